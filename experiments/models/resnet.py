"""ResNet for small images: 20 layers and 0.27M parameters as He et al. (2016) have it for CIFAR-10.

After their section 4.2: a 3×3 convolution, three stages of equally many residual blocks with 16, 32
and 64 channels, the mean over all places, one dense layer. A stage but the first halves the sides.

Shortcuts are their option A, without parameters: where the channels double, every other place is
taken and zeros fill the new channels. Option B, a 1×1 convolution, is for ImageNet; paper N does
not say, and A is what its source has for this data set.

Batch normalisation has statistics of its own beside the parameters, `batch_stats`: running means
and variances. They are not trained and not sent: each client keeps those of its own batches.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Shapes of the model; the defaults are ResNet-20, 269,722 parameters."""

    blocks: int = 3  # in each of the three stages; 6 blocks + 2 layers
    width: int = 16  # channels of the first stage
    classes: int = 10
    momentum: float = 0.9  # weight of the old running statistics
    patches: bool = False  # convolutions as matrix products, see `convolve_patches`

    def __post_init__(self):
        for name in ("blocks", "width", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`momentum` must lie in [0, 1), got {self.momentum}.")


class ResNet(nn.Module):
    """Images (batch, height, width, channels) -> logits (batch, classes), float32.

    With `train`, layers normalise by the batch, and `batch_stats` is updated where it is mutable;
    else they normalise by `batch_stats`. Sides that 4 does not divide are rounded up by the stages.
    """

    config: ResNetConfig

    @nn.compact
    def __call__(self, images, train):
        config = self.config
        x = _conv(config, config.width, "conv")(images)
        x = nn.relu(_normalised(config, train, "norm")(x))
        for stage in range(3):
            for block in range(config.blocks):
                stride = 2 if stage and not block else 1
                name = f"stage_{stage}_block_{block}"
                x = Block(config, config.width << stage, stride, name=name)(x, train)
        return nn.Dense(config.classes, name="head")(jnp.mean(x, axis=(-3, -2)))


class Block(nn.Module):
    """relu(x + F(x)), F of two convolutions; (..., h, w, c) -> (..., ⌈h/s⌉, ⌈w/s⌉, channels)."""

    config: ResNetConfig
    channels: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        y = _conv(self.config, self.channels, "conv_0", self.stride)(x)
        y = nn.relu(_normalised(self.config, train, "norm_0")(y))
        y = _conv(self.config, self.channels, "conv_1")(y)
        y = _normalised(self.config, train, "norm_1")(y)
        return nn.relu(y + shortcut(x, self.channels, self.stride))


def shortcut(x, channels, stride):
    """Option A: every `stride`-th place of x, and zeros for the channels it does not have."""
    x = x[..., ::stride, ::stride, :]
    widths = [(0, 0)] * (x.ndim - 1) + [(0, channels - x.shape[-1])]
    return jnp.pad(x, widths)


@functools.partial(jax.jit, static_argnums=(0, 2))
def initial(config, key, shape):
    """Parameters and running statistics for images of `shape`, (height, width, channels)."""
    variables = ResNet(config).init(key, jnp.zeros((1, *shape)), train=False)
    return variables["params"], variables["batch_stats"]


def cross_entropy(logits, labels):
    """Mean over the batch, in nats."""
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def accuracy(logits, labels):
    """The share of the batch whose largest logit is that of its label; float32, shape ()."""
    return jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))


def convolve_patches(x, kernel, window_strides, padding, **others):
    """A 3×3 convolution of (..., h, w, c), padded by one, as nine matrix products.

    For a CPU: in a loop XLA's own convolutions take ten times as long there. The arguments are
    those of `jax.lax.conv_general_dilated`; the others of them must be Flax's defaults.
    """
    del padding, others
    stride, (height, width) = window_strides[0], x.shape[-3:-1]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(1, 1), (1, 1), (0, 0)])
    products = (
        padded[..., i : i + height : stride, j : j + width : stride, :] @ kernel[i, j]
        for i in range(3)
        for j in range(3)
    )
    return functools.reduce(jnp.add, products)


def _conv(config, channels, name, stride=1):
    # One place on every side, so that a stride takes the places that the shortcut takes.
    return nn.Conv(
        channels,
        (3, 3),
        strides=stride,
        padding=1,
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
        conv_general_dilated=convolve_patches if config.patches else None,
        name=name,
    )


def _normalised(config, train, name):
    return nn.BatchNorm(
        use_running_average=not train, momentum=config.momentum, epsilon=1e-5, name=name
    )
