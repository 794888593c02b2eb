"""Trains a GPT by a recipe: the loop that all language experiments share."""

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import ef21_jax as ef21
from experiments import cluster, recipes
from experiments.checkpoints import Checkpoints
from experiments.data.corpora import Corpus
from experiments.models import gpt


# The tables of names are the one source of what may be asked for.
RecipeName = Literal[tuple(recipes.RECIPES)]
DownlinkName = Literal[tuple(recipes.DOWNLINKS)]
ModelName = Literal[tuple(gpt.PRESETS)]
ORACLES = {"polar_express": ef21.POLAR_EXPRESS, "jordan": ef21.JORDAN}


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides a run, but for the recipe and the text."""

    model: ModelName = "small"
    steps: int = 800  # optimizer steps
    eval_every: int = 20  # steps between evaluations, all in one jitted call
    workers: int = 4  # simulated, or as many as there are devices
    topology: Literal["gather", "sharded"] = "gather"  # who takes the server's step: all, or shares
    batch_size: int = 4  # sequences a worker and step
    microbatches: int = 1  # parts in which a worker takes its batch, one after the other
    length: int = 64  # tokens a sequence
    learning_rate: float | None = None  # constant, then linear to 0; None: the recipe's base
    lr_multiplier: float | None = None  # times the rate (radius = scale * rate); None: the recipe's
    constant: float = 0.4  # share of the steps before the rate falls
    momentum: float | None = None  # weight of the old gradients; None: the recipe's
    downlink: DownlinkName | None = None  # server to worker; None: the recipe's
    oracle: Literal["polar_express", "jordan"] = "polar_express"  # Newton-Schulz; paper: jordan
    eval_sequences: int = 256  # of the held-out text, always the same
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the activations
    seed: int = 0  # of the model, the batches and the compressors

    def __post_init__(self):
        if self.steps < 1 or self.eval_every < 1 or self.steps % self.eval_every:
            raise ValueError(
                f"`steps` must be a positive multiple of `eval_every`, got {self.steps} and "
                f"{self.eval_every}."
            )
        for name in ("workers", "batch_size", "microbatches", "length", "eval_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.batch_size % self.microbatches:
            raise ValueError(
                f"`batch_size` must be a multiple of `microbatches`, got {self.batch_size} and "
                f"{self.microbatches}."
            )
        if not 0 <= self.constant <= 1:
            raise ValueError(f"`constant` is a share of the steps in [0, 1], got {self.constant}.")
        for name in ("learning_rate", "lr_multiplier"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")

    @property
    def tokens_a_step(self) -> int:
        """Of all workers."""
        return self.workers * self.batch_size * self.length


def settings_of(config: Settings) -> Settings:
    """A script's settings without what is the script's own."""
    fields = dataclasses.fields(Settings)
    return Settings(**{field.name: getattr(config, field.name) for field in fields})


def train(
    settings: Settings,
    name: str,
    corpus: Corpus,
    mesh: Mesh | None = None,
    checkpoints: Checkpoints | None = None,
) -> Iterator[dict[str, Any]]:
    """Trains by the recipe called `name` and yields a record at each evaluation.

    The first is from before any step. With `checkpoints` that hold a beginning of this very run,
    its records are yielded again and training goes on from there, to the same bits.

    Raises:
      ValueError: where the corpus has more tokens than the model, or too few to train on.
    """
    recipe, model = recipe_of(settings, name), model_of(settings, corpus)
    warm_up = warm_up_steps(settings, recipe)
    tx = optimizer(settings, name)
    first = optimizer(settings, name, warm_up=True) if warm_up else tx
    held_out = jnp.asarray(corpus.held_out(settings.eval_sequences, settings.length), jnp.int32)
    params, state = start(settings, model, tx, mesh)
    sent = bytes_a_step(recipe, tx, params)
    sent_first = bytes_a_step(recipe, first, params) if warm_up else sent

    records: list[dict[str, Any]] = []
    if checkpoints is not None:
        (params, state), records = checkpoints.restore((params, state))
        yield from records
    begin = records[-1]["step"] if records else -settings.eval_every
    seconds = records[-1]["seconds"] if records else 0.0

    advance = None
    for step in range(begin + settings.eval_every, settings.steps + 1, settings.eval_every):
        train_loss = None
        if step:
            if advance is None or step == warm_up + settings.eval_every:
                # Compiled ahead, so that `seconds` counts training alone.
                batches = batches_of(settings, corpus, range(settings.eval_every), mesh)
                steps = steps_in_one_call(settings, model, first if step <= warm_up else tx, mesh)
                advance = steps.lower(params, state, batches).compile()
            began = time.perf_counter()
            batches = batches_of(settings, corpus, range(step - settings.eval_every, step), mesh)
            params, state, train_loss = advance(params, state, batches)
            train_loss = float(train_loss)  # waits for the device
            seconds += time.perf_counter() - began
        loss_w = float(held_out_loss(model, params, held_out))
        # Without a downlink compressor the server's model is W itself.
        server_params = ef21.server_params(tx, params, state)
        lossy = server_params is not params
        loss_x = float(held_out_loss(model, server_params, held_out)) if lossy else loss_w
        records.append(
            {
                "method": name,
                "uplink": repr(recipe.uplink),
                "downlink": repr(recipe.downlink),
                "momentum": recipe.momentum,
                "extrapolation": recipe.extrapolation,
                "warm_up": warm_up,  # steps
                "learning_rate": peak_learning_rate(settings, name),
                "seed": settings.seed,
                "step": step,
                "tokens": step * settings.tokens_a_step,
                "loss_train": train_loss,  # mean of the batches since the last evaluation
                "loss_w": loss_w,  # test loss of the model that the workers hold
                "loss_x": loss_x,  # test loss of the server's model
                "bytes_up": min(step, warm_up) * sent_first.up  # of each worker
                + max(step - warm_up, 0) * sent.up,
                "bytes_down": step * sent.down,
                # Messages refused for not being finite.
                "rejected": int(jax.jit(jnp.sum)(state.rejected)),
                "seconds": round(seconds, 3),
            }
        )
        if checkpoints is not None:
            checkpoints.save(step, (params, state), records)
        yield records[-1]


def recipe_of(settings: Settings, name: str) -> recipes.Recipe:
    """The recipe, with what the settings change of it."""
    recipe = recipes.RECIPES[name]
    if settings.momentum is not None:
        recipe = dataclasses.replace(recipe, momentum=settings.momentum)
    if settings.downlink is not None:
        recipe = dataclasses.replace(recipe, downlink=recipes.DOWNLINKS[settings.downlink])
    return recipe


def bytes_a_step(recipe: recipes.Recipe, tx: ef21.Distributed, params: Any) -> ef21.ledger.Ledger:
    """What a worker sends and is sent, as the recipe counts."""
    convention = ef21.ledger.PaperConvention() if recipe.paper_bytes else ef21.wire_bits
    return ef21.ledger.bytes_per_step(tx, params, convention=convention)


def model_of(settings: Settings, corpus: Corpus) -> gpt.GPT:
    config = dataclasses.replace(gpt.PRESETS[settings.model], dtype=settings.dtype)
    if corpus.vocab_size > config.vocab_size:
        raise ValueError(
            f"The model {settings.model!r} knows {config.vocab_size:,} tokens, and the text has "
            f"{corpus.vocab_size:,}: pass --model 124m for files of GPT-2's tokens."
        )
    return gpt.GPT(config)


def warm_up_steps(settings: Settings, recipe: recipes.Recipe) -> int:
    """The recipe's share of the steps as the nearest number of whole evaluations, at least one."""
    if recipe.warm_up is None:
        return 0
    share, _ = recipe.warm_up
    steps = max(1, round(share * settings.steps / settings.eval_every)) * settings.eval_every
    if steps >= settings.steps:
        raise ValueError(
            f"A warm-up takes whole evaluations, at least one, and so all {settings.steps} steps: "
            f"pass a smaller `eval_every` than {settings.eval_every}."
        )
    return steps


def optimizer(settings: Settings, name: str, *, warm_up: bool = False) -> ef21.Distributed:
    """Of the recipe called `name`, or of its warm-up: their states are alike."""
    recipe = recipe_of(settings, name)
    oracle = ef21.Spectral(ORACLES[settings.oracle])
    return recipes.optimizer(
        recipe.in_warm_up if warm_up else recipe,
        learning_rate(settings, name),
        topology=topology(settings),
        rules=ef21.with_norm(ef21.SCION_RULES, "hidden", oracle),
        seed=settings.seed,
    )


def topology(settings: Settings) -> ef21.Topology:
    return ef21.Sharded(settings.workers) if settings.topology == "sharded" else ef21.Gather()


def learning_rate(settings: Settings, name: str) -> optax.Schedule:
    """Constant, then linear to 0 (paper M, Table 4)."""
    peak = peak_learning_rate(settings, name)
    falls = round(settings.constant * settings.steps)
    return optax.join_schedules(
        [optax.constant_schedule(peak), optax.linear_schedule(peak, 0.0, settings.steps - falls)],
        boundaries=[falls],
    )


def peak_learning_rate(settings: Settings, name: str) -> float:
    recipe = recipes.RECIPES[name]
    base, multiplier = settings.learning_rate, settings.lr_multiplier
    base = recipe.base_rate if base is None else base
    return base * (recipes.multiplier(name) if multiplier is None else multiplier)


def start(
    settings: Settings, model: gpt.GPT, tx: ef21.Distributed, mesh: Mesh | None = None
) -> tuple[Any, Any]:
    """Parameters and the optimizer's state; on `mesh` if there is one."""

    def make():
        tokens = jnp.zeros((1, settings.length), jnp.int32)
        params = initial_params(model, jax.random.key(settings.seed), tokens)
        return params, ef21.replicate(tx.init(params), settings.workers)

    return make() if mesh is None else cluster.create(make, mesh)


def batches_of(settings: Settings, corpus: Corpus, steps: range, mesh: Mesh | None = None) -> Any:
    """(workers, steps, batch_size, length + 1): of a mesh, each process reads its own workers'."""
    workers = range(settings.workers) if mesh is None else cluster.own_rows(range(settings.workers))
    batches = corpus.batches(
        steps,
        workers,
        settings.workers,
        seed=settings.seed,
        size=settings.batch_size,
        length=settings.length,
    )
    return jnp.asarray(batches) if mesh is None else cluster.global_batch(batches, mesh)


def steps_in_one_call(
    settings: Settings, model: gpt.GPT, tx: ef21.Distributed, mesh: Mesh | None = None
) -> Any:
    """As many steps as there are batches as one jitted call: the host has nothing to do between."""

    def worker_step(params, state, batch):
        value, grads = loss_and_gradient(model, params, batch, settings.microbatches)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def advance(params, state, batches):
        def body(carry, batch):
            params, state, losses = ef21.spmd(worker_step, mesh=mesh)(*carry, batch)
            return (params, state), jnp.mean(losses)

        each_step = jnp.swapaxes(batches, 0, 1)
        (params, state), losses = jax.lax.scan(body, (params, state), each_step)
        return params, state, jnp.mean(losses)

    return jax.jit(advance, donate_argnums=(0, 1))


def loss_and_gradient(model: gpt.GPT, params: Any, batch: jax.Array, parts: int) -> Any:
    """The mean over a worker's batch, whose parts are taken one after the other."""
    of_part = jax.value_and_grad(functools.partial(loss, model))
    if parts == 1:
        return of_part(params, batch)

    def add(total, part):
        return jax.tree.map(jnp.add, total, of_part(params, part)), None

    # 0 · x and not zeros: it varies over the workers, as what is added to it does.
    nothing = jax.tree.map(lambda x: 0 * x, params)
    split = batch.reshape(parts, -1, batch.shape[-1])
    at_first = 0 * jax.tree.leaves(nothing)[0].ravel()[0]
    total, _ = jax.lax.scan(add, (at_first, nothing), split)
    return jax.tree.map(lambda x: x / parts, total)


def loss(model: gpt.GPT, params: Any, batch: jax.Array) -> jax.Array:
    batch = batch.astype(jnp.int32)
    return gpt.next_token_loss(model.apply({"params": params}, batch[..., :-1]), batch[..., 1:])


# The model is static and equal for all recipes, so these two are compiled once for a whole job.


@functools.partial(jax.jit, static_argnums=0)
def initial_params(model, key, tokens):
    return model.init(key, tokens)["params"]


@functools.partial(jax.jit, static_argnums=0)
def held_out_loss(model, params, held_out):
    # A few sequences at a time: the logits of all would not fit for a large vocabulary.
    one = functools.partial(loss, model, params)
    return jnp.mean(jax.lax.map(one, held_out, batch_size=8))
