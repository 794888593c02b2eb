"""Step sizes, radii and right-hand sides of the papers' theorems.

A theorem is a frozen dataclass of the constants that it is about. It gives the step size or the
radius that it prescribes, the momentum where it prescribes one, and the bound that it promises
after K iterations. Constants are Python numbers, so is what comes out; nothing here is traced.
"""

from ._checks import nonnegative as nonnegative, positive as positive, share as share
from ._normalized import (
    EF21 as EF21,
    NormalizedEF21 as NormalizedEF21,
    moderate_gamma0 as moderate_gamma0,
)
