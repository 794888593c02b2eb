"""What the averaging of messages takes in memory on eight devices: a line of JSON, in bytes.

A process of its own, since the tests have four devices.
"""

import json
import os
import sys


if __name__ == "__main__":  # and not in the process of the tests, which have their own number
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import AxisType, PartitionSpec as P  # noqa: E402

import ef21_jax as ef21  # noqa: E402
from ef21_jax import _topologies  # noqa: E402
from ef21_jax._layers import CompressEach  # noqa: E402
from ef21_jax._links import Links  # noqa: E402


WORKERS = 8
LAYER = (768, 3072)
LAYERS = 3  # that an owner has
COMPRESSORS = {
    "few": (
        ef21.TopK(0.1),
        ef21.RankK(0.1) >> ef21.Natural(),
        ef21.BlockTopK() >> ef21.BlockNatural(),
        ef21.Natural(),
    ),
    "more": (
        ef21.Identity(),
        ef21.TopK(0.02),
        ef21.TopK(0.25),
        ef21.RandK(0.25),
        ef21.RandK(0.25, shared=True),
        ef21.ColumnTopK(0.1),
        ef21.RandomSubspace(0.1),
        ef21.Dropout(0.5) >> ef21.TopK(0.1),
        ef21.BlockTopK(16, 256),
        ef21.BlockNatural(),
        ef21.RankK(0.25) >> ef21.BlockNatural(),
        ef21.TwoLevel(),
        ef21.Quantize(2),
        ef21.Quantize(4),
        ef21.Quantize(8),
        ef21.ScaledSign(),
        ef21.MaxRowSumSharp(),
    ),
}


def message_of(compressor, layers):
    """The shapes of what one worker sends for a stack of layers."""
    x = jax.ShapeDtypeStruct((layers, *LAYER), jnp.float32)
    if compressor == ef21.Identity():
        return x
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), layers))
    return jax.eval_shape(CompressEach(compressor, tuple(range(layers))).compress, x, keys)


def averaging(topology, message, workers):
    """The bytes that a device has for the mean, and for what it needs to make it."""
    mesh = jax.make_mesh((workers,), ("workers",), axis_types=(AxisType.Auto,))

    def body(stacked):
        message = jax.tree.map(lambda leaf: leaf[0], stacked)
        return _topologies.average(topology, message, Links("workers"))[None]

    spec = P("workers")
    mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    stacked = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((workers, *leaf.shape), leaf.dtype), message
    )
    memory = jax.jit(mapped).lower(stacked).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def figures(compressor):
    """Of one worker's message, and of the averaging of one and of eight of them."""
    own, whole = (message_of(compressor, layers) for layers in (LAYERS, WORKERS * LAYERS))
    return {
        "alone": averaging(ef21.Gather(), own, 1),
        "gather": averaging(ef21.Gather(), own, WORKERS),
        "sharded": averaging(ef21.Sharded(WORKERS), whole, WORKERS),
    }


if __name__ == "__main__":
    print(json.dumps({repr(c): figures(c) for c in COMPRESSORS[sys.argv[1]]}))
