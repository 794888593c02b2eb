"""The benchmarks: that each runs and writes what it prints, and that its instruments are right.

No time is ever asserted.
"""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest


pytest.importorskip("flax")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")

import ef21_jax as ef21  # noqa: E402
from experiments.benchmarks import (  # noqa: E402
    compile,
    compressors,
    polar,
    step,
    timing,
    train_step,
)


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a script; gives its figures, its record and what it printed."""

    def run(script, args):
        path = tmp_path / "figures.json"
        with jax.numpy_dtype_promotion("standard"):  # optax's Muon needs it
            script.main([*args.split(), "--json", str(path)])
        printed = capsys.readouterr().out
        lines = [line.split() for line in printed.splitlines() if line.startswith("target ")]
        record = json.loads(path.read_text())
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
        assert [name for _, name, _ in lines] == list(record["target"])
        for _, name, value in lines:
            assert math.isfinite(record["target"][name])
            assert float(value) == pytest.approx(record["target"][name], abs=5.1e-5)
        header = record["header"]
        assert header["command"].startswith(f"python -m {script.MODULE} {args.split()[0]} ")
        assert header["config"]["turns"] == int(args.split()[1])
        assert {"python", "jax", "jaxlib", "optax", "flax"} == set(header["versions"])
        assert printed.startswith(", ".join(header["devices"]))
        return record["target"], record, printed

    return run


def test_compressors_end_to_end(run):
    figures, _, printed = run(compressors, "--turns 2 --rows 16 --columns 64")
    units = ("over_copy", "over_lmo")
    names = {f"{name}_{unit}" for name in compressors.COMPRESSORS for unit in units}
    names |= {f"{name}_sum_of_8_over_decode" for name in compressors.SUMMED}
    assert set(figures) == names | {"top_k_over_block", "top_k_over_block_4bit"}
    assert min(figures.values()) > 0
    bits = {line.split()[0]: line.split()[1] for line in printed.splitlines()[2:17]}
    assert set(bits) == set(compressors.COMPRESSORS)
    assert float(bits["block_4bit"]) == pytest.approx(0.5, abs=0.1)


def test_polar_end_to_end(run):
    figures, record, _ = run(polar, "--turns 2 --size 8 --alignment-size 32 --matmul-size 32")
    names = {"", "optax_scan_", "jordan_"}
    names |= {f"polar_express_{suffix}_" for suffix in ("bf16", "5", "8")}
    forms = {"wide", "tall", "square"}
    expected = {f"{name}{form}_over_optax" for name in names for form in forms}
    expected |= {f"{name}{form}_of_peak" for name in ("", "optax_") for form in forms}
    expected |= {"worst_alignment", "bf16_worst_alignment", "bf16_largest_sigma"}
    assert set(figures) == expected | {"matmul_peak_gflops"}
    # No timings but facts: every spectrum, shape and scale, in float32 and in bfloat16.
    assert 0.985 <= figures["worst_alignment"] <= 1 + 1e-6
    assert 0.85 <= figures["bf16_worst_alignment"] <= 1 + 1e-6
    assert 0.9 <= figures["bf16_largest_sigma"] <= 1.02
    families = record["alignments"]["polar_express"]
    assert figures["worst_alignment"] == min(row["alignment"] for row in families.values())
    assert len(families) == 8
    # The instrument tells a rough step from a good one, and sees a step that is lost.
    assert record["alignments"]["jordan"]["gaussian"]["alignment"] < 0.9
    assert record["alignments"]["optax"]["gaussian"]["alignment"] == 0


def test_step_end_to_end(run):
    args = "--turns 2 --model tiny --matmul-size 32 --no-torch"
    figures, record, printed = run(step, args)
    ratios = {"_over_".join(pair) for pair in step.RATIOS if "torch_muon" not in pair}
    shares = {f"{name}_of_peak" for name in step.METHODS}
    assert set(figures) == ratios | shares | {"matmul_peak_gflops"}
    assert min(figures.values()) > 0
    assert set(record["milliseconds"]) == {*step.METHODS, "copy"}
    assert "7 matrices, 0.0M parameters, float32" in printed


def test_step_in_bfloat16_with_one_method(run):
    args = "--turns 2 --model tiny --matmul-size 32 --dtype bfloat16 --no-torch --methods gluon"
    figures, record, printed = run(step, args)
    assert set(figures) == {"gluon_of_peak", "matmul_peak_gflops"}
    assert set(record["milliseconds"]) == {"gluon", "copy"}
    assert "parameters, bfloat16" in printed
    assert "torch" not in printed


def test_compile_end_to_end(run):
    args = "--turns 1 --model tiny --methods uncompressed optax_muon"
    figures, record, printed = run(compile, args)
    kinds = ("compile_seconds", "temporary_mb", "instructions", "computing", "computing_growth")
    assert set(figures) == {f"{name}{kind}" for name in ("", "optax_muon_") for kind in kinds}
    assert [(row["method"], row["layers"]) for row in record["measures"]] == [
        ("uncompressed", 1),
        ("optax_muon", 1),
        ("uncompressed", 2),
        ("optax_muon", 2),
    ]
    for row in record["measures"]:
        [turn] = row["turns"]
        assert turn["total"] == pytest.approx(turn["tracing"] + turn["compiling"])
        assert turn["instructions"] > turn["computing"] > 0
    # optax treats each matrix by itself: twice the layers are about twice the program.
    assert 1.5 < figures["optax_muon_computing_growth"] < 2.2
    assert "computing at 2" in printed


def test_compile_of_the_model_as_it_is(run):
    args = "--turns 1 --model tiny --methods gluon --no-deeper --no-donate --clock cpu"
    figures, _, _ = run(compile, args)
    kinds = ("compile_seconds", "temporary_mb", "instructions", "computing")
    assert set(figures) == {f"gluon_{kind}" for kind in kinds}


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (compressors.Config, {"rows": 0}, "`rows` must be at least 1, got 0"),
        (polar.Config, {"turns": 0}, "`turns` must be at least 1, got 0"),
        (polar.Config, {"alignment_size": -3}, "`alignment_size` must be at least 1, got -3"),
        (step.Config, {"matmul_size": 0}, "`matmul_size` must be at least 1, got 0"),
        (step.Config, {"methods": ()}, "`methods` must name one at least, got none"),
        (compile.Config, {"methods": ()}, "`methods` must name one"),
        (compile.Config, {"turns": 0}, "`turns` must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_train_step_end_to_end(run):
    figures, record, _ = run(train_step, "--turns 1 --preset tiny --methods block16_both")
    assert set(figures) == {"block16_both_throughput_over_optax_muon"}
    (taken,), (theirs,) = (record["seconds"][name] for name in ("block16_both", "optax_muon"))
    assert min(figures.values()) == pytest.approx(theirs / taken)


@pytest.mark.slow  # it compiles NanoGPT-124M twice, and takes a step of it
@pytest.mark.timeout(1200)
def test_the_paper_step_fits_one_accelerator_and_a_small_one_runs(run):
    figures, *_ = run(train_step, "--turns 1 --paper --methods rank15_natural")
    assert 5 < figures["rank15_natural_gigabytes"] < 80


@pytest.mark.parametrize("args", ["--dtype int8", "--methods adam", "--turns many", "--no-such 1"])
def test_bad_arguments_are_refused(args, capsys):
    with pytest.raises(SystemExit):
        step.main(args.split())
    assert args.split()[0].strip("-") in capsys.readouterr().err


# The instruments


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock.pass_(seconds)` moves."""

    class Clock:
        now = 0.0

        def pass_(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setitem(timing.CLOCKS, "wall", lambda: clock.now)
    return clock


def test_all_are_timed_in_each_turn_and_short_ones_more_than_once(clock):
    log = []
    costs = {"long": 1.0, "short": 0.006}

    def call(name):
        def run():
            log.append(name)
            clock.pass_(costs[name])
            costs[name] *= 1.01  # so that no two measurements are the same

        return run

    seconds = timing.interleaved({name: call(name) for name in costs}, timing.Config(turns=3))
    # Two to warm up, then each turn: one of the long, and of the short one not counted and four.
    warm = ["long"] * 2 + ["short"] * 2
    assert log == warm + (["long"] + ["short"] * 5) * 3
    np.testing.assert_allclose(seconds["long"], [1.01**i for i in (2, 3, 4)])
    shorts = [np.mean([0.006 * 1.01 ** (3 + 5 * turn + i) for i in range(4)]) for turn in range(3)]
    np.testing.assert_allclose(seconds["short"], shorts)


def test_the_clock_is_the_one_asked_for(clock, monkeypatch):
    monkeypatch.setitem(timing.CLOCKS, "cpu", lambda: 3 * clock.now)
    for name, seconds in [("wall", 2.0), ("cpu", 6.0)]:
        config = timing.Config(turns=1, clock=name)
        assert timing.interleaved({"call": lambda: clock.pass_(2.0)}, config) == {"call": [seconds]}


def test_a_ratio_is_that_of_the_turns_and_not_of_the_medians():
    # The machine was ten times slower in the second turn and twice in the third.
    assert timing.ratio([1.0, 10.0, 2.0], [2.0, 20.0, 4.0]) == 0.5
    assert timing.ratio([1.0, 9.0, 1.0], [1.0, 3.0, 2.0]) == 1.0
    with pytest.raises(ValueError, match="zip"):
        timing.ratio([1.0], [1.0, 2.0])


def test_the_peak_is_the_fastest_turn_of_the_fastest_product():
    peak = timing.MatmulPeak.of("bfloat16", 16)
    assert set(peak.calls) == {"matmul_bfloat16", "matmul_float32"}
    assert {call().dtype.name for call in peak.calls.values()} == {"bfloat16", "float32"}
    seconds = {"matmul_bfloat16": [4.0, 2.0], "matmul_float32": [8.0, 4.0], "other": [0.1, 0.1]}
    assert peak.rate(seconds) == 2 * 16**3 / 2.0


def test_the_product_grows_until_it_takes_long_enough(clock, monkeypatch):
    def product(size, dtype):
        return lambda: clock.pass_(size**3 * 5e-12)

    monkeypatch.setattr(timing, "_product", product)
    # 1024 takes 5 ms, 2048 takes 43 ms, 4096 takes 344 ms.
    assert timing.MatmulPeak.of("float32").flops == {"matmul_float32": 2 * 4096**3}


def test_figures_of_the_polar_factor_are_ours_over_optaxs(monkeypatch, capsys):
    def interleaved(calls, config):
        cost = {"optax": 4.0, "jordan": 1.0, "matmul_float32": 0.5}
        return {key: [cost.get(key[1] if type(key) is tuple else key, 3.0)] for key in calls}

    monkeypatch.setattr(timing, "compiled", lambda programs: dict.fromkeys(programs, polar_factor))
    monkeypatch.setattr(timing, "interleaved", interleaved)
    with jax.numpy_dtype_promotion("standard"):
        figures, _ = polar.speed(polar.Config(size=8, matmul_size=16))
    assert figures["wide_over_optax"] == figures["square_over_optax"] == 0.75
    assert figures["jordan_tall_over_optax"] == 0.25
    # optax: five steps of 2m²n + 2m³ + 2m²n operations, in 4 s; the peak is 2 · 16³ in 0.5 s.
    wide = 5 * (2 * 2 * 8 * 8 * 32 + 2 * 8**3)
    assert figures["optax_wide_of_peak"] == pytest.approx(wide / 4 / (2 * 16**3 / 0.5))
    assert figures["matmul_peak_gflops"] == pytest.approx(2 * 16**3 / 0.5 / 1e9)


def test_figures_of_a_step_are_mine_over_theirs(capsys):
    seconds = {"uncompressed": [1.0, 3.0], "block": [2.0, 6.0], "optax_muon": [4.0, 12.0]}
    seconds |= {"copy": [0.5, 1.5], "matmul_float32": [1.0, 1.0]}
    flops = {"uncompressed": 30, "block": 40, "optax_muon": 50, "copy": 0}
    shapes = step.parameter_shapes(step.PRESETS["tiny"])
    step.report(step.Config(), [], shapes, seconds, flops, rate=100.0)
    printed = capsys.readouterr().out
    figures = dict(line.split()[1:] for line in printed.splitlines() if line.startswith("target"))
    assert {name: float(value) for name, value in figures.items()} == {
        "uncompressed_over_optax_muon": 0.25,
        "block_over_optax_muon": 0.5,
        "block_over_uncompressed": 2.0,
        "uncompressed_over_copy": 2.0,
        "uncompressed_of_peak": 0.3,
        "block_of_peak": 0.2,
        "optax_muon_of_peak": 0.125,
        "matmul_peak_gflops": 0.0,
    }
    assert "sign" in printed.split("uncompressed")[1].splitlines()[0]
    assert "AdamW" in printed.split("optax_muon ")[2].splitlines()[0]


def products_in_a_scan(x):
    y, _ = jax.lax.scan(lambda y, _: (jax.jit(jnp.matmul)(y, x), None), x, None, length=5)
    return y


@pytest.mark.parametrize(
    ("function", "shape", "products"),
    [
        (lambda x: x @ x + 1, (8, 8), 1),
        (lambda x: jnp.einsum("ik,jk->ij", x, x), (8, 8), 1),
        (products_in_a_scan, (8, 8), 5),
        (lambda x: jax.lax.cond(True, lambda x: x @ x @ x, lambda x: x @ x, x), (8, 8), 2),
        (jax.vmap(lambda x: x @ x), (3, 8, 8), 3),
        (jax.jit(jnp.sin), (8, 8), 0),
    ],
    ids=["one", "contraction", "scan", "cond", "vmap", "none"],
)
def test_operations_are_those_of_the_products(function, shape, products):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert timing.matmul_flops(function, x) == products * 2 * 8**3


def test_ours_and_optax_orthogonalise_the_same_matrices():
    shapes = step.parameter_shapes(step.PRESETS["tiny"])
    dims = jax.tree.leaves_with_path(step.hidden_matrices(shapes), is_leaf=lambda x: x is None)
    adam = [path for path, dim in dims if dim is None]
    routes = ef21.routes(shapes)
    assert [path[0].key for path in adam] == ["wte"]
    assert [route.path for route in routes if route.role != "hidden"] == ["wte"]


def test_the_124m_step_has_the_papers_73_matrices_and_its_twin_as_many():
    for name, size in [("124m", 123_568_128), ("twin", 13_729_792)]:
        leaves = jax.tree.leaves(step.parameter_shapes(step.PRESETS[name], "bfloat16"))
        assert len(leaves) == 73
        assert sum(leaf.size for leaf in leaves) == size
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}


def test_a_repeated_step_goes_on_with_the_gradients_in_turn():
    def executable(gradient, params, state):
        return params + gradient, state + 1

    params = jnp.zeros(())
    repeated = step.Repeated(executable, [jnp.float32(1), jnp.float32(10)], params, jnp.int32(0))
    for _ in range(3):
        repeated()
    assert float(repeated.params) == 12
    assert int(repeated.state) == 3
    assert float(params) == 0


def test_without_torch_a_line_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert step.torch_muon([], {}) is None
    assert "left out: it needs `pip install 'torch>=2.9'`" in capsys.readouterr().out


def test_torchs_step_is_muons():
    pytest.importorskip("torch", minversion="2.9")
    rng = np.random.default_rng(0)
    params = {"h_0": jnp.zeros((8, 24)), "wte": jnp.zeros((5, 8))}
    gradient = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), "float32"), params
    )
    torch_muon = step.torch_muon([gradient], params)
    torch_muon()
    hidden, embedding = (weight.numpy() / step.LEARNING_RATE for weight in torch_muon.weights)
    assert np.all(np.abs(np.linalg.svd(hidden, compute_uv=False) - 1) < 0.5)
    np.testing.assert_allclose(embedding, -np.sign(gradient["wte"]), rtol=1e-3)


def polar_factor(x):
    u, _, v = np.linalg.svd(x, full_matrices=False)
    return u @ v


@pytest.mark.parametrize(
    ("program", "alignment", "sigma"),
    [
        (polar_factor, 1.0, 1.0),
        (lambda x: 3 * polar_factor(x), 1.0, 3.0),
        (lambda x: -polar_factor(x), -1.0, 1.0),
        (lambda x: 0 * x, 0.0, 0.0),
        (lambda x: x / 0.0 * 0, 0.0, 0.0),
    ],
    ids=["exact", "longer", "ascent", "zero", "nan"],
)
def test_alignment_is_that_with_the_exact_step(program, alignment, sigma):
    g = np.random.default_rng(0).normal(size=(5, 9))
    measured = polar.quality(program, g * 1e30, "float32")
    np.testing.assert_allclose(measured, (alignment, sigma), atol=1e-5)
    # The identity: ‖G‖_F² / (‖G‖_* ‖G‖₂).
    s = np.linalg.svd(g, compute_uv=False)
    expected = np.sum(s**2) / np.sum(s) / s[0]
    np.testing.assert_allclose(polar.quality(lambda x: x, g, "float32")[0], expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (16, 16)])
def test_families_have_the_spectra_of_their_names(shape):
    found = {
        name: np.linalg.svd(matrix, compute_uv=False)
        for name, matrix in polar.families(*shape, np.random.default_rng(1)).items()
    }
    i = np.arange(1, 17)
    np.testing.assert_allclose(found["power_law_1"], 1 / i)
    np.testing.assert_allclose(found["power_law_2"], 1 / i**2, rtol=1e-6)
    np.testing.assert_allclose(found["rank_one"], i == 1, atol=1e-12)
    np.testing.assert_allclose(found["low_rank"], i <= 2, atol=1e-12)
    np.testing.assert_allclose(found["near_low_rank"], i <= 2, atol=0.01)
    assert 1e-5 < found["near_low_rank"][-1] < 1e-2
    np.testing.assert_allclose(found["near_singular"][[0, -1]], [1, 1e-6], rtol=1e-6)
    sparse = polar.families(*shape, np.random.default_rng(1))["sparse"]
    assert np.count_nonzero(sparse) == math.ceil(shape[0] * shape[1] / 250)


def test_instructions_are_counted_with_those_inside_of_fusions():
    text = """HloModule jit_step, is_scheduled=true

%fused (p.0: f32[2,3]) -> f32[2,3] {
  %p.0 = f32[2,3]{1,0} parameter(0)
  ROOT %add.1 = f32[2,3]{1,0} add(%p.0, %p.0), metadata={op_name="jit(f)/add"}
}

ENTRY %main (x: f32[2,3], y: f32[3,2]) -> (f32[2,3], /*index=1*/f32[2,2]) {
  %x = f32[2,3]{1,0} parameter(0)
  %dot.3 = f32[2,2]{1,0} dot(%x, %y), lhs_contracting_dims={1}
  %call.7 = f32[2,3]{1,0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %tuple.2 = (f32[2,3]{1,0}, /*index=1*/f32[2,2]{1,0}) tuple(%call.7, %dot.3)
}
"""
    expected = {"parameter": 2, "add": 1, "dot": 1, "fusion": 1, "tuple": 1}
    assert compile.count_opcodes(text) == expected
    assert [opcode for opcode in expected if opcode not in compile.MOVES] == ["add", "dot"]
