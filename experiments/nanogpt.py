r"""Trains a small GPT with EF21-Muon and compares what its workers send with what it learns.

The paper's main experiment in small: the same model family, norms, scales, momentum, schedule and
compressors, on bytes of Python source in place of FineWeb tokens and in minutes on a laptop. By
default the workers are simulated, lanes of one device, and the bytes are those of the messages they
would send. With `--on devices` each is a device of its own, here or on several machines, and the
messages travel. A record that is there grows by the methods that it has not; one of other settings
is refused.

    python -m experiments.nanogpt
    python -m experiments.nanogpt --methods rank15_natural --lr-multiplier 0.4 --out results/slow
    python -m experiments.nanogpt --model 124m --routes
    python -m experiments.nanogpt --preset paper --text fineweb10B --checkpoint-every 512 \
        --out results/paper
    python -m experiments.nanogpt --audit --topology sharded --downlink natural
    python -m experiments.launch --processes 4 -- -m experiments.nanogpt --on devices \
        --out results/devices
"""

import contextlib
import dataclasses
import pathlib
from typing import Literal

import tqdm

import ef21_jax as ef21
from experiments import checkpoints, cluster, plots, presets, records, training
from experiments.checkpoints import Checkpoints
from experiments.data import corpora
from experiments.models import gpt


@dataclasses.dataclass(frozen=True)
class Config(training.Settings):
    methods: tuple[training.RecipeName, ...] = ("uncompressed", "rank15_natural", "rank25_4bit_x2")
    on: Literal["lanes", "devices"] = "lanes"  # lanes of one device, or a device each
    text: str | None = None  # a file of text or tokens, or a folder; None: the standard library
    out: str = "results/nanogpt"  # folder for the record and the pictures
    checkpoint_every: int | None = None  # steps; the same command then goes on after a stop
    routes: bool = False  # print norm, compressor and bytes of each parameter, and stop
    audit: bool = False  # compile a step for devices, verify and print what it sends, and stop

    def __post_init__(self):
        super().__post_init__()
        if not self.methods:
            raise ValueError(f"`methods` must be among {list(training.recipes.RECIPES)}, got ().")
        checkpoints.check_every(self.checkpoint_every)


def main(args=None):
    config = presets.configure(Config, "experiments.nanogpt", __doc__, args)
    if config.routes:
        print_routes(config)
        return
    mesh = cluster.join(config.workers) if config.on == "devices" or config.audit else None
    corpus = corpora.load(config.text)
    if config.audit:
        for method in config.methods:
            for title, warm_up in parts(config, method):
                print_audit(config, method, corpus, mesh, title, warm_up)
        return
    path = pathlib.Path(config.out, "nanogpt.jsonl")
    command = records.command_line("experiments.nanogpt", args)
    header = records.header(dataclasses.asdict(config), command, text=corpus.describe())
    with records.only_writer(path) if cluster.is_first() else contextlib.nullcontext():
        lines, missing = resume(path, header, config)
        try:
            for method in missing:
                run = training.train(
                    config, method, corpus, mesh, checkpoints_of(config, method, corpus)
                )
                for record in with_progress(run, config.steps):
                    lines.append(record)
                    if cluster.is_first():
                        records.write_lines(path, lines)
        except KeyboardInterrupt:
            print(f"Stopped. What was measured stays in {path}.")
    if len(lines) > 1 and cluster.is_first():
        print(plots.nanogpt_table(path))
        print(f"Wrote {path} and {plots.nanogpt_picture(path)}")


def resume(path, header, config):
    """What a record at `path` begins with, and the methods that it has not to the end.

    Raises:
      ValueError: where there is one with other settings or of another text.
    """
    lines = []
    if cluster.is_first() and path.exists():
        found, lines = records.read_lines(path)
        for name, old in _compared(found).items():
            new = _compared(header)[name]
            if old != new:
                raise ValueError(
                    f"{str(path)!r} was made with {name} {old!r}, not {new!r}: pass another --out, "
                    "or move the file away."
                )
        header = found
    finished = {line["method"] for line in lines if line["step"] == config.steps}
    methods = list(dict.fromkeys(config.methods))
    has = cluster.of_first([method in finished for method in methods])
    missing = [method for method, there in zip(methods, has, strict=True) if not there]
    if len(missing) < len(methods) and cluster.is_first():
        names = ", ".join(method for method in methods if method not in missing)
        print(f"{path} has {names}: to run that again, move the file away or pass another --out.")
    return [header, *(line for line in lines if line["method"] not in missing)], missing


def _compared(header):
    """Of a record's first line, what all of its runs have."""
    names = [field.name for field in dataclasses.fields(training.Settings)]
    return {name: header["config"].get(name) for name in [*names, "on"]} | {"text": header["text"]}


def checkpoints_of(config, method, corpus):
    if config.checkpoint_every is None:
        return None
    about = dataclasses.asdict(training.settings_of(config))
    about |= {"method": method, "text": corpus.describe()}
    return Checkpoints(pathlib.Path(config.out, method), about, config.checkpoint_every)


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
    for method in config.methods:
        recipe = training.recipe_of(config, method)
        for title, warm_up in parts(config, method):
            table = ef21.routes(
                params,
                uplink=(recipe.in_warm_up if warm_up else recipe).uplink,
                downlink=recipe.downlink,
                topology=training.topology(config),
            )
            print(f"{title}\n{table}\n")


def parts(config, method):
    """What to call the parts of a run, and whether it is the warm-up, which few recipes have."""
    steps = training.warm_up_steps(config, training.recipe_of(config, method))
    warm_up = [(f"{method}, the first {steps} steps", True)] if steps else []
    return [*warm_up, (method, False)]


def print_audit(config, method, corpus, mesh, title, warm_up):
    """What a compiled program sends in `eval_every` steps; an error where that is too much."""
    model = training.model_of(config, corpus)
    tx = training.optimizer(config, method, warm_up=warm_up)
    params, state = training.start(config, model, tx, mesh)
    batches = training.batches_of(config, corpus, range(config.eval_every), mesh)
    advance = training.steps_in_one_call(config, model, tx, mesh)
    compiled = advance.lower(params, state, batches).compile()
    found = ef21.ledger.audit(compiled, tx, params, mesh=mesh, steps=config.eval_every)
    if cluster.is_first():
        book = ef21.ledger.traffic(tx, params, config.workers)
        print(f"{title}: one call, of {config.eval_every} steps\n{found}\n")
        print(f"{title}: one step, by the ledger\n{book}\n")


if __name__ == "__main__":
    main()
