"""What the GPTs are trained with, by name: paper M's Table 2, ours, and what people use today.

A recipe says what travels in both directions, how what is withheld comes later, and whose step
the server takes. Its learning rate is a multiple of a base rate that all recipes with the same
step share; the multiples are found by `experiments.sweep`.
"""

import dataclasses
import functools
from typing import Literal

import optax

import ef21_jax as ef21
from experiments import table2


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train, but for the learning rate and the model."""

    uplink: ef21.Compressor | ef21.ByRole = ef21.Identity()
    downlink: ef21.Compressor = ef21.Identity()
    feedback: Literal["ef21", "ef14", "none"] = "ef21"
    step: Literal["lmo", "adamw"] = "lmo"
    momentum: float = 0.9  # of the workers: the weight of the old gradients
    extrapolation: float = 0.0  # of EF21's estimate, see `ef21.ef21`
    warm_up: tuple[float, ef21.Compressor] | None = None  # share of the steps, and their uplink
    paper_bytes: bool = False  # counted as in the paper: 16 bits a Natural value

    def __post_init__(self):
        if self.extrapolation and self.feedback != "ef21":
            raise ValueError(
                f"`extrapolation` is of EF21's estimate: `feedback` must be 'ef21', got "
                f"{self.feedback!r}."
            )
        if isinstance(self.uplink, ef21.ByRole) or self.warm_up:
            if (self.step, self.feedback) != ("lmo", "ef21"):
                raise ValueError("Uplinks by role, and a warm-up, are of EF21-Muon alone.")
        if self.warm_up and not 0 < self.warm_up[0] < 1:
            raise ValueError(f"`warm_up` is a share of the steps in (0, 1), got {self.warm_up[0]}.")

    @property
    def in_warm_up(self) -> "Recipe":
        """How the warm-up is trained; its state is that of what comes after it.

        Where there is extrapolation it is Nesterov's then, as all that is late is momentum.
        """
        if self.warm_up is None:
            return self
        ahead = min(self.extrapolation, self.momentum)
        return dataclasses.replace(self, uplink=self.warm_up[1], extrapolation=ahead)

    @property
    def base_rate(self) -> float:
        """The learning rate whose multiples are tried: paper M's Table 4, or a usual one."""
        return {"lmo": 3.6e-4, "adamw": 5e-3}[self.step]


NATURAL_4BIT = ef21.BlockNatural()
RANK10, RANK15, RANK25 = (ef21.RankK(share) >> NATURAL_4BIT for share in (0.10, 0.15, 0.25))
BLOCK = ef21.BlockTopK() >> NATURAL_4BIT  # the largest of every 16, half a bit a parameter
BLOCK4 = ef21.BlockTopK(1, 4) >> NATURAL_4BIT  # of every four, a bit and a half

# "identity" is the name of a compressor in the table, here of a run.
PAPER = {
    "uncompressed" if name == "identity" else name: Recipe(uplink)
    for name, uplink, _ in table2.ROWS
}
OWN = {
    "block16": Recipe(BLOCK),
    "block8": Recipe(ef21.BlockTopK(1, 8) >> NATURAL_4BIT),
    "block4": Recipe(BLOCK4),
    "block2of16": Recipe(ef21.BlockTopK(2, 16) >> NATURAL_4BIT),
    "block3of16": Recipe(ef21.BlockTopK(3, 16) >> NATURAL_4BIT),
    "block16_2bit": Recipe(ef21.BlockTopK() >> ef21.TwoLevel()),
    "top10_4bit": Recipe(ef21.TopK(0.10) >> NATURAL_4BIT),
    "top15_4bit": Recipe(ef21.TopK(0.15) >> NATURAL_4BIT),
    "top20_4bit": Recipe(ef21.TopK(0.20) >> NATURAL_4BIT),
    "rank10_4bit": Recipe(RANK10),
    "rank15_4bit": Recipe(RANK15),
    "rank20_4bit": Recipe(ef21.RankK(0.20) >> NATURAL_4BIT),
    "rank25_4bit": Recipe(RANK25),
    "rank30_4bit": Recipe(ef21.RankK(0.30) >> NATURAL_4BIT),
    "natural_4bit": Recipe(NATURAL_4BIT),
    "natural_3bit": Recipe(ef21.BlockNatural(3, 64)),
    "two_level": Recipe(ef21.TwoLevel()),
    "sign": Recipe(ef21.ScaledSign()),
    # Four bits a parameter back.
    "uncompressed_natural_4bit": Recipe(downlink=NATURAL_4BIT),
    "rank25_4bit_both": Recipe(RANK25, NATURAL_4BIT),
    "top20_4bit_both": Recipe(ef21.TopK(0.20) >> NATURAL_4BIT, NATURAL_4BIT),
    "block16_both": Recipe(BLOCK, NATURAL_4BIT),
    # What is sent later averages over time as momentum does: so there can be less of that.
    "rank25_4bit_m80": Recipe(RANK25, momentum=0.8),
    "rank10_4bit_m80": Recipe(RANK10, momentum=0.8),
    "rank25_4bit_both_m80": Recipe(RANK25, NATURAL_4BIT, momentum=0.8),
    "uncompressed_m80": Recipe(momentum=0.8),
    # Or the step is taken ahead (x2: by twice the last change) of an estimate that is late, as
    # momentum is. The first with x2 is the library's default.
    "uncompressed_nesterov": Recipe(extrapolation=0.9),
    "rank25_4bit_x2": Recipe(RANK25, extrapolation=2.0),
    "rank25_4bit_both_x2": Recipe(RANK25, NATURAL_4BIT, extrapolation=2.0),
    "rank25_4bit_block4_x2": Recipe(RANK25, BLOCK4, extrapolation=2.0),  # BLOCK4 back
    # Two bits a parameter back, which come later: so farther ahead.
    "rank25_4bit_two_level_x3": Recipe(RANK25, ef21.TwoLevel(), extrapolation=3.0),
    "rank15_4bit_both_x3": Recipe(RANK15, NATURAL_4BIT, extrapolation=3.0),
    "rank10_4bit_both_x3": Recipe(RANK10, NATURAL_4BIT, extrapolation=3.0),
}
# What was tried to find those: how far ahead, how much momentum, to the nearest power of two and
# not at random, more for some layers than for others, more in the beginning than later.
TRIALS = {
    **{
        f"{rank}_4bit_both_x{ahead:g}": Recipe(uplink, NATURAL_4BIT, extrapolation=ahead)
        for rank, uplink in (("rank25", RANK25), ("rank10", RANK10))
        for ahead in (0.5, 1.0, 4.0, 5.0)
    },
    **{
        f"{name}_m{round(100 * momentum)}": dataclasses.replace(OWN[name], momentum=momentum)
        for name in ("rank25_4bit", "rank25_4bit_both_x2")
        for momentum in (0.7, 0.95)
    },
    "uncompressed_m95": Recipe(momentum=0.95),
    # With the very sketches that rank15_natural draws, and nothing rounded.
    "rank15_same_draws": Recipe(ef21.RankK(0.15) >> ef21.Identity()),
    "rank15_uniform8": Recipe(ef21.RankK(0.15) >> ef21.Quantize(8)),  # the bytes of rank15_natural
    **{  # levels at equal distances for the factors, where the default has powers of two
        f"rank{round(100 * share)}_uniform{bits}_x{ahead:g}": Recipe(
            ef21.RankK(share) >> ef21.Quantize(bits, nearest=True), extrapolation=ahead
        )
        for share, bits, ahead in ((0.25, 4, 2.0), (0.25, 3, 2.0), (0.33, 3, 2.0), (0.15, 4, 3.0))
    },
    "rank15_nearest": Recipe(ef21.RankK(0.15) >> ef21.Natural(nearest=True)),
    "top15_nearest": Recipe(ef21.TopK(0.15) >> ef21.Natural(nearest=True)),
    "embedding_4bit_rank15_x3": Recipe(
        ef21.ByRole(embedding=NATURAL_4BIT, hidden=RANK15), NATURAL_4BIT, extrapolation=3.0
    ),
    "embedding_4bit_rank10_x3": Recipe(
        ef21.ByRole(embedding=NATURAL_4BIT, hidden=RANK10), NATURAL_4BIT, extrapolation=3.0
    ),
    "embedding_block4_rank25_x2": Recipe(
        ef21.ByRole(embedding=BLOCK4, hidden=RANK25), NATURAL_4BIT, extrapolation=2.0
    ),
    "embedding_block16_rank25_x2": Recipe(
        ef21.ByRole(embedding=BLOCK, hidden=RANK25), NATURAL_4BIT, extrapolation=2.0
    ),
    "embedding_rank25_block4_x2": Recipe(
        ef21.ByRole(embedding=RANK25, hidden=BLOCK4), NATURAL_4BIT, extrapolation=2.0
    ),
    **{
        f"rank10_4bit_both_x3_{name}": dataclasses.replace(
            OWN["rank10_4bit_both_x3"], warm_up=(share, uplink)
        )
        for name, share, uplink in (
            ("dense10", 0.10, ef21.Identity()),
            ("4bit10", 0.10, NATURAL_4BIT),
            ("4bit30", 0.30, NATURAL_4BIT),
        )
    },
}
BASELINES = {
    "adamw": Recipe(feedback="none", step="adamw", momentum=0.0),
    "top15_natural_adamw": Recipe(ef21.TopK(0.15) >> ef21.Natural(), step="adamw", momentum=0.0),
    "powersgd_adamw": Recipe(ef21.RankK(0.04), feedback="ef14", step="adamw", momentum=0.0),
    "sign_ef14": Recipe(ef21.ScaledSign(), feedback="ef14"),
    "rank15_natural_ef14": Recipe(ef21.RankK(0.15) >> ef21.Natural(), feedback="ef14"),
    "block16_ef14": Recipe(BLOCK, feedback="ef14"),
    "rank15_natural_16bit": dataclasses.replace(PAPER["rank15_natural"], paper_bytes=True),
}
RECIPES: dict[str, Recipe] = PAPER | OWN | TRIALS | BASELINES

# Multiples of the base rate found by `experiments.sweep`; for all others there is one below.
_MULTIPLIERS = {"uncompressed": 0.4, "rank15_natural": 0.6, "top15_natural": 0.6}
_USUAL_MULTIPLIER = 0.6

DOWNLINKS = {"identity": ef21.Identity(), "natural": ef21.Natural(), "natural_4bit": NATURAL_4BIT}


def multiplier(name: str) -> float:
    """What the base rate of a recipe is multiplied by, where nothing else is said."""
    return _MULTIPLIERS.get(name, _USUAL_MULTIPLIER)


def optimizer(
    recipe: Recipe,
    learning_rate: optax.ScalarOrSchedule,
    *,
    axis_name: str | None = "workers",
    topology: ef21.Topology = ef21.Gather(),
    rules: tuple[ef21.Rule, ...] = ef21.SCION_RULES,
    seed: int = 0,
) -> ef21.Distributed:
    """The optimizer of a recipe."""
    common = {"axis_name": axis_name, "topology": topology}
    dense = recipe.uplink == recipe.downlink == ef21.Identity() and not recipe.extrapolation
    if recipe.step == "lmo" and recipe.feedback == "ef21" and dense and not recipe.warm_up:
        return ef21.gluon(learning_rate, momentum=recipe.momentum, rules=rules, **common)
    if recipe.step == "lmo" and recipe.feedback == "ef21":
        return ef21.ef21_muon(
            learning_rate,
            momentum=recipe.momentum,
            uplink=recipe.uplink,
            downlink=recipe.downlink,
            extrapolation=recipe.extrapolation,
            rules=rules,
            seed=seed,
            **common,
        )
    ef21_ahead = functools.partial(ef21.ef21, extrapolation=recipe.extrapolation)
    mechanism = {"ef21": ef21_ahead, "ef14": ef21.ef14, "none": ef21.no_feedback}[recipe.feedback]
    momentum = [ef21.worker_momentum(recipe.momentum)] if recipe.momentum else []

    def assemble(up, norms, topology):
        feedback = mechanism(up)
        if recipe.step == "adamw":
            step = optax.adamw(learning_rate, b2=0.95, weight_decay=0.0)
        else:
            step = ef21.lmo_step(norms, learning_rate)
        return ef21.distribute(
            worker=optax.chain(*momentum, feedback.worker),
            server=optax.chain(feedback.server, step),
            downlink=None if recipe.downlink == ef21.Identity() else ef21.ef21_p(recipe.downlink),
            axis_name=axis_name,
            topology=topology,
            seed=seed,
        )

    return ef21.grouped(
        assemble,
        topology,
        up=(recipe.uplink, ef21.Compressor),
        norms=(ef21.norms_by(rules), ef21.Norm),
    )
