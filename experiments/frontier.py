"""Beyond the papers: the best trade of bytes for loss, over all that can be sent.

First every candidate is trained on a quarter of the tokens, with several learning rates; then the
finalists on all of them, each with its best rates and with several seeds. Stopped and started
again, it goes on. The frontier is drawn from the record, and what it comes to is written to
`NAME_summary.json` beside it.

    python -m experiments.frontier --preset 0.3m --jobs 2
    python -m experiments.frontier --preset 1m --candidates uncompressed block16 --seeds 0
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import figures, plots, presets, recipes, records, sweep, training


@dataclasses.dataclass(frozen=True)
class Config(sweep.Config):
    methods: tuple[training.RecipeName, ...] = (
        "uncompressed",
        "rank25_4bit_both_x2",
        "rank15_4bit_both_x3",
        "rank10_4bit_both_x3",
    )  # the finalists; the first is what the others are compared with
    candidates: tuple[training.RecipeName, ...] = tuple(
        name for name in recipes.RECIPES if name not in ("rank15_natural_16bit",)
    )
    multipliers: tuple[float, ...] = (0.6, 0.4)  # of the base learning rate, for candidates
    baseline_multipliers: tuple[float, ...] = ()  # more rates for the first finalist, on all tokens
    seeds: tuple[int, ...] = (0, 1, 2)  # of the finalists; candidates have the first
    out: str = "results/frontier.jsonl"  # and a picture beside it
    summary: str | None = None  # what it comes to, in JSON; None: by the name of `out`, beside it

    def __post_init__(self):
        super().__post_init__()
        quarter(self)  # says so where there is none


def main(args=None):
    config = presets.configure(Config, "experiments.frontier", __doc__, args)
    command = records.command_line("experiments.frontier", args)
    lines = run(config, screening(config), command)
    lines = run(config, finals(config, lines), command)
    print(plots.aligned(table(config, lines)))
    summary = headlines(config, lines, command)
    path = config.summary or summary_path(config.out)
    records.write_json(path, summary)
    print(json.dumps(summary, indent=1))
    print(f"Wrote {config.out}, {picture(config, lines)} and {path}")


def run(config, runs, command):
    return sweep.run_all(runs, config.out, command, config.jobs, config.checkpoint_every)


def quarter(config: Config) -> int:
    return sweep.part_of_steps(config, 4)


def screening(config: Config) -> list[sweep.Run]:
    """Every candidate with every learning rate, on a quarter of the tokens."""
    names = tuple(dict.fromkeys((*config.methods, *config.candidates)))
    return sweep.grid(config, methods=names, seeds=config.seeds[:1], steps=quarter(config))


def finals(config: Config, lines: list[dict[str, Any]]) -> list[sweep.Run]:
    """The finalists with the rates that were best for them, on all tokens."""
    screened = figures.best_runs(lines, quarter(config))
    rates = {method: [screened[method][0]["lr_multiplier"]] for method in config.methods}
    rates[config.methods[0]] += config.baseline_multipliers
    return [
        run
        for method, multipliers in rates.items()
        for run in sweep.grid(config, methods=[method], multipliers=multipliers)
    ]


def summary_path(out: str) -> pathlib.Path:
    """By the record's name, so that no run replaces the summary of another record."""
    path = pathlib.Path(out)
    return path.with_name(f"{path.stem}_summary.json")


def table(config, lines):
    """Every recipe at its best rate: loss and bytes, on a quarter of the tokens and on all."""
    rows = [("", "rate", "seeds", "test loss", "±", "up", "both ways")]
    for steps in (quarter(config), config.steps):
        found = figures.best_runs(lines, steps)
        rows.append((f"{steps * config.tokens_a_step / 1e6:.1f}M tokens", *[""] * 6))
        base = found[config.methods[0]]
        order = sorted(found, key=lambda method: plots.sortable(mean_loss(found[method])))
        for method in order:
            own = found[method]
            rows.append(
                (
                    method,
                    f"{own[0]['lr_multiplier']:g}",
                    str(len(own)),
                    f"{mean_loss(own):.4f}",
                    f"{spread(own):.4f}" if len(own) > 1 else "–",
                    f"1/{sent(base) / sent(own):.1f}",
                    f"1/{sent(base, both=True) / sent(own, both=True):.1f}",
                )
            )
    return rows


def headlines(config: Config, lines: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """The claims: how many times fewer bytes, at equal loss and to a loss. None: not shown.

    Equal is a mean final loss that is no more than one standard deviation above the baseline's,
    the root of the mean of both variances over the seeds.
    """
    best = figures.best_runs(lines, config.steps)
    base = best[config.methods[0]]
    enough = {method: runs for method, runs in best.items() if len(runs) >= 3 <= len(base)}
    step, losses = figures.curve(base)
    at_75 = float(np.interp(0.75 * config.steps, step, losses))

    def claim(ratio, allowed):
        able = {method: ratio(runs) for method, runs in enough.items() if allowed(runs)}
        if not able:
            return {"value": None}
        most = max(able, key=lambda method: able[method])
        return {"value": able[most]} | about(enough[most], base)

    def equal(runs):
        deviation = math.sqrt((spread(runs) ** 2 + spread(base) ** 2) / 2)
        return runs is not base and mean_loss(runs) <= mean_loss(base) + deviation

    def reaches(runs):
        return runs is not base and figures.bytes_to(runs, at_75) is not None

    return {
        "command": command,
        "preset": {
            "parameters": base[0]["bytes_up"] // (4 * base[0]["step"]),
            "tokens": config.steps * config.tokens_a_step,
            "workers": config.workers,
        },
        "uplink_ratio_at_equal_loss": claim(lambda runs: sent(base) / sent(runs), equal),
        "both_ways_ratio_at_equal_loss": claim(
            lambda runs: sent(base, both=True) / sent(runs, both=True), equal
        ),
        "uplink_ratio_to_loss_at_75_percent": claim(
            lambda runs: base[0]["bytes_up"] * 0.75 / figures.bytes_to(runs, at_75), reaches
        )
        | {"loss_to_reach": at_75},
    }


def about(runs, base):
    """Whose figure it is, and what it rests on."""
    return {
        "method": runs[0]["method"],
        "seeds": sorted(run["seed"] for run in runs),
        "loss": mean_loss(runs),
        "spread": spread(runs),
        "lr_multiplier": runs[0]["lr_multiplier"],
        "loss_uncompressed": mean_loss(base),
        "spread_uncompressed": spread(base),
    }


def mean_loss(runs):
    return float(np.mean([run["loss_x"] for run in runs]))


def spread(runs):
    """The standard deviation over the seeds, of the population they are drawn from."""
    return float(np.std([run["loss_x"] for run in runs], ddof=1))


def sent(runs, both=False):
    """Bytes of a worker in the whole run: to the server, or also from it."""
    return runs[0]["bytes_up"] + both * runs[0]["bytes_down"]


def picture(config, lines):
    """Final loss against bytes, of the uplink and of both ways; returns the picture's path."""
    figure = Figure(figsize=(13, 13), layout="constrained")
    axes, named = figure.subplots(2, 2), []
    for row, steps in zip(axes, (quarter(config), config.steps), strict=True):
        found = figures.best_runs(lines, steps)
        for axis, both in zip(row, (False, True), strict=True):
            named.append((axis, _frontier(axis, found, both)))
            way = "both ways" if both else "to the server"
            axis.set_xlabel(f"MB of each worker, {way}")
            axis.set_title(f"{steps * config.tokens_a_step / 1e6:.1f}M tokens", fontsize=9)
        row[0].set_ylabel("final test loss (nats a token)")
    figure.draw_without_rendering()  # where things are
    for axis, names in named:
        _names(axis, names)
    return plots.save(figure, pathlib.Path(config.out).with_suffix(".png"))


def _frontier(axis, found, both):
    """Draws it, and returns what is to be named: x, y, name and color of each point.

    Trials are dots without a circle or a name, unless nothing is ahead of them.
    """
    points = sorted((sent(runs, both) / 1e6, mean_loss(runs), name) for name, runs in found.items())
    best, named, least = [], [], math.inf
    for x, y, name in points:
        ahead = y < least
        if ahead:
            best.append((x, y))
            least = y
        baseline = name in recipes.BASELINES or name == "uncompressed"
        color = "#000000" if baseline else "#D55E00" if name in recipes.PAPER else "#0072B2"
        own = [run["loss_x"] for run in found[name]]
        axis.plot([x] * len(own), own, ".", color=color, alpha=0.5, markersize=4)
        if name in recipes.TRIALS and not ahead:
            continue  # variations of others, too many and too near to them to be named
        axis.plot(x, y, "o", color=color, fillstyle="full" if ahead else "none", markersize=5)
        named.append((x, y, name, color))
    axis.plot(*zip(*best, strict=True), color="0.6", linewidth=0.8, zorder=0)
    losses = sorted(y for _, y, _ in points if math.isfinite(y)) or [0.0]
    axis.set_ylim(losses[0] - 0.01, losses[int(0.9 * (len(losses) - 1))] + 0.02)
    plots.logarithmic(axis)
    axis.set_xlim(right=4 * max(x for x, _, _ in points))  # room for the last names
    axis.grid(color="0.92", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    return named


def _names(axis, named):
    """Each beside its point, or as near as it lies on no other; with its loss where that is off."""
    top, size, taken = axis.get_ylim()[1], 6.5, []
    low, high = (y * 72 / axis.figure.dpi for y in (axis.bbox.ymin, axis.bbox.ymax))
    for x, y, name, color in sorted(named, key=lambda point: point[1]):
        text = name if y <= top else f"{name} {y:.2f} ↑"
        left, middle = axis.transData.transform((x, min(y, top))) * 72 / axis.figure.dpi
        for offset in sorted(range(-200, 201, 2), key=abs):
            box = (left + 5, middle + offset, left + 5 + 0.56 * size * len(text))
            inside = low + size < middle + offset < high - size
            if inside and not any(_overlap(box, other, 1.15 * size) for other in taken):
                break
        taken.append(box)
        axis.annotate(
            text,
            (x, min(y, top)),
            xytext=(5, offset),
            textcoords="offset points",
            fontsize=size,
            color=color,
            va="center",
            in_layout=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.3} if offset else None,
        )


def _overlap(box, other, height):
    left, middle, right = box
    return left < other[2] and other[0] < right and abs(middle - other[1]) < height


if __name__ == "__main__":
    main()
