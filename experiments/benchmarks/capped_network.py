"""Training over slow links: seconds of a step, and to a loss, with compression and without.

Four processes, each in a network namespace whose link is capped in both directions (`tc tbf`),
train one GPT. All methods are in the same processes and take their steps in turns, on the same
batches from the same parameters: EF21-Muon over both topologies; Gluon, which is uncompressed Muon,
and AdamW, whose gradients are all-reduced; and where torch is installed its DDP with the PowerSGD
hook, AdamW and the same model. Links have the first of the `rates` for the training, and each
other one for some more steps.

Ratios over ours are of the seconds of a step, and, since steps do not bring all equally far, of the
seconds to the loss that all reach: over the topology that is sooner there.

A step's seconds are those of the slowest worker, from a barrier on. Two processor cores compute for
four workers: on machines of their own they would compute faster, and the network would weigh more.
`seconds = compute + factor · bytes / rate` is fitted to all methods and rates, one factor for all,
with the bytes that the interfaces count. The rate at which a compressed method is no faster than an
uncompressed one is that at which both lines meet.

    sudo python -m experiments.benchmarks.capped_network
    sudo python -m experiments.benchmarks.capped_network --rates 1gbit --uplink natural_4bit
    sudo python -m experiments.benchmarks.capped_network --products bfloat16  # where those are fast

Needs Linux, root and iproute2.
"""

import dataclasses
import math
import pathlib
import statistics
import sys
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ef21_jax as ef21
from experiments import cluster
from experiments.benchmarks import bandwidth, network, pictures, timing, torch_gpt
from experiments.data import text
from experiments.models import gpt


MODULE = "experiments.benchmarks.capped_network"
CompressorName = Literal[
    "identity",
    "block",
    "block8",
    "block4",
    "block_2bit",
    "natural_4bit",
    "rank15_natural",
    "rank25_4bit",
]
COMPRESSORS = {
    "identity": ef21.Identity(),
    "block": ef21.BlockTopK() >> ef21.BlockNatural(),
    "block8": ef21.BlockTopK(1, 8) >> ef21.BlockNatural(),
    "block4": ef21.BlockTopK(1, 4) >> ef21.BlockNatural(),
    "block_2bit": ef21.BlockTopK() >> ef21.TwoLevel(),
    "natural_4bit": ef21.BlockNatural(),
    "rank15_natural": ef21.RankK(0.15) >> ef21.Natural(),
    "rank25_4bit": ef21.DEFAULT_UPLINK,
}
MethodName = Literal["gather", "sharded", "dense_muon", "dense_adamw", "powersgd"]
METHODS = ("gather", "sharded", "dense_muon", "dense_adamw", "powersgd")
OURS = ("gather", "sharded")
UNCOMPRESSED = ("dense_muon", "dense_adamw")
SKIPPED = 6  # steps before those that count: PowerSGD sends its first gradients whole, and settles
TIMEOUT = 3600  # seconds
FOR_TORCH = {
    "GLOO_SOCKET_IFNAME": network.INTERFACE,
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # it warns that addresses have no names
}


@dataclasses.dataclass(frozen=True)
class Config(timing.Config):
    turns: int = 20  # steps of the training
    json: pathlib.Path | None = pathlib.Path("results/capped_network.json")  # and a picture
    more_turns: int = 6  # steps at each further rate
    rates: tuple[str, ...] = ("100mbit", "1gbit")  # of each link and direction, as `tc` writes them
    methods: tuple[MethodName, ...] = METHODS
    uplink: CompressorName = "block8"
    downlink: CompressorName = "block8"  # sharded; with gather the server is everywhere
    extrapolation: float = 3.0  # how far the server steps ahead of its estimate
    products: Literal["float32", "bfloat16"] = "float32"  # of the spectral steps, ours and dense
    powersgd_rank: int = 4
    workers: int = 4
    layers: int = 8  # of the GPT
    width: int = 256  # of the GPT, a multiple of 8
    batch_size: int = 2  # sequences a worker and step
    length: int = 64  # tokens a sequence
    eval_every: int = 5  # steps
    eval_sequences: int = 64  # of the held-out text, always the same
    muon_learning_rate: float = 3.6e-4  # constant, then linear to 0, as for the others
    adamw_learning_rate: float = 1e-3
    constant: float = 0.4  # share of the steps before the rate falls
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        for rate in self.rates:
            network.rate_bits(rate)
        if self.turns % self.eval_every or self.turns <= SKIPPED or self.more_turns <= 0:
            raise ValueError(
                f"`turns` must be a multiple of `eval_every` and more than {SKIPPED}, got "
                f"{self.turns} and {self.eval_every}."
            )

    def model(self):
        return gpt.GPTConfig(
            vocab_size=256, layers=self.layers, heads=4, width=self.width, hidden=4 * self.width
        )

    def share(self, step):
        """Of the learning rate, at a step."""
        flat = round(self.constant * self.turns)
        return jnp.clip((self.turns - step) / max(1, self.turns - flat), 0.0, 1.0)


def main(args=None):
    config = timing.configure(Config, MODULE, __doc__, args)
    if "powersgd" in config.methods and torch_gpt.torch is None:
        print(f"PowerSGD is left out: it needs `{torch_gpt.INSTALL}`.")
        others = tuple(method for method in config.methods if method != "powersgd")
        config = dataclasses.replace(config, methods=others)
    settings = dataclasses.asdict(config) | {"json": None}
    try:
        with network.network(config.workers, rate=config.rates[0]) as built:
            found = built.call(
                f"{MODULE}:train",
                settings,
                dataclasses.astuple(built),
                environment=FOR_TORCH,
                timeout=TIMEOUT,
            )
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(str(error))
    report(config, args, *slowest(found))


# In each namespace.


def train(settings, built):
    """Of this worker: every step's method, rate, seconds and bytes, and at the first the losses."""
    config = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
    built = network.Network(built[0], tuple(built[1]))
    mesh, own = cluster.worker_mesh(), jax.process_index()
    corpus = text.standard_library()
    held_out = corpus.held_out(config.eval_sequences, config.length).astype(np.int32)
    params = jax.jit(gpt.GPT(config.model()).init)(jax.random.key(config.seed), held_out[:1, :-1])
    params = jax.tree.map(np.asarray, params["params"])
    contestants = {
        method: contestant(config, method, params, mesh, built.addresses[0])
        for method in config.methods
    }

    steps, losses = [], []

    def evaluate(step):
        if own == 0:
            for method, one in contestants.items():
                losses.append({"method": method, "step": step, "loss": one.loss(held_out)})

    evaluate(0)
    for step, rate in enumerate(plan(config)):
        cluster.wait_for_all(mesh)
        if own == 0 and (step == 0 or rate != plan(config)[step - 1]):
            built.cap(rate)
        ((batch,),) = corpus.batches(
            range(step, step + 1),
            range(own, own + 1),
            config.workers,
            seed=config.seed,
            size=config.batch_size,
            length=config.length,
        ).astype(np.int32)
        for method, one in contestants.items():
            cluster.wait_for_all(mesh)
            before, begin = network.own_counters(), time.perf_counter()
            one.step(batch)
            seconds = time.perf_counter() - begin
            sent = (network.own_counters() - before).sent_bytes
            steps.append({"method": method, "rate": rate, "seconds": seconds, "bytes": sent})
        if step < config.turns and (step + 1) % config.eval_every == 0:
            evaluate(step + 1)
    return steps, losses


def plan(config):
    """The rate of each step."""
    first, *further = config.rates
    return [first] * config.turns + [rate for rate in further for _ in range(config.more_turns)]


def contestant(config, method, params, mesh, address):
    if method == "powersgd":
        return torch_gpt.PowerSGD(
            config.model(),
            params,
            rank=config.powersgd_rank,
            learning_rate=config.adamw_learning_rate,
            share=lambda step: float(config.share(step)),
            store=f"tcp://{address}:9912",
            worker=jax.process_index(),
            workers=config.workers,
        )
    return InJax(config, optimizer(config, method), params, mesh)


def optimizer(config, method):
    def schedule(peak):
        return lambda step: peak * config.share(step)

    if method == "dense_adamw":
        average = optax.stateless(lambda grads, _: jax.lax.pmean(grads, "workers"))
        adamw = optax.adamw(schedule(config.adamw_learning_rate), weight_decay=0.0)
        return optax.chain(average, adamw)
    rate = schedule(config.muon_learning_rate)
    oracle = ef21.Spectral(dtype=config.products)
    rules = ef21.with_norm(ef21.SCION_RULES, "hidden", oracle)
    if method == "dense_muon":
        return ef21.gluon(rate, rules=rules, axis_name="workers")
    sharded = method == "sharded"
    return ef21.ef21_muon(
        rate,
        uplink=COMPRESSORS[config.uplink],
        downlink=COMPRESSORS[config.downlink if sharded else "identity"],
        topology=ef21.Sharded(config.workers) if sharded else ef21.Gather(),
        extrapolation=config.extrapolation,
        rules=rules,
        axis_name="workers",
        seed=config.seed,
    )


class InJax:
    """The model and an optimizer in JAX, compiled, on a mesh of all workers."""

    def __init__(self, config, tx, params, mesh):
        model = gpt.GPT(config.model())
        workers = config.workers

        def loss(params, tokens):
            logits = model.apply({"params": params}, tokens[:, :-1])
            return gpt.next_token_loss(logits, tokens[:, 1:])

        def worker_step(params, state, tokens):
            value, grads = jax.value_and_grad(loss)(params, tokens)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        self.mesh = mesh
        self.carry = cluster.create(
            lambda: (params, ef21.replicate(tx.init(params), workers)), mesh
        )
        tokens = np.zeros((1, config.batch_size, config.length + 1), np.int32)
        step = jax.jit(ef21.spmd(worker_step, mesh=mesh), donate_argnums=(0, 1))
        self.advance = step.lower(*self.carry, cluster.global_batch(tokens, mesh)).compile()
        self.own_loss = jax.jit(loss)

    def step(self, tokens):
        *self.carry, _ = self.advance(*self.carry, cluster.global_batch(tokens[None], self.mesh))
        jax.block_until_ready(self.carry)

    def loss(self, tokens):
        """Of the model that the workers hold, W."""
        own = jax.tree.map(lambda leaf: leaf.addressable_data(0), self.carry[0])
        return float(self.own_loss(own, tokens))


# What it says.


def slowest(found):
    """Every step with the seconds of its slowest worker and the mean of their bytes; the losses."""
    steps = []
    for at_workers in zip(*(steps for steps, _ in found), strict=True):
        steps.append(
            at_workers[0]
            | {
                "seconds": max(one["seconds"] for one in at_workers),
                "bytes": statistics.mean(one["bytes"] for one in at_workers),
            }
        )
    return steps, found[0][1]


def report(config, args, steps, losses):
    rates, methods = config.rates, config.methods
    seconds, sent = {}, {}
    for number, row in enumerate(steps):
        if number >= SKIPPED * len(methods):
            seconds.setdefault((row["rate"], row["method"]), []).append(row["seconds"])
            sent.setdefault((row["rate"], row["method"]), []).append(row["bytes"])
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    sizes = {key: statistics.mean(values) for key, values in sent.items()}
    target, reached = steps_to_target(losses)
    final = {row["method"]: row["loss"] for row in losses}  # the last remains
    to_target = {key: reached[key[1]] * value for key, value in medians.items()}

    head = ("", "MB", *(f"s, {rate}" for rate in rates), "loss", "steps to target")
    head += tuple(f"s to target, {rate}" for rate in rates)
    rows = []
    for method in methods:
        own = [medians[rate, method] for rate in rates]
        rows.append(
            (
                method,
                f"{sizes[rates[0], method] / 1e6:.2f}",
                *(f"{value:.3f}" for value in own),
                f"{final[method]:.3f}",
                f"{reached[method]}",
                *(f"{to_target[rate, method]:.1f}" for rate in rates),
            )
        )
    print(timing.table(head, rows))
    print(
        f"MB that a worker sends in a step, as its interface counts; s of a step, medians; loss on "
        f"held-out text\nafter {config.turns} steps. The target is the worst of these, "
        f"{target:.3f}; steps to it times s are s to it."
    )
    figures = {}
    for rate in rates:
        ours = [method for method in OURS if method in methods]
        others = [method for method in methods if method not in OURS]
        best = min(ours, key=lambda method: medians[rate, method], default=None)  # noqa: B023
        soonest = min((to_target[rate, method] for method in ours), default=None)
        for other in others if ours else ():
            over = timing.ratio(seconds[rate, other], seconds[rate, best])
            figures[f"{other}_over_ours_{rate}"] = over
            figures[f"{other}_to_loss_over_ours_{rate}"] = to_target[rate, other] / soonest
        own = {method: medians[rate, method] for method in methods}
        for mine, theirs in pairs(methods):
            print(bandwidth.verdict(rate, mine, theirs, own))
    fitted = fit(config, medians, sizes) if len(rates) > 1 else None
    timing.finish(
        config,
        MODULE,
        args,
        figures,
        rows=[
            {
                "method": method,
                "loss": final[method],
                "steps_to_target": reached[method],
                "seconds": {rate: medians[rate, method] for rate in rates},
                "bytes": {rate: sizes[rate, method] for rate in rates},
            }
            for method in methods
        ],
        target_loss=target,
        fit=fitted,
        losses=losses,
        steps=steps,
    )
    if config.json is not None:
        print(f"Wrote {config.json} and {pictures.capped_network(config.json)}")


def steps_to_target(losses):
    """The worst of the last losses, and method -> the first step that has it."""
    final = {row["method"]: row["loss"] for row in losses}
    target = max(final.values())
    reached = {}
    for row in losses:
        if row["loss"] <= target:
            reached.setdefault(row["method"], row["step"])
    return target, reached


def fit(config, medians, sizes):
    """Prints it, and where methods break even; returns it for the record."""
    compute, factor = bandwidth.fit(
        [
            (method, 8 * sizes[rate, method] / network.rate_bits(rate), value)
            for (rate, method), value in medians.items()
        ]
    )
    print(f"Fit: a step takes its compute and {factor:.3f} × bits / rate.")
    bits = {method: 8 * sizes[config.rates[0], method] for method in config.methods}
    meets = {}
    for mine, theirs in pairs(config.methods):
        saved = factor * (bits[theirs] - bits[mine])
        meet = bandwidth.break_even(saved, compute[mine] - compute[theirs])
        print(f"{mine} is faster than {theirs} {bandwidth.below(meet)}.")
        meets[f"{mine}, {theirs}"] = meet if math.isfinite(meet) else None  # None: always faster
    return {"compute_seconds": compute, "factor": factor, "bits": bits, "break_even_bits": meets}


def pairs(methods):
    return [
        (mine, theirs)
        for mine in OURS
        for theirs in UNCOMPRESSED
        if mine in methods and theirs in methods
    ]


if __name__ == "__main__":
    main()
