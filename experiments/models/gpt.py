"""The paper's NanoGPT: GPT-2's shape with RoPE, QK norm, squared ReLU, no biases, no gains.

Every parameter is a matrix, so each one meets exactly one norm and one compressor. `q`, `k` and
`v` are separate kernels, as the paper counts them: a fused one would have other singular vectors.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Shapes of the model; the defaults are the paper's Table 3, 123,568,128 parameters."""

    vocab_size: int = 50_304  # GPT-2's 50,257 tokens, padded to a multiple of 128
    layers: int = 12  # transformer blocks
    heads: int = 6  # attention heads; width / heads must be even, for RoPE
    width: int = 768  # of the residual stream
    hidden: int = 3072  # of the MLP
    rope_base: float = 10_000.0  # wavelengths run from 2π to 2π · base
    dtype: str = "float32"  # of the activations; parameters and logits are always float32

    def __post_init__(self):
        for name in ("vocab_size", "layers", "heads", "width", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"`width` must be a multiple of 2 · heads = {2 * self.heads}, since RoPE rotates "
                f"pairs within a head; got {self.width}."
            )


PRESETS = {
    "124m": GPTConfig(),
    "5m": GPTConfig(vocab_size=256, layers=6, heads=4, width=256, hidden=1024),
    "1m": GPTConfig(vocab_size=256, layers=5, heads=4, width=128, hidden=512),
    "small": GPTConfig(vocab_size=256, layers=3, heads=3, width=96, hidden=384),
    "tiny": GPTConfig(vocab_size=256, layers=2, heads=2, width=16, hidden=64),
}

# PyTorch's default for `nn.Linear`, which the paper inherits: uniform on ±1/√fan_in. The tied
# matrix is stored (vocab, width) and is a head before it is an embedding, so its fan-in is last.
_KERNEL_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_TIED_INIT = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")


class GPT(nn.Module):
    """Tokens (..., length) -> float32 logits (..., length, vocab)."""

    config: GPTConfig

    @nn.compact
    def __call__(self, tokens):
        config = self.config
        table = self.param("wte", _TIED_INIT, (config.vocab_size, config.width))
        table = table.astype(config.dtype)
        x = table[tokens]
        for layer in range(config.layers):
            x = Block(config, name=f"h_{layer}")(x)
        return jnp.einsum("...td,vd->...tv", rms_norm(x), table, preferred_element_type=jnp.float32)


def parameter_shapes(config):
    """The tree of parameters as `ShapeDtypeStruct`s: no memory is needed, however large."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(GPT(config).init, jax.random.key(0), tokens)["params"]


class Block(nn.Module):
    config: GPTConfig

    @nn.compact
    def __call__(self, x):
        x = x + Attention(self.config, name="attn")(rms_norm(x))
        return x + MLP(self.config, name="mlp")(rms_norm(x))


class Attention(nn.Module):
    config: GPTConfig

    @nn.compact
    def __call__(self, x):
        config = self.config

        def project(name):
            y = _dense(config.width, _KERNEL_INIT, config, name)(x)
            return y.reshape(*x.shape[:-1], config.heads, config.width // config.heads)

        q = rope(rms_norm(project("q")), config.rope_base)
        k = rope(rms_norm(project("k")), config.rope_base)
        y = causal_attention(q, k, project("v"))
        # Zero, so that each block starts as the identity.
        return _dense(config.width, nn.initializers.zeros, config, "out")(y.reshape(x.shape))


class MLP(nn.Module):
    config: GPTConfig

    @nn.compact
    def __call__(self, x):
        config = self.config
        x = _dense(config.hidden, _KERNEL_INIT, config, "up")(x)
        # (√2 · relu)², as in the paper's code: the factor keeps the second moment near one.
        x = jnp.square(math.sqrt(2) * nn.relu(x))
        return _dense(config.width, nn.initializers.zeros, config, "down")(x)


def rms_norm(x):
    """x / rms(x) over the last axis, without gains."""
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(square + jnp.finfo(jnp.float32).eps).astype(x.dtype)


def rope(x, base):
    """Rotates (x_i, x_{i + d/2}) of (..., length, heads, d) by position · base^(−2i/d)."""
    length, half = x.shape[-3], x.shape[-1] // 2
    wavenumbers = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.outer(jnp.arange(length, dtype=jnp.float32), wavenumbers)[:, None, :]
    angles = angles.reshape((1,) * (x.ndim - 3) + angles.shape)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate((first * cos + second * sin, second * cos - first * sin), axis=-1)


def causal_attention(q, k, v):
    """softmax(q kᵀ / √d) v of (..., length, heads, d), each position over itself and its past."""
    length, size = q.shape[-3], q.shape[-1]
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k, preferred_element_type=jnp.float32)
    future = jnp.triu(jnp.ones((length, length), bool), k=1)
    scores = jnp.where(jnp.broadcast_to(future, scores.shape), -jnp.inf, scores / math.sqrt(size))
    return jnp.einsum("...hqk,...khd->...qhd", nn.softmax(scores).astype(v.dtype), v)


def next_token_loss(logits, targets):
    """Mean cross-entropy, in nats a token."""
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets))


def _dense(features, init, config, name):
    return nn.Dense(features, use_bias=False, kernel_init=init, dtype=config.dtype, name=name)
