"""Pictures of the benchmarks with a network, drawn from their records alone.

python -m experiments.benchmarks.pictures experiments/results/benchmarks/wire_bytes.json
"""

import pathlib
import sys

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from experiments import plots, records
from experiments.benchmarks import network


# Okabe and Ito's colours, which the colour-blind tell apart, each with a marker of its own.
_WIRE_STYLES = {
    "dense": ("Gluon, dense all-reduce", "#000000", "o"),
    "block": ("EF21-Muon, gather, blocks up", "#D55E00", "s"),
    "rank15_natural": ("EF21-Muon, gather, Rank15% + Natural up", "#0072B2", "^"),
    "sharded": ("EF21-Muon, sharded, blocks up and down", "#009E73", "D"),
}
_SCALING_STYLES = {
    "dense": ("Gluon, dense all-reduce", "#000000", "o"),
    "gather": ("EF21-Muon, gather", "#D55E00", "s"),
    "sharded": ("EF21-Muon, sharded, both ways", "#009E73", "D"),
}
_CAPPED_STYLES = {
    "gather": ("EF21-Muon, gather", "#D55E00", "s"),
    "sharded": ("EF21-Muon, sharded", "#009E73", "D"),
    "dense_muon": ("Muon (Gluon), dense all-reduce", "#000000", "o"),
    "dense_adamw": ("AdamW, dense all-reduce", "#999999", "v"),
    "powersgd": ("PyTorch DDP, PowerSGD and AdamW", "#CC79A7", "^"),
}


def wire_bytes(path):
    """Bytes sent against workers, by ledger and by counter; returns the picture's path."""
    rows = records.read_json(path)["rows"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, (label, color, marker) in _WIRE_STYLES.items():
        own = [row for row in rows if row["method"] == method]
        if not own:
            continue
        workers = [row["workers"] for row in own]
        left.plot(workers, [row["ledger"] / 1e6 for row in own], color=color, linewidth=1)
        counted = [row["payload"] / 1e6 for row in own]
        left.plot(workers, counted, color=color, marker=marker, linestyle="", label=label)
        for key, filling in (("payload", "full"), ("frames", "none")):
            excess = [100 * (row[key] / row["ledger"] - 1) for row in own]
            style = {"color": color, "marker": marker, "fillstyle": filling}
            right.plot(workers, excess, linewidth=0.8, **style)
    left.set_yscale("log")
    left.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    left.set_ylabel("sent by a worker in a step (MB)")
    left.set_title("lines: ledger; marks: interface counters less headers", fontsize=9)
    right.axhspan(-1, 1, color="0.93", zorder=0)
    right.set_ylabel("counted over the ledger (%)")
    right.set_title("filled: less headers; hollow: whole frames; grey: ±1 %", fontsize=9)
    for axis in (left, right):
        _workers_axis(axis, sorted({row["workers"] for row in rows}))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return plots.save(figure, pathlib.Path(path).with_suffix(".png"))


def capped_network(path):
    """Loss against seconds at the first rate, and seconds of a step against rates; its path.

    The loss stands at the number of steps times the median of their seconds.
    """
    record = records.read_json(path)
    config = record["header"]["config"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates = {rate: network.rate_bits(rate) for rate in config["rates"]}
    for row in record["rows"]:
        method = row["method"]
        label, color, marker = _CAPPED_STYLES[method]
        style = {"color": color, "marker": marker, "markersize": 4}
        evaluated = [e for e in record["losses"] if e["method"] == method and e["step"]]
        times = [e["step"] * row["seconds"][config["rates"][0]] for e in evaluated]
        left.plot(times, [e["loss"] for e in evaluated], label=label, linewidth=1.4, **style)
        medians = [row["seconds"][rate] for rate in rates]
        right.plot([bits / 1e6 for bits in rates.values()], medians, linestyle="", **style)
        if record["fit"]:
            compute = record["fit"]["compute_seconds"][method]
            bits = record["fit"]["factor"] * record["fit"]["bits"][method]
            grid = np.geomspace(min(rates.values()) / 3, 10 * max(rates.values()), 100)
            right.plot(grid / 1e6, compute + bits / grid, color=color, linewidth=1)
    left.axhline(record["target_loss"], color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    left.set_xlabel(f"seconds at {config['rates'][0]}")
    left.set_ylabel("held-out loss (nats per token)")
    right.set_xscale("log")
    right.set_yscale("log")
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    right.set_xlabel("bandwidth of each link and direction (Mbit/s)")
    right.set_ylabel("seconds of a step (marks: measured)")
    for axis in (left, right):
        axis.grid(color="0.92", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return plots.save(figure, pathlib.Path(path).with_suffix(".png"))


def scaling(path):
    """Bytes sent and seconds of a step against workers; returns the picture's path."""
    rows = records.read_json(path)["rows"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method in dict.fromkeys(row["method"] for row in rows):
        label, color, marker = _SCALING_STYLES[method]
        style = {"color": color, "marker": marker, "linewidth": 1.4}
        own = [row for row in rows if row["method"] == method]
        several = [row for row in own if row["bytes"]]  # one worker alone sends nothing
        sizes = [row["bytes"] / 1e6 for row in several]
        left.plot([row["workers"] for row in several], sizes, label=label, **style)
        right.plot([row["workers"] for row in own], [row["seconds"] for row in own], **style)
    left.set_yscale("log")
    right.set_ylim(bottom=0)
    left.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    left.set_ylabel("sent by a worker in a step (MB)")
    right.set_ylabel("seconds of an optimizer step")
    for axis in (left, right):
        _workers_axis(axis, sorted({row["workers"] for row in rows}))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return plots.save(figure, pathlib.Path(path).with_suffix(".png"))


def _workers_axis(axis, workers):
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(workers))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_xlabel("workers")
    axis.grid(color="0.92", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m experiments.benchmarks.pictures RECORD")
    draw = {"capped_network": capped_network, "scaling": scaling, "wire_bytes": wire_bytes}
    print(draw[pathlib.Path(sys.argv[1]).stem](sys.argv[1]))
