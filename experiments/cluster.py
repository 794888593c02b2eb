"""A script's part in a job of several processes: joining it, and what all of them hold together.

The same script runs alone, under `experiments.launch`, under SLURM and on a TPU pod. A process
gives its own batch; model and state are made by all of them at once, already in their places.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import ef21_jax as ef21


# Seconds. The launcher ends the others when a process fails, so these are for what it cannot see.
TIMEOUTS = {
    "initialization_timeout": 60,
    "heartbeat_timeout_seconds": 30,
    "shutdown_timeout_seconds": 60,
}
# What the launcher tells each process.
COORDINATOR, PROCESSES, PROCESS_ID = (
    f"EF21_{name}" for name in ("COORDINATOR", "PROCESSES", "PROCESS_ID")
)


def initialize() -> None:
    """Joins the job that this process was started for, if any. Call it before anything of JAX.

    Under `experiments.launch`: that job, as where somebody else has set the three variables that
    it sets. Elsewhere JAX looks for SLURM, a TPU pod and the others that it knows, as
    `jax.distributed.initialize()` does; where it finds none, nothing happens.
    """
    if COORDINATOR in os.environ:
        address = os.environ[COORDINATOR]
        jax.distributed.initialize(
            address,
            num_processes=int(os.environ[PROCESSES]),
            process_id=int(os.environ[PROCESS_ID]),
            # JAX's own choice would be every address of this machine.
            coordinator_bind_address=address,
            # No look at the surroundings: a SLURM job may contain this one.
            cluster_detection_method="deactivate",
            **TIMEOUTS,
        )
        # Gloo gives the others 30 seconds to come to the first collective, and as long as they
        # need to all later ones: so meet now, and not when each has compiled something large.
        wait_for_all(worker_mesh())
        sys.excepthook = _fail
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):
            raise


def join(workers: int) -> Mesh:
    """Joins the job, if any, and gives a mesh of `workers` devices, one worker each.

    Of a single process whose devices are processor cores there are as many as are asked for.

    Raises:
      ValueError: where there are not so many devices.
    """
    initialize()
    if not jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # JAX has begun, with the devices that it has
            jax.config.update("jax_num_cpu_devices", workers)
    if jax.device_count() != workers:
        raise ValueError(
            f"{workers} workers want a device each, and there are {jax.device_count()}: pass "
            f"--workers {jax.device_count()}, or start another number of processes."
        )
    return worker_mesh()


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def of_first(flags: list[bool]) -> list[bool]:
    """The first process's, on all: what it alone has read decides what all of them do."""
    return [bool(flag) for flag in multihost_utils.broadcast_one_to_all(np.int32(flags))]


def own_rows(rows: Any) -> Any:
    """Of rows, one for each worker, those of the workers of this process."""
    own = len(rows) // jax.process_count()
    return rows[jax.process_index() * own :][:own]


def _fail(*error):
    """Ends at once, for the launcher to see. JAX would first wait for the others to end too."""
    sys.__excepthook__(*error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def worker_mesh(devices: int | None = None, axis_name: str = "workers") -> Mesh:
    """So many devices, or all of all processes, in one axis."""
    found = jax.devices()[:devices]
    return jax.make_mesh((len(found),), (axis_name,), axis_types=(AxisType.Auto,), devices=found)


def wait_for_all(mesh: Mesh) -> None:
    """Returns when all processes have called it. Sends a few hundred bytes."""
    total = jax.jit(jnp.sum)(global_batch(np.ones(jax.local_device_count(), np.int32), mesh))
    jax.block_until_ready(total)


def global_batch(local: Any, mesh: Mesh, axis_name: str = "workers") -> Any:
    """A batch of all workers from each process's own.

    Args:
      local: arrays with a leading axis of this process's workers, as many on every process.
      mesh: of all processes.
      axis_name: the mesh axis of workers, in which the processes follow each other.

    Returns:
      The same tree, with a leading axis of all workers. Nothing is sent.
    """
    sharding = NamedSharding(mesh, P(axis_name))
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), local
    )


def create(make: Callable[[], Any], mesh: Mesh, axis_name: str = "workers") -> Any:
    """What `make()` returns, e.g. parameters and `replicate(tx.init(params), n)`, on the mesh.

    The workers' part of an optimizer's state is split over `axis_name`, all else is on every
    device. Each process computes its share, from the same program: nothing is sent.
    """
    shapes = jax.eval_shape(make)
    split, shared = NamedSharding(mesh, P(axis_name)), NamedSharding(mesh, P())
    placement = jax.tree.broadcast(ef21.state_axes(shapes, split, shared), shapes)
    return jax.jit(make, out_shardings=placement)()
