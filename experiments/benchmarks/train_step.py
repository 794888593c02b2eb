"""What a whole training step costs: model, gradients, compression, oracle.

Steps of the same Flax model on the same tokens: with `optax.contrib.muon` on the gradient of the
whole batch, as anyone would without this library, and with our workers as lanes. With `--paper`,
for paper M's model and batch, whether it fits one accelerator: the program's memory by the
compiler, nothing of it run; and a step with a tiny batch, which is run.

    python -m experiments.benchmarks.train_step
    python -m experiments.benchmarks.train_step --paper --methods rank15_natural
"""

import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import optax

from experiments import presets, training
from experiments.benchmarks import timing
from experiments.data import corpora
from experiments.models import gpt


MODULE = "experiments.benchmarks.train_step"
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Config(timing.Config):
    preset: presets.PresetName = "1m"
    methods: tuple[training.RecipeName, ...] = (
        "uncompressed",
        "rank15_natural",
        "rank25_4bit_both",
        "block16_both",
    )
    paper: bool = False  # memory of the paper's step, and one of its model with a tiny batch


def main(args=None):
    config = timing.configure(Config, MODULE, __doc__, args)
    if config.paper:
        paper(config, args)
    else:
        throughput(config, args)


def throughput(config, args):
    """Tokens a second, over those with optax."""
    settings = training.Settings(**presets.PRESETS[config.preset] | {"eval_every": 1})
    corpus = corpora.load()
    model = training.model_of(settings, corpus)
    batches = training.batches_of(settings, corpus, range(1))
    calls = {"optax_muon": OptaxMuon(settings, model, batches)}
    calls |= {name: Ours(settings, model, batches, name) for name in config.methods}
    seconds = timing.interleaved(calls, config)

    figures, rows = {}, []
    for name, taken in seconds.items():
        speed = timing.ratio(seconds["optax_muon"], taken)
        rate = settings.tokens_a_step / statistics.median(taken)
        rows.append((name, f"{rate:,.0f}", f"{speed:.3f}"))
        if name != "optax_muon":
            figures[f"{name}_throughput_over_optax_muon"] = speed
    print(timing.table((f"{config.preset}, {settings.workers} workers", "tokens/s", "speed"), rows))
    timing.finish(config, MODULE, args, figures, seconds=seconds)


class Ours:
    """A step that goes on from where its last call has left parameters and state."""

    def __init__(self, settings, model, batches, name):
        tx = training.optimizer(settings, name)
        self.carry = training.start(settings, model, tx)
        advance = training.steps_in_one_call(settings, model, tx)
        self.advance = advance.lower(*self.carry, batches).compile()
        self.batches = batches

    def __call__(self):
        *self.carry, loss = self.advance(*self.carry, self.batches)
        return loss


class OptaxMuon(Ours):
    """The whole batch at once, and optax's step."""

    def __init__(self, settings, model, batches):
        tx = optax.contrib.muon(training.peak_learning_rate(settings, "uncompressed"))
        tokens = jnp.zeros((1, settings.length), jnp.int32)
        params = training.initial_params(model, jax.random.key(settings.seed), tokens)
        self.carry = params, tx.init(params)
        self.batches = batches.reshape(-1, batches.shape[-1])

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def advance(params, state, batch):
            value, grads = training.loss_and_gradient(model, params, batch, 1)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        self.advance = advance.lower(*self.carry, self.batches).compile()


def paper(config, args):
    """Gigabytes of the paper's step, and seconds of one with a tiny batch."""
    settings = training.Settings(**presets.PRESETS["paper"])
    tiny = dataclasses.replace(settings, batch_size=1, microbatches=1, length=64)
    model = gpt.GPT(dataclasses.replace(gpt.PRESETS[settings.model], dtype=settings.dtype))
    figures, rows = {}, []
    for name in config.methods:
        memory = program(settings, model, name).memory_analysis()
        held = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / GB
        tx = training.optimizer(tiny, name)
        params, state = training.start(tiny, model, tx)
        batch = jax.random.randint(jax.random.key(0), (tiny.workers, 1, 1, 65), 0, 50_257)
        step = program(tiny, model, name)
        start = time.perf_counter()
        *_, loss = step(params, state, batch.astype(jnp.uint16))
        loss = float(loss)
        seconds = time.perf_counter() - start
        rows.append((name, f"{held:.1f}", f"{seconds:.1f}", f"{loss:.3f}"))
        figures |= {f"{name}_gigabytes": held, f"{name}_tiny_step_seconds": seconds}
    head = ("124M, 4 lanes", "GB, 256 x 1024 tokens", "seconds, 4 x 64 tokens", "loss")
    print(timing.table(head, rows))
    timing.finish(config, MODULE, args, figures)


def program(settings, model, name):
    """One compiled step. Shapes suffice."""
    tx = training.optimizer(settings, name)
    params, state = jax.eval_shape(lambda: training.start(settings, model, tx))
    shape = settings.workers, 1, settings.batch_size, settings.length + 1
    batches = jax.ShapeDtypeStruct(shape, jnp.uint16)
    return training.steps_in_one_call(settings, model, tx).lower(params, state, batches).compile()


if __name__ == "__main__":
    main()
