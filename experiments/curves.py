"""Pictures and lines of record of runs over many seeds: bands of curves, and bars.

To draw them again:

    python -m experiments.curves results/polynomial.jsonl
"""

import itertools
import math
import pathlib
import sys

import numpy as np
from matplotlib.figure import Figure

from experiments import plots, records


# Okabe and Ito's colours, which the colour-blind tell apart, in the order of a panel's curves.
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", ":")
_POINTS = 150  # kept of a curve, evenly,
_FIRST = 10  # and the first, in which a run may leave the floats
_ROOM = 1e6  # a curve that rises is shown up to this many times the highest start


def curve(values, **about):
    """The record of one curve: median, least and greatest over the seeds, thinned.

    Args:
      values: (seeds, K + 1). What is not finite becomes None, which JSON knows.
      about: `figure`, `panel` and `label`, and what else is to be kept.
    """
    last = values.shape[1] - 1
    even = np.linspace(0, last, min(_POINTS, last + 1)).round().astype(int)
    at = np.union1d(even, np.arange(min(_FIRST, last + 1)))
    chosen = values[:, at]
    parts = {"median": np.median, "low": np.min, "high": np.max}
    lines = {name: _rounded(part(chosen, axis=0)) for name, part in parts.items()}
    return about | {"k": at.tolist()} | lines


def pictures(path):
    """Draws every figure of a record beside it; returns their paths."""
    _, lines = records.read_lines(path)
    drawn = [line for line in lines if "figure" in line]
    groups = itertools.groupby(drawn, key=lambda line: line["figure"])
    return [_picture(pathlib.Path(path), name, list(group)) for name, group in groups]


def _picture(path, name, lines):
    panels = {}
    for line in lines:
        panels.setdefault(line["panel"], []).append(line)
    figure = Figure(figsize=(1.6 + 3.4 * len(panels), 3.9), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, own) in zip(axes, panels.items(), strict=True):
        axis.grid(color="0.92", linewidth=0.6)
        axis.set_axisbelow(True)
        draw = _bars if "needed" in own[0] else _bands
        draw(axis, own)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(lines[0]["y"])
    handles, labels = axes[0].get_legend_handles_labels()
    if labels:
        columns = len(panels) if len(panels) < 3 else len(labels)
        figure.legend(handles, labels, loc="outside upper center", frameon=False, ncols=columns)
    return plots.save(figure, path.with_name(f"{path.stem}_{name}.png"))


def _bands(axis, lines):
    colors = dict(zip(dict.fromkeys(line["label"] for line in lines), _COLORS, strict=False))
    seen = []
    for line in lines:
        k, label = line["k"], line["label"]
        low, median, high = (_floats(line[name]) for name in ("low", "median", "high"))
        style = {"color": colors[label], "linestyle": _DASHES[line.get("dash", 0)]}
        axis.plot(k, median, label=None if label in seen else label, linewidth=1.5, **style)
        axis.fill_between(k, low, high, color=colors[label], alpha=0.15, linewidth=0)
        seen.append(label)
    axis.set_yscale("log")
    top = _ROOM * max(line["high"][0] for line in lines)
    if max(np.nanmax(_floats(line["high"])) for line in lines) > top:
        # The margin would be one of the whole height, up to the end of the floats.
        axis.set_ylim(min(np.nanmin(_floats(line["low"])) for line in lines) / 3, top)
    if lines[0].get("early"):
        axis.set_xscale("symlog", linthresh=10)
        axis.set_xlim(left=0)
        axis.set_xticks([0, 2, 4, 6, 8, 10, 100, 1000], ["0", "", "4", "", "8", "", "100", "1000"])
    axis.set_xlabel("iteration $k$")


def _bars(axis, lines):
    """One bar a line: the median of `needed`; hatched up to `cap` where that many were too few."""
    for i, line in enumerate(lines):
        needed = [math.inf if n is None else n for n in line["needed"]]
        middle = float(np.median(needed))
        color = _COLORS[i % len(_COLORS)]
        if math.isfinite(middle):
            axis.bar(i, middle, color=color)
            mark = f"{middle:,.0f}"
        else:
            axis.bar(i, line["cap"], color="white", edgecolor=color, hatch="///")
            mark = f"> {line['cap']:,}"
        axis.annotate(mark, (i, min(middle, line["cap"])), ha="center", va="bottom", fontsize=8)
    axis.set_yscale("log")
    axis.set_ylim(100, 4 * max(line["cap"] for line in lines))
    axis.grid(visible=False, axis="x")
    axis.set_xticks(range(len(lines)), [line["label"] for line in lines])


def _rounded(values):
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


def _floats(values):
    return np.array([math.nan if value is None else value for value in values])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m experiments.curves RECORD")
    print(*pictures(sys.argv[1]), sep="\n")
