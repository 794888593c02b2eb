"""The experiments: the model against a transcription in NumPy, the data, the runs and records."""

import bz2
import dataclasses
import gzip
import itertools
import lzma
import math
import os
import pathlib
import signal
import subprocess
import sys
import sysconfig
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest


pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")

import ef21_jax as ef21  # noqa: E402
from experiments import (  # noqa: E402
    cluster,
    nanogpt,
    plots,
    presets,
    recipes,
    records,
    sweep,
    training,
)
from experiments.checkpoints import Checkpoints  # noqa: E402
from experiments.data import corpora, shards, text  # noqa: E402
from experiments.models import gpt  # noqa: E402


REPOSITORY = pathlib.Path(__file__).parent.parent
TINY = gpt.PRESETS["tiny"]
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 7))


def random_params(config, seed=0):
    """Parameters without the zeros of the initialisation, which would hide most of the model."""
    leaves, treedef = jax.tree.flatten(gpt.parameter_shapes(config))
    rng = np.random.default_rng(seed)
    return treedef.unflatten(
        np.float32(rng.normal(size=leaf.shape) / math.sqrt(leaf.shape[-2])) for leaf in leaves
    )


def logits(params, tokens, config=TINY):
    return gpt.GPT(config).apply({"params": params}, jnp.asarray(tokens))


def numpy_logits(params, tokens, config=TINY):
    """One sequence, a head and a position at a time, in float64."""

    def norm(x):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))

    def rotated(x, position):  # as complex numbers, x_i + i x_{i + d/2}
        half = len(x) // 2
        turns = np.exp(-1j * position * config.rope_base ** (-np.arange(half) / half))
        z = (x[:half] + 1j * x[half:]) * turns
        return np.concatenate([z.real, z.imag])

    def attention(x, kernels):
        q, k, v = (x @ kernels[name]["kernel"] for name in "qkv")
        out = np.zeros_like(x)
        for head in np.split(np.arange(config.width), config.heads):
            for t in range(len(x)):
                query = rotated(norm(q[t, head]), t)
                past = [rotated(norm(k[s, head]), s) for s in range(t + 1)]
                weights = np.exp(np.stack(past) @ query / math.sqrt(len(head)))
                out[t, head] = weights / weights.sum() @ v[: t + 1, head]
        return out @ kernels["out"]["kernel"]

    params = jax.tree.map(np.float64, params)
    x = params["wte"][tokens]
    for layer in range(config.layers):
        block = params[f"h_{layer}"]
        x = x + attention(norm(x), block["attn"])
        hidden = norm(x) @ block["mlp"]["up"]["kernel"]
        x = x + 2 * np.maximum(hidden, 0) ** 2 @ block["mlp"]["down"]["kernel"]
    return norm(x) @ params["wte"].T


def test_the_paper_model_has_123_568_128_parameters_in_73_matrices():
    leaves = jax.tree.leaves(gpt.parameter_shapes(gpt.PRESETS["124m"]))
    assert len(leaves) == 73
    assert all(len(leaf.shape) == 2 for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) == 123_568_128


def test_the_model_is_its_transcription():
    params = random_params(TINY)
    expected = np.stack([numpy_logits(params, sequence) for sequence in TOKENS])
    np.testing.assert_allclose(logits(params, TOKENS), expected, rtol=2e-4, atol=2e-4)


def test_a_later_token_leaves_earlier_logits_as_they_were():
    params = random_params(TINY)
    changed = TOKENS.copy()
    changed[:, 4] = (changed[:, 4] + 1) % TINY.vocab_size
    before, after = logits(params, TOKENS), logits(params, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.all(np.any(np.asarray(before != after)[:, 4:], axis=-1))


def test_rope_turns_and_only_the_distance_matters():
    q, k = np.float32(np.random.default_rng(1).normal(size=(2, 8)))
    along = jnp.broadcast_to(jnp.asarray([q, k])[:, None, None, :], (2, 9, 1, 8))
    queries, keys = np.asarray(gpt.rope(along, 10_000.0))[:, :, 0]
    np.testing.assert_allclose(np.linalg.norm(queries, axis=-1), np.linalg.norm(q), rtol=1e-5)
    scores = queries @ keys.T
    np.testing.assert_allclose(scores[1:, 1:], scores[:-1, :-1], rtol=1e-4, atol=1e-5)
    assert not np.allclose(scores[0, 0], scores[4, 0], rtol=1e-2)


def test_at_first_every_block_is_the_identity():
    params = jax.jit(gpt.GPT(TINY).init)(jax.random.key(0), jnp.asarray(TOKENS))["params"]
    x = params["wte"][TOKENS]
    expected = gpt.rms_norm(x) @ params["wte"].T
    np.testing.assert_allclose(logits(params, TOKENS), expected, rtol=1e-5, atol=1e-6)


def test_kernels_start_uniform_up_to_one_over_the_root_of_the_fan_in():
    params = jax.jit(gpt.GPT(TINY).init)(jax.random.key(0), jnp.asarray(TOKENS))["params"]
    attn, mlp = params["h_0"]["attn"], params["h_0"]["mlp"]
    for kernel in (attn["q"], attn["k"], attn["v"], mlp["up"], {"kernel": params["wte"].T}):
        kernel = np.asarray(kernel["kernel"])
        bound = 1 / math.sqrt(TINY.width)
        assert 0.95 * bound < np.max(np.abs(kernel)) <= bound
        np.testing.assert_allclose(np.std(kernel), bound / math.sqrt(3), rtol=0.1)


def test_bfloat16_activations_leave_logits_and_gradients_in_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    params = random_params(TINY)

    def loss(params):
        return gpt.next_token_loss(logits(params, TOKENS, config), jnp.asarray(TOKENS))

    assert logits(params, TOKENS, config).dtype == jnp.float32
    grads = jax.eval_shape(jax.grad(loss), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


@pytest.fixture
def counting(tmp_path):
    """A text of which every four bytes tell their position."""
    path = tmp_path / "counting.txt"
    path.write_bytes(np.arange(3000, dtype=">u4").tobytes())
    return corpora.load(path)


def batch(corpus, step, **changes):
    """(4 workers, size, length + 1)."""
    settings = {"seed": 0, "size": 3, "length": 8} | changes
    return corpus.batches(range(step, step + 1), range(4), 4, **settings)[:, 0]


@pytest.fixture
def token_files(tmp_path):
    """Files of 101 and 75 tokens that tell their position, to train on, and one to test on."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    tokens = np.arange(1000)
    shards.write(folder / "fineweb_train_000001.bin", tokens[:101])
    shards.write(folder / "fineweb_train_000002.bin", tokens[200:275])
    shards.write(folder / "fineweb_val_000000.bin", tokens[500:541])
    return folder


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_a_batch_is_a_function_of_seed_step_and_worker(kind, counting, token_files):
    corpus = counting if kind == "text" else corpora.load(token_files)
    settings = {"seed": 0, "size": 2, "length": 3}
    whole = corpus.batches(range(8), range(4), 4, **settings)
    assert whole.shape == (4, 8, 2, 4)
    for steps, workers in ((range(5, 7), range(4)), (range(8), range(2, 3))):
        part = corpus.batches(steps, workers, 4, **settings)
        np.testing.assert_array_equal(part, whole[np.ix_(workers, steps)])
    for step, worker in ((0, 1), (1, 0)):
        assert not np.array_equal(whole[worker, step], whole[0, 0])


def test_another_seed_draws_other_windows(counting):
    assert not np.array_equal(batch(counting, 5), batch(counting, 5, seed=1))


def test_token_files_are_read_in_order_and_each_token_once(token_files):
    corpus = corpora.load(token_files)
    # A step takes 24 tokens: four of the first file, three of the second, and then from the start.
    sequences = corpus.batches(range(8), range(4), 4, seed=0, size=2, length=3)
    assert sequences.dtype == np.uint16
    inputs, targets = sequences[..., :-1], sequences[..., 1:]
    np.testing.assert_array_equal(targets, inputs + 1)
    read = inputs.swapaxes(0, 1).reshape(8, -1)  # by step, then worker
    expected = [*np.arange(96).reshape(4, 24), *np.arange(200, 272).reshape(3, 24), range(24)]
    np.testing.assert_array_equal(read, expected)
    held_out = corpus.held_out(13, 3)
    np.testing.assert_array_equal(held_out[:, :-1].ravel(), range(500, 539))
    np.testing.assert_array_equal(held_out[:, 1:].ravel(), range(501, 540))
    assert corpus.describe() == {
        "name": "tokens",
        "files": 2,
        "train_tokens": 176,
        "test_tokens": 41,
    }


def test_a_single_token_file_has_its_last_20th_for_testing(token_files):
    corpus = corpora.load(token_files / "fineweb_train_000001.bin")
    assert [corpus.train[0].size, corpus.test.size] == [96, 5]
    assert corpus.test[0] == 96


def test_bad_token_files_are_refused(token_files):
    corpus = corpora.load(token_files)
    with pytest.raises(ValueError, match="has 75 tokens, and a step takes 97: lower"):
        corpus.batches(range(1), range(4), 4, seed=0, size=3, length=8)
    with pytest.raises(ValueError, match="41 tokens to test on, and 14 sequences of 3 take 43"):
        corpus.held_out(14, 3)
    path = token_files / "fineweb_train_000002.bin"
    shards.write(path, np.full(75, 50_257))
    with pytest.raises(ValueError, match="a token 50257.*below 50,257.*another vocabulary"):
        corpora.load(token_files).batches(range(4, 5), range(4), 4, seed=0, size=2, length=3)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="says that it has 75 tokens, and has 74.0"):
        corpora.load(path)
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"no file of tokens.*20240520 and 1.*begins with \["):
        corpora.load(path)
    path.unlink()
    with pytest.raises(ValueError, match="There is no token file"):
        corpora.load(path)
    (token_files / "fineweb_val_000000.bin").unlink()
    with pytest.raises(ValueError, match="1 token files to train on and 0.*one of each is needed"):
        corpora.load(token_files)


def test_each_worker_reads_windows_of_its_own_part(counting):
    train = np.asarray(counting.train).tobytes()
    size = len(train) // 4
    for worker, sequences in enumerate(batch(counting, 0, size=8)):
        for sequence in sequences:
            window = bytes(sequence.tolist())
            # Nine bytes hold one whole number at least, so a window occurs once.
            assert train.count(window) == 1
            assert worker * size <= train.index(window) <= (worker + 1) * size - len(window)


def test_held_out_windows_reach_from_the_first_byte_to_the_last(counting):
    held_out = counting.held_out(5, 8)
    assert held_out.shape == (5, 9)
    np.testing.assert_array_equal(held_out[0], counting.test[:9])
    np.testing.assert_array_equal(held_out[-1], counting.test[-9:])


def test_the_default_text_is_split_by_file_and_in_a_fixed_order(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    for folder in ("a", "site-packages", "a/test"):
        (tmp_path / folder).mkdir()
    for i in range(40):
        (tmp_path / "a" / f"m{i:02}.py").write_text(f"<{i}>")
    for skipped in ("site-packages/x.py", "a/test/x.py", "a/data.txt"):
        (tmp_path / skipped).write_text("skipped")
    corpus = corpora.load()
    train, test = (bytes(np.asarray(part)) for part in (corpus.train, corpus.test))
    assert test == b"<19>\n<39>"
    assert train == "\n".join(f"<{i}>" for i in range(40) if i not in (19, 39)).encode()
    assert text.standard_library().digest == corpus.digest


@pytest.mark.parametrize(("suffix", "module"), [("xz", lzma), ("gz", gzip), ("bz2", bz2)])
def test_a_compressed_text_is_what_it_holds(suffix, module, tmp_path):
    content = np.random.default_rng(0).integers(97, 123, 2000, np.uint8).tobytes()
    plain, packed = tmp_path / "text.txt", tmp_path / f"text.txt.{suffix}"
    plain.write_bytes(content)
    packed.write_bytes(module.compress(content))
    found = corpora.load(packed)
    np.testing.assert_array_equal(found.train, corpora.load(plain).train)
    assert found.describe() == corpora.load(plain).describe()
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"text.txt.{suffix}' cannot be read.*Get the file anew"):
        corpora.load(packed)
    packed.write_bytes(content)
    with pytest.raises(ValueError, match=rf"text.txt.{suffix}' cannot be read.*Get the file anew"):
        corpora.load(packed)
    tokens = tmp_path / f"tokens.bin.{suffix}"
    tokens.write_bytes(module.compress(content))
    with pytest.raises(ValueError, match=rf"tokens.bin.{suffix}' are tokens.*unpack the file"):
        corpora.load(tokens)


def test_bad_texts_are_refused(tmp_path, monkeypatch, counting):
    with pytest.raises(ValueError, match=r"no text file '.*missing.txt'.*--text"):
        corpora.load(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="8 workers.*1425 bytes.*length 2000.*shorter sequence"):
        counting.batches(range(1), range(8), 8, seed=0, size=1, length=2000)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="Found 0 source files.*--text"):
        corpora.load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 10, "eval_every": 4}, "multiple of `eval_every`, got 10 and 4"),
        ({"workers": 0}, "`workers` must be at least 1, got 0"),
        ({"constant": 1.5}, r"`constant`.*\[0, 1\], got 1.5"),
        ({"batch_size": 4, "microbatches": 3}, "multiple of `microbatches`, got 4 and 3"),
        ({"lr_multiplier": 0.0}, "`lr_multiplier` must be positive, got 0.0"),
        ({"learning_rate": -1.0}, "`learning_rate` must be positive, got -1.0"),
        ({"methods": ()}, "`methods` must be among"),
        ({"checkpoint_every": 0}, "`checkpoint_every` must be at least 1 step.*got 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        nanogpt.Config(**settings)


def test_bad_shapes_and_multipliers_are_refused():
    with pytest.raises(ValueError, match="`width` must be a multiple of .* 6.*got 16"):
        gpt.GPTConfig(width=16, heads=3)
    with pytest.raises(ValueError, match="`layers` must be at least 1, got 0"):
        gpt.GPTConfig(layers=0)
    with pytest.raises(ValueError, match="`checkpoint_every` must be at least 1 step.*got -3"):
        sweep.Config(checkpoint_every=-3)
    for name in ("methods", "seeds"):
        with pytest.raises(ValueError, match=f"`{name}` must be one or more"):
            sweep.Config(**{name: ()})
    with pytest.raises(ValueError, match=r"`multipliers` must be positive, got \(0.5, 0.0\)"):
        sweep.Config(multipliers=(0.5, 0.0))


def test_the_learning_rate_stays_and_then_falls_to_zero():
    settings = training.Settings(steps=100, eval_every=10)
    tx_rates = training.learning_rate(settings, "uncompressed")
    peak = training.peak_learning_rate(settings, "uncompressed")
    rates = [float(tx_rates(step)) for step in (0, 39, 40, 70, 100)]
    np.testing.assert_allclose(rates, [peak, peak, peak, peak / 2, 0], rtol=1e-6)


ARGS = (
    "--model tiny --steps 4 --eval-every 2 --workers 2 --batch-size 1 --length 8 "
    "--eval-sequences 4 --lr-multiplier 0.5"
).split()


def test_the_main_job_end_to_end(tmp_path, capsys):
    source = tmp_path / "text.txt"
    source.write_text("to err is human, to feed the error back is EF21\n" * 60)
    methods = ["uncompressed", "top15_natural"]
    out = tmp_path / "out"
    nanogpt.main([*ARGS, "--methods", *methods, "--text", str(source), "--out", str(out)])

    header, lines = records.read_lines(out / "nanogpt.jsonl")
    assert header["config"]["steps"] == 4
    assert {"python", "jax", "jaxlib", "optax", "flax"} == set(header["versions"])
    assert [(line["method"], line["step"]) for line in lines] == [
        *itertools.product(methods, (0, 2, 4))
    ]
    dense, compressed = lines[2], lines[5]
    parameters = 256 * 16 + 2 * 12 * 16 * 16
    assert dense["bytes_up"] == 4 * 4 * parameters
    assert 0 < compressed["bytes_up"] < 0.1 * dense["bytes_up"]
    for line in lines:
        assert math.isfinite(line["loss_w"])
        assert line["loss_x"] == line["loss_w"]  # the downlink is lossless
        assert line["rejected"] == 0
        assert line["tokens"] == line["step"] * 2 * 1 * 8
    # The same model and text for both, and both learn.
    assert lines[0]["loss_w"] == lines[3]["loss_w"]
    assert dense["loss_w"] < lines[0]["loss_w"]
    assert compressed["loss_w"] < lines[3]["loss_w"]

    assert (out / "nanogpt.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in out.iterdir()}
    assert names == {"nanogpt.jsonl", "nanogpt.png", ".nanogpt.jsonl.lock"}
    printed = capsys.readouterr().out
    assert "top15_natural: step 4 of 4" in printed
    assert "tokens/s" in printed


@pytest.fixture
def four(tmp_path, monkeypatch):
    """Arguments for four workers, and the folder of their results. Their devices are there."""
    monkeypatch.setattr(cluster, "initialize", lambda: None)  # JAX has begun, and cannot join a job
    source = tmp_path / "text.txt"
    source.write_text("to err is human, to feed the error back is EF21\n" * 60)
    out = tmp_path / "out"
    args = [*ARGS, "--workers", "4", "--methods", "rank15_natural", "--text", str(source)]
    return [*args, "--downlink", "natural", "--topology", "sharded", "--out", str(out)], out


@pytest.mark.slow  # test_cluster does so with processes
def test_workers_on_devices_learn_what_lanes_do(four):
    args, out = four
    losses = []
    for on in ("lanes", "devices"):
        nanogpt.main([*args, "--on", on, "--out", str(out / on)])
        _, lines = records.read_lines(out / on / "nanogpt.jsonl")
        losses.append([line["loss_x"] for line in lines])
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_an_audit_prints_what_a_compiled_step_sends_and_stops(four, capsys):
    args, out = four
    nanogpt.main([*args, "--audit"])
    printed = capsys.readouterr().out
    assert "one call, of 2 steps" in printed and "all-to-all" in printed
    # Of two steps, by the program, and of one, by the ledger.
    totals = [line.split() for line in printed.splitlines() if line.startswith("total")]
    of_call, of_step = (int(words[-1].replace(",", "")) for words in totals)
    assert 2 * of_step <= of_call <= 2 * of_step + 100
    assert not out.exists()
    with pytest.raises(ValueError, match="3 workers want a device each.*there are 4"):
        nanogpt.main([*args, "--workers", "3", "--audit"])


def test_routes_lists_every_parameter_and_stops(tmp_path, capsys):
    out = tmp_path / "out"
    nanogpt.main(["--routes", "--model", "124m", "--methods", "top15_natural", "--out", str(out)])
    printed = capsys.readouterr().out
    assert printed.count("Spectral()") == 72
    assert printed.count("Sign()") == 1
    assert "50304×768" in printed
    assert not out.exists()


def test_routes_list_a_warm_up_too(capsys):
    nanogpt.main(["--routes", "--preset", "tiny", "--methods", "rank10_4bit_both_x3_dense10"])
    warm_up, after = capsys.readouterr().out.strip().split("\n\n")
    assert warm_up.startswith("rank10_4bit_both_x3_dense10, the first 5 steps\n")
    assert after.startswith("rank10_4bit_both_x3_dense10\n")
    assert "RankK" in after and "RankK" not in warm_up


@pytest.mark.slow
def test_an_audit_has_a_warm_up_too(four, capsys):
    args, _ = four
    args = [*args, "--steps", "4", "--methods", "rank10_4bit_both_x3_4bit30"]
    nanogpt.main([*args, "--audit"])
    printed = capsys.readouterr().out
    for title in ("4bit30, the first 2 steps: one call", "4bit30: one call"):
        assert title in printed


def fake_train(config, method, corpus, mesh=None, checkpoints=None):
    """What `training.train` yields, with losses that are best at half of the base rate."""
    del corpus, mesh, checkpoints
    rate = config.lr_multiplier or 1.0
    cost = {"uncompressed": 1000, "rank15_natural": 50, "top15_natural": 70}[method]
    for step in range(0, config.steps + 1, config.eval_every):
        loss = 2 + abs(rate - 0.5) + 3 / (1 + step)
        yield {
            "method": method,
            "seed": config.seed,
            "step": step,
            "tokens": 10 * step,
            "loss_w": loss,
            "loss_x": loss,
            "bytes_up": cost * step,
            "bytes_down": 1000 * step,
            "rejected": 0,
            "seconds": 0.1 * step,
        }


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The scripts with a training that costs nothing, and arguments for them."""
    monkeypatch.setattr(training, "train", fake_train)
    source = tmp_path / "text.txt"
    source.write_bytes(bytes(2000))
    return ["--steps", "10", "--eval-every", "1", "--text", str(source)]


def test_savings_are_measured_at_the_loss_of_the_baseline_after_70_percent(quick, tmp_path):
    methods = ["uncompressed", "rank15_natural", "top15_natural"]
    nanogpt.main([*quick, "--methods", *methods, "--out", str(tmp_path)])
    baseline, rank, top = plots.nanogpt_table(tmp_path / "nanogpt.jsonl").splitlines()[1:4]
    # All three have the same losses, so the savings are those of a step.
    assert baseline.split()[5:7] == ["1×", "1×"]
    assert rank.split()[5:7] == ["0.05×", "20×"]
    assert top.split()[5:7] == ["0.07×", "14.3×"]


def test_what_the_main_job_calls_the_default_is_the_librarys():
    recipe = recipes.RECIPES["rank25_4bit_x2"]
    assert "its default" in plots.style("rank25_4bit_x2", [])[0]
    assert recipe == recipes.Recipe(ef21.DEFAULT_UPLINK, extrapolation=ef21.DEFAULT_EXTRAPOLATION)


def test_runs_of_several_budgets_are_told_apart():
    cells = [
        {"method": "block16", "lr_multiplier": rate, "steps": steps, "loss_x": loss}
        for rate, steps, loss in ((0.5, 9, 2.0), (1.0, 9, 3.0), (0.5, 1000, 1.75), (1.0, 1000, 1.5))
    ]
    assert [line.split() for line in sweep.best(cells).splitlines()[1:]] == [
        ["block16,", "9", "steps:", "0.5", "test", "loss", "2.0000"],
        ["block16,", "1,000", "steps:", "1", "test", "loss", "1.5000"],
    ]


def test_an_interrupted_job_keeps_what_it_has(quick, tmp_path, monkeypatch, capsys):
    def interrupted(config, method, corpus, *others):
        yield from itertools.islice(fake_train(config, method, corpus), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    nanogpt.main([*quick, "--out", str(tmp_path)])
    _, lines = records.read_lines(tmp_path / "nanogpt.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert "Stopped" in capsys.readouterr().out


def test_a_record_of_the_main_job_grows_and_is_never_replaced(quick, tmp_path, monkeypatch, capsys):
    ran = []

    def counted(config, method, corpus, *others):
        ran.append(method)
        for record in fake_train(config, method, corpus):
            if len(ran) == 2 and record["step"] == 5:
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(training, "train", counted)
    monkeypatch.setattr(cluster, "initialize", lambda: None)  # JAX has begun, and cannot join a job
    path = tmp_path / "nanogpt.jsonl"

    def main(*more):
        nanogpt.main([*quick, "--out", str(tmp_path), *more])
        _, lines = records.read_lines(path)
        return {method: len(list(own)) for method, own in itertools.groupby(lines, method_of)}

    def method_of(line):
        return line["method"]

    methods = ["--methods", "uncompressed", "rank15_natural"]
    assert main(*methods) == {"uncompressed": 11, "rank15_natural": 5}
    assert "has uncompressed" not in capsys.readouterr().out
    # Another method leaves what there is, finished or not.
    only = ["--methods", "top15_natural"]
    assert main(*only) == {"uncompressed": 11, "rank15_natural": 5, "top15_natural": 11}
    whole = {"uncompressed": 11, "top15_natural": 11, "rank15_natural": 11}
    assert main(*methods) == whole
    assert "has uncompressed: to run that again, move the file" in capsys.readouterr().out
    assert main(*methods) == whole
    assert ran == ["uncompressed", "rank15_natural", "top15_natural", "rank15_natural"]
    assert "tokens/s" in capsys.readouterr().out

    before = path.read_bytes()
    for name, value in (("seed", "1"), ("steps", "20"), ("on", "devices")):
        message = rf"nanogpt.jsonl' was made with {name} .*{value}.*another --out"
        with pytest.raises(ValueError, match=message):
            main(f"--{name}", value, *only)
    other = tmp_path / "other.txt"
    other.write_bytes(bytes(3000))
    with pytest.raises(ValueError, match="was made with text .*another --out, or move the file"):
        main("--text", str(other))
    with records.only_writer(path), pytest.raises(ValueError, match="Another process is writing"):
        main(*only)
    assert path.read_bytes() == before


def test_a_sweep_goes_on_where_it_stopped(quick, tmp_path, monkeypatch, capsys):
    ran = []

    def counted(config, method, corpus, checkpoints=None):
        ran.append((method, config.lr_multiplier))
        if len(ran) == 3:
            raise KeyboardInterrupt
        return fake_train(config, method, corpus)

    monkeypatch.setattr(training, "train", counted)
    path = tmp_path / "sweep.jsonl"
    args = [*quick, "--methods", "top15_natural", "--multipliers", "1.0", "0.5", "0.25"]
    with pytest.raises(SystemExit, match="Stopped"):
        sweep.main([*args, "--out", str(path)])
    sweep.main([*args, "--out", str(path)])
    multipliers = [1.0, 0.5, 0.25, 0.25]  # the third was stopped, and ran again
    assert ran == [("top15_natural", multiplier) for multiplier in multipliers]
    _, lines = records.read_lines(path)
    assert [line["lr_multiplier"] for line in lines] == [1, 0.5, 0.25]
    assert lines[0]["curves"]["step"] == list(range(11))
    assert lines[0]["curves"]["loss_x"][-1] == round(lines[0]["loss_x"], 5)
    printed = capsys.readouterr().out
    assert "top15_natural:  0.5  test loss" in printed
    # Not the name of the frontier's picture, whose record may be the same.
    assert [entry.name for entry in tmp_path.glob("*.png")] == ["sweep_rates.png"]

    # The record grows by other seeds and budgets, and by nothing that is not comparable.
    sweep.main([*args, "--seeds", "0", "1", "--out", str(path)])
    assert [line["seed"] for line in records.read_lines(path)[1]] == [0, 0, 0, 1, 1, 1]
    sweep.main([*args, "--steps", "20", "--out", str(path)])
    assert [line["steps"] for line in records.read_lines(path)[1]] == [10] * 6 + [20] * 3
    with pytest.raises(ValueError, match="made with config .*'batch_size': 4.*another --out"):
        sweep.main([*args, "--batch-size", "2", "--out", str(path)])


def checkpointed(settings, method, corpus, checkpoints):
    """Training that keeps its steps and does nothing else."""
    records = []
    for record in fake_train(settings, method, corpus):
        records.append(record)
        checkpoints.save(record["step"], {"w": np.zeros(1)}, records)
        yield record


def test_a_checkpoint_stays_until_the_line_is_written(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train", checkpointed)
    path = tmp_path / "sweep.jsonl"
    args = [*quick, "--methods", "uncompressed", "--multipliers", "0.5", "--out", str(path)]
    args += ["--checkpoint-every", "10"]
    kept = tmp_path / "sweep.checkpoints" / "uncompressed_0.5_0_10"

    def killed(*others):
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(records, "write_lines", killed)
        sweep.main(args)
    assert (kept / "10").exists() and not path.exists()
    sweep.main(args)
    assert path.exists() and not kept.exists()
    # It was killed after the line, and before the checkpoint was removed.
    kept.mkdir()
    sweep.main(args)
    assert not kept.exists()


def test_a_record_has_one_writer(quick, tmp_path, monkeypatch):
    path = tmp_path / "sweep.jsonl"
    args = [*quick, "--methods", "uncompressed", "--multipliers", "0.5", "--out", str(path)]
    with records.only_writer(path), pytest.raises(ValueError, match="Another process is writing"):
        sweep.main(args)
    holder = (
        "import sys; from experiments import records\n"
        "with records.only_writer(sys.argv[1]):\n print('here', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPOSITORY, **pipes) as process:
        assert process.stdout.readline() == b"here\n"
        with pytest.raises(ValueError, match="Another process is writing .*sweep.jsonl.*--out"):
            sweep.main(args)
        process.kill()
    sweep.main(args)
    assert len(records.read_lines(path)[1]) == 1


@pytest.mark.slow  # three processes that import JAX
@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="asks Linux")
def test_no_run_outlives_a_sweep_that_is_killed(tmp_path):
    settings = "--preset tiny --steps 10000000 --eval-every 10 --checkpoint-every 10 --jobs 2"
    grid = "--methods uncompressed --multipliers 0.5 0.4".split()
    out = tmp_path / "sweep.jsonl"
    command = [sys.executable, "-m", "experiments.sweep", *settings.split(), *grid, "--out", out]
    process = subprocess.Popen(command, cwd=REPOSITORY)
    children = []
    try:
        while len(list(tmp_path.glob("sweep.checkpoints/*/[1-9]*/state"))) < 2:
            assert process.poll() is None
            time.sleep(0.1)
        found = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        children = [int(child) for child in found.split()]
        assert len(children) >= 2
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while any(map(running, children)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(running, children))
    finally:
        process.kill()
        process.wait()
        for child in filter(running, children):
            os.kill(child, signal.SIGKILL)


def running(process):
    try:
        status = pathlib.Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # ended, and nobody has asked


@pytest.fixture
def prose(tmp_path):
    source = tmp_path / "text.txt"
    source.write_text("to err is human, to feed the error back is EF21\n" * 60)
    return str(source)


TINY_RUN = training.Settings(
    model="tiny", steps=6, eval_every=2, workers=2, batch_size=2, length=8, eval_sequences=4
)


def test_processes_share_the_processor_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 3})
    assert sweep.shares_of(3) == [("core", 3), ("core", 5), ("core", 3)]
    kept = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: kept.append(cores))
    sweep.take(("core", 5))
    assert kept == [{5}]


def test_processes_share_the_gpus_where_there_are_any(monkeypatch):
    gpus = [types.SimpleNamespace(platform="gpu", local_hardware_id=number) for number in (0, 1)]
    monkeypatch.setattr(jax, "local_devices", lambda: gpus)
    assert sweep.shares_of(3) == [("gpu", 0), ("gpu", 1), ("gpu", 0)]
    before = jax.config.values["jax_cuda_visible_devices"]
    sweep.take(("gpu", 1))
    assert jax.config.values["jax_cuda_visible_devices"] == "1"
    for maker in ("cuda", "rocm"):
        jax.config.update(f"jax_{maker}_visible_devices", before)


@pytest.mark.slow  # two processes that import JAX
def test_a_sweep_of_two_processes_gives_what_one_does(prose, tmp_path):
    found = {}
    for jobs in (1, 2):
        path = tmp_path / f"{jobs}.jsonl"
        settings = dataclasses.replace(TINY_RUN, lr_multiplier=0.5)
        runs = [sweep.Run(name, settings, prose) for name in ("uncompressed", "block16")]
        lines = sweep.run_all(runs, path, "a test", jobs)
        found[jobs] = {line["method"]: line["curves"] for line in lines}
    for name, curves in found[1].items():
        np.testing.assert_allclose(curves["loss_x"], found[2][name]["loss_x"], rtol=1e-4)


@pytest.mark.parametrize(("on", "topology"), [("lanes", "gather"), ("devices", "sharded")])
def test_a_run_goes_on_from_its_checkpoint_to_the_same_bits(on, topology, prose, tmp_path):
    corpus, name = corpora.load(prose), "block16"
    settings = dataclasses.replace(TINY_RUN, downlink="natural_4bit", topology=topology)
    mesh = cluster.worker_mesh(2) if on == "devices" else None
    whole = list(training.train(settings, name, corpus, mesh))

    def checkpoints(about="this run"):
        return Checkpoints(tmp_path / "run", about, every=2)

    def untimed(found):
        return [record | {"seconds": None} for record in found]

    stopped = itertools.islice(training.train(settings, name, corpus, mesh, checkpoints()), 3)
    assert untimed(stopped) == untimed(whole[:3])
    drawn = []
    batches = training.batches_of

    def watched(settings, corpus, steps, mesh):
        drawn.append(steps)
        return batches(settings, corpus, steps, mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "batches_of", watched)
        found = list(training.train(settings, name, corpus, mesh, checkpoints()))
    assert untimed(found) == untimed(whole)
    assert drawn == [range(2), range(4, 6)]  # the first to compile with
    with pytest.raises(ValueError, match="is of a run with this run, not another: move"):
        list(training.train(settings, name, corpus, mesh, checkpoints("another")))


def test_microbatches_give_the_gradient_of_the_whole_batch(prose):
    model = training.model_of(TINY_RUN, corpora.load(prose))
    params = random_params(TINY)
    batch = jnp.asarray(np.random.default_rng(0).integers(0, 256, (6, 9)))
    whole, *others = (
        jax.jit(training.loss_and_gradient, static_argnums=(0, 3))(model, params, batch, parts)
        for parts in (1, 2, 6)
    )
    for other in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), other, whole
        )


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_an_optimizer_of_the_papers_matrices(name):
    settings = training.Settings(**presets.PRESETS["paper"])
    params = gpt.parameter_shapes(dataclasses.replace(gpt.PRESETS["124m"], layers=1))
    tx = training.optimizer(settings, name)
    book = ef21.ledger.bytes_per_step(tx, params)
    dense = recipes.RECIPES[name].uplink == ef21.Identity()
    assert book.up == book.dense if dense else book.up < 0.51 * book.dense
    assert jax.eval_shape(tx.init, params)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["top15_natural_adamw", "powersgd_adamw", "sign_ef14"])
def test_baselines_learn(name, prose):
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        *_, last = found = list(training.train(TINY_RUN, name, corpora.load(prose)))
    assert last["loss_x"] < found[0]["loss_x"] - 0.1


@pytest.mark.parametrize("step", ["lmo", "adamw"])
def test_a_recipe_extrapolates(step):
    """By one, of a momentum of one half: from the second on, the gradient itself is handed on."""
    recipe = recipes.Recipe(momentum=0.5, extrapolation=1.0, step=step)
    rules = (ef21.Rule("all", ef21.Frobenius()),)
    tx = recipes.optimizer(recipe, 0.1, axis_name=None, rules=rules)
    params = {"w": jnp.zeros((3, 4))}
    first, second = ({"w": g} for g in jax.random.normal(jax.random.key(0), (2, 3, 4)))
    # Estimates start at zero, so the first is handed on twice.
    given = [optax.tree.scale(2.0, first), second]
    server = {
        "lmo": ef21.lmo_step(ef21.Frobenius(), 0.1),
        "adamw": optax.adamw(0.1, b2=0.95, weight_decay=0.0),
    }[step]
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        state, of_server = tx.init(params), server.init(params)
        for gradient, ahead in zip((first, second), given, strict=True):
            update, state = tx.update(gradient, state, params)
            expected, of_server = server.update(ahead, of_server, params)
    np.testing.assert_allclose(update["w"], expected["w"], rtol=1e-5)


WARMED_UP = [name for name, recipe in recipes.RECIPES.items() if recipe.warm_up]


@pytest.mark.parametrize("name", WARMED_UP)
def test_a_warm_up_has_the_state_of_what_comes_after_it(name):
    params = gpt.parameter_shapes(gpt.PRESETS["124m"])
    states = [
        jax.eval_shape(training.optimizer(training.Settings(), name, warm_up=warm_up).init, params)
        for warm_up in (True, False)
    ]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert jax.tree.leaves(states[0]) == jax.tree.leaves(states[1])


def test_a_warm_up_is_of_the_first_steps_and_its_bytes_are_counted(prose, monkeypatch):
    uplinks = {"before": ef21.Identity(), "after": ef21.TopK(0.1)}
    named = {name: recipes.Recipe(uplink) for name, uplink in uplinks.items()}
    evaluations = {"a quarter": 1, "half": 2}
    for name, count in evaluations.items():
        named[name] = dataclasses.replace(named["after"], warm_up=(count / 4, uplinks["before"]))
    monkeypatch.setattr(recipes, "RECIPES", named)
    settings = dataclasses.replace(TINY_RUN, steps=8, eval_every=2)
    found = {name: list(training.train(settings, name, corpora.load(prose))) for name in named}
    loss, up = (
        {name: [record[key] for record in found[name]] for name in named}
        for key in ("loss_w", "bytes_up")
    )
    for name, count in evaluations.items():
        # EF21 of what is sent as it is adds and subtracts an estimate; `gluon` has none.
        same = slice(0, count + 1)
        assert loss[name][same] == pytest.approx(loss["before"][same], rel=1e-5)
        assert abs(loss[name][-1] - loss["before"][-1]) > 1e-3
        later = [up["before"][count] + x for x in up["after"][1 : 5 - count]]
        assert up[name] == [*up["before"][same], *later]


def test_a_warm_up_takes_at_least_one_evaluation_and_not_all():
    recipe = recipes.Recipe(ef21.TopK(0.1), warm_up=(0.01, ef21.Identity()))
    assert training.warm_up_steps(TINY_RUN, recipe) == TINY_RUN.eval_every
    assert training.warm_up_steps(TINY_RUN, recipes.Recipe()) == 0
    with pytest.raises(ValueError, match="all 6 steps: pass a smaller `eval_every` than 6"):
        training.warm_up_steps(dataclasses.replace(TINY_RUN, eval_every=6), recipe)


def test_a_warm_up_is_no_farther_ahead_than_momentum_is_late():
    recipe = recipes.Recipe(ef21.TopK(0.1), extrapolation=3.0, warm_up=(0.1, ef21.Identity()))
    assert (recipe.in_warm_up.uplink, recipe.in_warm_up.extrapolation) == (ef21.Identity(), 0.9)
    assert dataclasses.replace(recipe, extrapolation=0.0).in_warm_up.extrapolation == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"warm_up": (1.0, ef21.Identity())}, r"share of the steps in \(0, 1\), got 1.0"),
        ({"warm_up": (0.1, ef21.Identity()), "step": "adamw"}, "of EF21-Muon alone"),
        ({"uplink": ef21.ByRole(hidden=ef21.Identity()), "feedback": "ef14"}, "of EF21-Muon alone"),
    ],
    ids=["all steps", "another step", "another feedback"],
)
def test_recipes_that_cannot_be_trained_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        recipes.Recipe(**kwargs)


def test_what_has_no_estimate_cannot_be_extrapolated():
    with pytest.raises(ValueError, match="`extrapolation` is of EF21's estimate.*got 'ef14'"):
        recipes.Recipe(feedback="ef14", extrapolation=1.0)


def test_a_recipe_can_be_counted_as_the_paper_does():
    params = gpt.parameter_shapes(gpt.PRESETS["124m"])
    recipe = recipes.RECIPES["rank15_natural_16bit"]
    book = training.bytes_a_step(recipe, recipes.optimizer(recipe, 1.0), params)
    assert book.up / book.dense == pytest.approx(0.1010, abs=1e-4)  # Table 2


def test_the_paper_preset_is_the_paper_s_tables():
    config = presets.configure(nanogpt.Config, "test", None, ["--preset", "paper", "--seed", "1"])
    assert config.seed == 1
    assert gpt.PRESETS[config.model] == gpt.GPTConfig(50_304, 12, 6, 768, 3072)
    assert (config.workers * config.batch_size, config.length) == (256, 1024)  # Table 4
    assert training.peak_learning_rate(config, "uncompressed") == 3.6e-4
    assert (config.constant, config.oracle, config.topology) == (0.4, "jordan", "gather")
    assert recipes.RECIPES["uncompressed"].momentum == 0.9
    assert config.steps * config.tokens_a_step == pytest.approx(5e9, rel=1e-3)
    half = presets.configure(nanogpt.Config, "test", None, ["--preset", "paper_2.5b"])
    assert half.steps * half.tokens_a_step == pytest.approx(2.5e9, rel=1e-3)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_are_settings(name):
    settings = training.Settings(**presets.PRESETS[name])
    if name.endswith("m"):  # the ladder: 20 tokens a parameter
        leaves = jax.tree.leaves(gpt.parameter_shapes(gpt.PRESETS[settings.model]))
        tokens = settings.steps * settings.tokens_a_step
        assert 20 <= tokens / sum(leaf.size for leaf in leaves) < 21


def test_a_record_that_was_cut_short_says_so(tmp_path):
    path = tmp_path / "record.jsonl"
    records.write_lines(path, [{"a": 1}, {"a": 2}])
    path.write_text(path.read_text()[:-3])
    with pytest.raises(ValueError, match="Line 2 of '.*record.jsonl'.*cut short: remove the line"):
        records.read_lines(path)
    path.write_text("")
    with pytest.raises(ValueError, match="record.jsonl' is empty: remove it"):
        records.read_lines(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "record.jsonl"
    records.write_lines(path, [{"a": 1}])
    with pytest.raises(TypeError):
        records.write_lines(path, [{"a": 2}, {"a": object()}])
    assert records.read_lines(path) == ({"a": 1}, [])
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.jsonl"]
