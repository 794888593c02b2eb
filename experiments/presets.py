"""Settings by name, for all scripts that train a GPT: `--preset NAME`, and then what differs."""

import dataclasses
from typing import Any, Literal, TypeVar

import tyro


PRESETS: dict[str, dict[str, Any]] = {
    # The main job: minutes on a laptop.
    "small": {},
    "tiny": {"model": "tiny", "steps": 20, "eval_every": 5},  # to see that all works
    # A ladder, each with 20 tokens a parameter: about six minutes on one processor core, an hour
    # or two, a day. With half the steps, the budgets are as 2.5B tokens to the paper's 5B.
    "0.3m": {"model": "small", "steps": 3600, "eval_every": 100, "batch_size": 8},
    "1m": {"model": "1m", "steps": 5000, "eval_every": 100, "batch_size": 8, "length": 128},
    "5m": {"model": "5m", "steps": 5900, "eval_every": 100, "batch_size": 16, "length": 256},
    # Paper M, Tables 3 and 4, on files of FineWeb10B: 4 x 64 sequences of 1024, 5.0B tokens.
    "paper": {
        "model": "124m",
        "steps": 19_072,
        "eval_every": 128,
        "batch_size": 64,
        "microbatches": 16,
        "length": 1024,
        "lr_multiplier": 1.0,
        "oracle": "jordan",
        "eval_sequences": 10_240,
        "dtype": "bfloat16",
    },
}
PRESETS["paper_2.5b"] = PRESETS["paper"] | {"steps": 9_536, "eval_every": 64}

PresetName = Literal[tuple(PRESETS)]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class _Preset:
    preset: PresetName = "small"  # settings to start from; all other arguments change them


def configure(config: type[T], module: str, description: str | None, args: Any = None) -> T:
    """The command line as a `config`, whose defaults are those of the preset that it names."""
    prog = f"python -m {module}"
    chosen, others = tyro.cli(
        _Preset, prog=prog, args=args, return_unknown_args=True, add_help=False
    )
    names = ", ".join(PRESETS)
    note = f"\n\n--preset NAME: settings to start from, of {names}; now {chosen.preset}."
    default = config(**PRESETS[chosen.preset])
    return tyro.cli(
        config, prog=prog, args=others, default=default, description=f"{description}{note}"
    )
