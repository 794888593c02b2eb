"""Matrix quadratics, with ripples on them, whose smoothness is known in several norms.

    f_j(X) = ½ ⟨D, P_j D Q_j⟩ + w_j Σ (1 − cos d) + c_j Σ S(d),  D = X − B_j,  S' = sin(π d² / 2)

over the entries d of D. P_j and Q_j are positive semidefinite and have no negative entry. Waves w_j
make f_j nonconvex and leave it smooth. The chirp S has ever shorter waves of one slope, so that f_j
is (L0, L1)-smooth and not smooth.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import fresnel

import ef21_jax as ef21


@dataclasses.dataclass(frozen=True)
class Quadratics:
    """n workers' functions of an (m, k) matrix.

    Raises:
      ValueError: for P or Q that are not symmetric, or have a negative entry or eigenvalue; for
        negative w or c; for c without Q = I, P a multiple of I and c of it, and a single B.
    """

    left: np.ndarray  # P, (n, m, m)
    right: np.ndarray  # Q, (n, k, k)
    centre: np.ndarray  # B, (n, m, k)
    wave: np.ndarray  # w, (n,)
    chirp: np.ndarray  # c, (n,)

    def __post_init__(self):
        for name in ("left", "right"):
            kernels = getattr(self, name)
            symmetric = np.array_equal(kernels, np.swapaxes(kernels, -1, -2))
            if not symmetric or np.min(kernels) < 0 or np.min(_eigenvalues(kernels)) < -1e-12:
                raise ValueError(
                    f"`{name}` must be symmetric, without negative entries or eigenvalues, got "
                    f"{kernels}."
                )
        for name in ("wave", "chirp"):
            if np.min(getattr(self, name)) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if np.any(self.chirp) and not self._chirps_alike():
            raise ValueError(
                "A `chirp` needs scalar kernels, of the chirp's proportions, and one centre: its "
                "constants are not known otherwise."
            )

    def _chirps_alike(self):
        scales = self.left[:, 0, 0]
        return (
            np.allclose(self.left, scales[:, None, None] * np.eye(self.shape[0]))
            and np.allclose(self.right, np.eye(self.shape[1]))
            and np.allclose(self.chirp, scales * self.chirp[0] / scales[0])
            and np.allclose(self.centre, self.centre[0])
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(m, k)."""
        return self.centre.shape[1:]

    @staticmethod
    def loss(x, worker):
        """f_j; `worker` has P_j, Q_j, B_j, w_j and c_j."""
        d = x - worker["centre"]
        curved = jnp.einsum("ab,bc,cd->ad", worker["left"], d, worker["right"], precision="highest")
        return (
            jnp.sum(d * curved) / 2
            + worker["wave"] * jnp.sum(1 - jnp.cos(d))
            + worker["chirp"] * jnp.sum(fresnel(d)[0])
        )

    @property
    def workers(self):
        """Leaves (n, m, m), (n, k, k), (n, m, k), (n,), (n,)."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def start(self, seed: int = 0, distance: float = 1.0) -> np.ndarray:
        """X^0: the minimizer of the quadratics' mean, and ±distance in each entry. (m, k)."""
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], self.shape)
        return self.minimizer + distance * signs

    @property
    def minimizer(self) -> np.ndarray:
        """Of the mean without its ripples: P_j X Q_j = P_j B_j Q_j, on average over j."""
        target = np.mean(self.left @ self.centre @ self.right, axis=0)
        return np.linalg.solve(self._hessian(), target.ravel()).reshape(self.shape)

    @property
    def lower(self) -> float:
        """f*, or something below it: the least value of the quadratics' mean.

        Waves are never negative, nor is ½ d² + a S(d), whose one stationary point is zero where
        π a² < 2. So it is f* without ripples, or with one centre.
        """
        d = self.minimizer - self.centre
        return float(np.mean(np.sum(d * (self.left @ d @ self.right), axis=(1, 2))) / 2)

    @property
    def worker_lowers(self) -> tuple[float, ...]:
        """f_j* = 0, at B_j."""
        return (0.0,) * len(self.centre)

    def smoothness(self, norm: ef21.Norm) -> tuple[float, tuple[float, ...]]:
        """L, and the L_j: the least with ‖∇f_j(X) − ∇f_j(Y)‖_* <= L_j ‖X − Y‖.

        A Hessian is between its quadratic's and that with w_j added on the diagonal, or w_j taken
        off; the second is the longest, and is that at B_j. With λ_i the eigenvalues, falling:

            norm       sup ‖P D Q‖_* over ‖D‖ <= 1
            Frobenius  λ_1(P) λ_1(Q)
            Spectral   Σ_i λ_i(P) λ_i(Q)      (Horn: Σ σ_i(PDQ) <= Σ σ_i(P) σ_i(D) σ_i(Q); D = U Vᵀ)
            Nuclear    λ_1(P) λ_1(Q)          (extreme D = u vᵀ, ‖Pu‖ ‖Qv‖)
            Sign       Σ P · Σ Q              (no entry is negative: D = 1)
            L1         max P · max Q          (extreme D = one entry)

        Each is attained where a multiple of D is added too. L is exact in Frobenius, Sign and L1;
        in Spectral and Nuclear it is where the workers' kernels are multiples of each other, and
        else the mean of the L_j, no less than the least.

        Raises:
          ValueError: for another norm, or with a chirp.
        """
        if np.any(self.chirp):
            raise ValueError("A chirp is not smooth: ask for `generalized`.")
        return self._quadratic(norm)

    def generalized(
        self, norm: ef21.Norm, L1: float = 1e-3
    ) -> tuple[float, float, tuple[float, ...], tuple[float, ...]]:
        """L0, L1, and those of the f_j: ‖∇f(X) − ∇f(Y)‖_* <= (L0 + L1 ‖∇f(X)‖_*) ‖X − Y‖.

        What is smooth has L0 = L and any L1. For φ = ½ d² + a S, with |x² − y²| <= |x − y|
        (2|x| + |x − y|) up to the distance 2/√π and |sin − sin| <= 2 past it,

            |φ'(x) − φ'(y)| <= (1 + a √π + π a |x|) |x − y|,  |x| <= |φ'(x)| + a,

        so ℓ0 = 1 + a √π + π a², ℓ1 = π a for an entry, with s_j ℓ0 and ℓ1 for s_j φ. For all of
        them, in Frobenius, these; in Sign, m k ℓ0 and ℓ1 (sums over entries); in Spectral r ℓ0 and
        √r ℓ1, with ‖·‖_nuclear <= √r ‖·‖_F, ‖D‖_F <= √r ‖D‖_2, and |d| <= ‖D‖_2 beside ∇f.

        Args:
          norm: Frobenius, Sign or Spectral where there is a chirp.
          L1: what to take for it where any will do.
        """
        if not np.any(self.chirp):
            L, L_workers = self._quadratic(norm)
            return L, L1, L_workers, (L1,) * len(L_workers)
        if np.any(self.wave):
            raise ValueError("The constants of a chirp with waves are not known: leave one out.")
        scales = self.left[:, 0, 0]
        a = self.chirp[0] / scales[0]
        rank, size = min(self.shape), math.prod(self.shape)
        of_l0, of_l1 = _lookup(
            norm,
            {ef21.Frobenius: (1, 1), ef21.Sign: (size, 1), ef21.Spectral: (rank, math.sqrt(rank))},
        )
        l0, l1 = 1 + a * math.sqrt(math.pi) + math.pi * a**2, math.pi * a
        L0_workers = tuple(float(of_l0 * l0 * scale) for scale in scales)
        L1 = float(of_l1 * l1)
        return sum(L0_workers) / len(scales), L1, L0_workers, (L1,) * len(scales)

    def _quadratic(self, norm):
        P, Q = _eigenvalues(self.left), _eigenvalues(self.right)
        rank, size = min(self.shape), math.prod(self.shape)
        largest = P[:, 0] * Q[:, 0]
        each, of_identity = _lookup(
            norm,
            {
                ef21.Frobenius: (largest, 1),
                ef21.Spectral: (np.sum(P[:, :rank] * Q[:, :rank], axis=1), rank),
                ef21.Nuclear: (largest, 1),
                ef21.Sign: (np.sum(self.left, (1, 2)) * np.sum(self.right, (1, 2)), size),
                ef21.L1: (np.max(self.left, (1, 2)) * np.max(self.right, (1, 2)), 1),
            },
        )
        each = each + of_identity * self.wave
        hessian = self._hessian()
        L = _lookup(
            norm,
            {
                ef21.Frobenius: _eigenvalues(hessian)[0] + np.mean(self.wave),
                ef21.L1: np.max(hessian) + np.mean(self.wave),
            },
            np.mean(each),
        )
        return float(L), tuple(float(value) for value in each)

    def _hessian(self):
        """The mean of P_j ⊗ Q_j, (m k, m k), for rows of X one after the other."""
        return np.mean([np.kron(P, Q) for P, Q in zip(self.left, self.right, strict=True)], axis=0)


def same(n: int, shape: tuple[int, int], *, seed: int = 0) -> Quadratics:
    """The same convex quadratic at each of `n` workers."""
    rng = np.random.default_rng(seed)
    m, k = shape
    left, right, centre = _kernel(rng, m), _kernel(rng, k), rng.normal(size=shape)
    return Quadratics(
        *(np.repeat(part[None], n, axis=0) for part in (left, right, centre)),
        wave=np.zeros(n),
        chirp=np.zeros(n),
    )


def different(n: int, shape: tuple[int, int], *, seed: int = 0) -> Quadratics:
    """Workers that disagree: on kernels, on their size, and on where the least value is."""
    rng = np.random.default_rng(seed)
    m, k = shape
    sizes = np.linspace(0.5, 1.5, n)
    return Quadratics(
        left=np.stack([size * _kernel(rng, m) for size in sizes]),
        right=np.stack([_kernel(rng, k) for _ in sizes]),
        centre=rng.normal(size=(n, *shape)),
        wave=np.zeros(n),
        chirp=np.zeros(n),
    )


def waves(n: int, shape: tuple[int, int], *, seed: int = 0) -> Quadratics:
    """s_j Σ ½ d² + 2 (1 − cos d): nonconvex, smooth, with one stationary point, d = 0.

    The derivative d + 2 sin d has no other zero, since sin d has the sign of d up to π > 2.
    """
    return _rippled(n, shape, seed, wave=2.0, chirp=0.0)


def chirps(n: int, shape: tuple[int, int], *, seed: int = 0) -> Quadratics:
    """s_j Σ ½ d² + S(d) / 32: (L0, L1)-smooth, and not smooth."""
    return _rippled(n, shape, seed, wave=0.0, chirp=1 / 32)


def _rippled(n, shape, seed, wave, chirp):
    rng = np.random.default_rng(seed)
    m, k = shape
    scales = np.linspace(0.5, 1.5, n)
    return Quadratics(
        left=scales[:, None, None] * np.eye(m),
        right=np.repeat(np.eye(k)[None], n, axis=0),
        centre=np.repeat(rng.normal(size=(1, *shape)), n, axis=0),
        wave=wave * scales,
        chirp=chirp * scales,
    )


def _kernel(rng, size):
    """Positive definite, no entry negative; eigenvalues between 1 and 3/2."""
    factor = rng.uniform(0.0, 1.0, (size, size))
    gram = factor @ factor.T
    return np.eye(size) + (gram + gram.T) / (4 * np.linalg.norm(gram, 2))


def _eigenvalues(kernels):
    """Falling."""
    return np.linalg.eigvalsh(kernels)[..., ::-1]


def _lookup(norm, table, default=None):
    value = table.get(type(norm), default)
    if value is None:
        names = ", ".join(kind.__name__ for kind in table)
        raise ValueError(f"Constants are known in {names}, got {norm!r}.")
    return value
