"""Trains a small GPT with EF21-Muon and compares what its workers send with what it learns.

The paper's main experiment in small: the same model family, norms, scales, momentum, schedule and
compressors, on bytes of Python source in place of FineWeb tokens and in minutes on a laptop. By
default the workers are simulated, lanes of one device, and the bytes are those of the messages they
would send. With `--on devices` each is a device of its own, here or on several machines, and the
messages travel.

    python -m experiments.nanogpt
    python -m experiments.nanogpt --methods rank15_natural --lr-multiplier 0.4
    python -m experiments.nanogpt --model 124m --routes
    python -m experiments.nanogpt --audit --topology sharded --downlink natural
    python -m experiments.launch --processes 4 -- -m experiments.nanogpt --on devices
"""

import dataclasses
import functools
import pathlib
import time
from typing import Literal

import jax
import jax.numpy as jnp
import optax
import tqdm
import tyro

import ef21_jax as ef21
from experiments import cluster, plots, records
from experiments.data import text
from experiments.models import gpt


MethodName = Literal["uncompressed", "rank15_natural", "top15_natural"]
UPLINKS = {
    "uncompressed": ef21.Identity(),
    "rank15_natural": ef21.RankK(0.15) >> ef21.Natural(),
    "top15_natural": ef21.TopK(0.15) >> ef21.Natural(),
}
DOWNLINKS = {"identity": ef21.Identity(), "natural": ef21.Natural()}

# Chosen by experiments/sweep.py, the numbers are in experiments/results/nanogpt_sweep.json. The
# paper lowers the rate the more, the harder the compression; at this size that does not show.
LR_MULTIPLIERS = {"uncompressed": 0.4, "rank15_natural": 0.6, "top15_natural": 0.6}


@dataclasses.dataclass(frozen=True)
class Config:
    methods: tuple[MethodName, ...] = ("uncompressed", "rank15_natural", "top15_natural")
    model: Literal["small", "tiny", "124m"] = "small"  # 0.36M, 7k or 124M parameters
    steps: int = 800  # optimizer steps
    eval_every: int = 20  # steps between evaluations, all in one jitted call
    workers: int = 4  # simulated, or as many as there are devices
    on: Literal["lanes", "devices"] = "lanes"  # lanes of one device, or a device each
    topology: Literal["gather", "sharded"] = "gather"  # who takes the server's step: all, or shares
    batch_size: int = 4  # sequences a worker and step
    length: int = 64  # tokens a sequence
    learning_rate: float = 3.6e-4  # constant, then linear to 0; radius = scale * rate
    lr_multiplier: float | None = None  # times the rate; None: the method's own, from the sweep
    constant: float = 0.4  # share of the steps before the rate falls
    momentum: float = 0.9  # weight of the old gradients
    downlink: Literal["identity", "natural"] = "identity"  # server to worker; paper: identity
    eval_sequences: int = 256  # of the held-out text, always the same
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the activations
    seed: int = 0  # of the model, the batches and the compressors
    text: str | None = None  # a text file; None: the sources of Python's standard library
    out: str = "results/nanogpt"  # folder for the record and the pictures
    routes: bool = False  # print norm, compressor and bytes of each parameter, and stop
    audit: bool = False  # compile a step for devices, verify and print what it sends, and stop

    def __post_init__(self):
        if self.steps < 1 or self.eval_every < 1 or self.steps % self.eval_every:
            raise ValueError(
                f"`steps` must be a positive multiple of `eval_every`, got {self.steps} and "
                f"{self.eval_every}."
            )
        for name in ("workers", "batch_size", "length", "eval_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.constant <= 1:
            raise ValueError(f"`constant` is a share of the steps in [0, 1], got {self.constant}.")
        unknown = set(self.methods) - set(UPLINKS)
        if unknown or not self.methods:
            raise ValueError(f"`methods` must be among {list(UPLINKS)}, got {self.methods}.")


def main(args=None):
    config = tyro.cli(Config, args=args, prog="python -m experiments.nanogpt", description=__doc__)
    if config.routes:
        print_routes(config)
        return
    mesh = cluster.join(config.workers) if config.on == "devices" or config.audit else None
    corpus = text.load(config.text)
    if config.audit:
        for method in config.methods:
            print_audit(config, method, corpus, mesh)
        return
    path = pathlib.Path(config.out, "nanogpt.jsonl")
    command = records.command_line("experiments.nanogpt", args)
    lines = [records.header(dataclasses.asdict(config), command, text=corpus.describe())]
    try:
        for method in config.methods:
            for record in with_progress(train(config, method, corpus, mesh), config.steps):
                lines.append(record)
                if cluster.is_first():
                    records.write_lines(path, lines)
    except KeyboardInterrupt:
        print(f"Stopped. What was measured stays in {path}.")
    if len(lines) > 1 and cluster.is_first():
        print(plots.nanogpt_table(path))
        print(f"Wrote {path} and {plots.nanogpt_picture(path)}")


def train(config, method, corpus, mesh=None):
    """Trains with one method and yields a record at each evaluation, the first before any step."""
    model, tx = model_of(config), optimizer(config, method)
    held_out = text.held_out_batch(corpus, config.eval_sequences, config.length)
    params, state, shards = start(config, model, tx, corpus, mesh)
    sent = ef21.ledger.bytes_per_step(tx, params)
    # Compiled ahead, so that `seconds` counts training alone.
    advance = steps_in_one_call(config, model, tx, mesh).lower(params, state, shards).compile()

    seconds, train_loss = 0.0, None
    for step in range(0, config.steps + 1, config.eval_every):
        if step:
            began = time.perf_counter()
            params, state, train_loss = advance(params, state, shards)
            train_loss = float(train_loss)  # waits for the device
            seconds += time.perf_counter() - began
        loss_w = float(held_out_loss(model, params, held_out))
        # Without a downlink compressor the server's model is W itself.
        server_params = ef21.server_params(tx, params, state)
        lossy = server_params is not params
        loss_x = float(held_out_loss(model, server_params, held_out)) if lossy else loss_w
        yield {
            "method": method,
            "uplink": repr(UPLINKS[method]),
            "downlink": repr(DOWNLINKS[config.downlink]),
            "learning_rate": peak_learning_rate(config, method),
            "seed": config.seed,
            "step": step,
            "tokens": step * config.workers * config.batch_size * config.length,
            "loss_train": train_loss,  # mean of the batches since the last evaluation
            "loss_w": loss_w,  # test loss of the model that the workers hold
            "loss_x": loss_x,  # test loss of the server's model
            "bytes_up": step * sent.up,  # of each worker
            "bytes_down": step * sent.down,
            "rejected": int(
                jax.jit(jnp.sum)(state.rejected)
            ),  # messages refused for not being finite
            "seconds": round(seconds, 3),
        }


def model_of(config):
    return gpt.GPT(dataclasses.replace(gpt.PRESETS[config.model], dtype=config.dtype))


def start(config, model, tx, corpus, mesh):
    """Parameters, the optimizer's state, and each worker's text; on `mesh` if there is one."""

    def make():
        tokens = jnp.zeros((1, config.length), jnp.int32)
        params = initial_params(model, jax.random.key(config.seed), tokens)
        return params, ef21.replicate(tx.init(params), config.workers)

    shards = text.shards(corpus, config.workers, config.length)
    if mesh is None:
        return *make(), shards
    return *cluster.create(make, mesh), cluster.global_batch(cluster.own_rows(shards), mesh)


def steps_in_one_call(config, model, tx, mesh=None):
    """`eval_every` steps as one jitted call, which leaves the host nothing to do between them."""

    def worker_step(params, state, shard):
        batch = text.training_batch(
            shard,
            jax.lax.axis_index("workers"),
            state.count,
            seed=config.seed,
            batch_size=config.batch_size,
            length=config.length,
        )
        value, grads = jax.value_and_grad(loss, argnums=1)(model, params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def advance(params, state, shards):
        def body(carry, _):
            params, state, losses = ef21.spmd(worker_step, mesh=mesh)(*carry, shards)
            return (params, state), jnp.mean(losses)

        (params, state), losses = jax.lax.scan(body, (params, state), length=config.eval_every)
        return params, state, jnp.mean(losses)

    return jax.jit(advance, donate_argnums=(0, 1))


def loss(model, params, batch):
    return gpt.next_token_loss(model.apply({"params": params}, batch[..., :-1]), batch[..., 1:])


# The model is static and equal for all methods, so these two are compiled once for a whole job.


@functools.partial(jax.jit, static_argnums=0)
def initial_params(model, key, tokens):
    return model.init(key, tokens)["params"]


@functools.partial(jax.jit, static_argnums=0)
def held_out_loss(model, params, held_out):
    # A few sequences at a time: the logits of all would not fit for a large vocabulary.
    one = functools.partial(loss, model, params)
    return jnp.mean(jax.lax.map(one, held_out, batch_size=8))


def optimizer(config, method):
    if method == "uncompressed" and config.downlink == "identity":
        return ef21.gluon(
            learning_rate(config, method),
            momentum=config.momentum,
            axis_name="workers",
            topology=topology(config),
        )
    return ef21.ef21_muon(
        learning_rate(config, method),
        momentum=config.momentum,
        uplink=UPLINKS[method],
        downlink=DOWNLINKS[config.downlink],
        axis_name="workers",
        topology=topology(config),
        seed=config.seed,
    )


def topology(config):
    return ef21.Sharded(config.workers) if config.topology == "sharded" else ef21.Gather()


def learning_rate(config, method):
    """Constant, then linear to 0 (paper, Table 4)."""
    peak = peak_learning_rate(config, method)
    falls = round(config.constant * config.steps)
    return optax.join_schedules(
        [optax.constant_schedule(peak), optax.linear_schedule(peak, 0.0, config.steps - falls)],
        boundaries=[falls],
    )


def peak_learning_rate(config, method):
    own = config.lr_multiplier is None
    return config.learning_rate * (LR_MULTIPLIERS[method] if own else config.lr_multiplier)


def with_progress(run, steps):
    """Passes a run's records on, with a bar on a terminal and plain lines elsewhere."""
    with tqdm.tqdm(total=steps, unit="step", disable=None if cluster.is_first() else True) as bar:
        for record in run:
            method, step = record["method"], record["step"]
            message = f"test loss {record['loss_w']:.4f}, {record['bytes_up'] / 1e6:.2f} MB up"
            bar.set_description(method, refresh=False)
            bar.set_postfix_str(message, refresh=False)
            bar.update(step - bar.n)
            if bar.disable and cluster.is_first():  # not a terminal
                print(f"{method}: step {step} of {steps}, {message}", flush=True)
            yield record
    if record["rejected"]:
        print(f"{record['method']}: refused {record['rejected']} messages that were not finite.")


def print_routes(config):
    """Norm, scale, compressor and bytes of each parameter, for each method; needs no memory."""
    params = gpt.parameter_shapes(gpt.PRESETS[config.model])
    settings = {"downlink": DOWNLINKS[config.downlink], "topology": topology(config)}
    for method in config.methods:
        print(f"{method}\n{ef21.routes(params, uplink=UPLINKS[method], **settings)}\n")


def print_audit(config, method, corpus, mesh):
    """What a compiled program sends in `eval_every` steps; an error where that is too much."""
    model, tx = model_of(config), optimizer(config, method)
    params, state, shards = start(config, model, tx, corpus, mesh)
    compiled = steps_in_one_call(config, model, tx, mesh).lower(params, state, shards).compile()
    found = ef21.ledger.audit(compiled, tx, params, mesh=mesh, steps=config.eval_every)
    if cluster.is_first():
        book = ef21.ledger.traffic(tx, params, config.workers)
        print(f"{method}: one call, of {config.eval_every} steps\n{found}\n")
        print(f"{method}: one step, by the ledger\n{book}\n")


if __name__ == "__main__":
    main()
