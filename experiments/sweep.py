"""Trains GPTs over a grid of recipes, learning rates and seeds, and keeps one line a run.

Stopped and started again, it goes on where it was: a finished run is never run twice, and the
same record can grow by other grids of the same settings.

    python -m experiments.sweep --out results/sweep.jsonl
    python -m experiments.sweep --methods block16 block8 --seeds 0 1 2 --jobs 2
"""

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
import pathlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import tqdm
import tyro

from experiments import checkpoints, plots, presets, records, training
from experiments.checkpoints import Checkpoints
from experiments.data import corpora


KEYS = ("method", "lr_multiplier", "seed", "steps")  # that tell runs of a record apart
_AXES = ("methods", "multipliers", "seeds")  # of a grid
_CURVES = ("step", "loss_w", "loss_x", "bytes_up")  # of every evaluation, of the last one all


@dataclasses.dataclass(frozen=True)
class Config(training.Settings):
    methods: tuple[training.RecipeName, ...] = ("uncompressed", "rank15_natural", "top15_natural")
    multipliers: tuple[float, ...] = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1)  # of the base learning rate
    seeds: tuple[int, ...] = (0,)
    jobs: int = 1  # runs at a time, each in a process and on a GPU, or processor core, of its own
    text: str | None = None  # a file of text or tokens, or a folder; None: the standard library
    checkpoint_every: int | None = None  # steps; a run that is stopped then goes on, not anew
    out: str = "results/sweep.jsonl"  # and a picture beside it
    # Each run has its own: no arguments, so that nobody passes them in vain.
    seed: tyro.conf.Suppress[int] = 0
    lr_multiplier: tyro.conf.Suppress[float | None] = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("methods", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must be one or more, got ().")
        checkpoints.check_every(self.checkpoint_every)
        bad = [multiplier for multiplier in self.multipliers if not multiplier > 0]
        if bad or not self.multipliers:
            raise ValueError(f"`multipliers` must be positive, got {self.multipliers}.")
        if self.jobs < 1:
            raise ValueError(f"`jobs` must be at least 1, got {self.jobs}.")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: a recipe by name, its settings, and where its tokens are."""

    method: str
    settings: training.Settings
    text: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        settings = self.settings
        return self.method, settings.lr_multiplier, settings.seed, settings.steps


def main(args=None):
    config = presets.configure(Config, "experiments.sweep", __doc__, args)
    command = records.command_line("experiments.sweep", args)
    lines = run_all(grid(config), config.out, command, config.jobs, config.checkpoint_every)
    if lines:
        print(best(lines))
        print(f"Wrote {config.out} and {plots.sweep_picture(config.out)}")


def grid(config: Config, **changes: Any) -> list[Run]:
    """Every recipe with every learning rate and seed.

    Args:
      changes: of the fields of `config`: `methods`, `multipliers`, `seeds`, or of its settings.
    """
    axes = [changes.pop(name, getattr(config, name)) for name in _AXES]
    settings = dataclasses.replace(training.settings_of(config), **changes)
    return [
        Run(method, dataclasses.replace(settings, lr_multiplier=rate, seed=seed), config.text)
        for method, rate, seed in itertools.product(*axes)
    ]


def part_of_steps(config: Config, parts: int) -> int:
    """`steps` / `parts`, as near to it as a number of whole evaluations is.

    Raises:
      ValueError: where the steps have fewer evaluations than parts.
    """
    if config.steps < parts * config.eval_every:
        raise ValueError(
            f"`steps` must be at least {parts} times `eval_every`, to train on 1/{parts} of them "
            f"too, got {config.steps} and {config.eval_every}."
        )
    return round(config.steps / (parts * config.eval_every)) * config.eval_every


def run_all(
    runs: Iterable[Run],
    path: str | pathlib.Path,
    command: str,
    jobs: int = 1,
    checkpoint_every: int | None = None,
) -> list[dict[str, Any]]:
    """Runs what the record at `path` has not, adds a line for each, and returns all its lines.

    Raises:
      ValueError: where the record was made with other settings or another text, or another process
        is writing it.
      SystemExit: on Ctrl-C, as there is nothing to go on with.
    """
    path, runs = pathlib.Path(path), list(runs)
    if jobs > 1:  # else this process, which trains nothing, would take most of the GPUs' memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    header = records.header(_shared(runs[0]), command, text=corpora.load(runs[0].text).describe())
    commit = {"commit": header["commit"]}  # the record may have begun with another
    with records.only_writer(path):
        header, lines = _resume(path, header)
        for run in runs:
            if _shared(run) != header["config"]:
                raise ValueError(f"{run} has other settings than {header['config']}.")
        done = set(map(_key, lines))
        missing = list({run.key: run for run in runs if run.key not in done}.values())
        folder = path.with_suffix(".checkpoints") if checkpoint_every else None
        if folder is not None:
            for key in done:  # of one that was killed after the line
                checkpoints.remove(_place(folder, key))
        try:
            with tqdm.tqdm(total=len(missing), unit="run", disable=None) as bar:
                for line in _results(missing, jobs, folder, checkpoint_every):
                    lines.append(line | commit)
                    records.write_lines(path, [header, *lines])
                    if folder is not None:  # not before the line is safe
                        checkpoints.remove(_place(folder, _key(line)))
                    bar.set_postfix_str(_short(line), refresh=False)
                    bar.update()
                    if bar.disable:  # not a terminal
                        print(_short(line), flush=True)
        except KeyboardInterrupt:
            raise SystemExit("Stopped. The same command goes on from here.") from None
    return lines


def finish(
    run: Run, folder: pathlib.Path | None = None, checkpoint_every: int | None = None
) -> dict[str, Any]:
    """Trains to the end: the last record, and the losses of all of them as curves."""
    kept = None
    if folder is not None:
        about = {"method": run.method} | dataclasses.asdict(run.settings) | {"text": run.text}
        kept = Checkpoints(_place(folder, run.key), about, checkpoint_every)
    corpus = corpora.load(run.text)
    found = list(training.train(run.settings, run.method, corpus, checkpoints=kept))
    if kept is not None:
        kept.close()
    curves = {name: [_rounded(record[name]) for record in found] for name in _CURVES}
    own = {"lr_multiplier": run.settings.lr_multiplier, "steps": run.settings.steps}
    return found[-1] | own | {"curves": curves}


def best(lines: list[dict[str, Any]]) -> str:
    """The multiple of the base rate with the least loss, for each recipe; means over seeds."""
    rows = []
    for name, own in plots.by_method(lines).items():
        multiplier, loss = plots.best_rate(own)
        rows.append((f"{name}:", f"{multiplier:g}", f"test loss {loss:.4f}"))
    return "Best multiples of the base rate:\n" + plots.aligned(rows)


def _results(runs, jobs, folder, checkpoint_every) -> Iterator[dict[str, Any]]:
    """The lines of runs, as they finish."""
    if jobs == 1:
        for run in runs:
            yield finish(run, folder, checkpoint_every)
        return
    # JAX does not survive a fork.
    context = multiprocessing.get_context("spawn")
    shares = context.Queue()
    for share in shares_of(jobs):
        shares.put(share)
    with concurrent.futures.ProcessPoolExecutor(jobs, context, _begin, (shares,)) as pool:
        tasks = [pool.submit(finish, run, folder, checkpoint_every) for run in runs]
        try:
            for task in concurrent.futures.as_completed(tasks):
                yield task.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def shares_of(jobs: int) -> list[tuple[str, int]]:
    """What each of so many processes has of this machine: ("gpu", its number), or ("core", ...)."""
    gpus = [device.local_hardware_id for device in jax.local_devices() if device.platform == "gpu"]
    kind, numbers = ("gpu", gpus) if gpus else ("core", sorted(os.sched_getaffinity(0)))
    return [(kind, number) for number in itertools.islice(itertools.cycle(numbers), jobs)]


def take(share: tuple[str, int]) -> None:
    """Keeps this process to its share. JAX must not have begun."""
    kind, number = share
    if kind == "gpu":
        for maker in ("cuda", "rocm"):
            jax.config.update(f"jax_{maker}_visible_devices", str(number))
    else:  # two runs that share two cores, thread by thread, are slower than two with one each
        os.sched_setaffinity(0, {number})


def _begin(shares):
    """What a process does first."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    take(shares.get())


def _end_with_parent():
    """Else a run whose line nobody writes would go on, in the way of the same command's next."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _place(folder, key):
    """Of the checkpoints of a run."""
    return folder / "_".join(map(str, key))


def _key(line):
    return tuple(line[name] for name in KEYS)


def _resume(path, header):
    """Header and lines of what is at `path`, or the new header and none."""
    if not path.exists():
        return header, []
    found, lines = records.read_lines(path)
    for key in ("config", "text"):
        if found[key] != header[key]:
            raise ValueError(
                f"{str(path)!r} was made with {key} {found[key]}, not {header[key]}: pass another "
                "--out, or move the file away."
            )
    return found, lines


def _shared(run):
    """The settings that all runs of a record have."""
    fields = dataclasses.asdict(run.settings)
    return {key: value for key, value in fields.items() if key not in KEYS}


def _short(line):
    loss, sent = line["loss_x"], line["bytes_up"] / 1e6
    return (
        f"{line['method']}, {line['lr_multiplier']:g} of the rate, seed {line['seed']}, "
        f"{line['steps']} steps: test loss {loss:.4f}, {sent:.2f} MB up"
    )


def _rounded(value):
    return round(value, 5) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
