"""The runs behind paper M's Table 1: the algorithm they run, the constants, the verdicts."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest


pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")

import ef21_jax as ef21  # noqa: E402
from ef21_jax import theory  # noqa: E402
from experiments import plots, rates, records, rounds  # noqa: E402
from experiments.problems import quadratics  # noqa: E402


SHAPE, N = (3, 4), 3


# The algorithm, against a transcription.


def top(x, count):
    """Of equals the first."""
    order = np.argsort(-np.abs(x).ravel(), kind="stable")[:count]
    kept = np.zeros(x.size)
    kept[order] = x.ravel()[order]
    return kept.reshape(x.shape)


def transcription(problem, start, norm, *, rate, decay, sharp, damping, warm, length):
    """Paper M, Algorithms 2 and 3 for one layer, TopK of 3 up and damping down: ‖∇f(X^k)‖_*."""

    def grads(x):
        return [
            P @ (x - B) @ Q
            for P, Q, B in zip(problem.left, problem.right, problem.centre, strict=True)
        ]

    X, W = start.copy(), start.copy()
    M = grads(W)
    G = [m if warm else top(m, 3) for m in M]
    norms = []
    for _ in range(length):
        exact = np.mean(grads(X), axis=0)
        size = np.sum(np.abs(exact)) if norm == "sign" else np.linalg.norm(exact)
        norms.append(size)
        mean = np.mean(G, axis=0)
        if norm == "sign":
            lmo, dual = -np.sign(mean), np.sum(np.abs(mean))
        else:
            lmo, dual = -mean / np.linalg.norm(mean), np.linalg.norm(mean)
        X = X + rate * (dual if sharp else 1.0) * lmo
        W = W + damping * (X - W)
        M = [decay * m + (1 - decay) * g for m, g in zip(M, grads(W), strict=True)]
        G = [g + top(m - g, 3) for m, g in zip(M, G, strict=True)]
    return np.array(norms)


def lanes(problems, lane_rates, decays, sigmas=0.0):
    count, layers = np.shape(lane_rates)
    return rounds.Lanes(
        workers=tuple(
            jax.tree.map(lambda x: np.stack([x] * count), problem.workers) for problem in problems
        ),
        starts=tuple(np.stack([problem.start(seed=1)] * count) for problem in problems),
        rates=np.array(lane_rates),
        decays=np.array(decays),
        sigmas=np.full((count, layers), sigmas),
        seeds=np.arange(count),
    )


@pytest.mark.parametrize("sharp, noisy", [(True, False), (False, True)], ids=["sharp", "lmo"])
def test_runs_are_the_papers_algorithm(sharp, noisy):
    problems = [quadratics.different(N, SHAPE, seed=i) for i in range(2)]
    method = rounds.Method(
        norms=(ef21.Sign(), ef21.Frobenius()),
        uplinks=(ef21.TopK(0.25),) * 2,
        downlinks=(ef21.Damping(0.75),) * 2 if sharp else None,
        sharp=sharp,
        noisy=noisy,
        warm=sharp,
    )
    step = [[0.01, 0.1], [0.02, 0.2]]
    decays = [0.9, 0.5]
    found = rounds.dual_norms(method, lanes(problems, step, decays), 25, chunk=10)
    assert found.shape == (25, 2, 2)
    for lane in range(2):
        for layer, name in enumerate(("sign", "frobenius")):
            expected = transcription(
                problems[layer],
                problems[layer].start(seed=1),
                name,
                rate=step[lane][layer],
                decay=decays[lane] if noisy else 0.0,
                sharp=sharp,
                damping=0.75 if sharp else 1.0,
                warm=sharp,
                length=25,
            )
            np.testing.assert_allclose(found[:, lane, layer], expected, rtol=2e-4, atol=2e-4)


def test_noise_has_the_length_it_should_and_repeats_within_a_round():
    problems = [quadratics.same(4, SHAPE), quadratics.same(4, (2, 5))]
    method = rounds.Method((ef21.Sign(),) * 2, (ef21.Identity(),) * 2, None, True, True, True)
    many = jax.tree.map(jnp.asarray, lanes(problems, np.ones((500, 2)), np.zeros(500), 3.0))

    def noise(k):
        return jax.vmap(lambda lane: rounds._batch(method, lane, k)[1])(many)

    first, again, next_round = noise(0), noise(0), noise(1)
    for a, b, c, shape in zip(first, again, next_round, (SHAPE, (2, 5)), strict=True):
        assert a.shape == (500, 4, *shape)
        lengths = np.sum(np.square(a), axis=(2, 3))
        assert np.mean(lengths) == pytest.approx(9, rel=0.05)
        np.testing.assert_array_equal(a, b)
        assert abs(np.mean(a * c)) < 0.02 * np.mean(lengths)
        # Workers and seeds are independent.
        assert np.mean(np.sum(np.square(np.mean(a, axis=1)), axis=(1, 2))) == pytest.approx(
            9 / 4, rel=0.1
        )


def test_chunks_are_one_run():
    problems = [quadratics.same(N, SHAPE)]
    method = rounds.Method((ef21.Frobenius(),), (ef21.Identity(),), None, False, True, False)
    one = lanes(problems, [[0.1]], [0.5], sigmas=1.0)
    found = [rounds.dual_norms(method, one, 6, chunk=chunk) for chunk in (3, 6)]
    np.testing.assert_allclose(*found, rtol=1e-5)


# The table.


def test_the_eight_rows_are_those_of_the_paper():
    assert [row.theorem for row in rates.ROWS] == [3, 14, 4, 17, 5, 19, 6, 24]
    assert {row.theorem for row in rates.ROWS if row.noisy} == {5, 19, 6, 24}
    assert {row.theorem for row in rates.ROWS if row.smooth} == {3, 14, 5, 19}
    assert {row.theorem for row in rates.ROWS if row.layers} == {14, 17, 19, 24}
    assert {row.promised for row in rates.ROWS if row.noisy} == {-0.25}
    assert {row.promised for row in rates.ROWS if not row.noisy} == {-0.5}
    assert min(len(rates.SMOOTH), len(rates.GENERALIZED), len(rates.NORMS)) >= 3
    assert min(len(rates.EXACT), len(rates.NOISY), len(rates.PAIRS)) >= 3


def test_every_compressor_is_contractive_where_its_theorem_asks_for_it():
    x = jax.random.normal(jax.random.key(0), rates.SHAPE)
    for i, norm in enumerate(rates.NORMS.values()):
        np.testing.assert_allclose(norm.dual(x), rates.DUALS[i].norm(x), rtol=1e-5)
        assert 0 < rates.DOWNLINKS[i].contraction(rates.SHAPE, norm) < 1
        for uplinks in rates.EXACT.values():
            assert 0 < uplinks[i].contraction(rates.SHAPE, rates.DUALS[i]) < 1
        for uplinks in rates.NOISY.values():
            assert 0 < uplinks[i].contraction(rates.SHAPE) < 1


TINY = "--iterations 8 32 --longest 128 --seeds 2 --compressors largest top".split()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """A small table: all eight rows, with one compressor each. The record, and what is printed."""
    path = tmp_path_factory.mktemp("rates") / "rates.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *args: printed.append(" ".join(map(str, args))))
        rates.main([*TINY, "--json", str(path)])
    return path, "\n".join(printed)


def test_a_small_table_has_every_row_and_stays_within_the_bounds(outcome):
    path, printed = outcome
    header, cells = records.read_lines(path)
    assert header["config"]["iterations"] == [8, 32] and "jax" in header["versions"]
    assert len(cells) == 8 * 3 * 3
    assert list(dict.fromkeys(cell["row"] for cell in cells)) == [row.name for row in rates.ROWS]
    for cell in cells:
        assert cell["within"]
        assert all(a <= b for a, b in zip(cell["left"], cell["bound"], strict=True))
        assert all(g > 0 for g in cell["gradient"])
        assert cell["iterations"] == ([16, 32, 64, 128] if cell["row"] in SINGLE_RUNS else [8, 32])
    assert printed.splitlines()[-1] == "target rows_of_table1_within_bound 8"
    for row in rates.ROWS:
        assert f"target slope_of_theorem_{row.theorem} -" in printed
        assert f"\nTheorem {row.theorem} " in printed
    assert "9 of 9" in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


SINGLE_RUNS = ("theorem_3", "theorem_14")


def test_bounds_of_exact_gradients_are_tight_to_a_factor_of_ten(outcome):
    _, cells = records.read_lines(outcome[0])
    for cell in cells:
        if cell["row"] in SINGLE_RUNS:
            assert max(a / b for a, b in zip(cell["left"], cell["bound"], strict=True)) > 0.1


def test_the_picture_is_drawn_from_the_record_again(outcome, monkeypatch, capsys, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_text(outcome[0].read_text())
    assert plots.rates_picture(copy) == tmp_path / "copy.png"
    assert (tmp_path / "copy.png").stat().st_size > 10_000


def cell(row, left, bound, **more):
    within = left <= bound
    base = {"row": row, "left": [left], "bound": [bound], "slope": -1.0, "within": within}
    return base | {"late_slope": -0.8} | more


def test_a_bound_that_is_exceeded_anywhere_costs_its_row():
    cells = [cell("theorem_3", 1.0, 2.0, slope=-0.6), cell("theorem_3", 1.0, 2.0, slope=-0.7)]
    cells += [cell("theorem_4", 1.0, 2.0), cell("theorem_4", 3.0, 2.0)]
    assert rates.targets(cells) == {
        "slope_of_theorem_3": -0.6,
        "slope_of_theorem_4": -1.0,
        "rows_of_table1_within_bound": 1,
    }
    lines = rates.table(cells).splitlines()
    assert lines[1].split()[-6:] == ["-0.80", "<=", "0.5", "2", "of", "2"]
    assert "-0.70 to -0.60" in lines[1]
    assert lines[2].split()[-5:] == ["<=", "1.5", "1", "of", "2"]


def curve(theorem, norms):
    """The verdict on made-up norms of K + 1 iterates, at K / 2 and K, of `theorem`'s row."""
    row = next(row for row in rates.ROWS if row.theorem == theorem)
    method = rounds.Method(
        tuple(rates.NORMS.values()),
        tuple(rates.NOISY["top"] if row.noisy else rates.EXACT["largest"]),
        rates.DOWNLINKS if row.smooth else None,
        row.smooth,
        row.noisy,
        True,
    )
    make = quadratics.same if row.smooth else quadratics.chirps
    layers = [rates.Layer.of(rates.Config(), make, method, i) for i in range(3)]
    chosen = (0, 1) if row.layers else (0,)
    norms = np.broadcast_to(norms[:, None, None], (len(norms), 2, len(chosen)))
    K = len(norms) - 1
    return (
        rates._curve(row, layers, chosen, {K // 2: norms[: K // 2 + 1], K: norms}),
        row,
        layers,
        chosen,
    )


@pytest.mark.parametrize("theorem", [row.theorem for row in rates.ROWS])
def test_left_sides_just_above_the_bound_are_seen(theorem):
    K = 32
    good, row, layers, chosen = curve(theorem, np.full(K + 1, 1.0))
    # Weights add up to the number of layers.
    assert good["left"][-1] == pytest.approx(len(chosen), rel=1e-4)
    assert good["bound"][-1] == pytest.approx(
        rates._theorem(row, layers, chosen, K).bound(K), rel=1e-4
    )
    largest = good["bound"][-1] / len(chosen)
    level = math.sqrt(largest) if row.smooth else largest
    assert curve(theorem, np.full(K + 1, 0.99 * level))[0]["within"]
    assert not curve(theorem, np.full(K + 1, 1.01 * level))[0]["within"]


def test_smooth_rows_average_squares_and_the_others_take_the_least():
    norms = np.array([4.0, 2.0, 3.0, 1.0, 5.0])
    smooth, *_ = curve(5, norms)
    assert smooth["left"] == pytest.approx([np.mean(norms[:2] ** 2), np.mean(norms[:4] ** 2)])
    assert smooth["gradient"] == pytest.approx([2.0, 1.0])
    least, *_ = curve(6, norms)
    assert least["left"] == least["gradient"] == pytest.approx([2.0, 1.0])
    # X^K counts there, and not where squares are averaged.
    last = np.array([4.0, 2.0, 3.0, 2.5, 1.0])
    assert curve(6, last)[0]["left"][1] == pytest.approx(1.0)
    assert curve(5, last)[0]["gradient"][1] == pytest.approx(2.0)


def test_a_slope_is_that_of_the_logarithms():
    K = [10, 100, 1000]
    assert rates._slope(K, [3 * k**-0.5 for k in K]) == pytest.approx(-0.5)


@pytest.mark.parametrize("theorem", [5, 19, 6, 24])
def test_runs_have_the_momentum_of_their_theorem(theorem):
    _, row, layers, _ = curve(theorem, np.ones(9))
    _, decay = rates._settings(row, layers, 100)
    if not row.smooth:
        assert decay == pytest.approx(1 - 1 / math.sqrt(101))
        return
    single = rates.ROWS[4]
    betas = [
        theory.Corollary2(**rates._constants(single, layers, (i,))).beta(100) for i in range(3)
    ]
    assert decay == 1 - min(betas) and 0 < min(betas) < 1
    chosen = (0, 1, 2) if row.layers else (0,)
    assert np.all(np.equal(rates._theorem(row, layers, chosen, 100).momentum, decay))


def test_runs_without_noise_have_no_momentum():
    for theorem in (3, 14, 4, 17):
        _, row, layers, _ = curve(theorem, np.ones(9))
        assert rates._settings(row, layers, 100)[1] == 0


def test_the_gap_is_above_the_least_value():
    method = rounds.Method(
        tuple(rates.NORMS.values()), rates.EXACT["largest"], None, True, False, True
    )
    layer = rates.Layer.of(rates.Config(), quadratics.different, method, 0)
    hessian = layer.problem._hessian()
    d = (layer.start - layer.problem.minimizer).ravel()
    assert layer.problem.lower > 0.1
    assert layer.gap == pytest.approx(d @ hessian @ d / 2, rel=1e-4)


def test_step_sizes_of_pairs_are_those_of_all_layers():
    for theorem in (14, 17, 19, 24):
        _, row, layers, _ = curve(theorem, np.ones(9))
        together = rates._rates(row, rates._theorem(row, layers, (0, 1, 2), 8), 8)
        for pair in rates.PAIRS.values():
            alone = rates._rates(row, rates._theorem(row, layers, pair, 8), 8)
            assert alone == pytest.approx([together[i] for i in pair])


def test_layers_have_the_constants_of_their_problem():
    _, row, layers, _ = curve(6, np.ones(9))
    layer = layers[1]
    d = np.asarray(layer.start) - layer.problem.centre[0]
    # s_j d, up to the chirp, which is small.
    assert layer.start_gradient == pytest.approx(np.linalg.norm(d), rel=0.05)
    assert layer.gap == pytest.approx(np.sum(d**2) / 2, rel=0.05)
    theorem = rates._theorem(row, layers, (1,), 8)
    assert isinstance(theorem, theory.Theorem6)
    assert theorem.rho == (1.0, math.sqrt(12)) and theorem.alpha_D == 0.25


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--iterations 8", "two or more"),
        ("--seeds 0", "`seeds` must be positive"),
        ("--theorems 7", "`theorems` must be some of"),
        ("--compressors best", "`compressors` must be some of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as caught:
        rates.main(arguments.split())
    assert message in str(caught.value) + capsys.readouterr().err


def test_the_record_is_json_lines(outcome):
    for line in outcome[0].read_text().splitlines():
        assert isinstance(json.loads(line), dict)
    assert dataclasses.is_dataclass(rates.Config)
