"""Communication-efficient distributed training in JAX: EF21-Muon and normalized EF21.

Values are spelled with a capital: compressors, norms, rules. Verbs and transformations are not.
"Paper M" is Gruntkowska, Gaponov, Tovmasyan, Richtárik, "Error Feedback for Muon and Friends"
(arXiv:2510.00643); "paper N" is Khirirat, Sadiev, Riabinin et al., "Communication-efficient
Algorithms Under Generalized Smoothness Assumptions".
"""

from importlib import metadata as _metadata

from . import ledger as ledger, theory as theory
from ._axes import varying as varying
from ._compressors import (
    Chain as Chain,
    Compressor as Compressor,
    Damping as Damping,
    Dropout as Dropout,
    Identity as Identity,
    Natural as Natural,
)
from ._defaults import (
    DEFAULT_EXTRAPOLATION as DEFAULT_EXTRAPOLATION,
    DEFAULT_UPLINK as DEFAULT_UPLINK,
)
from ._distributed import (
    Distributed as Distributed,
    distribute as distribute,
    server_params as server_params,
)
from ._feedback import (
    EF21State as EF21State,
    ErrorFeedback as ErrorFeedback,
    MomentumState as MomentumState,
    ResidualState as ResidualState,
    compress as compress,
    ef14 as ef14,
    ef21 as ef21,
    ef21_p as ef21_p,
    no_feedback as no_feedback,
    worker_momentum as worker_momentum,
)
from ._grouped import grouped as grouped
from ._invariant import check_invariant as check_invariant, warm_start as warm_start
from ._low_rank import (
    NuclearSharp as NuclearSharp,
    RandomSubspace as RandomSubspace,
    RankK as RankK,
)
from ._matrix_norms import (
    ColumnNorm as ColumnNorm,
    MaxColumnSum as MaxColumnSum,
    MaxRowSum as MaxRowSum,
    Mixed as Mixed,
    Nuclear as Nuclear,
    RowNorm as RowNorm,
    SchattenP as SchattenP,
    Spectral as Spectral,
)
from ._messages import (
    Message as Message,
    dense as dense,
    expand as expand,
    is_message as is_message,
    wire_bits as wire_bits,
)
from ._norms import (
    L1 as L1,
    RMS as RMS,
    Frobenius as Frobenius,
    Norm as Norm,
    Scaled as Scaled,
    Shaped as Shaped,
    Sign as Sign,
)
from ._optimizers import (
    compressed_sgd as compressed_sgd,
    ef14_sgd as ef14_sgd,
    ef21_muon as ef21_muon,
    ef21_sgd as ef21_sgd,
    ef21_sgdm as ef21_sgdm,
    gluon as gluon,
    lmo_step as lmo_step,
    muon as muon,
    normalize as normalize,
    normalized_ef21 as normalized_ef21,
    scion as scion,
    sharp_step as sharp_step,
)
from ._polar import (
    CUBIC as CUBIC,
    JORDAN as JORDAN,
    POLAR_EXPRESS as POLAR_EXPRESS,
    YOU as YOU,
    orthogonalize as orthogonalize,
    polar_express as polar_express,
)
from ._quantizers import (
    BlockNatural as BlockNatural,
    BlockTopK as BlockTopK,
    Quantize as Quantize,
    ScaledSign as ScaledSign,
    TwoLevel as TwoLevel,
)
from ._routing import (
    MUON_RULES as MUON_RULES,
    SCION_RULES as SCION_RULES,
    ByRole as ByRole,
    Route as Route,
    Routes as Routes,
    Rule as Rule,
    constant as constant,
    moonlight_scale as moonlight_scale,
    muon_scale as muon_scale,
    norms_by as norms_by,
    one_over_fan_in as one_over_fan_in,
    one_over_fan_out as one_over_fan_out,
    routes as routes,
    scion_scale as scion_scale,
    with_norm as with_norm,
)
from ._sharp import L1Sharp as L1Sharp, MaxRowSumSharp as MaxRowSumSharp
from ._sparse import ColumnTopK as ColumnTopK, RandK as RandK, TopK as TopK
from ._spmd import spmd as spmd
from ._state import (
    DistributedState as DistributedState,
    PerWorker as PerWorker,
    find_state as find_state,
    map_per_worker as map_per_worker,
    replicate as replicate,
    state_axes as state_axes,
)
from ._topologies import Gather as Gather, Sharded as Sharded, Topology as Topology


__version__ = _metadata.version("ef21_jax")
