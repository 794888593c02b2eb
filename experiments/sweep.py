"""Finds each method's learning rate: a grid from the base rate down to a tenth, as in the paper.

Stopped and started again, it goes on where it was: a finished cell is never run twice.

    python -m experiments.sweep
    python -m experiments.sweep --methods top15_natural --multipliers 0.5 0.25
"""

import dataclasses
import pathlib

import tyro

from experiments import nanogpt, plots, records
from experiments.data import text


@dataclasses.dataclass(frozen=True)
class Config:
    methods: tuple[nanogpt.MethodName, ...] = nanogpt.Config.methods
    multipliers: tuple[float, ...] = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1)  # of the base learning rate
    steps: int = nanogpt.Config.steps  # of each run
    eval_every: int = nanogpt.Config.eval_every  # steps of one jitted call
    model: str = nanogpt.Config.model
    seed: int = 0
    text: str | None = None  # a text file; None: the sources of Python's standard library
    out: str = "experiments/results/nanogpt_sweep.json"  # and the same name with .png

    def __post_init__(self):
        bad = [multiplier for multiplier in self.multipliers if not multiplier > 0]
        if bad or not self.multipliers:
            raise ValueError(f"`multipliers` must be positive, got {self.multipliers}.")


def main(args=None):
    config = tyro.cli(Config, args=args, prog="python -m experiments.sweep", description=__doc__)
    base = nanogpt.Config(
        steps=config.steps,
        eval_every=config.eval_every,
        model=config.model,
        seed=config.seed,
        text=config.text,
    )
    corpus = text.load(config.text)
    command = records.command_line("experiments.sweep", args)
    header = records.header(_settings(base), command, text=corpus.describe())
    sweep = _resume(pathlib.Path(config.out), header)
    try:
        for method, multiplier in _missing(config, sweep["cells"]):
            sweep["cells"].append(_cell(base, method, multiplier, corpus))
            records.write_json(config.out, sweep)
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.")
    if sweep["cells"]:
        print(_best(sweep["cells"]))
        print(f"Wrote {config.out} and {plots.sweep_picture(config.out)}")


def _cell(base, method, multiplier, corpus):
    """The last record of one run."""
    config = dataclasses.replace(base, lr_multiplier=multiplier)
    print(f"{method}, {multiplier:g} of the base rate")
    *_, last = nanogpt.with_progress(nanogpt.train(config, method, corpus), config.steps)
    return {"lr_multiplier": multiplier} | last


def _missing(config, cells):
    done = {(cell["method"], cell["lr_multiplier"]) for cell in cells}
    grid = [(method, m) for method in config.methods for m in config.multipliers]
    return [cell for cell in grid if cell not in done]


def _resume(path, header):
    """What is at `path`, or a new sweep. Cells of other settings must not stand in one table."""
    if not path.exists():
        return {"header": header, "cells": []}
    sweep = records.read_json(path)
    for key in ("config", "text"):
        if sweep["header"][key] != header[key]:
            raise ValueError(
                f"{str(path)!r} was made with {key} {sweep['header'][key]}, not {header[key]}: "
                "pass another --out, or move the file away."
            )
    return sweep


def _settings(base):
    """The fields that all cells share."""
    own = ("methods", "lr_multiplier", "out", "routes")
    return {key: value for key, value in dataclasses.asdict(base).items() if key not in own}


def _best(cells):
    lines = []
    for method in dict.fromkeys(cell["method"] for cell in cells):
        own = [cell for cell in cells if cell["method"] == method]
        best = min(own, key=lambda cell: cell["loss_x"])
        lines.append(f"{method}: {best['lr_multiplier']:g}, test loss {best['loss_x']:.4f}")
    return "Best multiples of the base rate:\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
