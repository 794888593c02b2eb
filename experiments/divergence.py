"""Feedback against none: three workers on which Top-1 without feedback diverges for every step.

Beznosikov et al., Example 1 (`experiments.problems.counterexample`), from its own start and from
random ones, at EF21's theoretical step size and at multiples of it. In double precision.

    python -m experiments.divergence
    python -m experiments.divergence --multiples 1 8 64 --iterations 200
"""

import dataclasses
import pathlib

import jax
import numpy as np
import tyro

import ef21_jax as ef21
from experiments import bounds, curves, descent, plots, records
from experiments.problems.counterexample import Counterexample


PROBLEM = Counterexample()
UPLINK = ef21.TopK(1 / 3)
METHODS = {
    "no feedback": ef21.compressed_sgd,
    "EF21": ef21.ef21_sgd,
    "EF14": ef21.ef14_sgd,
}


@dataclasses.dataclass(frozen=True)
class Config:
    iterations: int = 1000  # K
    multiples: tuple[float, ...] = (0.25, 1.0, 4.0)  # of EF21's theoretical step size
    seeds: int = 5  # starts; the first is the example's own, (1, 1, 1)
    json: pathlib.Path = pathlib.Path("results/divergence.jsonl")  # and beside it the picture

    def __post_init__(self):
        if not self.multiples or not min(self.multiples) > 0:
            raise ValueError(f"`multiples` must be positive, got {self.multiples}.")
        for name in ("iterations", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


def main(args=None):
    config = tyro.cli(
        Config, args=args, prog="python -m experiments.divergence", description=__doc__
    )
    command = records.command_line("experiments.divergence", args)
    settings = dataclasses.asdict(config) | {"json": str(config.json)}
    step_size = bounds.ef21_of(PROBLEM, 1 / 3).gamma
    with jax.enable_x64(True):
        lines, paths = sweep(config, step_size)
        starts = np.stack([PROBLEM.start(seed) for seed in range(config.seeds)])
        at_theorem = descent.path(
            ef21.ef21_sgd,
            PROBLEM,
            starts,
            np.full(config.seeds, step_size),
            config.iterations,
            uplink=UPLINK,
        )
    kept = bounds.of_ef21(PROBLEM, 1 / 3, at_theorem)
    records.write_lines(config.json, [records.header(settings, command), *lines, kept])
    print(_table(config, step_size, paths))
    print(f"Largest share of EF21's bound that was measured: {kept['largest_share']:.2g}")
    print(f"Wrote {config.json} and", *curves.pictures(config.json))
    half = config.iterations // 2  # by then a random start has come near to (1, 1, 1)
    rising = {label: np.sum(p[:, :, -1] > p[:, :, half]) for label, p in paths.items()}
    for label, count in rising.items():
        print(f"target runs_that_rise_{label.lower().replace(' ', '_')} {count}")
    print(f"target runs_of_each_method {len(config.multiples) * config.seeds}")
    print(f"target bounds_violated {kept['violations']}")


def sweep(config, step_size):
    """Lines of record, and by method ‖∇f‖², (multiples, seeds, K + 1)."""
    seeds, multiples = np.arange(config.seeds), np.asarray(config.multiples)
    multiple, seed = descent.lanes(multiples, seeds)
    starts = np.stack([PROBLEM.start(int(s)) for s in seed])
    lines, paths = [], {}
    for label, method in METHODS.items():
        path = descent.path(
            method,
            PROBLEM,
            starts,
            multiple * step_size,
            config.iterations,
            uplink=UPLINK,
            measure=descent.squared_gradient,
        )["squared_gradient"]
        paths[label] = path.reshape(len(multiples), len(seeds), -1)
        lines += [
            curves.curve(
                own,
                figure="figure",
                panel=f"step {m:g} times EF21's",
                label=label,
                y="$\\|∇f(x^k)\\|^2$",
                step_size=float(m * step_size),
                dash=int(label == "EF14"),
            )
            for m, own in zip(multiples, paths[label], strict=True)
        ]
    return sorted(lines, key=lambda line: line["step_size"]), paths


def _table(config, step_size, paths):
    """Of the example's own start: how many times longer the gradient is after a step."""
    rows = [("step", "1 + 11γ/6", *(f"{label}, a step" for label in paths), *paths)]
    for i, multiple in enumerate(config.multiples):
        own = multiple * step_size
        growth = [(p[i, 0, -1] / p[i, 0, 0]) ** (0.5 / config.iterations) for p in paths.values()]
        last = [np.median(path[i, :, -1]) for path in paths.values()]
        rows.append(
            (
                f"{own:.4g}",
                f"{PROBLEM.growth(own):.6f}",
                *(f"{x:.6f}" for x in growth),
                *(f"{x:.3g}" for x in last),
            )
        )
    note = (
        "A step: ‖∇f‖ after a step over that before, on average, from (1, 1, 1).\n"
        f"The last {len(paths)}: ‖∇f(x^K)‖², median over the starts."
    )
    return f"{plots.aligned(rows)}\n{note}"


if __name__ == "__main__":
    main()
