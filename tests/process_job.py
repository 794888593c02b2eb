"""What the processes of `test_cluster` run: EF21-Muon on a tiny problem.

    python -m experiments.launch --processes 2 -- -m tests.process_job gather few OUT

Three layers a compressor, so that all of them are in one program, and so that two owners of
layers have one too few. Lanes take the same steps.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import ef21_jax as ef21
from experiments import cluster


SHAPE = (6, 40)
STEPS = 100
COPIES = 3
# One of each way to travel: sums of arrays, of values at shared places, and gathered messages.
FEW = (
    ef21.Identity(),
    ef21.RandK(0.25, shared=True),
    ef21.RankK(0.25) >> ef21.Natural(),
    ef21.BlockTopK() >> ef21.BlockNatural(),
)
ALL = FEW + (
    ef21.TopK(0.25),
    ef21.RandK(0.25),
    ef21.RankK(0.25),
    ef21.RandomSubspace(0.5),
    ef21.RandomSubspace(0.5, shared=True),
    ef21.ColumnTopK(0.25),
    ef21.Natural(),
    ef21.Damping(0.75),
    ef21.Dropout(0.7),
    ef21.NuclearSharp(),
    ef21.L1Sharp(),
    ef21.BlockTopK(),
    ef21.BlockNatural(),
    ef21.Quantize(4),
    ef21.ScaledSign(),
    ef21.TwoLevel(),
    ef21.TopK(0.25) >> ef21.Natural(),
)
UPLINKS = {"few": FEW, "all": ALL}
TOPOLOGIES = {"gather": lambda workers: ef21.Gather(), "sharded": ef21.Sharded}


def optimizer(topology, uplinks, workers):
    uplink = {name: uplinks[i // COPIES] for i, name in enumerate(layer_names(uplinks))}
    return ef21.ef21_muon(
        optax.linear_schedule(radius(workers), 0.0, STEPS),
        uplink=uplink,
        downlink={name: downlink(each, workers) for name, each in uplink.items()},
        rules=(
            ef21.Rule("entry-wise", ef21.Sign(), "layer_01"),  # its rows can have several owners
            ef21.Rule("hidden", ef21.Spectral(), "layer_0"),
            ef21.Rule("other", ef21.Frobenius()),  # compiles sooner
        ),
        axis_name="workers",
        topology=TOPOLOGIES[topology](workers),
    )


# More than two arrays a network adds up in an order of its own, and the last bit may differ: the
# polar factor of a gradient that is nearly zero makes much of that bit, and so does rounding to a
# power of two. With more workers no layer arrives, then, and what is added up goes back as it is.


def radius(workers):
    return 0.2 if workers <= 2 else 0.015


def downlink(uplink, workers):
    x, key = jnp.zeros(SHAPE), jax.random.key(0)
    added_up = getattr(jax.eval_shape(uplink.compress, x, key), "summable", True)
    return ef21.Identity() if added_up and workers > 2 else ef21.Natural()


def layer_names(uplinks):
    return [f"layer_{i:02}" for i in range(COPIES * len(uplinks))]


def targets(uplinks, workers):
    """What each worker's gradients draw to: (workers, layers, *SHAPE)."""
    shape = (workers, len(layer_names(uplinks)), *SHAPE)
    return np.random.default_rng(0).uniform(-1.0, 1.0, shape).astype(np.float32)


def start(tx, uplinks, workers):
    params = {name: jnp.zeros(SHAPE) for name in layer_names(uplinks)}
    return params, ef21.replicate(tx.init(params), workers)


def train(tx, carry, batch, mesh=None):
    """W after each step, as all workers have it, then the last X: (steps + 1, layers, *SHAPE)."""

    def stacked(params):
        return jnp.stack([params[name] for name in sorted(params)])

    def worker_step(params, state, target):
        grads = jax.grad(lambda w: 0.5 * jnp.sum(jnp.square(stacked(w) - target)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, None

    def every_step(carry, batch):
        def one(carry, _):
            params, state, _ = ef21.spmd(worker_step, mesh=mesh)(*carry, batch)
            return (params, state), stacked(params)

        return jax.lax.scan(one, carry, length=STEPS)

    carry, path = jax.jit(every_step)(carry, batch)
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    # Not in a jitted function: a script may ask for X between two steps.
    model = jax.jit(stacked, out_shardings=whole)(ef21.server_params(tx, *carry))
    return np.concatenate([path, model[None]])


def main():
    topology, which, out = sys.argv[1:]
    uplinks = UPLINKS[which]
    cluster.initialize()
    workers, own = jax.process_count(), jax.process_index()
    mesh = cluster.worker_mesh()
    tx = optimizer(topology, uplinks, workers)
    carry = cluster.create(lambda: start(tx, uplinks, workers), mesh)
    for leaf in jax.tree.leaves(carry[1].worker):
        if leaf.addressable_data(0).shape[0] != 1:
            raise AssertionError("A process holds the state of other workers.")
    batch = cluster.global_batch(targets(uplinks, workers)[own : own + 1], mesh)
    np.save(f"{out}.{own}.npy", train(tx, carry, batch, mesh))


if __name__ == "__main__":
    main()
