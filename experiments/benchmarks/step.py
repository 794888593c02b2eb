"""A whole optimizer step, from gradients to new parameters, on the matrices of NanoGPT-124M.

Ours without compression and with it, one worker, beside optax's Muon, PyTorch's (where torch is
installed, and on a CPU), and the floor: reading and writing every parameter once. All of them
orthogonalise the same 72 hidden matrices. The embedding gets what the last column says.

    python -m experiments.benchmarks.step
    python -m experiments.benchmarks.step --model 124m --json step.json
    python -m experiments.benchmarks.step --methods block optax_muon
"""

import dataclasses
import statistics
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ef21_jax as ef21
from experiments.benchmarks import timing
from experiments.models import gpt


MODULE = "experiments.benchmarks.step"
LEARNING_RATE = 1e-4
MOMENTUM = 0.95

PRESETS = {
    "124m": gpt.PRESETS["124m"],
    # As many matrices, a third as wide and with a third of the vocabulary: a ninth of the memory.
    "twin": gpt.GPTConfig(vocab_size=16_768, heads=4, width=256, hidden=1024),
    "tiny": dataclasses.replace(gpt.PRESETS["tiny"], layers=1),
}
ModelName = Literal["twin", "124m", "tiny"]


def hidden_matrices(params):
    """For optax's Muon: the embedding to AdamW, as Muon's users do, and all else orthogonalised."""
    return {
        name: None
        if name == "wte"
        else jax.tree.map(lambda leaf: optax.contrib.MuonDimensionNumbers(), subtree)
        for name, subtree in params.items()
    }


def _ef21_muon(**settings):
    return ef21.ef21_muon(LEARNING_RATE, momentum=MOMENTUM, **settings)


BFLOAT16 = ef21.Spectral(dtype=jnp.bfloat16)  # what is multiplied, and no more

METHODS = {
    "uncompressed": _ef21_muon(uplink=ef21.Identity()),
    "uncompressed_bf16": _ef21_muon(
        uplink=ef21.Identity(), rules=ef21.with_norm(ef21.SCION_RULES, "hidden", BFLOAT16)
    ),
    "gluon": ef21.gluon(LEARNING_RATE, momentum=MOMENTUM),
    "block": _ef21_muon(
        uplink=ef21.BlockTopK() >> ef21.BlockNatural(), downlink=ef21.BlockNatural()
    ),
    "rank15_natural": _ef21_muon(uplink=ef21.RankK(0.15) >> ef21.Natural()),
    "muon": ef21.muon(LEARNING_RATE, momentum=MOMENTUM),
    "muon_bf16": ef21.muon(
        LEARNING_RATE, momentum=MOMENTUM, rules=ef21.with_norm(ef21.MUON_RULES, "hidden", BFLOAT16)
    ),
    "optax_muon": optax.contrib.muon(
        LEARNING_RATE, beta=MOMENTUM, muon_weight_dimension_numbers=hidden_matrices
    ),
}
MethodName = Literal[
    "uncompressed",
    "uncompressed_bf16",
    "gluon",
    "block",
    "rank15_natural",
    "muon",
    "muon_bf16",
    "optax_muon",
]
# What each does with the embedding.
EMBEDDING = dict.fromkeys(METHODS, "sign") | {
    "muon": "AdamW",
    "muon_bf16": "AdamW",
    "optax_muon": "AdamW",
    "torch_muon": "AdamW",
    "copy": "x + 1",
}
RATIOS = (
    ("uncompressed", "optax_muon"),
    ("gluon", "optax_muon"),
    ("block", "optax_muon"),
    ("rank15_natural", "optax_muon"),
    ("muon", "optax_muon"),
    ("uncompressed_bf16", "optax_muon"),
    ("muon_bf16", "optax_muon"),
    ("muon_bf16", "torch_muon"),
    ("block", "uncompressed"),
    ("block", "gluon"),
    ("uncompressed", "copy"),
    ("uncompressed", "torch_muon"),
    ("block", "torch_muon"),
    ("optax_muon", "torch_muon"),
)


@dataclasses.dataclass(frozen=True)
class Config(timing.Config):
    turns: int = 5  # each of them times everything once
    methods: tuple[MethodName, ...] = tuple(METHODS)
    model: ModelName = "twin"  # a ninth of NanoGPT-124M, or the whole: 13 GB for all methods
    dtype: Literal["float32", "bfloat16"] = "float32"  # of parameters and gradients
    torch: bool = True  # PyTorch's Muon too, where it is installed
    matmul_size: int | None = None  # of the product that gives the peak; None: large enough
    seed: int = 0  # of parameters and gradients


def main(args=None):
    config = timing.configure(Config, MODULE, __doc__, args)
    shapes = parameter_shapes(PRESETS[config.model], config.dtype)
    params = random_tree(shapes, config.seed, 0.02)
    # Two, taken in turn: under a gradient that stays the same, what EF21 has yet to send dies out.
    gradients = [random_tree(shapes, config.seed + i, 1.0) for i in (1, 2)]

    programs, flops = {}, {"copy": 0, "torch_muon": 0}
    for name in config.methods:
        tx = METHODS[name]
        args_of_step = gradients[0], params, jax.eval_shape(tx.init, params)
        programs[name] = jax.jit(optimizer_step(tx), donate_argnums=(1, 2)), args_of_step
        flops[name] = timing.matmul_flops(optimizer_step(tx), *args_of_step)
    programs["copy"] = jax.jit(add_one, donate_argnums=1), (gradients[0], params, ())
    executables = timing.compiled(programs)

    calls = {
        name: Repeated(executable, gradients, params, initial_state(name, params))
        for name, executable in executables.items()
    }
    if config.torch and (torch_call := torch_muon(gradients, params)):
        calls["torch_muon"] = torch_call
    peak = timing.MatmulPeak.of(config.dtype, config.matmul_size)
    # Alone too: between programs of gigabytes a product may take twice as long.
    alone = timing.interleaved(peak.calls, config)
    seconds = timing.interleaved(calls | peak.calls, config)
    products = {name: alone[name] + seconds[name] for name in peak.calls}
    report(config, args, shapes, seconds, flops, peak.rate(products))


def report(config, args, shapes, seconds, flops, rate):
    figures = {
        f"{mine}_over_{theirs}": timing.ratio(seconds[mine], seconds[theirs])
        for mine, theirs in RATIOS
        if mine in seconds and theirs in seconds
    }
    times, rows = {}, []
    for name in seconds:
        if name not in EMBEDDING:  # the products that give the peak
            continue
        times[name] = 1e3 * statistics.median(seconds[name])
        cells = [f"{times[name]:.1f}"]
        for unit in ("optax_muon", "copy"):
            over = timing.ratio(seconds[name], seconds[unit]) if unit in seconds else None
            cells.append("" if over is None else f"{over:.3f}")
        if flops[name]:
            figures[f"{name}_of_peak"] = flops[name] / min(seconds[name]) / rate
            cells += [f"{flops[name] / 1e9:.1f}", f"{figures[f'{name}_of_peak']:.0%}"]
        else:
            cells += ["", ""]
        rows.append((name, *cells, EMBEDDING[name]))
    leaves = jax.tree.leaves(shapes)
    size = sum(leaf.size for leaf in leaves)
    print(f"{len(leaves)} matrices, {size / 1e6:.1f}M parameters, {config.dtype}", end=", ")
    print(f"matmul peak {rate / 1e9:.0f} GFLOP/s ({config.clock})")
    head = ("", "ms", "× optax_muon", "copies", "GFLOP", "of peak", "embedding")
    print(timing.table(head, rows))
    figures["matmul_peak_gflops"] = rate / 1e9
    timing.finish(config, MODULE, args, figures, milliseconds=times)


def parameter_shapes(model, dtype="float32"):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), gpt.parameter_shapes(model)
    )


def random_tree(shapes, seed, scale):
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(
        jax.random.normal(key, leaf.shape, leaf.dtype) * scale
        for key, leaf in zip(keys, leaves, strict=True)
    )


def optimizer_step(tx):
    def step(gradients, params, state):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def add_one(gradients, params, state):
    del gradients
    return jax.tree.map(lambda leaf: leaf + 1, params), state


def initial_state(name, params):
    return jax.jit(METHODS[name].init)(params) if name in METHODS else ()


class Repeated:
    """A compiled step that goes on from where its last call has left parameters and state."""

    def __init__(self, executable, gradients, params, state):
        self.executable = executable
        self.gradients = gradients
        # Its own, since they are donated.
        self.params, self.state = jax.tree.map(jnp.copy, (params, state))
        self.calls = 0

    def __call__(self):
        gradients = self.gradients[self.calls % len(self.gradients)]
        self.calls += 1
        self.params, self.state = self.executable(gradients, self.params, self.state)
        return self.params, self.state


def torch_muon(gradients, params):
    """`TorchMuon`, or None, with a line that says why."""
    if jax.default_backend() != "cpu":
        print("torch.optim.Muon is left out: it is timed on a CPU only.")
        return None
    try:
        import torch

        torch.optim.Muon  # noqa: B018
    except (ImportError, AttributeError):
        print("torch.optim.Muon is left out: it needs `pip install 'torch>=2.9'`.")
        return None
    return TorchMuon(torch, gradients, params)


class TorchMuon:
    """A step of PyTorch's Muon, which orthogonalises in bfloat16 whatever the gradients are."""

    def __init__(self, torch, gradients, params):
        def tensors(tree):
            leaves = jax.tree.leaves(tree)
            dtype = getattr(torch, leaves[0].dtype.name)
            return [torch.from_numpy(np.array(leaf, np.float32)).to(dtype) for leaf in leaves]

        self.weights, self.gradients = tensors(params), [tensors(tree) for tree in gradients]
        names = [path[0].key for path, _ in jax.tree.leaves_with_path(params)]
        named = list(zip(names, self.weights, strict=True))
        hidden = [weight for name, weight in named if name != "wte"]
        embedding = [weight for name, weight in named if name == "wte"]
        self.optimizers = [
            torch.optim.Muon(hidden, lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=0.0),
            torch.optim.AdamW(embedding, lr=LEARNING_RATE, weight_decay=0.0),
        ]
        self.calls = 0

    def __call__(self):
        gradients = self.gradients[self.calls % len(self.gradients)]
        self.calls += 1
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
        for optimizer in self.optimizers:
            optimizer.step()


if __name__ == "__main__":
    main()
