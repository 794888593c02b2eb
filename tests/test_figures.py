"""Paper M's figures and the frontier, on runs whose losses and bytes are known beforehand."""

import json
import math
import pathlib

import pytest


pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tyro")

from experiments import (  # noqa: E402
    figures,
    frontier,
    nanogpt,
    presets,
    recipes,
    records,
    sweep,
    training,
)


COSTS = {"uncompressed": 1000, "rank15_natural": 50, "rank10": 125, "block16": 16}
PENALTIES = {"uncompressed": 0.0, "rank15_natural": 0.001, "rank10": 0.2, "block16": 0.1}
NAMES = list(COSTS)


def fake_train(settings, method, corpus, mesh=None, checkpoints=None):
    """Losses that fall to 2 plus the method's penalty, are best at a rate of 0.5, and vary."""
    del corpus, mesh, checkpoints
    noise = 0.002 * (settings.seed - 1)  # seeds 0, 1, 2: a standard deviation of 0.002
    floor = 2 + PENALTIES[method] + abs(settings.lr_multiplier - 0.5) + noise
    for step in range(0, settings.steps + 1, settings.eval_every):
        loss = floor + 1 - step / settings.steps
        yield {
            "method": method,
            "seed": settings.seed,
            "step": step,
            "tokens": step * settings.tokens_a_step,
            "loss_w": loss,
            "loss_x": loss,
            "bytes_up": COSTS[method] * step,
            "bytes_down": (250 if method == "rank15_natural" else 1000) * step,
            "rejected": 0,
            "seconds": 0.1 * step,
        }


@pytest.fixture
def args(monkeypatch, tmp_path):
    """Arguments for a script whose trainings cost nothing. `trained` counts them."""
    trained = []

    def counted(settings, method, *others, **more):
        trained.append((method, settings.lr_multiplier, settings.seed, settings.steps))
        return fake_train(settings, method, *others, **more)

    monkeypatch.setattr(training, "train", counted)
    source = tmp_path / "text.txt"
    source.write_bytes(bytes(2000))
    words = ["--steps", "40", "--eval-every", "5", "--multipliers", "1.0", "0.5", "--text"]
    return [
        *words,
        str(source),
        "--out",
        str(tmp_path / "record.jsonl"),
        "--methods",
        *NAMES,
    ], trained


def test_every_figure_is_drawn_from_one_set_of_runs(args, tmp_path, capsys):
    args, trained = args
    figures.main(args)
    assert len(trained) == len(set(trained)) == len(NAMES) * 2 * 2  # rates, budgets
    for number in figures.FIGURES:
        picture = tmp_path / f"record_figure{number}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()
    figures.main(args)
    assert len(trained) == len(NAMES) * 2 * 2
    printed = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in printed if line.startswith("rank15_natural "))
    # At the best rate, with the noise of seed 0. It is 0.001 worse than what it is compared with,
    # and so needs another evaluation for the same loss: 35 steps for 30.
    assert row[:4] == ["rank15_natural", "0.5", "1.9990", "–"]
    assert float(row[4].removeprefix("1/")) == pytest.approx(20 * 30 / 35, abs=0.05)


def test_a_figure_alone_runs_what_it_needs(args):
    args, trained = args
    figures.main([*args, "--figures", "1", "2"])
    assert {steps for *_, steps in trained} == {40}


def test_figure_7_alone_takes_half_the_tokens_alone(args, tmp_path, capsys):
    args, trained = args
    figures.main([*args, "--figures", "7"])
    assert {steps for *_, steps in trained} == {20}
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    (own,) = (row for row in rows if row and row[0] == "uncompressed")
    assert own[1:3] == ["0.5", "1.9980"]
    assert (tmp_path / "record_figure7.png").exists()
    figures.main([*args, "--figures", "4", "7"])
    assert {steps for *_, steps in trained} == {20, 40}


def test_thresholds_may_be_given(args, capsys):
    args, _ = args
    figures.main([*args, "--figures", "1", "--thresholds", "2.5", "2.05"])
    printed = capsys.readouterr().out.splitlines()
    words = [line.split() for line in printed]
    rows = {row[0]: row[-2:] for row in words if row and row[0] in NAMES}
    assert rows["uncompressed"] == ["1/1.0", "1/1.0"]
    assert rows["block16"][1] == "–"  # it ends at 2.1
    assert rows["rank10"][0] == f"1/{8 * 20 / 30:.1f}"  # 2.2 + 1 − t <= 2.5 at 30 of 40 steps


def test_bytes_to_a_loss_are_those_sent_by_then(args, tmp_path, monkeypatch):
    args, _ = args

    def warmed_up(settings, method, *others, **more):
        for record in fake_train(settings, method, *others, **more):
            extra = 1000 * min(record["step"], 10) if method == "block16" else 0
            yield record | {"bytes_up": record["bytes_up"] + extra}

    monkeypatch.setattr(training, "train", warmed_up)
    figures.main([*args, "--figures", "1"])
    _, lines = records.read_lines(tmp_path / "record.jsonl")
    runs = figures.best_runs(lines, 40)["block16"]
    assert figures.bytes_to(runs, 2.5) == 10 * 1000 + 25 * 16  # 2.1 + 1 − t <= 2.5, of 40 steps
    assert figures.bytes_to(runs, 2.0) is None
    for run in runs:  # a record of before has no curve of bytes
        del run["curves"]["bytes_up"]
    assert figures.bytes_to(runs, 2.5) == pytest.approx(25 / 40 * (10 * 1000 + 40 * 16))


def test_figures_are_drawn_where_nobody_has_the_loss(args, tmp_path, capsys):
    args, _ = args
    figures.main([*args, "--figures", "1", "2", "6", "--thresholds", "1.5", "1.0"])
    for number in (1, 2, 6):
        assert (tmp_path / f"record_figure{number}.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {row[0]: row[-2:] for row in rows if row and row[0] in NAMES} == dict.fromkeys(
        NAMES, ["–", "–"]
    )


def test_figures_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="must have 'uncompressed'"):
        figures.Config(methods=("block16",))
    with pytest.raises(ValueError, match="at least 2 times `eval_every`.*1/2.*got 40 and 40"):
        figures.Config(steps=40, eval_every=40)
    assert figures.Config(steps=40, eval_every=40, figures=(1,))
    with pytest.raises(ValueError, match="at least 4 times `eval_every`.*got 40 and 20"):
        frontier.Config(steps=40, eval_every=20)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_script_takes_every_preset(name):
    def budgets(runs):
        return sorted({run.settings.steps for run in runs}, reverse=True)

    configs = {
        script: presets.configure(script.Config, "test", None, ["--preset", name])
        for script in (nanogpt, sweep, figures, frontier)
    }
    whole = configs[sweep].steps
    assert configs[nanogpt].steps == whole
    assert budgets(sweep.grid(configs[sweep])) == [whole]

    most, half = budgets(figures.runs_of(configs[figures]))
    (quarter,) = budgets(frontier.screening(configs[frontier]))
    screened = [
        {"method": method, "steps": quarter, "lr_multiplier": 0.6, "loss_x": 2.0}
        for method in configs[frontier].methods
    ]
    assert [most] == budgets(frontier.finals(configs[frontier], screened)) == [whole]
    every = configs[sweep].eval_every
    for steps, parts in ((half, 2), (quarter, 4)):
        assert steps % every == 0 and abs(steps - whole / parts) <= every / 2


def test_the_budgets_of_the_records_are_the_preset_s():
    args = ["--preset", "0.3m"]
    assert figures.half(presets.configure(figures.Config, "test", None, args)) == 1800
    assert frontier.quarter(presets.configure(frontier.Config, "test", None, args)) == 900


def test_the_frontier_claims_what_its_runs_show(args, tmp_path, capsys):
    args, trained = args
    args = [*args, "--eval-every", "2", "--candidates", *NAMES, "--baseline-multipliers", "0.3"]
    frontier.main(args)
    screened = {(method, rate, 0, 10) for method in NAMES for rate in (1.0, 0.5)}
    finals = {(method, 0.5, seed, 40) for method in NAMES for seed in (0, 1, 2)}
    finals |= {(NAMES[0], 0.3, seed, 40) for seed in (0, 1, 2)}
    assert len(trained) == len(set(trained)) and set(trained) == screened | finals
    frontier.main([*args, "--summary", str(tmp_path / "elsewhere.json")])
    assert len(trained) == len(screened | finals)

    summary = json.loads((tmp_path / "record_summary.json").read_text())
    equal = summary["uplink_ratio_at_equal_loss"]
    # rank10 and block16 are worse by more than the spread.
    assert (equal["value"], equal["method"]) == (20, "rank15_natural")
    assert equal["seeds"] == [0, 1, 2]
    assert equal["loss"] == pytest.approx(2.001)
    assert equal["spread"] == pytest.approx(0.002)
    assert equal["loss_uncompressed"] == pytest.approx(2.0)
    both = summary["both_ways_ratio_at_equal_loss"]
    assert both["value"] == pytest.approx(2000 / 300)
    # The loss of the baseline after 30 of 40 steps is 2.25: block16 has it after 34.
    reached = summary["uplink_ratio_to_loss_at_75_percent"]
    assert reached["loss_to_reach"] == pytest.approx(2.25)
    assert (reached["method"], reached["value"]) == ("block16", pytest.approx(30 / 34 / 0.016))
    assert summary["command"].startswith("python -m experiments.frontier")
    again = json.loads((tmp_path / "elsewhere.json").read_text())
    assert again | {"command": ""} == summary | {"command": ""}
    assert (tmp_path / "record.png").exists()
    assert not (tmp_path / "summary.json").exists()  # that of the headline
    assert "10.2M tokens" not in capsys.readouterr().out


@pytest.mark.parametrize("script", [figures, frontier])
def test_a_script_that_is_stopped_does_nothing_more(script, args, tmp_path, monkeypatch):
    args, trained = args

    def interrupted(settings, method, *others, **more):
        trained.append((method, settings.steps))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return fake_train(settings, method, *others, **more)

    monkeypatch.setattr(training, "train", interrupted)
    # The first alone is finished, and it is not what the others are compared with.
    methods = ["--methods", "rank10", "uncompressed", "--multipliers", "0.5"]
    more = ["--candidates", "rank10"] if script is frontier else []
    with pytest.raises(SystemExit, match="Stopped. The same command goes on"):
        script.main([*args[: args.index("--methods")], *methods, *more])
    assert len(trained) == 2
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("script", [figures, frontier, sweep])
def test_a_run_that_diverged_is_no_one_s_best(script, args, tmp_path, monkeypatch, capsys):
    args, _ = args

    def diverging(settings, method, *others, **more):
        lost = method == "block16" or (method, settings.lr_multiplier) == ("rank10", 1.0)
        nan = {"loss_w": math.nan, "loss_x": math.nan} if lost else {}
        return (record | nan for record in fake_train(settings, method, *others, **more))

    monkeypatch.setattr(training, "train", diverging)
    script.main([*args, *(["--candidates", "block16"] if script is frontier else [])])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    name = "rank10:" if script is sweep else "rank10"
    assert {row[1] for row in rows if row and row[0] == name} == {"0.5"}
    if script is frontier:  # where the table has the best in front
        order = [row[0] for row in rows if row and row[0] in NAMES]
        assert [order[3], order[7]] == ["block16", "block16"]


@pytest.mark.parametrize("script", [figures, frontier, sweep])
@pytest.mark.parametrize("argument", [("--seed", "5"), ("--lr-multiplier", "0.3")])
def test_what_a_grid_has_of_its_own_is_no_argument(script, argument, capsys):
    for preset in ("small", "paper"):
        args = ["--preset", preset]
        assert presets.configure(script.Config, "test", None, args).seed == 0
        with pytest.raises(SystemExit):
            presets.configure(script.Config, "test", None, [*args, *argument])
        assert argument[0] in capsys.readouterr().err


def test_a_frontier_without_an_equal_says_so(args, tmp_path):
    args, _ = args
    frontier.main(
        [*args[:-4], "uncompressed", "block16", "--candidates", "block16", "--eval-every", "2"]
    )
    summary = json.loads((tmp_path / "record_summary.json").read_text())
    assert summary["uplink_ratio_at_equal_loss"] == {"value": None}
    assert summary["uplink_ratio_to_loss_at_75_percent"]["method"] == "block16"


def test_no_record_has_the_summary_of_another_but_by_request():
    results = pathlib.Path(frontier.__file__).parent / "results"
    found = [frontier.summary_path(record) for record in results.glob("*.jsonl")]
    assert len({*found, results / "summary.json"}) == len(found) + 1
    command = json.loads((results / "summary.json").read_text())["command"]
    assert "--summary experiments/results/summary.json" in command


def test_two_seeds_are_too_few_for_a_claim(args, tmp_path):
    args, _ = args
    frontier.main([*args, "--eval-every", "2", "--candidates", "rank10", "--seeds", "0", "1"])
    summary = json.loads((tmp_path / "record_summary.json").read_text())
    assert summary["uplink_ratio_at_equal_loss"] == {"value": None}


def test_every_row_of_table_2_has_its_place_in_figures_4_and_5():
    shown = {name for names in figures.KINDS.values() for name in names}
    assert shown == set(recipes.PAPER) - {"uncompressed"}
    for prefix in figures.LEVELS.values():
        assert {f"{prefix}{level}" for level in (20, 15, 10, 5)} <= set(recipes.PAPER)


def test_a_record_can_hold_more_than_is_drawn(args, tmp_path):
    args, _ = args
    figures.main([*args, "--seeds", "0", "1", "--figures", "2"])
    figures.main([*args, "--figures", "2"])
    _, lines = records.read_lines(tmp_path / "record.jsonl")
    assert len(lines) == 2 * len(NAMES) * 2


def test_a_line_says_which_commit_made_it(args, tmp_path, monkeypatch):
    args, _ = args
    for commit, seeds in (("before", ["0"]), ("after", ["0", "1"])):
        monkeypatch.setattr(records, "_git_commit", lambda commit=commit: commit)
        figures.main([*args, "--figures", "2", "--seeds", *seeds])
    header, lines = records.read_lines(tmp_path / "record.jsonl")
    assert header["commit"] == "before"
    assert {(line["seed"], line["commit"]) for line in lines} == {(0, "before"), (1, "after")}
