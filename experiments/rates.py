"""Paper M's Table 1: each theorem's bound against runs, and how fast the gradient really falls.

A run has three layers, one in each norm. They do not interact, so that a layer by itself is a run
of the theorem without layers, and two of them, at step sizes for layers, one of the layer-wise.

    python -m experiments.rates
    python -m experiments.rates --json rates.jsonl
"""

import dataclasses
import functools
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
SINGLES = {name: (i,) for i, name in enumerate(NORMS)}
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
_NAMES = [row.name for row in ROWS]
_GENERALIZED = ("L0", "L1", "L0_workers", "L1_workers")


@dataclasses.dataclass(frozen=True)
class Config:
    iterations: tuple[int, ...] = tuple(2**i for i in range(2, 12))  # K, where a run is for one
    longest: int = 4096  # K, where a run is for all that are smaller
    seeds: int = 10  # of noise and random compressors
    theorems: tuple[int, ...] = tuple(row.theorem for row in ROWS)
    compressors: tuple[str, ...] = (*EXACT, "top", "rank")  # the last two where there is noise
    noise: float = 1.0  # σ of a layer's gradient
    distance: float = 1.0  # of the start from the centre, in each entry
    json: pathlib.Path | None = None  # JSON lines, one a cell; and the same name with .png

    def __post_init__(self):
        if len(self.iterations) < 2 or min(self.iterations) < 1:
            raise ValueError(
                f"`iterations` must be two or more positive numbers, got {self.iterations}."
            )
        for name, known in (("theorems", Config.theorems), ("compressors", Config.compressors)):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown or not getattr(self, name):
                raise ValueError(f"`{name}` must be some of {known}, got {getattr(self, name)}.")
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
    jobs = []
    for smooth, noisy in itertools.product((True, False), (False, True)):
        rows = [
            row
            for row in ROWS
            if (row.smooth, row.noisy) == (smooth, noisy) and row.theorem in config.theorems
        ]
        for name, uplinks in (NOISY if noisy else EXACT).items():
            if rows and name in config.compressors:
                jobs.append((rows, name, uplinks))
    cells = []
    for job in tqdm.tqdm(jobs, desc="rates", unit="program", leave=False):
        cells += _measure(config, *job)
    return sorted(cells, key=lambda cell: _NAMES.index(cell["row"]))


def by_row(cells):
    """`{row: its cells}`, in the order of the table."""
    return {
        row.name: own
        for row in ROWS
        if (own := [cell for cell in cells if cell["row"] == row.name])
    }


def table(cells):
    """One line a row of the paper's table; slopes over all K, and over the larger half of them."""
    lines = [
        ("", "layer-wise", "smooth", "promised", "slopes", "later half", "left / bound", "within"),
    ]
    for name, own in by_row(cells).items():
        row = ROWS[_NAMES.index(name)]
        worst = max(a / b for cell in own for a, b in zip(cell["left"], cell["bound"], strict=True))
        lines.append(
            (
                f"Theorem {row.theorem}",
                "yes" if row.layers else "no",
                "yes" if row.smooth else "no",
                f"{row.promised:g}",
                _range(cell["slope"] for cell in own),
                _range(cell["late_slope"] for cell in own),
                f"<= {worst:.2g}",
                f"{sum(cell['within'] for cell in own)} of {len(own)}",
            )
        )
    return plots.aligned(lines)


def _range(slopes):
    slopes = sorted(slopes)
    return f"{slopes[0]:.2f} to {slopes[-1]:.2f}"


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
        name: [Layer.of(config, make, method, i) for i in range(3)]
        for name, make in (SMOOTH if smooth else GENERALIZED).items()
    }
    random = noisy or not all(isinstance(c, ef21.TopK | ef21.RankK) for c in uplinks)
    seeds = config.seeds if random else 1
    runs = [(row, name) for row in rows for name in problems]
    norms = {}
    for K in config.iterations if rows[0].depends_on_iterations else (config.longest,):
        lanes = _lanes([(row, problems[name]) for row, name in runs], K, seeds)
        measured = rounds.dual_norms(method, lanes, K + 1)
        norms[K] = measured.reshape(K + 1, len(runs), seeds, 3)
    cells = []
    for i, (row, problem) in enumerate(runs):
        for norm, chosen in (PAIRS if row.layers else SINGLES).items():
            cell = {"row": row.name, "problem": problem, "compressor": family, "norm": norm}
            by_k = {K: measured[:, i][..., chosen] for K, measured in norms.items()}
            cells.append(cell | _curve(row, problems[problem], chosen, by_k))
    return cells


def _lanes(runs, K, seeds):
    """Every run `seeds` times."""
    settings = [_settings(row, layers, K) for row, layers in runs]
    tree = rounds.Lanes(
        workers=_stack([[layer.problem.workers for layer in layers] for _, layers in runs]),
        starts=_stack([[layer.start for layer in layers] for _, layers in runs]),
        rates=np.array([rates for rates, _ in settings]),
        decays=np.array([decay for _, decay in settings]),
        sigmas=np.array([[layer.sigma for layer in layers] for _, layers in runs]),
        seeds=np.zeros(len(runs), int),
    )
    tree = jax.tree.map(lambda leaf: np.repeat(leaf, seeds, axis=0), tree)
    return dataclasses.replace(tree, seeds=np.tile(np.arange(seeds), len(runs)))


def _stack(parts):
    """Lists of equal trees, as a tuple of trees of stacked leaves."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(tuple, parts))


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a problem, and its constants in its norm."""

    problem: quadratics.Quadratics
    norm: ef21.Norm
    start: np.ndarray
    sigma: float
    alpha_D: float
    alpha_P: float

    @classmethod
    def of(cls, config, make, method, i):
        problem, norm = make(WORKERS, SHAPE, seed=i), method.norms[i]
        return cls(
            problem=problem,
            norm=norm,
            start=problem.start(seed=i, distance=config.distance),
            sigma=config.noise,
            alpha_D=method.uplinks[i].contraction(SHAPE, None if method.noisy else DUALS[i]),
            alpha_P=method.downlinks[i].contraction(SHAPE, norm) if method.downlinks else 1.0,
        )

    @functools.cached_property
    def gap(self):
        """f(X^0) − f*."""
        return float(np.mean(self._at_start(self.problem.loss))) - self.problem.lower

    @functools.cached_property
    def start_gradient(self):
        """mean_j ‖∇f_j(X^0)‖_2."""
        gradients = self._at_start(jax.grad(self.problem.loss))
        return float(np.mean(np.linalg.norm(gradients, axis=(1, 2))))

    @functools.cached_property
    def smooth(self):
        """L, L_j."""
        return self.problem.smoothness(self.norm)

    @functools.cached_property
    def generalized(self):
        """L0, L1, and those of the workers."""
        return self.problem.generalized(self.norm)

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
        names, values = ("L", "L_workers"), [layer.smooth for layer in own]
    else:
        constants["worker_gaps"] = _worker_gaps(own)
        names, values = _GENERALIZED, [layer.generalized for layer in own]
    by_layer = dict(zip(names, zip(*values, strict=True), strict=True))
    if row.noisy:
        by_layer["sigma"] = [layer.sigma for layer in own]
        by_layer["rho"] = [layer.norm.equivalence(SHAPE) for layer in own]
        if not row.smooth:
            name = "start_gradients" if row.layers else "start_gradient"
            by_layer[name] = [layer.start_gradient for layer in own]
    if row.layers:
        return constants | by_layer
    return constants | {name: value[0] for name, value in by_layer.items()}


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
    """Left sides, bounds and best gradient norms at each K, and what they amount to.

    A step size that does not depend on K makes one run do for every K up to its own.

    Args:
      by_k: of each K, ‖∇_i f(X^k)‖_*, (K + 1, seeds, chosen layers).
    """
    columns, within = {"iterations": [], "left": [], "bound": [], "gradient": []}, True
    for K, norms in by_k.items():
        theorem = _theorem(row, layers, chosen, K)
        k = np.array([K]) if row.depends_on_iterations else np.arange(1, K + 1)
        bound = np.array([theorem.bound(int(one)) for one in k])
        weights = np.asarray(_weights(row, theorem, K))
        if row.smooth:  # over X^0, …, X^(k−1), with squares
            mean = np.mean(norms**2, axis=1) @ weights
            left = (np.cumsum(mean) / np.arange(1, K + 2))[k - 1]
            gradient = np.sqrt(np.minimum.accumulate(mean))[k - 1]
        else:  # over X^0, …, X^k
            left = gradient = np.minimum.accumulate(np.mean(norms, axis=1) @ weights)[k]
        within &= bool(np.all(left <= bound))
        shown = np.isin(k, [K, *(2**power for power in range(4, 40))])
        for name, values in zip(columns, (k, left, bound, gradient), strict=True):
            columns[name] += [float(f"{value:.5g}") for value in values[shown]]
    points = columns["iterations"], columns["gradient"]
    half = min(len(points[0]) // 2, len(points[0]) - 2)  # two points make a slope
    return columns | {
        "within": within,
        "promised": row.promised,
        "slope": _slope(*points),
        "late_slope": _slope(*(values[half:] for values in points)),
        "squared": row.smooth,
    }


def _weights(row, theorem, K):
    if not row.layers:
        return (1.0,)
    return theorem.weights(K) if row.noisy and not row.smooth else theorem.weights


def _slope(iterations, gradients):
    """Of the gradient norm against K, both logarithmic: least squares."""
    points = np.log([iterations, np.maximum(gradients, 1e-30)])
    return float(np.polyfit(*points, 1)[0])


if __name__ == "__main__":
    main()
