"""How bytes and seconds of an optimizer step grow with the workers, for each way to communicate.

Dense: uncompressed gradients are all-reduced and every worker takes the server's step. Gather:
every worker has all messages, by the default compressor, and takes that step too. Sharded: every
worker is the server of its share of the layers, and answers in two bits a parameter. Bytes are what
the collectives of the compiled program have a worker send, held against the ledger. Seconds are of
an optimizer step on the layers of a GPT, gradients given, on devices that share this machine's
processor cores. So work that every worker repeats takes n times as long here, which on n machines
it would not.

A worker is itself the owner of 1/n of what is dealt out, and that much never leaves it. The table
and the targets named `leaving` are of what does, which for a dense all-reduce and a sharded server
grows as (n - 1) / n. `bytes_n8_over_n2` is of the sharded server's message and answer as such.

    python -m experiments.benchmarks.scaling
    python -m experiments.benchmarks.scaling --workers 2 4 --json scaling.json
"""

import contextlib
import dataclasses
import pathlib
import statistics
import sys
from typing import Literal

import jax
import numpy as np
import optax

import ef21_jax as ef21
from experiments import cluster
from experiments.benchmarks import bandwidth, pictures, timing
from experiments.benchmarks.step import parameter_shapes, random_tree
from experiments.models import gpt


MODULE = "experiments.benchmarks.scaling"
LEARNING_RATE = 1e-4
MethodName = Literal["dense", "gather", "sharded"]
METHODS = ("dense", "gather", "sharded")
UPLINK, DOWNLINK = ef21.DEFAULT_UPLINK, ef21.TwoLevel()
MOST_WORKERS = 8


@dataclasses.dataclass(frozen=True)
class Config(timing.Config):
    turns: int = 3  # each of them times everything once
    json: pathlib.Path | None = pathlib.Path("results/scaling.json")  # and a picture
    workers: tuple[int, ...] = (1, 2, 4, MOST_WORKERS)
    methods: tuple[MethodName, ...] = METHODS
    layers: int = 8  # of the GPT
    width: int = 192  # of the GPT, a multiple of 8
    seed: int = 0  # of parameters and gradients


def main(args=None):
    with contextlib.suppress(RuntimeError):  # where JAX runs already, with the devices it has
        jax.config.update("jax_num_cpu_devices", MOST_WORKERS)
    config = timing.configure(Config, MODULE, __doc__, args)
    if max(config.workers) > jax.device_count():
        sys.exit(f"There are {jax.device_count()} devices for {max(config.workers)} workers.")
    model = gpt.GPTConfig(
        vocab_size=256, layers=config.layers, heads=4, width=config.width, hidden=4 * config.width
    )
    shapes = parameter_shapes(model)
    params = random_tree(shapes, config.seed, 0.02)
    gradients = random_tree(shapes, config.seed + 1, 1.0)
    rows, seconds = [], {}
    for workers in config.workers:  # one number at a time, for memory's sake
        calls = {method: Step(method, params, gradients, workers) for method in config.methods}
        seconds[workers] = timing.interleaved(calls, config)
        for method in config.methods:
            sent = calls[method].sent(shapes)
            median = statistics.median(seconds[workers][method])
            rows.append({"method": method, "workers": workers, "bytes": sent, "seconds": median})
    report(config, args, rows, seconds)


def optimizer(method, workers):
    if method == "dense":
        return ef21.gluon(LEARNING_RATE, axis_name="workers")
    if method == "gather":
        return ef21.ef21_muon(LEARNING_RATE, uplink=UPLINK, axis_name="workers")
    return ef21.ef21_muon(
        LEARNING_RATE,
        uplink=UPLINK,
        downlink=DOWNLINK,
        topology=ef21.Sharded(workers),
        axis_name="workers",
    )


class Step:
    """A compiled optimizer step on n devices, which goes on from where its last call has stopped.

    The gradients change their sign from call to call: under one that stays, EF21 would soon have
    nothing more to send.
    """

    def __init__(self, method, params, gradients, workers):
        self.tx = tx = optimizer(method, workers)
        self.mesh = mesh = cluster.worker_mesh(workers)

        def worker_step(params, state, batch):
            sign, gradients = batch
            gradients = jax.tree.map(lambda leaf: sign * leaf, gradients)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, None

        self.carry = cluster.create(
            lambda: (params, ef21.replicate(tx.init(params), workers)), mesh
        )
        repeated = jax.tree.map(lambda leaf: np.stack([leaf] * workers), gradients)
        self.gradients = cluster.global_batch(repeated, mesh)
        self.signs = [
            cluster.global_batch(np.full(workers, sign, np.float32), mesh) for sign in (1, -1)
        ]
        step = jax.jit(ef21.spmd(worker_step, mesh=mesh), donate_argnums=(0, 1))
        self.step = step.lower(*self.carry, (self.signs[0], self.gradients)).compile()

    def sent(self, params):
        """Bytes that a worker sends; an error where they are more than the ledger's."""
        return ef21.ledger.audit(self.step, self.tx, params, mesh=self.mesh).sent_per_worker

    def __call__(self):
        self.signs.reverse()
        *self.carry, _ = self.step(*self.carry, (self.signs[0], self.gradients))
        return self.carry


def report(config, args, rows, seconds):
    cells = [
        (
            f"{row['workers']} {row['method']}",
            f"{row['bytes'] / 1e6:.3f}",
            f"{1e3 * row['seconds']:.1f}",
        )
        for row in rows
    ]
    print(timing.table(("workers, method", "MB sent", "ms a step"), cells))
    sent = {(row["method"], row["workers"]): row["bytes"] for row in rows}
    median = {(row["method"], row["workers"]): row["seconds"] for row in rows}
    several = [n for n in config.workers if n > 1]
    for n in several if "dense" in config.methods else ():
        for method in sorted({*config.methods} - {"dense"}):
            saved = 8 * (sent["dense", n] - sent[method, n])
            dearer = median[method, n] - median["dense", n]
            pays = bandwidth.below(bandwidth.break_even(saved, dearer))
            print(f"{n} workers: {method} is faster than dense {pays}.")
    figures = {}
    if several and {"sharded", "dense"} <= set(config.methods):
        n = max(several)
        figures["sharded_over_dense_both_ways"] = sent["sharded", n] / sent["dense", n]
        figures[f"sharded_over_dense_seconds_n{n}"] = timing.ratio(
            seconds[n]["sharded"], seconds[n]["dense"]
        )
    if len(several) > 1:
        least, most = min(several), max(several)
        for method in config.methods:
            growth = sent[method, most] / sent[method, least]
            figures[f"{method}_leaving_n{most}_over_n{least}"] = growth
            if method == "sharded":
                left = (1 - 1 / most) / (1 - 1 / least)
                figures[f"bytes_n{most}_over_n{least}"] = growth / left
    timing.finish(config, MODULE, args, figures, rows=rows)
    if config.json is not None:
        print(f"Wrote {config.json} and {pictures.scaling(config.json)}")


if __name__ == "__main__":
    main()
