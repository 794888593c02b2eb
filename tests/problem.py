"""A small problem whose workers disagree, with its gradient in closed form, and a way to train.

    f_j(W; ξ^k) = Σ_i ½ ⟨H_ij, (W_i − Y_ij^k)²⟩ + ½ (Σ_i ⟨C_ij, W_i⟩)²

for layers i: a vector, a tall and a wide matrix, coupled by the last term. Its NumPy gradient is
for the pseudocode; the library differentiates `loss`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ef21_jax as ef21


# In the order in which JAX flattens them.
SHAPES = {"bias": (6,), "tall/kernel": (10, 4), "wide/kernel": (4, 12)}


class Problem:
    """`n` workers, a batch for each at every one of `steps` steps, and a start."""

    def __init__(self, n, steps, *, noise=0.3, names=tuple(SHAPES), seed=0):
        rng = np.random.default_rng(seed)

        def draw(low, high, *leading):
            return [rng.uniform(low, high, (*leading, *SHAPES[name])) for name in names]

        self.n, self.steps, self.names = n, steps, names
        self.start = draw(-1.0, 1.0)
        self.H, self.C = draw(0.5, 1.5, n), draw(-0.2, 0.2, n)
        centres, xi = draw(-2.0, 2.0, n), draw(-noise, noise, steps, n)
        self.Y = [centre + jitter for centre, jitter in zip(centres, xi, strict=True)]

    def grad(self, j, k, W):
        """[∇_i f_j(W; ξ^k)]. The box asks for one gradient past the last step: that repeats ξ."""
        k = min(k, self.steps - 1)
        coupling = sum(float(np.sum(C[j] * w)) for C, w in zip(self.C, W, strict=True))
        return [
            H[j] * (w - Y[k, j]) + coupling * C[j]
            for H, Y, C, w in zip(self.H, self.Y, self.C, W, strict=True)
        ]

    def tree(self, leaves):
        return dict(zip(self.names, leaves, strict=True))

    def params(self):
        return self.tree(jnp.asarray(layer, float) for layer in self.start)

    def batches(self):
        """Leaves (steps, n, ...)."""
        H, C = (
            [np.broadcast_to(layer, (self.steps, *layer.shape)) for layer in field]
            for field in (self.H, self.C)
        )
        fields = {"H": self.tree(H), "C": self.tree(C), "Y": self.tree(self.Y)}
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), fields)

    def gradients(self, W, k=0):
        """Every worker's: leaves (n, ...)."""
        layers = zip(*(self.grad(j, k, W) for j in range(self.n)), strict=True)
        return self.tree(jnp.asarray(np.stack(layer), float) for layer in layers)


def loss(params, batch):
    separate, coupling = 0.0, 0.0
    for name, w in params.items():
        H, C, Y = (batch[field][name] for field in "HCY")
        separate += 0.5 * jnp.sum(H * jnp.square(w - Y))
        coupling += jnp.sum(C * w)
    return separate + 0.5 * jnp.square(coupling)


def mean_loss(params, batch):
    return jnp.mean(jax.vmap(loss, in_axes=(None, 0))(params, batch))


@functools.cache
def compiled(tx, axis_name):
    """Of a carry (params, state) and of batches: the last carry, and the paths of W and X."""

    def step(params, state, batch):
        objective = mean_loss if axis_name is None else loss
        updates, state = tx.update(jax.grad(objective)(params, batch), state, params)
        return optax.apply_updates(params, updates), state, None

    def one(carry, batch):
        every = step if axis_name is None else ef21.spmd(step, axis_name=axis_name)
        params, state, _ = every(*carry, batch)
        return (params, state), (params, ef21.server_params(tx, params, state))

    return jax.jit(lambda carry, batches: jax.lax.scan(one, carry, batches))


def train(tx, problem, *, state=None, axis_name="workers"):
    """Runs all steps; without an axis, on the mean of the workers' losses.

    Returns:
      W, X: the trajectories, stacked along a leading axis of steps.
      state: the last.
    """
    params = problem.params()
    if state is None:
        state = tx.init(params)
        state = state if axis_name is None else ef21.replicate(state, problem.n)
    (_, state), (W, X) = compiled(tx, axis_name)((params, state), problem.batches())
    return W, X, state


def assert_same_path(actual, expected, tolerance=1e-10):
    """A tree stacked over steps, against a list over steps of lists over layers."""
    layers = zip(*expected, strict=True)
    for (name, leaf), layer in zip(sorted(actual.items()), layers, strict=True):
        for k, (a, b) in enumerate(zip(np.asarray(leaf), layer, strict=True)):
            message = f"{name}, after step {k + 1}"
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=message)


def assert_same_trees(actual, expected, tolerance=1e-10):
    def same(a, b):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    jax.tree.map(same, actual, expected)
