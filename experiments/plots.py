"""Tables and pictures, drawn from the records alone.

To draw them again:

    python -m experiments.plots results/nanogpt/nanogpt.jsonl
    python -m experiments.plots experiments/results/nanogpt_sweep.jsonl
    python -m experiments.plots experiments/results/rates.jsonl
"""

import itertools
import math
import pathlib
import sys

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from experiments import records


# Okabe and Ito's colours, which the colour-blind tell apart, each with a marker of its own.
_STYLES = {
    "uncompressed": ("Gluon, uncompressed", "#000000", "o"),
    "rank15_natural": ("EF21-Muon, Rank15% + Natural", "#D55E00", "s"),
    "top15_natural": ("EF21-Muon, Top15% + Natural", "#0072B2", "^"),
    "rank25_4bit_x2": ("EF21-Muon, its default", "#009E73", "D"),
}
_COLORS = tuple(
    "#CC79A7 #E69F00 #56B4E9 #F0E442 #999999 #882255 #44AA99 #332288 #661100 #DDCC77".split()
)
_MARKERS = "vx*P<>hX+"
_BASELINE = "uncompressed"
_TARGET_SHARE = 0.7  # the loss to reach is the baseline's at this share of its steps


def nanogpt_table(path):
    """One row a method: losses, bytes, and how many times fewer bytes reach the target loss."""
    runs, target = _read(path)
    columns = {
        "test loss W": lambda method, last: f"{last['loss_w']:.4f}",
        "test loss X": lambda method, last: f"{last['loss_x']:.4f}",
        "MB up": lambda method, last: f"{last['bytes_up'] / 1e6:.1f}",
        "MB down": lambda method, last: f"{last['bytes_down'] / 1e6:.1f}",
        "up per step": lambda method, last: _times(_ratio_per_step(runs, method)),
        "to target": lambda method, last: _times(_ratio_to_target(runs, method, target)),
        "tokens/s": lambda method, last: _rate(last),
    }
    rows = [("method", *columns)]
    for method, run in runs.items():
        rows.append((method, *(cell(method, run[-1]) for cell in columns.values())))
    note = "MB of one worker. Up per step: bytes over those of uncompressed."
    if target is not None:
        note += (
            f" To target: how many times fewer bytes\nthan uncompressed until test loss "
            f"{target['loss_x']:.4f}, which uncompressed has at step {target['step']}."
        )
    return f"{aligned(rows)}\n{note}"


def nanogpt_picture(path):
    """Test loss against tokens and against bytes sent up, beside the record; returns its path."""
    runs, target = _read(path)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for method, run in runs.items():
        label, color, marker = style(method, runs)
        how = {"color": color, "marker": marker, "markersize": 3.5, "linewidth": 1.4}
        losses = [record["loss_x"] for record in run]
        left.plot([record["tokens"] / 1e6 for record in run], losses, label=label, **how)
        # Nothing is sent before the first step, which a logarithm cannot show.
        right.plot([record["bytes_up"] / 1e6 for record in run[1:]], losses[1:], **how)
    if target is not None:
        for axis in (left, right):
            axis.axhline(target["loss_x"], color="0.6", linewidth=0.8, linestyle="--", zorder=0)
        _mark_target(right, runs, target)
    left.set_xlabel("tokens seen by all workers (millions)")
    left.set_ylabel("test loss of the server's model (nats per token)")
    left.legend(frameon=False)
    logarithmic(right)
    right.set_xlabel("sent by each worker to the server (MB)")
    left.set_ylim(*_loss_limits(runs))
    for axis in (left, right):
        axis.grid(color="0.92", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return save(figure, pathlib.Path(path).with_suffix(".png"))


def sweep_picture(path):
    """Final test loss against the learning rate, a curve a method; returns the picture's path."""
    _, cells = records.read_lines(path)
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axis = figure.subplots()
    found = by_method(cells)
    for name, of_name in found.items():
        label, color, marker = style(name, list(found))
        own = sorted(mean_losses(of_name).items())
        best = best_rate(of_name)
        axis.plot(*zip(*own, strict=True), color=color, marker=marker, label=label)
        axis.plot(*best, marker=marker, color=color, markersize=12, fillstyle="none")
    axis.set_xscale("log")
    ticks = sorted({cell["lr_multiplier"] for cell in cells})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("learning rate, as a multiple of the base rate")
    axis.set_ylabel("final test loss (nats per token)")
    axis.grid(color="0.92", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=7)
    path = pathlib.Path(path)
    return save(figure, path.with_name(f"{path.stem}_rates.png"))


def by_method(cells):
    """Name -> the cells of a method; of each number of steps apart, if there are several."""
    several = len({cell["steps"] for cell in cells}) > 1
    found = {}
    for cell in cells:
        name = f"{cell['method']}, {cell['steps']:,} steps" if several else cell["method"]
        found.setdefault(name, []).append(cell)
    return found


def mean_losses(cells):
    """Learning-rate multiplier -> final test loss of X, mean over the seeds."""
    losses = {}
    for cell in cells:
        losses.setdefault(cell["lr_multiplier"], []).append(cell["loss_x"])
    return {multiplier: sum(found) / len(found) for multiplier, found in losses.items()}


def best_rate(cells):
    """The multiplier with the least mean loss, and that loss. Runs that diverged, NaN, lose."""
    return min(mean_losses(cells).items(), key=lambda item: sortable(item[1]))


def sortable(loss):
    """NaN, which is neither less nor more than anything, is after all others."""
    return math.inf if math.isnan(loss) else loss


def rates_picture(path):
    """Paper M's Table 1, a panel a row: left sides and bounds against K; returns its path."""
    _, cells = records.read_lines(path)
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(2, -(-len(rows) // 2), squeeze=False)
    # Column by column, so that each theorem stands above its layer-wise form.
    for axis, row in zip(axes.T.flat, rows, strict=False):
        own = [cell for cell in cells if cell["row"] == row]
        for cell in own:
            K = cell["iterations"]
            power = 0.5 if cell["squared"] else 1.0
            unit = cell["bound"][0] ** power
            for key, exponent, style in (
                ("bound", power, {"color": "#000000", "linestyle": ":"}),
                ("left", power, {"color": "#0072B2"}),
                ("gradient", 1.0, {"color": "#D55E00"}),
            ):
                if key == "gradient" and not cell["squared"]:
                    continue  # there it is the left side
                values = [value**exponent / unit for value in cell[key]]
                axis.plot(K, values, linewidth=0.6, **style)
        slope = own[0]["promised"]
        axis.plot(K, [3 * (k / K[0]) ** slope for k in K], color="0.5", linestyle="--")
        axis.set_title(f"{row.replace('_', ' ').capitalize()}, slope {slope:g}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.grid(color="0.92", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("iterations K")
    figure.supylabel("over the bound at the least K")
    handles = [
        Line2D([], [], color="#000000", linestyle=":", label="bound"),
        Line2D([], [], color="#0072B2", label="left side"),
        Line2D([], [], color="#D55E00", label="best gradient norm, where it is not the left side"),
        Line2D([], [], color="0.5", linestyle="--", label="promised slope"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return save(figure, pathlib.Path(path).with_suffix(".png"))


def style(method, methods):
    """Label, colour and marker: those of the main job, or others in the order of `methods`."""
    if method in _STYLES:
        return _STYLES[method]
    i = [other for other in methods if other not in _STYLES].index(method)
    return method, _COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]


def logarithmic(axis):
    """Makes the x axis logarithmic, with numbers as people write them: 50, 100, 200."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _read(path):
    """Records by method, and the target: the baseline's first at or after 70 % of the steps."""
    header, lines = records.read_lines(path)
    by_method = itertools.groupby(lines, key=lambda record: record["method"])
    runs = {method: list(run) for method, run in by_method}
    at = _TARGET_SHARE * header["config"]["steps"]
    return runs, next((r for r in runs.get(_BASELINE, []) if r["step"] >= at), None)


def _reached(run, target):
    """The first evaluation that is as good as the target, or None; no interpolation."""
    return next((r for r in run if r["step"] and r["loss_x"] <= target["loss_x"]), None)


def _ratio_to_target(runs, method, target):
    reached = target and _reached(runs[method], target)
    # The baseline may have been as good before; the ratio is with its own first time.
    return reached and _reached(runs[_BASELINE], target)["bytes_up"] / reached["bytes_up"]


def _ratio_per_step(runs, method):
    per_step = {m: run[-1]["bytes_up"] / max(run[-1]["step"], 1) for m, run in runs.items()}
    if not per_step[method] or _BASELINE not in per_step:
        return None
    return per_step[method] / per_step[_BASELINE]


def _mark_target(axis, runs, target):
    """Writes each method's saving at the target, in a column left of where the first gets there."""
    ratios = {method: _ratio_to_target(runs, method, target) for method in runs}
    ratios = {method: ratio for method, ratio in ratios.items() if ratio and method != _BASELINE}
    if not ratios:
        return
    first = min(_reached(runs[method], target)["bytes_up"] for method in ratios)
    for line, (method, ratio) in enumerate(ratios.items(), start=1):
        axis.annotate(
            f"{ratio:.1f}× fewer bytes",
            xy=(first / 1e6, target["loss_x"]),
            xytext=(-8, -14 * line),
            textcoords="offset points",
            horizontalalignment="right",
            color=style(method, runs)[1],
        )


def _loss_limits(runs):
    """Leaves out the steep beginning: all that lies above the loss after a tenth of the run."""
    late = [r["loss_x"] for run in runs.values() for r in run if r["step"] >= run[-1]["step"] / 10]
    late = [loss for loss in late if math.isfinite(loss)] or [0.0, 1.0]
    margin = 0.05 * (max(late) - min(late)) or 0.05
    return min(late) - margin, max(late) + margin


def _rate(record):
    return f"{record['tokens'] / record['seconds']:,.0f}" if record["seconds"] else "–"


def _times(ratio):
    return "–" if ratio is None else f"{ratio:.3g}×"


def aligned(rows):
    """Rows of strings as lines; all columns but the first flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def save(figure, path):
    with records.replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m experiments.plots RECORD")
    first = records.read_lines(sys.argv[1])[1][0]
    kinds = {"row": rates_picture, "lr_multiplier": sweep_picture, "tokens": nanogpt_picture}
    print(next(draw for key, draw in kinds.items() if key in first)(sys.argv[1]))
