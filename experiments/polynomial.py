"""Paper N's Figures 2, 3 and 4: normalized EF21 and EF21 on a polynomial, Top-1 of d = 4.

Figure 2: the least K of a grid with which steps of length gamma0 / sqrt(K + 1) reach the accuracy
‖∇f(x^k)‖² < ε at some k <= K. Figure 3: both methods at their theoretical step sizes. Figure 4:
EF21 with L0 in the place of a constant L that f has not. In double precision.

The first estimates v^{-1}, which Algorithm 1 leaves open, are the first gradients: so in the
paper's comparison of the two methods. From zero EF21 escapes Figure 4's divergence at some starts.

    python -m experiments.polynomial
    python -m experiments.polynomial --cap 20000
"""

import dataclasses
import pathlib
from typing import Literal

import jax
import numpy as np
import tqdm
import tyro

import ef21_jax as ef21
from ef21_jax import theory
from experiments import bounds, curves, descent, plots, records
from experiments.problems.polynomial import Polynomial


DIMENSION = 4
UPLINK = ef21.TopK(1 / DIMENSION)
ALPHA = 1 / DIMENSION
REACH = 20.0  # D, the paper's estimate of every |x_i|
_CHUNK = 5000  # iterates of a jitted call


@dataclasses.dataclass(frozen=True)
class Config:
    L0: float = 4.0
    L1: tuple[float, ...] = (1.0, 4.0, 8.0)
    iterations: tuple[int, ...] = (2000, 5000, 16000)  # K of Figures 3 and 4, one for each L1
    diverging: int = 1  # Figure 4 is of this one of `L1`, counted from 0
    gamma0s: tuple[float, ...] = (0.1, 1.0, 10.0)  # of Figure 2
    grid: int = 500  # Figure 2's distance between two K; ten times that beyond `coarse`
    coarse: int = 20_000
    cap: int = 200_000  # the largest K
    accuracy: float = 1e-4  # epsilon
    first_estimates: Literal["exact", "zero"] = "exact"  # the first gradients, or zero
    seeds: int = 3  # starts
    json: pathlib.Path = pathlib.Path("results/polynomial.jsonl")  # and beside it the pictures

    def __post_init__(self):
        if not self.L1 or len(self.iterations) != len(self.L1):
            raise ValueError(
                f"`iterations` must have one entry for each of `L1`, got {self.iterations} and "
                f"{self.L1}."
            )
        if not 0 <= self.diverging < len(self.L1):
            raise ValueError(
                f"`diverging` must be a position in `L1`, below {len(self.L1)}, got "
                f"{self.diverging}."
            )
        if not self.gamma0s or not min(self.gamma0s) > 0:
            raise ValueError(f"`gamma0s` must be positive, got {self.gamma0s}.")
        for name in ("grid", "coarse", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.cap < self.grid:
            raise ValueError(f"`cap` must be at least `grid`, {self.grid}, got {self.cap}.")
        if not self.accuracy > 0:
            raise ValueError(f"`accuracy` must be positive, got {self.accuracy}.")


def main(args=None):
    config = tyro.cli(
        Config, args=args, prog="python -m experiments.polynomial", description=__doc__
    )
    command = records.command_line("experiments.polynomial", args)
    settings = dataclasses.asdict(config) | {"json": str(config.json)}
    header = records.header(settings, command)
    with jax.enable_x64(True):
        needed = [
            iterations_needed(config, L1, gamma0) for L1 in config.L1 for gamma0 in config.gamma0s
        ]
        compared = [compare(config, i) for i in range(len(config.L1))]
    third = [line for lines in compared for line in lines if line.get("figure") == "figure3"]
    fourth = [line for lines in compared for line in lines if line.get("figure") == "figure4"]
    kept = [line for lines in compared for line in lines if "bound" in line]
    records.write_lines(config.json, [header, *needed, *third, *fourth, *kept])
    print(_needed_table(config, needed))
    print(_compared_table(config, third + fourth))
    shares = ", ".join(f"{line['largest_share']:.2g}" for line in kept)
    print(f"Largest share of normalized EF21's bound that was measured, by L1: {shares}")
    print(f"Wrote {config.json} and", *curves.pictures(config.json))
    print(f"target bounds_violated {sum(line['violations'] for line in kept)}")


def iterations_needed(config, L1, gamma0):
    """Figure 2's bar: the least K of the grid, for every start, or None where `cap` is too few."""
    problem = Polynomial(config.L0, L1, DIMENSION)
    ks = grid(config, gamma0)
    starts = _starts(config, problem)
    start, k = descent.lanes(np.arange(config.seeds), ks)
    reached = np.zeros(len(k), bool)
    chunks = descent.descend(
        ef21.normalized_ef21,
        problem,
        starts[start],
        gamma0 / np.sqrt(k + 1),
        int(ks[-1]),
        uplink=UPLINK,
        exact=config.first_estimates == "exact",
        measure=descent.squared_gradient,
        chunk=_CHUNK,
    )
    title = f"L1 = {L1:g}, gamma0 = {gamma0:g}"
    with tqdm.tqdm(total=int(ks[-1]) + 1, desc=title, unit="it", disable=None) as bar:
        seen = 0
        for chunk in chunks:
            squared = chunk["squared_gradient"]
            own = seen + np.arange(squared.shape[1]) <= k[:, None]  # a lane's run ends at its K
            reached |= np.any((squared < config.accuracy) & own, axis=1)
            seen += squared.shape[1]
            bar.update(squared.shape[1])
            # What is to come can change no lane of a K that has been.
            if np.all(np.any((reached & (k < seen)).reshape(config.seeds, -1), axis=1)):
                break
    ok = (reached & (k < seen)).reshape(config.seeds, -1)
    needed = [int(ks[np.argmax(row)]) if row.any() else None for row in ok]
    return {
        "figure": "figure2",
        "panel": f"$L_0$ = {config.L0:g}, $L_1$ = {L1:g}",
        "label": f"$γ_0$ = {gamma0:g}",
        "y": "iterations $K$ needed",
        "L1": L1,
        "gamma0": gamma0,
        "needed": needed,
        "cap": int(ks[-1]),
    }


def grid(config, gamma0):
    """K: multiples of `grid`, beyond `coarse` and for gamma0 < 1 of ten times that."""
    fine = np.arange(config.grid, config.coarse + 1, config.grid)
    wide = np.arange(10 * config.grid, config.cap + 1, 10 * config.grid)
    ks = wide if gamma0 < 1 else np.union1d(fine, wide)
    ks = ks[ks <= config.cap]
    return ks if len(ks) else np.array([config.cap])


def compare(config, i):
    """Figure 3's panel number i, Figure 4 where that is the one, and the bound."""
    L1, iterations = config.L1[i], config.iterations[i]
    problem = Polynomial(config.L0, L1, DIMENSION)
    starts = _starts(config, problem)
    normalized = bounds.normalized_of(problem, ALPHA, 1.0)
    runs = {
        "EF21, $L$": (ef21.ef21_sgd, _step_of_ef21(problem.L(REACH))),
        "normalized EF21, $γ_0 / \\sqrt{K + 1}$, $γ_0$ = 1": (
            ef21.normalized_ef21,
            normalized.gamma(iterations),
        ),
        "normalized EF21, $1 / 2c_1$": (ef21.normalized_ef21, 1 / (2 * normalized.c1)),
    }
    panel = f"$L_0$ = {config.L0:g}, $L_1$ = {L1:g}, $K$ = {iterations}"

    def lines(figure, runs):
        return [
            _curve(config, problem, starts, iterations, *run, label=label, figure=figure)
            | {"panel": panel, "L1": L1, "iterations": iterations}
            for label, run in runs.items()
        ]

    found = lines("figure3", runs)
    if i == config.diverging:
        wrong = {"EF21, $L_0$ for $L$": (ef21.ef21_sgd, _step_of_ef21(config.L0))}
        found += lines("figure4", wrong)
        found += [line | {"figure": "figure4"} for line in found[1:3]]
        found[3:] = [line | {"early": True} for line in found[3:]]
    kept = bounds.of_normalized(problem, ALPHA, starts, iterations, uplink=UPLINK)
    return [*found, kept | {"L1": L1}]


def _step_of_ef21(L):
    return theory.EF21(L=L, L_workers=(L,), gap=0.0, alpha=ALPHA).gamma


def _curve(config, problem, starts, iterations, method, step_size, **about):
    steps = np.full(len(starts), step_size)
    path = descent.path(
        method,
        problem,
        starts,
        steps,
        iterations,
        uplink=UPLINK,
        exact=config.first_estimates == "exact",
        measure=descent.squared_gradient,
    )["squared_gradient"]
    below = path < config.accuracy
    reached = [int(np.argmax(row)) if row.any() else None for row in below]
    return curves.curve(
        path, **about, y="$\\|∇f(x^k)\\|^2$", step_size=step_size, reached_after=reached
    )


def _starts(config, problem):
    return np.stack([problem.start(seed) for seed in range(config.seeds)])


def _needed_table(config, lines):
    rows = [("K needed", *(f"gamma0 = {gamma0:g}" for gamma0 in config.gamma0s))]
    for L1 in config.L1:
        cells = [_counts(line["needed"], line["cap"]) for line in lines if line["L1"] == L1]
        rows.append((f"L1 = {L1:g}", *cells))
    return plots.aligned(rows)


def _compared_table(config, lines):
    rows = [("figure", "L1", "K", "step", "‖∇f‖² at the end", "iterations to accuracy", "method")]
    for line in lines:
        last, K = line["median"][-1], line["iterations"]
        rows.append(
            (
                line["figure"].removeprefix("figure"),
                f"{line['L1']:g}",
                str(K),
                f"{line['step_size']:.3g}",
                "not finite" if last is None else f"{last:.3g}",
                _counts(line["reached_after"], K),
                line["label"].replace("$", "").replace("\\sqrt{K + 1}", "√(K + 1)"),
            )
        )
    return plots.aligned(rows)


def _counts(counts, cap):
    return " ".join(f">{cap}" if count is None else str(count) for count in counts)


if __name__ == "__main__":
    main()
