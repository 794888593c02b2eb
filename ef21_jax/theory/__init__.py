"""Step sizes, radii and right-hand sides of the papers' theorems.

A theorem is a frozen dataclass of the constants that it is about. It gives the step size or the
radius that it prescribes, the momentum where it prescribes one, and the bound that it promises
after K iterations. Constants are Python numbers, and so is what comes out: nothing is traced.

Theorems and corollaries that go by their number are those of paper M, on EF21-Muon; those that go
by the name of a method are of paper N.
"""

from ._muon_generalized import Theorem4 as Theorem4, Theorem17 as Theorem17
from ._muon_generalized_noisy import (
    Corollary3 as Corollary3,
    Theorem6 as Theorem6,
    Theorem24 as Theorem24,
)
from ._muon_smooth import Theorem3 as Theorem3, Theorem14 as Theorem14
from ._muon_smooth_noisy import (
    Corollary1 as Corollary1,
    Corollary2 as Corollary2,
    Theorem5 as Theorem5,
    Theorem19 as Theorem19,
)
from ._normalized import (
    EF21 as EF21,
    NormalizedEF21 as NormalizedEF21,
    moderate_gamma0 as moderate_gamma0,
)
