"""The experiments: the model against a transcription in NumPy, the data, the runs and records."""

import dataclasses
import itertools
import json
import math
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import pytest


pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")

from experiments import cluster, nanogpt, plots, records, sweep  # noqa: E402
from experiments.data import text  # noqa: E402
from experiments.models import gpt  # noqa: E402


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
    return text.load(path)


def batch(corpus, step, **changes):
    settings = {"seed": 0, "batch_size": 3, "length": 8} | changes
    shards = enumerate(text.shards(corpus, 4, 8))
    return np.stack([text.training_batch(s, worker, step, **settings) for worker, s in shards])


def test_a_batch_is_a_function_of_seed_step_and_worker(counting):
    np.testing.assert_array_equal(batch(counting, 5), batch(counting, 5))
    others = [batch(counting, 6), batch(counting, 5, seed=1)]
    assert all(not np.array_equal(batch(counting, 5), other) for other in others)


def test_each_worker_reads_windows_of_its_own_part(counting):
    train = np.asarray(counting.train).tobytes()
    size = len(train) // 4
    for worker, sequences in enumerate(batch(counting, 0, batch_size=8)):
        for sequence in sequences:
            window = bytes(sequence.tolist())
            # Nine bytes hold one whole number at least, so a window occurs once.
            assert train.count(window) == 1
            assert worker * size <= train.index(window) <= (worker + 1) * size - len(window)


def test_held_out_windows_reach_from_the_first_byte_to_the_last(counting):
    held_out = np.asarray(text.held_out_batch(counting, 5, 8))
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
    corpus = text.load()
    train, test = (bytes(np.asarray(part)) for part in (corpus.train, corpus.test))
    assert test == b"<19>\n<39>"
    assert train == "\n".join(f"<{i}>" for i in range(40) if i not in (19, 39)).encode()
    assert text.load().digest == corpus.digest


def test_bad_texts_are_refused(tmp_path, monkeypatch, counting):
    with pytest.raises(ValueError, match=r"no text file '.*missing.txt'.*--text"):
        text.load(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="8 workers.*1425 bytes.*length 2000.*shorter sequence"):
        text.shards(counting, 8, 2000)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="Found 0 source files.*--text"):
        text.load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 10, "eval_every": 4}, "multiple of `eval_every`, got 10 and 4"),
        ({"workers": 0}, "`workers` must be at least 1, got 0"),
        ({"constant": 1.5}, r"`constant`.*\[0, 1\], got 1.5"),
        ({"methods": ("adam",)}, r"`methods` must be among .*top15_natural.*got \('adam',\)"),
        ({"methods": ()}, "`methods` must be among"),
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
    with pytest.raises(ValueError, match=r"`multipliers` must be positive, got \(0.5, 0.0\)"):
        sweep.Config(multipliers=(0.5, 0.0))


def test_the_learning_rate_stays_and_then_falls_to_zero():
    tx_rates = nanogpt.learning_rate(nanogpt.Config(steps=100, eval_every=10), "uncompressed")
    peak = nanogpt.peak_learning_rate(nanogpt.Config(), "uncompressed")
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
    assert {path.name for path in out.iterdir()} == {"nanogpt.jsonl", "nanogpt.png"}
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
        nanogpt.main([*args, "--on", on])
        losses.append([line["loss_x"] for line in records.read_lines(out / "nanogpt.jsonl")[1]])
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


def fake_train(config, method, corpus, mesh=None):
    """What `nanogpt.train` yields, with losses that are best at half of the base rate."""
    del corpus, mesh
    rate = config.lr_multiplier or 1.0
    cost = {"uncompressed": 1000, "rank15_natural": 50, "top15_natural": 70}[method]
    for step in range(0, config.steps + 1, config.eval_every):
        loss = 2 + abs(rate - 0.5) + 3 / (1 + step)
        yield {
            "method": method,
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
    monkeypatch.setattr(nanogpt, "train", fake_train)
    source = tmp_path / "text.txt"
    source.write_bytes(bytes(2000))
    return ["--steps", "10", "--eval-every", "1", "--text", str(source)]


def test_savings_are_measured_at_the_loss_of_the_baseline_after_70_percent(quick, tmp_path):
    nanogpt.main([*quick, "--out", str(tmp_path)])
    baseline, rank, top = plots.nanogpt_table(tmp_path / "nanogpt.jsonl").splitlines()[1:4]
    # All three have the same losses, so the savings are those of a step.
    assert baseline.split()[5:7] == ["1×", "1×"]
    assert rank.split()[5:7] == ["0.05×", "20×"]
    assert top.split()[5:7] == ["0.07×", "14.3×"]


def test_an_interrupted_job_keeps_what_it_has(quick, tmp_path, monkeypatch, capsys):
    def interrupted(config, method, corpus, mesh):
        yield from itertools.islice(fake_train(config, method, corpus), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(nanogpt, "train", interrupted)
    nanogpt.main([*quick, "--out", str(tmp_path)])
    _, lines = records.read_lines(tmp_path / "nanogpt.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert "Stopped" in capsys.readouterr().out


def test_a_sweep_goes_on_where_it_stopped(quick, tmp_path, monkeypatch, capsys):
    ran = []

    def counted(config, method, corpus):
        ran.append((method, config.lr_multiplier))
        if len(ran) == 3:
            raise KeyboardInterrupt
        return fake_train(config, method, corpus)

    monkeypatch.setattr(nanogpt, "train", counted)
    path = tmp_path / "sweep.json"
    args = [*quick, "--methods", "top15_natural", "--multipliers", "1.0", "0.5", "0.25"]
    sweep.main([*args, "--out", str(path)])
    sweep.main([*args, "--out", str(path)])
    multipliers = [1.0, 0.5, 0.25, 0.25]  # the third was stopped, and ran again
    assert ran == [("top15_natural", multiplier) for multiplier in multipliers]
    assert [cell["lr_multiplier"] for cell in json.loads(path.read_text())["cells"]] == [
        1,
        0.5,
        0.25,
    ]
    assert "top15_natural: 0.5, test loss" in capsys.readouterr().out
    assert path.with_suffix(".png").exists()
    with pytest.raises(ValueError, match="made with config .*'steps': 10.*another --out"):
        sweep.main(["--steps", "20", *args[2:], "--out", str(path)])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "record.jsonl"
    records.write_lines(path, [{"a": 1}])
    with pytest.raises(TypeError):
        records.write_lines(path, [{"a": 2}, {"a": object()}])
    assert records.read_lines(path) == ({"a": 1}, [])
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.jsonl"]
