"""What the interfaces count while n processes train, over what the ledger says they send.

The workers are processes, each in a network namespace with an interface of its own, and train a
GPT. Between two readings of the counters lie some steps of all workers and nothing else; what the
same pause without steps sends is taken off.

An interface counts Ethernet frames, the ledger what is in them. So 66 bytes a packet are taken off
for headers: Ethernet 14, IPv4 20, TCP with time stamps 32. (An acknowledgement is nothing else.)
What is left over the ledger is the collectives' own. `counter_over_ledger` is that ratio where it
is furthest from 1, of all workers and methods; `frames_over_ledger` is that of the bytes as they
were counted. Between namespaces a packet may have up to 64 kB. On a cable, with frames of 1500
bytes, headers are 4.6 % of the payload, which is more than here.

    sudo python -m experiments.benchmarks.wire_bytes
    sudo python -m experiments.benchmarks.wire_bytes --workers 4 --json wire_bytes.json

Needs Linux, root and iproute2.
"""

import dataclasses
import pathlib
import sys
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import ef21_jax as ef21
from experiments import cluster
from experiments.benchmarks import network, pictures, timing
from experiments.models import gpt


MODULE = "experiments.benchmarks.wire_bytes"
MethodName = Literal["dense", "block", "rank15_natural", "sharded"]
METHODS = ("dense", "block", "rank15_natural", "sharded")
LEARNING_RATE = 1e-3
LENGTH = 32  # tokens of the one sequence that a worker has in a step
PAUSE = 0.2  # seconds before a reading, for what is still under way
TIMEOUT = 1800  # seconds


@dataclasses.dataclass(frozen=True)
class Config(timing.Config):
    turns: int = 4  # steps between two readings
    json: pathlib.Path | None = pathlib.Path("results/wire_bytes.json")  # and a picture
    workers: tuple[int, ...] = (2, 4, 8)
    methods: tuple[MethodName, ...] = METHODS
    layers: int = 8  # of the GPT
    width: int = 192  # of the GPT, a multiple of 8
    seed: int = 0


def main(args=None):
    config = timing.configure(Config, MODULE, __doc__, args)
    rows = []
    for workers in tqdm.tqdm(config.workers, "jobs", disable=None):
        try:
            with network.network(workers) as built:
                settings = dataclasses.asdict(config) | {"json": None}
                found = built.call(f"{MODULE}:measure", settings, timeout=TIMEOUT)
        except (OSError, RuntimeError, ValueError) as error:
            sys.exit(str(error))
        for method in config.methods:
            rows.append({"workers": workers, "method": method} | summary(method, found))
    report(config, args, rows)


def measure(settings):
    """At each worker: what it sends in a step, by method."""
    config = Config(**settings)
    return {method: measure_method(config, method) for method in config.methods}


def measure_method(config, method):
    mesh, own = cluster.worker_mesh(), jax.process_index()
    workers = mesh.devices.size
    model, tx = gpt.GPT(model_config(config)), optimizer(method, workers)
    tokens = np.random.default_rng((config.seed, own)).integers(256, size=(1, 1, LENGTH + 1))
    batch = cluster.global_batch(tokens.astype(np.int32), mesh)

    def start():
        params = model.init(jax.random.key(config.seed), jnp.zeros((1, 8), jnp.int32))["params"]
        return params, ef21.replicate(tx.init(params), workers)

    def loss(params, batch):
        return gpt.next_token_loss(model.apply({"params": params}, batch[:, :-1]), batch[:, 1:])

    def worker_step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(ef21.spmd(worker_step, mesh=mesh), donate_argnums=(0, 1))
    carry = cluster.create(start, mesh)
    carry = advance(step, carry, batch, 1)  # compiles, and connects the workers
    ledger = ef21.ledger.traffic(tx, carry[0], workers).sent
    nothing, carry = between_readings(step, carry, batch, mesh, 0)
    counted, carry = between_readings(step, carry, batch, mesh, config.turns)
    sent = counted - nothing
    return {
        "ledger": ledger,
        "frames": sent.sent_bytes / config.turns,
        "payload": sent.sent_payload / config.turns,
        "packets": sent.sent_packets / config.turns,
        "pause": nothing.sent_bytes,
    }


def model_config(config):
    return gpt.GPTConfig(
        vocab_size=256, layers=config.layers, heads=4, width=config.width, hidden=4 * config.width
    )


def optimizer(method, workers):
    if method == "dense":
        return ef21.gluon(LEARNING_RATE, axis_name="workers")
    uplink = ef21.BlockTopK() >> ef21.BlockNatural()
    more = {}
    if method == "rank15_natural":
        uplink = ef21.RankK(0.15) >> ef21.Natural()
    if method == "sharded":
        more = {"downlink": ef21.BlockNatural(), "topology": ef21.Sharded(workers)}
    return ef21.ef21_muon(LEARNING_RATE, uplink=uplink, axis_name="workers", **more)


def advance(step, carry, batch, steps):
    for _ in range(steps):
        *carry, _ = step(*carry, batch)
    return jax.block_until_ready(carry)


def between_readings(step, carry, batch, mesh, steps):
    """What this worker's interface counts during these steps, and the carry after them."""
    cluster.wait_for_all(mesh)
    time.sleep(PAUSE)
    before = network.own_counters()
    carry = advance(step, carry, batch, steps)
    cluster.wait_for_all(mesh)
    time.sleep(PAUSE)
    return network.own_counters() - before, carry


def summary(method, found):
    """Of the worker whose payload is furthest from the ledger's."""
    return max(
        (at_worker[method] for at_worker in found),
        key=lambda one: abs(one["payload"] / one["ledger"] - 1),
    )


def report(config, args, rows):
    cells = [
        (
            f"{row['workers']} {row['method']}",
            *(f"{row[key] / 1e6:.4f}" for key in ("ledger", "payload", "frames")),
            f"{row['payload'] / row['ledger']:.4f}",
            f"{row['frames'] / row['ledger']:.4f}",
            f"{row['packets']:.0f}",
        )
        for row in rows
    ]
    head = ("MB a worker and step", "ledger", "payload", "frames", "payload/", "frames/", "packets")
    print(timing.table(head, cells))
    dense = {row["workers"]: row["payload"] for row in rows if row["method"] == "dense"}
    for row in rows:
        if row["method"] != "dense" and row["workers"] in dense:
            fewer = dense[row["workers"]] / row["payload"]
            verdict = f"{fewer:.1f} times fewer bytes" if fewer > 1 else "no fewer: it does not pay"
            print(f"{row['workers']} workers, {row['method']} against dense: {verdict}.")
    figures = {
        f"{name}_over_ledger": max(
            (row[key] / row["ledger"] for row in rows), key=lambda ratio: abs(ratio - 1)
        )
        for name, key in (("counter", "payload"), ("frames", "frames"))
    }
    timing.finish(config, MODULE, args, figures, rows=rows)
    if config.json is not None:
        print(f"Wrote {config.json} and {pictures.wire_bytes(config.json)}")


if __name__ == "__main__":
    main()
