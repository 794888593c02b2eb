"""Paper N's Figure 1: normalized EF21 against EF21 at their theoretical step sizes.

Logistic regression with a nonconvex regularizer, a worker for each sample, Top-k. Beside it, both
theorems' bounds are held against runs at many K. In double precision.

    python -m experiments.logistic
    python -m experiments.logistic --datasets synthetic breast-cancer a1a
    python -m experiments.logistic --datasets breast-cancer a1a --data-dir FOLDER
"""

import dataclasses
import pathlib
from typing import Literal

import jax
import numpy as np
import tqdm
import tyro

import ef21_jax as ef21
from experiments import bounds, curves, descent, plots, records
from experiments.data import libsvm
from experiments.problems import logistic


Dataset = Literal["synthetic", "breast-cancer", "a1a"]
ITERATIONS = {"synthetic": 100, "breast-cancer": 100, "a1a": 400}  # K, the paper's


@dataclasses.dataclass(frozen=True)
class Config:
    datasets: tuple[Dataset, ...] = ("synthetic",)  # the others are fetched, or in `data_dir`
    ks: tuple[int, ...] = (1,)  # of Top-k; the paper does not print its own. The first is drawn
    gamma0: float = 1.0  # of normalized EF21: steps of length gamma0 / sqrt(K + 1)
    iterations: int | None = None  # K; None: the paper's
    penalty: float = 0.1  # lambda
    first_estimates: Literal["exact", "zero"] = "exact"  # the first gradients, or zero
    seeds: int = 5  # starts
    data_seed: int = 0  # of the synthetic data
    data_dir: pathlib.Path | None = None  # a folder with LIBSVM's files; None: download
    json: pathlib.Path = pathlib.Path("results/logistic.jsonl")  # and beside it the picture

    def __post_init__(self):
        unknown = set(self.datasets) - set(ITERATIONS)
        if unknown or not self.datasets:
            raise ValueError(f"`datasets` must be among {list(ITERATIONS)}, got {self.datasets}.")
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"`ks` must be at least 1, got {self.ks}.")
        if self.iterations is not None and self.iterations < 1:
            raise ValueError(f"`iterations` must be at least 1, got {self.iterations}.")
        if not self.gamma0 > 0:
            raise ValueError(f"`gamma0` must be positive, got {self.gamma0}.")
        if self.seeds < 1:
            raise ValueError(f"`seeds` must be at least 1, got {self.seeds}.")


def main(args=None):
    config = tyro.cli(Config, args=args, prog="python -m experiments.logistic", description=__doc__)
    command = records.command_line("experiments.logistic", args)
    lines = [records.header(dataclasses.asdict(config) | _paths(config), command)]
    cells = [(name, k) for name in config.datasets for k in config.ks]
    rows, wins = [], {name: True for name in config.datasets}
    with jax.enable_x64(True):
        for name, k in tqdm.tqdm(cells, desc="logistic", unit="run", disable=None):
            problem = _problem(config, name)
            cell = compare(config, name, k, problem)
            lines += cell["lines"]
            rows.append(_row(cell))
            wins[name] &= cell["wins"] == config.seeds
    records.write_lines(config.json, lines)
    print(plots.aligned([_HEAD, *rows]))
    print(_NOTE)
    print(f"Wrote {config.json} and", *curves.pictures(config.json))
    print(f"target data_sets_where_normalized_wins {sum(wins.values())}")
    violated = sum(line.get("violations", 0) for line in lines)
    print(f"target bounds_violated {violated}")


def compare(config, name, k, problem):
    """Both methods from the same starts: lines of record, and what the table says of them."""
    if k > problem.dimension:
        raise ValueError(f"`ks` must not exceed {name}'s {problem.dimension} features, got {k}.")
    iterations = config.iterations or ITERATIONS[name]
    uplink = ef21.TopK(k / problem.dimension)
    alpha = uplink.contraction((problem.dimension,))
    starts = np.stack([problem.start(seed) for seed in range(config.seeds)])
    runs = {
        "EF21": (ef21.ef21_sgd, bounds.ef21_of(problem, alpha).gamma),
        "normalized EF21": (
            ef21.normalized_ef21,
            bounds.normalized_of(problem, alpha, config.gamma0).gamma(iterations),
        ),
    }
    paths, lines = {}, []
    about = {"data": name, "n": len(problem.labels), "d": problem.dimension, "top_k": k}
    for label, (method, step_size) in runs.items():
        steps = np.full(config.seeds, step_size)
        paths[label] = descent.path(
            method,
            problem,
            starts,
            steps,
            iterations,
            uplink=uplink,
            exact=config.first_estimates == "exact",
        )
        drawn = {"figure": "figure1", "panel": f"{name}, Top-{k}", "y": "$\\|∇f(x^k)\\|^2$"}
        lines.append(
            curves.curve(
                paths[label]["squared_gradient"],
                **(drawn if k == config.ks[0] else {}),
                **about,
                label=label,
                step_size=step_size,
                iterations=iterations,
            )
        )
    kept = [
        bounds.of_ef21(problem, alpha, paths["EF21"]),
        bounds.of_normalized(problem, alpha, starts[:1], iterations, uplink=uplink),
    ]
    lines += [about | line for line in kept]
    last = {label: path["squared_gradient"][:, -1] for label, path in paths.items()}
    return about | {
        "lines": lines,
        "iterations": iterations,
        "step_sizes": {label: step_size for label, (_, step_size) in runs.items()},
        "last": last,
        "wins": int(np.sum(last["normalized EF21"] < last["EF21"])),
        "shares": [line["largest_share"] for line in kept],
    }


def _problem(config, name):
    if name == "synthetic":
        return logistic.synthetic(config.data_seed, penalty=config.penalty)
    return logistic.Logistic(*libsvm.load(name, config.data_dir), config.penalty)


_HEAD = (
    *("data", "n", "d", "Top-k", "K", "γ of EF21", "γ of norm.", "‖∇f‖² EF21", "‖∇f‖² norm."),
    *("wins", "of bound: EF21", "norm."),
)
_NOTE = (
    "‖∇f‖² at x^K, median over the starts; wins: starts from which normalized EF21 ends lower.\n"
    "Of bound: the largest share of the theorem's bound that was measured, over K; EF21 from all\n"
    f"starts, normalized EF21 from the first, at γ0 = 1 / (8 c L1): at {Config.gamma0:g} it "
    "overflows."
)


def _row(cell):
    last = [np.median(cell["last"][label]) for label in ("EF21", "normalized EF21")]
    counts = (str(cell[name]) for name in ("n", "d", "top_k", "iterations"))
    small = (f"{x:.3g}" for x in (*cell["step_sizes"].values(), *last))
    wins = f"{cell['wins']}/{len(cell['last']['EF21'])}"
    return (cell["data"], *counts, *small, wins, *(f"{share:.2g}" for share in cell["shares"]))


def _paths(config):
    """For the record: paths as strings; where the data lies is nobody's business."""
    return {"json": str(config.json), "data_dir": None if config.data_dir is None else "given"}


if __name__ == "__main__":
    main()
