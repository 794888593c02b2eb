"""Problems whose constants are known, so that a theorem's promise can be held against a run.

Each is a frozen dataclass: `loss(x, worker)` is one worker's f_i, `workers` a tree of what it is
given, with a leading axis of n workers, `start(seed)` the first iterate, and every constant says
why it is right.
"""
