"""The recipe of `ef21_muon` if nothing else is asked for. Evidence: experiments/results/gpt.md."""

from ._low_rank import RankK
from ._quantizers import BlockNatural


DEFAULT_UPLINK = RankK(0.25) >> BlockNatural()
"""Two factors in four bits an entry: some 20 times fewer bytes than the dense array."""

DEFAULT_EXTRAPOLATION = 2.0
"""How far ahead of EF21's estimate the step is taken with it; see `ef21`."""
