"""One layer after the other: nothing changes but when."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef21_jax._order import after, zeros_after


ODD = {
    "float32": np.array([0.0, -0.0, 1.5, 3e38, np.inf, -np.inf, np.nan], np.float32),
    "bfloat16": np.array([-0.0, 1.5, np.nan], jnp.bfloat16),
    "uint8": np.array([0, 1, 255], np.uint8),
    "uint32": np.array([[0, 2**32 - 1]], np.uint32),
    "int32": np.array([-(2**31), 2**31 - 1], np.int32),
    "empty": np.zeros((0, 3), np.float32),
}


def bits(x):
    return np.asarray(x).tobytes()


@pytest.mark.parametrize("first", ODD)
def test_no_bit_of_an_array_depends_on_what_it_waits_for(first, optimized):
    for array in (ODD[first], ODD[first].ravel()[::-1]):
        later = jax.jit(after)(ODD, array)  # less subnormal floats, which a CPU takes for zero
        for name, x in ODD.items():
            assert later[name].dtype == x.dtype
            assert bits(later[name]) == bits(x), name
        zeros = jax.jit(zeros_after, static_argnums=(1, 2))(array, (2, 3), jnp.dtype(jnp.float32))
        assert bits(zeros) == bits(np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("first", ["float32", "uint8"])
def test_the_compiler_cannot_tell_that_it_need_not_wait(first, optimized):
    compiled = jax.jit(after, keep_unused=True).lower(np.ones(4), ODD[first]).compile()
    entry = compiled.as_text().split("\nENTRY", 1)[1]
    waited_for = [line for line in entry.splitlines() if "parameter(1)" in line][0].split(" =")[0]
    assert entry.count(waited_for.strip()) > 1
