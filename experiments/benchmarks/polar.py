"""The spectral LMO, by Newton-Schulz: its time against optax's, and how good a step it gives.

A step O is judged by its alignment ⟨G, O⟩ / (‖G‖_* ‖O‖₂) with the exact one: the share of the best
value of the linear problem that it reaches, 1 for U Vᵀ. Against a float64 decomposition of G, for
matrices of many spectra, wide, tall and square, each scaled by 1, 1e30 and 1e-30.

optax's is `optax.contrib.scale_by_muon` without momentum; `optax_scan` gives it the same
coefficients as an array, of which it makes a faster program.

    python -m experiments.benchmarks.polar
    python -m experiments.benchmarks.polar --dtype bfloat16 --size 1024 --json polar.json
"""

import dataclasses
import functools
import statistics
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import ef21_jax as ef21
from experiments.benchmarks import timing


MODULE = "experiments.benchmarks.polar"
DEFAULT = "polar_express"
BFLOAT16 = "polar_express_bf16"  # what is multiplied, and no more
SCALES = (1.0, 1e30, 1e-30)


@dataclasses.dataclass(frozen=True)
class Config(timing.Config):
    turns: int = 15  # each of them times everything once
    size: int = 768  # m: timed are m × 4m, 4m × m and m × m
    alignment_size: int = 256  # m of the matrices that alignment is measured on
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the timed matrices
    matmul_size: int | None = None  # of the product that gives the peak; None: large enough
    seed: int = 0  # of the matrices


def main(args=None):
    config = timing.configure(Config, MODULE, __doc__, args)
    figures, times = speed(config)
    qualities = alignments(config)
    figures |= {
        "worst_alignment": min(row["alignment"] for row in qualities[DEFAULT].values()),
        "bf16_worst_alignment": min(row["alignment"] for row in qualities[BFLOAT16].values()),
        "bf16_largest_sigma": max(row["largest_sigma"] for row in qualities[BFLOAT16].values()),
    }
    print_alignments(qualities)
    timing.finish(config, MODULE, args, figures, times=times, alignments=qualities)


def methods():
    """name -> function of a matrix, its approximate polar factor."""

    def ours(*settings, **more):
        norm = ef21.Spectral(*settings, **more)
        return lambda x: -norm.lmo(x)

    def optax_with(**coefficients):
        tx = optax.contrib.scale_by_muon(
            beta=0.0,
            nesterov=False,
            weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(),
            **coefficients,
        )
        return lambda x: tx.update(x, tx.init(x))[0]

    return {
        DEFAULT: ours(),
        BFLOAT16: ours(dtype=jnp.bfloat16),
        "polar_express_5": ours(ef21.polar_express(5)),
        "polar_express_8": ours(ef21.polar_express(8)),
        "jordan": ours(ef21.JORDAN),
        "optax": optax_with(),
        "optax_scan": optax_with(ns_coeffs=ef21.JORDAN),
    }


def shapes(size):
    return {"wide": (size, 4 * size), "tall": (4 * size, size), "square": (size, size)}


def speed(config):
    """Figures, and the milliseconds and rates behind them."""
    rng = np.random.default_rng(config.seed)
    programs, flops = {}, {}
    for form, shape in shapes(config.size).items():
        x = jnp.asarray(rng.normal(size=shape), config.dtype)
        for name, method in methods().items():
            programs[form, name] = jax.jit(method), (x,)
            flops[form, name] = timing.matmul_flops(method, x)
    executables = timing.compiled(programs)
    calls = {key: functools.partial(executables[key], *args) for key, (_, args) in programs.items()}
    peak = timing.MatmulPeak.of(config.dtype, config.matmul_size)
    seconds = timing.interleaved(calls | peak.calls, config)

    rate = peak.rate(seconds)
    figures, times = {}, []
    for form, name in programs:
        mine = seconds[form, name]
        over = timing.ratio(mine, seconds[form, "optax"])
        median = statistics.median(mine)
        share = flops[form, name] / min(mine) / rate
        row = {"form": form, "method": name, "milliseconds": 1e3 * median, "over_optax": over}
        times.append(row | {"gflop": flops[form, name] / 1e9, "of_peak": share})
        prefix = "" if name == DEFAULT else f"{name}_"
        if name != "optax":
            figures[f"{prefix}{form}_over_optax"] = over
        if name in (DEFAULT, "optax"):
            figures[f"{prefix}{form}_of_peak"] = share
    head = f"{config.dtype}, matmul peak {rate / 1e9:.0f} GFLOP/s ({config.clock})"
    rows = [
        (
            f"{row['form']:8}{row['method']}",
            f"{row['milliseconds']:.2f}",
            f"{row['over_optax']:.3f}",
            f"{row['gflop']:.2f}",
            f"{row['of_peak']:.0%}",
        )
        for row in times
    ]
    print(timing.table((head, "ms", "× optax", "GFLOP", "of peak"), rows), end="\n\n")
    figures["matmul_peak_gflops"] = rate / 1e9
    return figures, times


def alignments(config):
    """method -> family -> the worst alignment and the largest σ of a step, over shapes and scales.

    For matrices in float32; where the products are in bfloat16, so are the matrices.
    """
    programs = {
        name: (jax.jit(methods()[name]), "bfloat16" if name == BFLOAT16 else "float32")
        for name in (DEFAULT, BFLOAT16, "jordan", "optax")
    }

    found = {name: {} for name in programs}
    for shape in tqdm.tqdm(shapes(config.alignment_size).values(), "aligning", disable=None):
        rng = np.random.default_rng(config.seed)
        for family, g in families(*shape, rng).items():
            for name, (program, dtype) in programs.items():
                rows = found[name].setdefault(family, [])
                rows.extend(quality(program, g * scale, dtype) for scale in SCALES)
    return {
        name: {
            family: {
                "alignment": min(alignment for alignment, _ in rows),
                "alignment_unscaled": min(alignment for alignment, _ in rows[:: len(SCALES)]),
                "largest_sigma": max(sigma for _, sigma in rows),
            }
            for family, rows in by_family.items()
        }
        for name, by_family in found.items()
    }


def families(rows, columns, rng):
    """Matrices in float64, by the name of their kind."""
    r = min(rows, columns)
    u, _ = np.linalg.qr(rng.normal(size=(rows, r)))
    v, _ = np.linalg.qr(rng.normal(size=(columns, r)))
    gaussian = rng.normal(size=(rows, columns))
    i = np.arange(1, r + 1)
    low = (u * (i <= max(1, r // 8))) @ v.T
    sparse = np.zeros(rows * columns)
    kept = rng.choice(sparse.size, size=-(-sparse.size // 250), replace=False)
    sparse[kept] = rng.normal(size=kept.size)
    return {
        "gaussian": gaussian,
        "power_law_1": (u / i) @ v.T,
        "power_law_2": (u / i**2) @ v.T,
        "rank_one": np.outer(u[:, 0], v[:, 0]),
        "low_rank": low,
        "near_low_rank": low + 1e-3 * gaussian / np.sqrt(max(rows, columns)),
        "near_singular": (u * np.geomspace(1, 1e-6, r)) @ v.T,
        "sparse": sparse.reshape(rows, columns),
    }


def quality(program, g, dtype):
    """Alignment of the step for `g`, and the step's largest singular value.

    A step that is zero or not finite is worth nothing: alignment 0.
    """
    x = jnp.asarray(g, dtype)
    step = np.asarray(program(x), np.float64)
    g = np.asarray(x, np.float64)  # what the program has seen
    if not np.all(np.isfinite(step)) or not np.any(step):
        return 0.0, 0.0
    short = step @ step.T if step.shape[0] <= step.shape[1] else step.T @ step
    sigma = float(np.sqrt(np.linalg.eigvalsh(short)[-1]))
    nuclear = np.sum(np.linalg.svd(g, compute_uv=False))
    return float(np.vdot(g, step) / nuclear / sigma), sigma


def print_alignments(qualities):
    head = ("alignment, worst of shapes and scales", DEFAULT, "jordan", "optax", "optax unscaled")
    rows = []
    for family, row in qualities[DEFAULT].items():
        optax_row, bf16 = qualities["optax"][family], qualities[BFLOAT16][family]
        cells = (
            row["alignment"],
            qualities["jordan"][family]["alignment"],
            optax_row["alignment"],
            optax_row["alignment_unscaled"],
            bf16["alignment"],
            bf16["largest_sigma"],
        )
        rows.append((family, *(f"{cell:.4f}" for cell in cells)))
    print(timing.table((*head, "bf16", "bf16 σ₁"), rows), end="\n\n")


if __name__ == "__main__":
    main()
