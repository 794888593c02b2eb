"""Paper M's Table 2: bytes a worker sends in a round, over those of no compression, at 124M.

Needs no memory for the model: shapes are enough. Beside the paper's way to count stands what our
messages weigh on the wire, and about the least that any code could need.

    python -m experiments.table2
    python -m experiments.table2 --json table2.json
"""

import dataclasses
import pathlib

import tyro

import ef21_jax as ef21
from experiments import records
from experiments.models import gpt


# Name, compressor, and the relative cost that the paper prints.
ROWS = (
    ("identity", ef21.Identity(), 1.0000),
    ("natural", ef21.Natural(), 0.5000),
    ("rank20", ef21.RankK(0.20), 0.2687),
    ("rank15", ef21.RankK(0.15), 0.2019),
    ("rank15_natural", ef21.RankK(0.15) >> ef21.Natural(), 0.1010),
    ("rank10", ef21.RankK(0.10), 0.1335),
    ("rank10_natural", ef21.RankK(0.10) >> ef21.Natural(), 0.0667),
    ("rank5", ef21.RankK(0.05), 0.0667),
    ("top20", ef21.TopK(0.20), 0.3625),
    ("top15", ef21.TopK(0.15), 0.2718),
    ("top15_natural", ef21.TopK(0.15) >> ef21.Natural(), 0.1969),
    ("top10", ef21.TopK(0.10), 0.1812),
    ("top10_natural", ef21.TopK(0.10) >> ef21.Natural(), 0.1312),
    ("top5", ef21.TopK(0.05), 0.0906),
)
CONVENTIONS = ("paper", "wire", "information")


@dataclasses.dataclass(frozen=True)
class Config:
    json: pathlib.Path | None = None  # a file for the figures


def main(args=None):
    config = tyro.cli(Config, args=args, prog="python -m experiments.table2", description=__doc__)
    params = gpt.parameter_shapes(gpt.PRESETS["124m"])
    figures = {}
    print(f"{'':16}{'printed':>10}" + "".join(f"{name:>13}" for name in CONVENTIONS))
    for name, compressor, printed in ROWS:
        costs = relative_costs(compressor, params)
        print(f"{name:16}{printed:10.4f}" + "".join(f"{cost:13.4f}" for cost in costs.values()))
        figures |= {f"{convention}_{name}": cost for convention, cost in costs.items()}
    if config.json is not None:
        command = records.command_line("experiments.table2", args)
        records.write_json(config.json, {"header": records.header({}, command), "target": figures})
    for name, value in figures.items():
        print(f"target {name} {value:.6f}")


def relative_costs(compressor, params):
    """Bytes of the messages over those of the dense float32 arrays, for each convention."""
    ledgers = ef21.ledger.side_by_side(ef21.ef21_sgd(1.0, uplink=compressor), params)
    return {name: ledgers[name].up / ledgers[name].dense for name in CONVENTIONS}


if __name__ == "__main__":
    main()
