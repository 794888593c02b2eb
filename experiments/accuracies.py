"""Accuracy against what was sent: table and picture of a record by `experiments.resnet`.

To draw it again:

    python -m experiments.accuracies results/resnet.jsonl
"""

import pathlib
import sys

import numpy as np
from matplotlib.figure import Figure

from experiments import plots, records


# Okabe and Ito's colours, which the colour-blind tell apart.
_STYLES = {"EF21": ("#D55E00", "--"), "normalized EF21": ("#0072B2", "-")}
_PARTS = {"train_accuracy": "training accuracy", "test_accuracy": "test accuracy"}


def table(path):
    """One row for each k and method, at the last epoch: median over the seeds (least, greatest)."""
    _, lines = records.read_lines(path)
    rows = [("method", "k / d", "seeds", "steps", "Mbit", *_PARTS.values(), "step length")]
    for (share, method), runs in _runs(lines).items():
        last = [run[-1] for run in runs]
        sent = f"{last[0]['bits_up'] / 1e6:.2f}"
        accuracies = (_spread([line[part] for line in last]) for part in _PARTS)
        length = np.median([_mean(run[1:], "step_length") for run in runs])
        head = (method, f"{share:g}", str(len(runs)), str(last[0]["step"]), sent)
        rows.append((*head, *accuracies, f"{length:.3g}"))
    note = (
        "Mbit: sent by each client. Training accuracy: of the last epoch's batches, as they are\n"
        "trained on. Step length: mean over the run."
    )
    return f"{plots.aligned(rows)}\n{note}"


def picture(path):
    """A column for each k, training above test; medians, and bands over the seeds. Its path."""
    _, lines = records.read_lines(path)
    shares = sorted({line["share"] for line in lines})
    figure = Figure(figsize=(1.2 + 3.9 * len(shares), 6.2), layout="constrained")
    axes = figure.subplots(2, len(shares), sharex="col", sharey="row", squeeze=False)
    for (share, method), runs in _runs(lines).items():
        color, dashes = _STYLES[method]
        for row, part in enumerate(_PARTS):
            axis = axes[row, shares.index(share)]
            # Nothing is trained on before the first step.
            own = [[line for line in run if part in line] for run in runs]
            sent = [line["bits_up"] / 1e6 for line in own[0]]
            values = np.array([[_number(line[part]) for line in run] for run in own])
            axis.plot(sent, np.median(values, axis=0), dashes, color=color, label=method)
            axis.fill_between(
                sent, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0
            )
    for row, name in enumerate(_PARTS.values()):
        axes[row, 0].set_ylabel(name)
    for axis, share in zip(axes[0], shares, strict=True):
        axis.set_title(f"Top-k, k = {share:g} d", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("sent by each client (Mbit)")
        axis.set_xlim(left=0)
    for axis in axes.flat:
        axis.grid(color="0.92", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", frameon=False, ncols=len(labels))
    return plots.save(figure, pathlib.Path(path).with_suffix(".png"))


def _runs(lines):
    """{(share, method): a list of lines for each seed}, in a fixed order."""
    runs = {}
    for line in lines:
        seeds = runs.setdefault((line["share"], line["method"]), {})
        seeds.setdefault(line["seed"], []).append(line)
    return {cell: list(runs[cell].values()) for cell in sorted(runs)}


def _spread(values):
    values = [_number(value) for value in values]
    return f"{np.median(values):.3f} ({min(values):.3f}, {max(values):.3f})"


def _mean(lines, name):
    return np.mean([_number(line[name]) for line in lines])


def _number(value):
    return np.nan if value is None else value


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m experiments.accuracies RECORD")
    print(picture(sys.argv[1]))
