"""Batches of images on the device: a pure function of (seed, step, client)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


# Keep these keys apart from each other, and from those of the model.
_ORDER, _AUGMENTATION = 20_090_408, 20_151_210


def pooled(images, side):
    """(n, h, h, c) uint8 -> (n, side, side, c) uint8: means over squares, rounded."""
    height = images.shape[1]
    if side < 1 or height % side:
        raise ValueError(f"`side` must divide the images' {height}, got {side}.")
    if side == height:
        return images
    factor = height // side
    squares = images.reshape(len(images), side, factor, side, factor, images.shape[-1])
    return np.round(squares.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8)


def shards(images, labels, clients, seed):
    """Equally many images a client, at random: (clients, m, h, w, c) and (clients, m).

    What does not fill a client's share is left out.
    """
    size = len(images) // clients
    chosen = np.random.default_rng(seed).permutation(len(images))[: clients * size]
    chosen = chosen.reshape(clients, size)
    return jnp.asarray(images[chosen]), jnp.asarray(labels[chosen])


def moments(images):
    """Mean and standard deviation of each channel, (2, c) float32, of the pixels as they are."""
    axes = tuple(range(images.ndim - 1))
    parts = images.mean(axes, dtype=np.float64), images.std(axes, dtype=np.float64)
    return np.stack(parts).astype(np.float32)


def epoch(seed, number, clients, size, batch_size):
    """Positions of an epoch's batches, (steps, clients, batch_size) int32, no image twice.

    Each client has an order of its own, another each epoch. What does not fill a batch is left out.
    """
    steps = size // batch_size

    def order(client):
        key = _key(_ORDER, seed, number, client)
        return jax.random.permutation(key, size)[: steps * batch_size].reshape(steps, batch_size)

    return jax.vmap(order, out_axes=1)(jnp.arange(clients))


def standardised(images, of):
    """(..., c) uint8 to float32 of mean 0 and deviation 1 in each channel. `of`: `moments`."""
    mean, deviation = (jnp.broadcast_to(part, images.shape) for part in of)
    return (images.astype(jnp.float32) - mean) / deviation


def augmented(images, seed, step, client):
    """As He et al. (2016): padded by an eighth of the side, cut at random, mirrored half the time.

    Args:
      images: (batch, side, side, c), standardised; the padding is zero. At a side of 32 it is 4.
    """
    batch, side, _, channels = images.shape
    pad = side // 8
    cut_key, mirror_key = jax.random.split(_key(_AUGMENTATION, seed, step, client))
    starts = jax.random.randint(cut_key, (batch, 2), 0, 2 * pad + 1)
    mirrored = jax.random.bernoulli(mirror_key, shape=(batch,))
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def one(image, start, mirror):
        image = jax.lax.dynamic_slice(image, (start[0], start[1], 0), (side, side, channels))
        return jnp.where(mirror, image[:, ::-1], image)

    return jax.vmap(one)(padded, starts, mirrored)


def _key(stream, seed, *numbers):
    return functools.reduce(jax.random.fold_in, (stream, *numbers), jax.random.key(seed))
