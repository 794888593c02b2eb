"""Paper N's figures, feedback against none, and the data of LIBSVM: each script from end to end."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest


pytest.importorskip("matplotlib")
pytest.importorskip("pooch")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")

from experiments import curves, descent, divergence, logistic, polynomial, records  # noqa: E402
from experiments.data import libsvm  # noqa: E402


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG")


# The data.

TINY = "4 1:0.5 3:-1 \n2 2:0.25 \n4 1:-0.125 \n"
FEATURES = np.array([[0.5, 0, -1], [0, 0.25, 0], [-0.125, 0, 0]])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a data set `tiny` of three rows."""
    sha256 = libsvm.digest(FEATURES, np.array([4, 2, 4]))
    source = libsvm.Source(file="tiny_scale", features=3, positive=4, sha256=sha256)
    monkeypatch.setitem(libsvm.SOURCES, "tiny", source)
    (tmp_path / "tiny_scale").write_text(TINY)
    return tmp_path


@pytest.mark.parametrize("text", [TINY, TINY.replace("4 ", "+4.0  ").replace(" \n", "\r\n")])
def test_a_data_set_is_its_numbers_however_written(folder, text):
    (folder / "tiny_scale").write_text(text, newline="")
    features, labels = libsvm.load("tiny", folder)
    np.testing.assert_array_equal(features, FEATURES)
    np.testing.assert_array_equal(labels, [1, -1, 1])
    assert features.dtype == labels.dtype == np.float64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TINY.replace("0.25", "0.26"), "does not hold the numbers of LIBSVM's tiny_scale.*anew"),
        (TINY.replace("2 2", "4 2"), "does not hold the numbers"),
        (TINY + "4 1:1 \n", "does not hold the numbers"),
        ("<html>404</html>", "is no file of LIBSVM's format"),
        ("4 7:1 \n", "is no file of LIBSVM's format"),
    ],
    ids=["number", "label", "row", "page", "feature"],
)
def test_other_data_is_refused(folder, text, message):
    (folder / "tiny_scale").write_text(text)
    with pytest.raises(ValueError, match=message):
        libsvm.load("tiny", folder)


def test_a_missing_file_and_an_unknown_name_are_refused(folder):
    with pytest.raises(ValueError, match="no file '.*elsewhere.tiny_scale'.*--data-dir"):
        libsvm.load("tiny", folder / "elsewhere")
    with pytest.raises(ValueError, match="`name` must be among .*a1a.*got 'mnist'"):
        libsvm.load("mnist")


def test_without_a_folder_the_file_is_fetched_and_checked(folder, monkeypatch):
    asked = []

    def retrieve(url, known_hash, fname):
        asked.append(url)
        return str(folder / fname)

    monkeypatch.setattr(libsvm.pooch, "retrieve", retrieve)
    np.testing.assert_array_equal(libsvm.load("tiny")[0], FEATURES)
    assert asked == [libsvm.URL + "tiny_scale"]
    (folder / "tiny_scale").write_text(TINY.replace("0.5", "0.6"))
    with pytest.raises(ValueError, match="does not hold the numbers"):
        libsvm.load("tiny")


def test_a_failed_download_says_what_to_do(folder, monkeypatch):
    def retrieve(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(libsvm.pooch, "retrieve", retrieve)
    with pytest.raises(ValueError, match="Could not fetch .*no route to host.*--data-dir"):
        libsvm.load("tiny")


# Figure 1.


def test_normalized_ef21_beats_ef21_on_the_synthetic_data(tmp_path, capsys):
    path = tmp_path / "logistic.jsonl"
    logistic.main(["--json", str(path)])
    out = capsys.readouterr().out
    assert "target data_sets_where_normalized_wins 1\ntarget bounds_violated 0\n" in out
    assert " 5/5 " in out
    header, lines = records.read_lines(path)
    assert header["config"]["seeds"] == 5 and header["config"]["data_dir"] is None
    plain, normalized, *kept = lines
    assert (plain["label"], normalized["label"]) == ("EF21", "normalized EF21")
    assert plain["iterations"] == 100 and plain["k"][-1] == 100 and plain["top_k"] == 1
    np.testing.assert_allclose(normalized["step_size"], 1 / math.sqrt(101))
    assert normalized["step_size"] > plain["step_size"]  # the paper's reason
    assert plain["median"][0] == normalized["median"][0]  # the same starts
    assert normalized["high"][-1] < 0.05 * plain["low"][-1]
    assert [line["bound"] for line in kept] == ["EF21", "normalized EF21"]
    assert is_picture(tmp_path / "logistic_figure1.png")
    assert not list(tmp_path.glob(".*"))


def test_data_sets_from_a_folder_and_several_k(folder, monkeypatch):
    monkeypatch.setitem(logistic.ITERATIONS, "tiny", 3)
    monkeypatch.setattr(logistic.tyro, "cli", lambda *args, **kwargs: config)
    config = dataclasses.replace(
        logistic.Config(data_dir=folder, ks=(1, 2), seeds=2, json=folder / "x.jsonl"),
        datasets=("tiny",),
    )
    logistic.main([])
    header, lines = records.read_lines(folder / "x.jsonl")
    assert header["config"]["data_dir"] == "given"  # and not where
    found = [line for line in lines if line.get("label")]
    assert {(line["data"], line["n"], line["d"], line["top_k"]) for line in found} == {
        ("tiny", 3, 3, 1),
        ("tiny", 3, 3, 2),
    }
    # Only the first k is drawn.
    assert [line["top_k"] for line in found if "figure" in line] == [1, 1]
    config = dataclasses.replace(config, ks=(4,))
    with pytest.raises(ValueError, match="must not exceed tiny's 3 features, got 4"):
        logistic.main([])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"datasets": ("mnist",)}, r"`datasets` must be among .*a1a.*got \('mnist',\)"),
        ({"datasets": ()}, "`datasets` must be among"),
        ({"ks": (0,)}, r"`ks` must be at least 1, got \(0,\)"),
        ({"iterations": 0}, "`iterations` must be at least 1, got 0"),
        ({"gamma0": 0.0}, "`gamma0` must be positive, got 0.0"),
        ({"seeds": 0}, "`seeds` must be at least 1, got 0"),
    ],
)
def test_bad_settings_of_figure_1_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        logistic.Config(**settings)


# Figures 2, 3 and 4.


def test_the_polynomial_end_to_end(tmp_path, capsys):
    """At L1 = 1 the paper's own K, 2000, comes out; at L1 = 4 EF21 with L0 for L diverges."""
    path = tmp_path / "polynomial.jsonl"
    args = "--L1 1 4 --iterations 2000 3000 --gamma0s 0.1 1 --cap 5000 --seeds 1".split()
    polynomial.main([*args, "--json", str(path)])
    out = capsys.readouterr().out
    assert "target bounds_violated 0\n" in out
    _, lines = records.read_lines(path)
    needed = {
        (line["L1"], line["gamma0"]): line["needed"]
        for line in lines
        if line.get("figure") == "figure2"
    }
    assert needed[1, 1] == [2000]
    assert needed[1, 0.1] == needed[4, 0.1] == [None]
    assert 2000 < needed[4, 1][0] <= 5000

    third = [line for line in lines if line.get("figure") == "figure3"]
    plain, normalized, constant = third[:3]
    assert plain["reached_after"] == [None]
    assert normalized["reached_after"][0] < 2000 and constant["reached_after"][0] < 2000
    c1 = 1 / 2 + 2 * math.sqrt(3 / 4) / (1 - math.sqrt(3 / 4))
    np.testing.assert_allclose(constant["step_size"], 1 / (2 * c1))
    # At first EF21 is ahead, as in the paper.
    assert plain["median"][20] < 0.1 * normalized["median"][20]

    fourth = [line for line in lines if line.get("figure") == "figure4"]
    assert fourth[0]["median"][-1] is None  # past the floats
    assert fourth[1]["median"][-1] < 1e-3
    assert all(is_picture(tmp_path / f"polynomial_figure{i}.png") for i in (2, 3, 4))


def fake_descend(first):
    """A `descent.descend` in which the lane of step size γ is accurate at one iterate alone."""

    def descend(method, problem, starts, step_sizes, iterations, *, chunk, **kwargs):
        ks = np.round(step_sizes**-2.0 - 1).astype(int)
        for begin in range(0, iterations + 1, chunk):
            at = np.arange(begin, min(begin + chunk, iterations + 1))
            yield {"squared_gradient": np.where(at == [[first(k)] for k in ks], 0.0, 1.0)}

    return descend


@pytest.mark.parametrize(
    ("first", "needed"),
    [
        (lambda k: 1200, 1500),  # the first of the grid that runs so long
        (lambda k: 1500, 1500),  # at the last iterate
        (lambda k: 1501, 2000),
        (lambda k: k + 1 if k < 6000 else k, 6000),  # after its run is over: that is no success
        (lambda k: 4999 if k == 5000 else -1, 5000),  # seen before its run is over, counted after
        (lambda k: k if k >= 21_000 else -1, 25_000),  # the grid is coarser there
        (lambda k: -1, None),
    ],
)
def test_the_least_k_of_the_grid_is_found(monkeypatch, first, needed):
    monkeypatch.setattr(descent, "descend", fake_descend(first))
    config = polynomial.Config(cap=30_000, seeds=2)
    line = polynomial.iterations_needed(config, 1.0, 1.0)
    assert line["needed"] == [needed, needed]
    assert line["cap"] == 30_000


def test_small_gamma0_has_the_coarse_grid():
    config = polynomial.Config(cap=20_000)
    assert polynomial.grid(config, 0.1).tolist() == [5000, 10_000, 15_000, 20_000]
    assert polynomial.grid(config, 1.0).tolist() == list(range(500, 20_001, 500))
    assert polynomial.grid(polynomial.Config(cap=600), 0.1).tolist() == [600]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": (10,)}, r"`iterations` must have one entry for each of `L1`.*\(10,\)"),
        ({"diverging": 3}, "`diverging` must be a position in `L1`, below 3, got 3"),
        ({"gamma0s": (1.0, -1.0)}, r"`gamma0s` must be positive, got \(1.0, -1.0\)"),
        ({"cap": 100}, "`cap` must be at least `grid`, 500, got 100"),
        ({"accuracy": 0.0}, "`accuracy` must be positive, got 0.0"),
        ({"coarse": 0}, "`coarse` must be at least 1, got 0"),
        ({"seeds": 0}, "`seeds` must be at least 1, got 0"),
    ],
)
def test_bad_settings_of_the_polynomial_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        polynomial.Config(**settings)


# Feedback against none.


def test_only_without_feedback_does_it_diverge(tmp_path, capsys):
    path = tmp_path / "divergence.jsonl"
    divergence.main(["--seeds", "3", "--multiples", "1", "4", "--json", str(path)])
    out = capsys.readouterr().out
    for name, count in {"no_feedback": 6, "ef21": 0, "ef14": 0}.items():
        assert f"target runs_that_rise_{name} {count}\n" in out
    assert "target bounds_violated 0\n" in out
    _, lines = records.read_lines(path)
    last = {
        (line["label"], line["panel"]): line["median"][-1]
        for line in lines
        if "k" in line and "label" in line
    }
    assert last["no feedback", "step 1 times EF21's"] > 1e6
    assert last["EF21", "step 1 times EF21's"] < 1e-5
    assert is_picture(tmp_path / "divergence_figure.png")
    for settings in ({"multiples": (0.0,)}, {"iterations": 0}, {"seeds": 0}):
        with pytest.raises(ValueError, match=f"`{next(iter(settings))}` must be"):
            divergence.Config(**settings)


# The runner and the pictures.


def test_chunks_are_one_run_and_an_exact_start_has_no_distance():
    problem = divergence.PROBLEM
    args = divergence.METHODS["EF21"], problem, [problem.start(1)], [0.01], 9
    with jax.enable_x64(True):
        whole = descent.path(*args, uplink=divergence.UPLINK)
        parts = list(descent.descend(*args, uplink=divergence.UPLINK, chunk=4))
        exact = descent.path(*args, uplink=divergence.UPLINK, exact=True)
    assert [part["loss"].shape for part in parts] == [(1, 4), (1, 4), (1, 2)]
    for name, values in whole.items():
        joined = np.concatenate([part[name] for part in parts], axis=1)
        np.testing.assert_allclose(joined, values, rtol=1e-12)
    assert whole["distance"][0, 0] > 0.1 > exact["distance"][0, 0] == 0
    assert whole["loss"][0, 0] == exact["loss"][0, 0]


def test_a_curve_is_thinned_and_knows_no_nan():
    values = np.geomspace(1, 1e-6, 5001)[None] * np.array([[1.0], [2.0], [4.0]])
    values[:, -1] = np.inf
    line = curves.curve(values, label="x")
    assert line["k"][0] == 0 and line["k"][-1] == 5000 and 150 <= len(line["k"]) < 160
    assert line["k"][:10] == list(range(10))  # a run may leave the floats at once
    assert (line["low"][0], line["median"][0], line["high"][0]) == (1, 2, 4)
    assert line["high"][-1] is None
    assert "Infinity" not in json.dumps(line)
