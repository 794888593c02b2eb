"""Paper N's Figures 5 and 6: normalized EF21 against EF21 on ResNet-20 and CIFAR-10.

Five clients, Top-k of the whole parameter vector with k = 0.01 d and 0.1 d, one step size for both
methods. `--preset full` is the paper's: 50,000 images, batches of 128, 100 epochs, step size 5. The
default is for two slow cores: fewer and smaller images, a narrower network, smaller batches, 375
steps, step size 1.

    python -m experiments.resnet
    python -m experiments.resnet --data-dir FOLDER --seeds 3 --gamma 5
    python -m experiments.resnet --preset full --seeds 3

Stopped and started again, it goes on where it was: a finished run is not repeated.
"""

import collections
import dataclasses
import itertools
import json
import math
import pathlib
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro
from jax.flatten_util import ravel_pytree

import ef21_jax as ef21
from experiments import accuracies, records
from experiments.data import cifar10, images
from experiments.models import resnet


MethodName = Literal["EF21", "normalized EF21"]
METHODS = {"EF21": ef21.ef21_sgd, "normalized EF21": ef21.normalized_ef21}
PRESETS = {
    "full": {
        **{"epochs": 100, "batch_size": 128, "images": 50_000, "width": 16, "side": 32},
        "gamma": 5.0,
    },
    # In so few steps the parameters do not grow to where one of length 5 is short, see the results.
    "short": {
        **{"epochs": 3, "batch_size": 16, "images": 10_000, "width": 8, "side": 16},
        "gamma": 1.0,
    },
}


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Literal["short", "full"] = "short"  # what the six settings after it are if None
    epochs: int | None = None  # through the training images, all clients together
    batch_size: int | None = None  # images a client and step
    images: int | None = None  # to train on, the first ones; all are tested on
    width: int | None = None  # channels of the first stage; ResNet-20 has 16
    side: int | None = None  # of the images, which are pooled to it; CIFAR-10 has 32
    gamma: float | None = None  # the step size of both methods; the paper's is 5
    methods: tuple[MethodName, ...] = ("EF21", "normalized EF21")
    shares: tuple[float, ...] = (0.01, 0.1)  # k / d of Top-k
    clients: int = 5
    blocks: int = 3  # of each stage: 6 blocks + 2 layers
    augment: bool = True  # the training images, as He et al.; the paper does not say
    patches: bool | None = None  # convolutions as matrix products; None: on a CPU
    seeds: int = 1  # of the model, the clients' images, their order and their augmentation
    data_dir: pathlib.Path | None = None  # a folder with CIFAR-10; None: download
    json: pathlib.Path = pathlib.Path("results/resnet.jsonl")  # and beside it the picture

    def __post_init__(self):
        unknown = set(self.methods) - set(METHODS)
        if unknown or not self.methods:
            raise ValueError(f"`methods` must be among {list(METHODS)}, got {self.methods}.")
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"`shares` must lie in (0, 1], got {self.shares}.")
        if self.gamma is not None and not self.gamma > 0:
            raise ValueError(f"`gamma` must be positive, got {self.gamma}.")
        for name in ("clients", "blocks", "seeds", *PRESETS["full"]):
            value = getattr(self, name)
            if name != "gamma" and value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")

    def whole(self):
        """With the preset's settings where there is None."""
        given = {name: getattr(self, name) for name in PRESETS[self.preset]}
        own = {name: value for name, value in given.items() if value is not None}
        on_cpu = jax.default_backend() == "cpu"
        patches = on_cpu if self.patches is None else self.patches
        return dataclasses.replace(self, patches=patches, **(PRESETS[self.preset] | own))

    def model(self):
        return resnet.ResNetConfig(blocks=self.blocks, width=self.width, patches=self.patches)


def main(args=None):
    config = tyro.cli(Config, args=args, prog="python -m experiments.resnet", description=__doc__)
    config = config.whole()
    data = prepared(cifar10.load(config.data_dir), config)
    command = records.command_line("experiments.resnet", args)
    header = records.header(_settings(config), command, data=data.describe())
    lines = _resume(config.json, header)  # the first is the header
    cells = [(share, method) for share in config.shares for method in config.methods]
    runs = [train(config, data, *cell, _missing(lines, *cell, config.seeds)) for cell in cells]
    try:
        # Seed by seed: a job that is stopped has as much of each.
        for run in _in_turns(runs):
            lines += run
            records.write_lines(config.json, lines)
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.")
    if len(lines) > 1:
        print(accuracies.table(config.json))
        print(f"Wrote {config.json} and {accuracies.picture(config.json)}")


def prepared(data, config):
    """The images to train on, and all of the test, at the side that is asked for."""
    if len(data.train) < config.images:
        raise ValueError(
            f"There are {len(data.train)} images to train on and `images` is {config.images}: get "
            "all of CIFAR-10, or ask for fewer."
        )
    if config.images // config.clients < config.batch_size:
        raise ValueError(
            f"{config.images} images give each of {config.clients} clients fewer than a batch of "
            f"{config.batch_size}."
        )
    return dataclasses.replace(
        data,
        train=images.pooled(data.train[: config.images], config.side),
        train_labels=data.train_labels[: config.images],
        test=images.pooled(data.test, config.side),
    )


def train(config, data, share, method, seeds):
    """Yields the lines of each seed's run, one for each epoch; the first is before any step."""
    tx = METHODS[method](config.gamma, uplink=ef21.TopK(share), axis_name="clients")
    start, loss = start_and_loss(config, images.moments(data.train))
    advance, test = one_epoch(config, tx, loss), tested(loss)
    steps = config.images // config.clients // config.batch_size
    for seed in seeds:
        x, stats = start(seed)
        state = ef21.replicate(tx.init(x), config.clients)
        shards = images.shards(data.train, data.train_labels, config.clients, seed)
        bits = 8 * ef21.ledger.bytes_per_step(tx, x).up
        about = {"method": method, "share": share, "seed": seed, "d": x.size}
        title = f"{method}, k = {share:g} d, seed {seed}"
        lines, seconds, trained = [], 0.0, {}
        with tqdm.tqdm(total=config.epochs, desc=title, unit="epoch", disable=None) as bar:
            for epoch in range(config.epochs + 1):
                if epoch:
                    began = time.perf_counter()
                    (x, state, stats), trained = advance((x, state, stats), shards, seed, epoch)
                    trained = _floats(trained)  # waits for the device
                    seconds += time.perf_counter() - began
                found = _floats(test(x, stats, data.test, data.test_labels))
                taken = epoch * steps
                lines.append(
                    about
                    | {"epoch": epoch, "step": taken, "bits_up": taken * bits}
                    | trained  # means over the epoch
                    | found
                    # Of the first seed, compilation included.
                    | {"rejected": int(jnp.sum(state.rejected)), "seconds": round(seconds, 3)}
                )
                message = f"test accuracy {found['test_accuracy']:.3f}"
                bar.set_postfix_str(message, refresh=False)
                bar.update(epoch - bar.n)
                if bar.disable:  # not a terminal
                    print(f"{title}: epoch {epoch} of {config.epochs}, {message}", flush=True)
        yield lines


def start_and_loss(config, moments):
    """Where a run starts, and what it minimises, as functions of one vector x of parameters.

    Returns:
      start: seed -> x, (d,), and running statistics with a leading axis of clients.
      loss: (x, stats, images, labels, augment) -> mean cross-entropy, (accuracy, stats). `augment`
        is the `seed, step, client` of `images.augmented`; without it the network is tested.
    """
    model = config.model()
    shape = (config.side, config.side, 3)
    shapes, _ = jax.eval_shape(lambda: resnet.initial(model, jax.random.key(0), shape))
    _, unravel = ravel_pytree(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))

    def start(seed):
        params, stats = resnet.initial(model, jax.random.key(seed), shape)
        x, _ = ravel_pytree(params)
        return x, jax.tree.map(lambda leaf: jnp.stack([leaf] * config.clients), stats)

    def loss(x, stats, pixels, labels, augment=None):
        variables = {"params": unravel(x), "batch_stats": stats}
        pixels = images.standardised(pixels, moments)
        if augment is None:
            logits = resnet.ResNet(model).apply(variables, pixels, train=False)
        else:
            pixels = images.augmented(pixels, *augment) if config.augment else pixels
            logits, updated = resnet.ResNet(model).apply(
                variables, pixels, train=True, mutable="batch_stats"
            )
            stats = updated["batch_stats"]
        return resnet.cross_entropy(logits, labels), (resnet.accuracy(logits, labels), stats)

    return start, loss


def one_epoch(config, tx, loss):
    """(carry, shards, seed, number) -> carry and the epoch's means, as one jitted call.

    The carry is x, the optimizer's state, and the clients' running statistics.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if config.patches:
        # One client at a time: on a CPU what a client needs then stays in the cache.
        gradient = jax.custom_batching.sequential_vmap(gradient)

    def client_step(x, state, own):
        pixels, labels, chosen, stats, seed = own
        augment = seed, state.count, jax.lax.axis_index("clients")
        (value, (share, stats)), g = gradient(x, stats, pixels[chosen], labels[chosen], augment)
        update, state = tx.update(g, state, x)
        measured = {
            "train_loss": value,
            "train_accuracy": share,
            "step_length": jnp.linalg.norm(update),
        }
        return optax.apply_updates(x, update), state, (stats, measured)

    def advance(carry, shards, seed, number):
        order = images.epoch(seed, number, *shards[1].shape, config.batch_size)
        seeds = jnp.full(config.clients, seed)

        def one(carry, chosen):
            *carry, stats = carry
            own = (*shards, chosen, stats, seeds)
            *carry, (stats, measured) = ef21.spmd(client_step, axis_name="clients")(*carry, own)
            return (*carry, stats), jax.tree.map(jnp.mean, measured)

        carry, measured = jax.lax.scan(one, carry, order)
        return carry, jax.tree.map(jnp.mean, measured)

    return jax.jit(advance, donate_argnums=0)


def tested(loss):
    """(x, stats, images, labels) -> loss and accuracy, with the clients' mean statistics."""

    def test(x, stats, pixels, labels):
        stats = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), stats)

        def one(image):
            value, (share, _) = loss(x, stats, *(leaf[None] for leaf in image))
            return value, share

        losses, right = jax.lax.map(one, (pixels, labels), batch_size=min(100, len(labels)))
        found = {"test_loss": losses, "test_accuracy": right}
        return {"length": jnp.linalg.norm(x)} | jax.tree.map(jnp.mean, found)

    return jax.jit(test)


def _in_turns(iterators):
    """The first of each, then the second of each, and so on; none is taken before it is wanted."""
    waiting = collections.deque(iterators)
    while waiting:
        iterator = waiting.popleft()
        for item in itertools.islice(iterator, 1):
            yield item
            waiting.append(iterator)


def _missing(lines, share, method, seeds):
    """The seeds whose run is not in a record; a run is written when it is whole."""
    done = {(line["share"], line["method"], line["seed"]) for line in lines[1:]}
    return [seed for seed in range(seeds) if (share, method, seed) not in done]


def _resume(path, header):
    """The lines at `path`, or a new record. Runs of other settings must not stand in one table."""
    if not path.exists():
        return [header]
    old, lines = records.read_lines(path)
    own = ("methods", "shares", "seeds", "json")
    for key in ("config", "data"):
        before, now = ({k: v for k, v in h[key].items() if k not in own} for h in (old, header))
        if before != now:
            raise ValueError(
                f"{str(path)!r} was made with {key} {before}, not {now}: pass another --json, or "
                "move the file away."
            )
    return [header, *lines]


def _settings(config):
    """For the record, as it is read; where the data lies is nobody's business."""
    settings = dataclasses.asdict(config) | {"json": str(config.json), "data_dir": None}
    return json.loads(json.dumps(settings))


def _floats(tree):
    """Numbers for JSON, which has none that are not finite."""
    values = {name: float(value) for name, value in tree.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


if __name__ == "__main__":
    main()
