"""What travels in a step: what the messages weigh, what the network carries, what a program sends.

`bytes_per_step` counts the messages of a worker by one convention, `side_by_side` by all three.
`traffic` says what they make a worker's network carry, which depends on how many workers there are.
`collective_bytes` reads a compiled program, and `audit` compares the two.
"""

from .._collectives import Collective as Collective
from .._conventions import (
    PaperConvention as PaperConvention,
    information_bits as information_bits,
    log2_binomial as log2_binomial,
)
from ._audit import audit as audit
from ._compiled import (
    CollectiveLedger as CollectiveLedger,
    collective_bytes as collective_bytes,
)
from ._steps import (
    CONVENTIONS as CONVENTIONS,
    Ledger as Ledger,
    Row as Row,
    SideBySide as SideBySide,
    bytes_per_step as bytes_per_step,
    side_by_side as side_by_side,
)
from ._traffic import Traffic as Traffic, traffic as traffic
