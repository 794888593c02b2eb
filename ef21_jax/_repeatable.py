"""A worker's half that leaves the same state again, given what it has sent.

Whether a worker's message and state are finite is known when all of them are made. To hold them
until then takes as much memory again as the state. To make the state a second time, of what is
known to be finite and in the place of the old one, takes a pass over it, if nothing is compressed
a second time.
"""

import optax


class Repeatable(optax.GradientTransformationExtraArgs):
    """A worker's transformation whose `update` may be given `sent`.

    These are the arrays that the messages stand for which it made of the same gradients and state.
    It must not compress again then: it gives `sent` back, and the state that it left.
    """
