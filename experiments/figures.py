r"""Paper M's Figures 1 to 7: what each compressor of Table 2 learns, by tokens and by bytes.

One command runs what a figure needs and its record has not, and draws it; stopped and started
again, it goes on. The paper's own size wants a cluster, `--preset paper` and files of FineWeb10B;
the others are the same runs of smaller models.

    python -m experiments.figures --preset 0.3m --jobs 2
    python -m experiments.figures --preset 0.3m --figures 5 --multipliers 0.6 --seeds 0 1 2
    python -m experiments.figures --preset paper --thresholds 3.31 3.28 --text fineweb10B \
        --checkpoint-every 512
"""

import dataclasses
import math
import pathlib
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from experiments import plots, presets, recipes, records, sweep, training


FIGURES = {
    1: "test loss by tokens, and the bytes to a test loss",
    2: "tokens and bytes to a test loss",
    3: "test loss by the learning rate, for two budgets of tokens",
    4: "test loss by tokens, for kinds of compressors",
    5: "test loss by the level of compression, for two budgets of tokens",
    6: "as 1, to a harder test loss",
    7: "as 4, with half the tokens",
}
WITH_HALF_THE_TOKENS = (3, 5, 7)
# The kinds of Figures 4 and 7, and the levels of Figure 5 in per cent.
KINDS = {
    "RankK": ("rank20", "rank15", "rank10", "rank5"),
    "RankK + Natural": ("rank15_natural", "rank10_natural", "natural"),
    "TopK": ("top20", "top15", "top10", "top5"),
    "TopK + Natural": ("top15_natural", "top10_natural"),
}
LEVELS = {"RankK": "rank", "TopK": "top"}
_BASELINE = "uncompressed"
# Of the baseline's tokens: when it has the losses that the others are to reach. The paper's
# thresholds, 3.31 and 3.28, lie so in its runs.
_SHARES = (0.75, 0.9)


@dataclasses.dataclass(frozen=True)
class Config(sweep.Config):
    figures: tuple[Literal[tuple(FIGURES)], ...] = tuple(FIGURES)
    methods: tuple[training.RecipeName, ...] = tuple(recipes.PAPER)
    thresholds: tuple[float, float] | None = None  # of Figures 1 and 6; paper: 3.31 3.28
    out: str = "results/figures.jsonl"  # and the figures beside it

    def __post_init__(self):
        super().__post_init__()
        if _BASELINE not in self.methods:
            raise ValueError(f"`methods` must have {_BASELINE!r}, to compare with.")
        budgets(self)  # says so where there is no half


def main(args=None):
    config = presets.configure(Config, "experiments.figures", __doc__, args)
    command = records.command_line("experiments.figures", args)
    lines = sweep.run_all(
        runs_of(config), config.out, command, config.jobs, config.checkpoint_every
    )
    chosen = of_grid(config, lines)
    print(plots.aligned(table(config, chosen)))
    for number in config.figures:
        print(f"Figure {number}, {FIGURES[number]}: {picture(config, number, chosen)}")


def runs_of(config: Config) -> list[sweep.Run]:
    """All that the figures need."""
    return [run for steps in budgets(config) for run in sweep.grid(config, steps=steps)]


def budgets(config: Config) -> list[int]:
    """The numbers of steps that the figures need, the longest first."""
    wanted = set(config.figures)
    if wanted == {7}:  # the only one of half the tokens alone
        return [half(config)]
    return [config.steps, half(config)] if wanted & set(WITH_HALF_THE_TOKENS) else [config.steps]


def half(config: Config) -> int:
    return sweep.part_of_steps(config, 2)


def of_grid(config, lines):
    """Of a record, which may hold more, what the figures are of."""
    keys = {run.key for run in runs_of(config)}
    return [line for line in lines if tuple(line[key] for key in sweep.KEYS) in keys]


def table(config, lines):
    """The figures in numbers: what each method ends with at its best learning rate.

    With all tokens, where the figures need them.
    """
    loss = thresholds(config, lines)
    rows = [("", "rate", "test loss", "±", *(f"bytes to {each:.3f}" for each in loss))]
    whole = best_runs(lines, budgets(config)[0])
    for method, own in whole.items():
        losses = [line["loss_x"] for line in own]
        ratios = [saving(whole, method, each) for each in loss]
        rows.append(
            (
                method,
                f"{own[0]['lr_multiplier']:g}",
                f"{np.mean(losses):.4f}",
                f"{np.std(losses, ddof=1):.4f}" if len(losses) > 1 else "–",
                *("–" if ratio is None else f"1/{ratio:.1f}" for ratio in ratios),
            )
        )
    return rows


def best_runs(lines, steps):
    """method -> the runs of all seeds with its best learning rate, of those with `steps`."""
    found = {}
    for method in dict.fromkeys(line["method"] for line in lines):
        own = [line for line in lines if (line["method"], line["steps"]) == (method, steps)]
        if own:
            best, _ = plots.best_rate(own)
            found[method] = [line for line in own if line["lr_multiplier"] == best]
    return found


def thresholds(config, lines):
    """The losses of Figures 1 and 6."""
    if config.thresholds is not None:
        return config.thresholds
    steps = budgets(config)[0]
    step, loss = curve(best_runs(lines, steps)[_BASELINE])
    return tuple(float(np.interp(share * steps, step, loss)) for share in _SHARES)


def curve(runs):
    """Steps and the mean test loss of X over runs of several seeds."""
    losses = [[math.nan if x is None else x for x in run["curves"]["loss_x"]] for run in runs]
    return np.array(runs[0]["curves"]["step"]), np.mean(losses, axis=0)


def steps_to(runs, loss):
    """The first evaluation with a mean loss so low, in steps; None where there is none."""
    step, losses = curve(runs)
    reached = np.flatnonzero(losses <= loss)
    return int(step[reached[0]]) if reached.size else None


def bytes_to(runs, loss):
    """What a worker has sent by then, or None."""
    steps, run = steps_to(runs, loss), runs[0]
    if steps is None:
        return None
    if "bytes_up" not in run["curves"]:  # of an older record, and as many in each step
        return steps * run["bytes_up"] / run["step"]
    return run["curves"]["bytes_up"][run["curves"]["step"].index(steps)]


def saving(found, method, loss):
    """How many times fewer bytes than the baseline until the loss, or None."""
    own, base = (bytes_to(found[name], loss) for name in (method, _BASELINE))
    return None if own is None or base is None else base / own


# Drawing.


def picture(config, number, lines):
    """Draws a figure beside the record; returns its path."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    whole = best_runs(lines, config.steps)
    if number in (1, 6):
        loss = thresholds(config, lines)[0 if number == 1 else 1]
        left, right = figure.subplots(1, 2)
        _curves(left, whole, config)
        left.axhline(loss, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
        _bytes(right, whole, loss)
    elif number == 2:
        loss = thresholds(config, lines)[0]
        _trade_off(figure.subplots(), whole, loss, config)
    elif number == 3:
        _rates(figure.subplots(1, 2, sharey=True), lines, config)
    elif number in (4, 7):
        steps = config.steps if number == 4 else half(config)
        found = best_runs(lines, steps)
        axes = figure.subplots(1, len(KINDS), sharey=True)
        for axis, (kind, names) in zip(axes, KINDS.items(), strict=True):
            own = {name: found[name] for name in (_BASELINE, *names) if name in found}
            _curves(axis, own, config, narrow=True)
            axis.set_title(kind, fontsize=9)
            axis.label_outer()
    else:
        _levels(figure.subplots(1, 2, sharey=True), lines, config)
    return plots.save(figure, _beside(config, number))


def _beside(config, number):
    path = pathlib.Path(config.out)
    return path.with_name(f"{path.stem}_figure{number}.png")


def _curves(axis, found, config, narrow=False):
    """Test loss by tokens. `narrow`: with the names of recipes, which are short, in the legend."""
    limits = []
    for method, runs in found.items():
        step, losses = curve(runs)
        label, color, marker = plots.style(method, list(found))
        tokens, label = step * config.tokens_a_step / 1e6, method if narrow else label
        axis.plot(tokens, losses, label=label, color=color, marker=marker, markersize=3)
        limits += [losses[-1], np.interp(step[-1] / 8, step, losses)]
    limits = [limit for limit in limits if math.isfinite(limit)] or [0.0, 1.0]
    axis.set_ylim(min(limits) - 0.02, max(limits))
    _finish(axis, "tokens (millions)", "test loss (nats a token)")
    axis.legend(frameon=False, fontsize=7, loc="lower left" if narrow else "upper right")


def _bytes(axis, found, loss):
    """A bar a method: bytes to the loss over the model's own, as the paper draws them."""
    dense = found[_BASELINE][0]["bytes_up"] / found[_BASELINE][0]["step"]
    sent = {method: bytes_to(runs, loss) for method, runs in found.items()}
    values = {method: each / dense for method, each in sent.items() if each is not None}
    least, most = min(values.values(), default=1.0), max(values.values(), default=1.0)
    for at, method in enumerate(found):
        text, x = " not reached", least / 2  # where the axis begins
        if method in values:
            x = values[method]
            text = f" {x:,.0f}"
            axis.barh(at, x, color=plots.style(method, list(found))[1])
        axis.annotate(text, (x, at), va="center", fontsize=8)
    axis.set_yticks(range(len(found)), list(found), fontsize=8)
    axis.set_ylim(len(found) - 0.5, -0.5)  # the first is at the top
    plots.logarithmic(axis)
    axis.set_xlim(least / 2, 1.5 * most)
    _finish(axis, f"bytes sent by a worker to test loss {loss:.3f}, in models", None)


def _trade_off(axis, found, loss, config):
    for method, runs in found.items():
        label, color, marker = plots.style(method, list(found))
        steps = steps_to(runs, loss)
        if steps is None:
            axis.plot([], [], color=color, marker=marker, ls="none", label=f"{label}: not reached")
            continue
        x, y = bytes_to(runs, loss) / 1e6, steps * config.tokens_a_step / 1e6
        axis.plot(x, y, color=color, marker=marker, linestyle="none", label=label)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    plots.logarithmic(axis)
    _finish(
        axis,
        f"MB sent by a worker to test loss {loss:.3f}",
        f"tokens to test loss {loss:.3f} (millions)",
    )


def _rates(axes, lines, config):
    for axis, steps in zip(axes, (config.steps, half(config)), strict=True):
        methods = list(dict.fromkeys(line["method"] for line in lines))
        for method in methods:
            own = [line for line in lines if (line["method"], line["steps"]) == (method, steps)]
            points = sorted(plots.mean_losses(own).items())
            if points:
                label, color, marker = plots.style(method, methods)
                axis.plot(*zip(*points, strict=True), label=label, color=color, marker=marker)
        axis.set_title(f"{steps * config.tokens_a_step / 1e6:,.1f} million tokens", fontsize=9)
        axis.set_xscale("log")
        axis.set_xticks(config.multipliers, [f"{m:g}" for m in config.multipliers])
        axis.minorticks_off()
        _finish(axis, "learning rate, as a multiple of the base rate", None)
    axes[0].set_ylabel("final test loss (nats a token)")
    axes[1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _levels(axes, lines, config):
    colors = ("#D55E00", "#0072B2")
    for axis, (kind, prefix) in zip(axes, LEVELS.items(), strict=True):
        for steps, color in zip((config.steps, half(config)), colors, strict=True):
            found = best_runs(lines, steps)
            names = {100: _BASELINE} | {k: f"{prefix}{k}" for k in (20, 15, 10, 5)}
            points = sorted(
                (level, np.mean([line["loss_x"] for line in found[name]]))
                for level, name in names.items()
                if name in found
            )
            label = f"{steps * config.tokens_a_step / 1e6:,.1f}M tokens"
            axis.plot(*zip(*points, strict=True), color=color, marker="o", label=label)
        axis.set_xscale("log")
        axis.set_xticks([5, 10, 15, 20, 100], ["5", "10", "15", "20", "100"])
        axis.minorticks_off()
        axis.set_title(kind, fontsize=9)
        _finish(axis, "K, per cent", None)
    axes[0].set_ylabel("final test loss (nats a token)")
    axes[0].legend(frameon=False)


def _finish(axis, x, y):
    axis.set_xlabel(x)
    if y is not None:
        axis.set_ylabel(y)
    axis.grid(color="0.92", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
