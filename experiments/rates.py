"""Paper M's Table 1: each theorem's bound against runs, and how fast the gradient really falls.

A run has three layers, one in each norm. They do not interact, so that a layer by itself is a run
of the theorem without layers, and two of them, at step sizes for layers, one of the layer-wise.

    python -m experiments.rates
    python -m experiments.rates --json rates.jsonl
"""

import dataclasses
import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
import tyro

import ef21_jax as ef21
from ef21_jax import theory
from experiments import plots, records, rounds
from experiments.problems import quadratics


SHAPE = (3, 4)
WORKERS = 4
NORMS = {
    "spectral": ef21.Spectral(exact=True),
    "sign": ef21.Sign(),
    "frobenius": ef21.Frobenius(),
}
PAIRS = {"spectral, sign": (0, 1), "sign, frobenius": (1, 2), "frobenius, spectral": (2, 0)}
SMOOTH = {
    "same": quadratics.same,
    "different": quadratics.different,
    "waves": quadratics.waves,
}
GENERALIZED = {
    "same": quadratics.same,
    "different": quadratics.different,
    "chirps": quadratics.chirps,
}
# Contractive in the dual of each norm, where gradients are exact; in the Euclidean norm else.
EXACT = {
    "largest": (ef21.RankK(0.5, exact=True), ef21.TopK(0.25), ef21.TopK(0.25)),
    "natural": (ef21.Natural(),) * 3,
    "dropout": (ef21.Dropout(0.5),) * 3,
}
NOISY = {
    "top": (ef21.TopK(0.25),) * 3,
    "rank": (ef21.RankK(0.5, exact=True),) * 3,
    "natural": (ef21.Natural(),) * 3,
}
DUALS = (ef21.Nuclear(), ef21.L1(), ef21.Frobenius())
DOWNLINKS = (ef21.Natural(nearest=True),) * 3


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table."""

    theorem: int
    layers: bool
    smooth: bool
    noisy: bool

    @property
    def name(self):
        return f"theorem_{self.theorem}"

    @property
    def promised(self):
        """The slope of the gradient norm against K."""
        return -1 / 4 if self.noisy else -1 / 2

    @property
    def depends_on_iterations(self):
        """Whether the step size does: then each K is a run of its own."""
        return self.noisy or not self.smooth


ROWS = (
    Row(3, layers=False, smooth=True, noisy=False),
    Row(14, layers=True, smooth=True, noisy=False),
    Row(4, layers=False, smooth=False, noisy=False),
    Row(17, layers=True, smooth=False, noisy=False),
    Row(5, layers=False, smooth=True, noisy=True),
    Row(19, layers=True, smooth=True, noisy=True),
    Row(6, layers=False, smooth=False, noisy=True),
    Row(24, layers=True, smooth=False, noisy=True),
)


@dataclasses.dataclass(frozen=True)
class Config:
    iterations: tuple[int, ...] = (
        32,
        128,
        512,
        2048,
    )  # K of the runs whose step size depends on it
    longest: int = 4096  # the largest K of the others
    seeds: int = 10  # of noise and random compressors
    noise: float = 1.0  # σ of a layer's gradient
    distance: float = 1.0  # of the start from the centre, in each entry
    json: pathlib.Path | None = None  # JSON lines, one a cell; and the same name with .png

    def __post_init__(self):
        if len(self.iterations) < 2 or min(self.iterations) < 1:
            raise ValueError(
                f"`iterations` must be two or more positive numbers, got {self.iterations}."
            )
        for name in ("longest", "seeds", "noise", "distance"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")


def main(args=None):
    config = tyro.cli(Config, args=args, prog="python -m experiments.rates", description=__doc__)
    cells = run(config)
    print(table(cells))
    if config.json is not None:
        settings = dataclasses.asdict(config) | {"json": str(config.json)}
        header = records.header(settings, records.command_line("experiments.rates", args))
        records.write_lines(config.json, [header, *cells])
        print(f"Wrote {config.json} and {plots.rates_picture(config.json)}")
    for name, value in targets(cells).items():
        print(f"target {name} {value:g}")


def run(config):
    """One record a row, problem, compressor and norm: K, left sides, bounds, gradient norms."""
    cells = []
    jobs = list(itertools.product((True, False), (False, True), range(3)))
    for smooth, noisy, family in tqdm.tqdm(jobs, desc="rates", unit="program", leave=False):
        rows = [row for row in ROWS if (row.smooth, row.noisy) == (smooth, noisy)]
        name, uplinks = list((NOISY if noisy else EXACT).items())[family]
        cells += _measure(config, rows, name, uplinks)
    order = {row.name: i for i, row in enumerate(ROWS)}
    return sorted(cells, key=lambda cell: order[cell["row"]])


def by_row(cells):
    """`{row: its cells}`, in the order of the table."""
    return {
        row.name: own
        for row in ROWS
        if (own := [cell for cell in cells if cell["row"] == row.name])
    }


def table(cells):
    """One line a row of the paper's table."""
    lines = [
        ("", "layer-wise", "smooth", "promised", "measured slopes", "left / bound", "within"),
    ]
    for row in ROWS:
        own = by_row(cells).get(row.name, [])
        slopes = [cell["slope"] for cell in own]
        worst = max(a / b for cell in own for a, b in zip(cell["left"], cell["bound"], strict=True))
        lines.append(
            (
                f"Theorem {row.theorem}",
                "yes" if row.layers else "no",
                "yes" if row.smooth else "no",
                f"{row.promised:g}",
                f"{min(slopes):.2f} to {max(slopes):.2f}",
                f"<= {worst:.2g}",
                f"{sum(cell['within'] for cell in own)} of {len(own)}",
            )
        )
    return plots.aligned(lines)


def targets(cells):
    """The shallowest slope of each row, and of how many rows no bound is exceeded anywhere."""
    rows = by_row(cells)
    figures = {f"slope_of_{name}": max(cell["slope"] for cell in own) for name, own in rows.items()}
    within = sum(all(cell["within"] for cell in own) for own in rows.values())
    return figures | {"rows_of_table1_within_bound": within}


def _measure(config, rows, family, uplinks):
    """The cells of two rows, without layers and with, that share a program."""
    smooth, noisy = rows[0].smooth, rows[0].noisy
    method = rounds.Method(
        norms=tuple(NORMS.values()),
        uplinks=uplinks,
        downlinks=DOWNLINKS if smooth else None,
        sharp=smooth,
        noisy=noisy,
        warm=smooth or not noisy,
    )
    problems = {
        name: [Layer.of(config, make, i, method) for i in range(3)]
        for name, make in (SMOOTH if smooth else GENERALIZED).items()
    }
    random = noisy or not all(isinstance(c, ef21.TopK | ef21.RankK) for c in uplinks)
    seeds = config.seeds if random else 1
    grid = config.iterations if rows[0].depends_on_iterations else (config.longest,)
    runs = [(row, name) for row in rows for name in problems]
    found = {}
    for K in grid:
        settings = [_settings(row, problems[name], K) for row, name in runs]
        lanes = rounds.Lanes(
            workers=_stack(
                [[layer.problem.workers for layer in problems[n]] for _, n in runs], seeds
            ),
            starts=_stack([[layer.start for layer in problems[n]] for _, n in runs], seeds),
            rates=np.repeat([rates for rates, _ in settings], seeds, axis=0),
            decays=np.repeat([decay for _, decay in settings], seeds, axis=0),
            sigmas=np.full((len(runs) * seeds, 3), config.noise),
            seeds=np.tile(np.arange(seeds), len(runs)),
        )
        norms = rounds.dual_norms(method, lanes, K + 1)
        norms = norms.reshape(K + 1, len(runs), seeds, 3)
        for i, (row, name) in enumerate(runs):
            found.setdefault((row, name), {})[K] = norms[:, i]
    cells = []
    for (row, name), by_k in found.items():
        for norm, chosen in (
            PAIRS if row.layers else {n: (i,) for i, n in enumerate(NORMS)}
        ).items():
            curve = _curve(row, problems[name], chosen, by_k)
            cells.append(
                {"row": row.name, "problem": name, "compressor": family, "norm": norm, **curve}
            )
    return cells


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a problem, and its constants in its norm."""

    problem: quadratics.Quadratics
    norm: ef21.Norm
    start: np.ndarray
    alpha_D: float
    alpha_P: float
    sigma: float

    @classmethod
    def of(cls, config, make, i, method):
        problem, norm = make(WORKERS, SHAPE, seed=i), method.norms[i]
        return cls(
            problem=problem,
            norm=norm,
            start=problem.start(seed=i, distance=config.distance),
            alpha_D=method.uplinks[i].contraction(SHAPE, None if method.noisy else DUALS[i]),
            alpha_P=1.0
            if method.downlinks is None
            else method.downlinks[i].contraction(SHAPE, norm),
            sigma=config.noise,
        )

    @property
    def gap(self):
        """f(X^0) − f*."""
        return float(np.mean(self._at_start(self.problem.loss))) - self.problem.lower

    @property
    def start_gradient(self):
        """mean_j ‖∇f_j(X^0)‖_2."""
        gradients = self._at_start(jax.grad(self.problem.loss))
        return float(np.mean(np.linalg.norm(gradients, axis=(1, 2))))

    def _at_start(self, function):
        workers = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), self.problem.workers)
        return jax.vmap(function, in_axes=(None, 0))(jnp.asarray(self.start, float), workers)


def _settings(row, layers, K):
    """What a run is given for K iterations: the rates of its three layers, and 1 − β."""
    if row.layers:
        theorem = _theorem(row, layers, (0, 1, 2), K)
        return _rates(row, theorem, K), 1 - _beta(row, layers, K)
    rates = [_rates(row, _theorem(row, layers, (i,), K), K)[0] for i in range(3)]
    return rates, 1 - _beta(row, layers, K)


def _rates(row, theorem, K):
    schedules = theorem.step_size() if row.smooth else theorem.radius(K)
    return [schedule(0) for schedule in (schedules if row.layers else (schedules,))]


def _beta(row, layers, K):
    """One for all layers, since runs share it: the least that Corollary 2 gives to one of them."""
    if not row.noisy:
        return 1.0
    if not row.smooth:
        return 1 / math.sqrt(K + 1)
    single = dataclasses.replace(row, layers=False)
    return min(theory.Corollary2(**_constants(single, layers, (i,))).beta(K) for i in range(3))


def _theorem(row, layers, chosen, K):
    """The theorem of a row on the layers that are `chosen`, at K iterations."""
    constants = _constants(row, layers, chosen)
    if row.smooth and row.noisy:
        beta = _beta(row, layers, K)
        constants["beta"] = (beta,) * len(chosen) if row.layers else beta
    if row.layers and row.smooth and row.noisy:
        return theory.Corollary1(**constants)
    if row.layers and row.noisy:
        return theory.Corollary3(**constants)
    if not row.smooth and not row.noisy:
        constants["eta"] = [_eta(row, layers, i) for i in chosen]
        constants["eta"] = constants["eta"] if row.layers else constants["eta"][0]
    return getattr(theory, f"Theorem{row.theorem}")(**constants)


def _constants(row, layers, chosen):
    """By the names that the theorems of a row have for them; one a layer for those with layers."""
    own = [layers[i] for i in chosen]
    # α of all the layers of a run, so that no step size depends on which of them are looked at.
    shared = layers if row.layers else own
    constants = {
        "gap": sum(layer.gap for layer in own),
        "alpha_D": min(layer.alpha_D for layer in shared),
    }
    if row.smooth:
        constants["alpha_P"] = min(layer.alpha_P for layer in shared)
        by_layer = {
            key: values
            for key, values in zip(
                ("L", "L_workers"),
                zip(*(layer.problem.smoothness(layer.norm) for layer in own), strict=True),
                strict=True,
            )
        }
    else:
        constants["worker_gaps"] = _worker_gaps(own)
        by_layer = dict(
            zip(
                ("L0", "L1", "L0_workers", "L1_workers"),
                zip(*(layer.problem.generalized(layer.norm) for layer in own), strict=True),
                strict=True,
            )
        )
    if row.noisy:
        by_layer["sigma"] = [layer.sigma for layer in own]
        by_layer["rho"] = [layer.norm.equivalence(SHAPE) for layer in own]
        if not row.smooth:
            key = "start_gradients" if row.layers else "start_gradient"
            by_layer[key] = [layer.start_gradient for layer in own]
    if row.layers:
        return constants | by_layer
    return constants | {key: value[0] for key, value in by_layer.items()}


def _worker_gaps(layers):
    lower = sum(layer.problem.lower for layer in layers)
    each = zip(*(layer.problem.worker_lowers for layer in layers), strict=True)
    return [lower - sum(parts) for parts in each]


def _eta(row, layers, i):
    """Of the layer alone: of a grid of ratio √2, that with the least bound."""
    single = dataclasses.replace(row, layers=False)
    constants = _constants(single, layers, (i,))
    constants["alpha_D"] = _constants(row, layers, (i,))["alpha_D"]
    etas = [2 ** (j / 2) for j in range(-20, 11)]
    return min(etas, key=lambda eta: theory.Theorem4(**constants, eta=eta).bound(1))


def _curve(row, layers, chosen, by_k):
    """Left sides, bounds and best gradient norms, at each K."""
    columns = {"iterations": [], "left": [], "bound": [], "gradient": []}
    power = 2 if row.smooth else 1
    within = True
    for K, norms in by_k.items():
        theorem = _theorem(row, layers, chosen, K)
        weights = _weights(row, theorem, K)
        # E over seeds, then the weighted sum over layers.
        means = np.mean(norms[..., chosen] ** power, axis=1) @ np.asarray(weights)
        best = np.minimum.accumulate(means)
        grid = [K] if row.depends_on_iterations else range(1, K + 1)
        bounds = np.array([theorem.bound(k) for k in grid])
        if row.smooth:
            left = np.array([np.mean(means[:K])])
            if not row.depends_on_iterations:
                left = np.cumsum(means[:K]) / np.arange(1, K + 1)
        else:
            left = best[-1:]
        within = within and bool(np.all(left <= bounds))
        for j, k in enumerate(grid):
            if row.depends_on_iterations or (k >= 16 and k.bit_count() == 1):
                last = k - 1 if row.smooth else k
                columns["iterations"].append(k)
                for key, value in (
                    ("left", left[j]),
                    ("bound", bounds[j]),
                    ("gradient", best[last] ** (1 / power)),
                ):
                    columns[key].append(float(f"{value:.5g}"))
    columns |= {"within": within, "slope": _slope(columns), "promised": row.promised}
    return columns | {"squared": row.smooth}


def _weights(row, theorem, K):
    if not row.layers:
        return (1.0,)
    return theorem.weights(K) if row.noisy and not row.smooth else theorem.weights


def _slope(columns):
    """Of the best gradient norm against K, both logarithmic: least squares."""
    points = np.log([columns["iterations"], np.maximum(columns["gradient"], 1e-30)])
    return float(np.polyfit(*points, 1)[0])


def _stack(parts, seeds):
    """Trees of equal structure as one, stacked, each `seeds` times; lists become tuples."""
    parts = [tuple(part) for part in parts]
    return jax.tree.map(lambda *leaves: np.repeat(np.stack(leaves), seeds, axis=0), *parts)


if __name__ == "__main__":
    main()
