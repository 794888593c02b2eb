"""A worker's half that can leave its state in the place of the old one.

Whether a worker's message and state are finite is known when all of them are made. To hold them
until then takes as much memory again as the state. To make the state a second time, of what is
known to be finite, takes a pass over it, if nothing is compressed a second time.
"""

import jax
import jax.numpy as jnp
import optax


class Repeatable(optax.GradientTransformationExtraArgs):
    """A transformation on the worker's side whose `update` may be called again.

    The first time `provisional` is true. What it returns in the state's place is not kept then, but
    looked at, and need not be the state: arrays of the like will do which, if they and all that the
    messages stand for are less than a quarter of the largest float, say that the state's are less
    than half of it. So no message has to be taken apart.

    The second time it is given the same state, and two more arguments. `accepted` says, traced,
    whether what it made before is to be kept: if so gradients are the same too; if not they are
    zero, and it must leave the state that it is given. `sent` are the arrays that its messages
    stand for, or zeros if not accepted. It must not compress again, but gives these back; where
    making one again takes no more than a pass it does that instead, and `sent` need not be held.
    """

    @staticmethod
    def of(transformation: optax.GradientTransformation) -> "Repeatable":
        """Of one that sends nothing."""
        if isinstance(transformation, Repeatable):
            return transformation
        inner = optax.with_extra_args_support(transformation)

        def update(updates, state, params=None, *, accepted=True, **extra_args):
            updates, proposed = inner.update(updates, state, params, **extra_args)
            return updates, jax.tree.map(lambda a, b: either(accepted, a, b), proposed, state)

        return Repeatable(inner.init, update)

    @staticmethod
    def chain(*transformations: optax.GradientTransformation) -> "Repeatable":
        """`optax.chain` of these, of which only the last sends anything."""
        return Repeatable(*optax.chain(*map(Repeatable.of, transformations)))


def either(accepted: jax.Array | bool, new: jax.Array, old: jax.Array | float) -> jax.Array:
    """`new` if accepted, else `old`; just `new` in a program where that is not asked."""
    return new if accepted is True else jnp.where(accepted, new, old)
