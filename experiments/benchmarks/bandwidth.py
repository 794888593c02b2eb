"""What the bandwidth makes of methods that compute and send different amounts.

`seconds = compute of the method + factor · bits / bandwidth`, with one factor for all, which is
somewhat above one: headers, and time in which nothing is on the link.
"""

import math

import numpy as np


NO_DIFFERENCE = 0.03  # of the seconds


def fit(observations):
    """Least squares of that line.

    Args:
      observations: (method, bits over bandwidth, seconds), where each method has two bandwidths.

    Returns:
      A dict from methods to their compute, in seconds, and the factor.
    """
    methods = list(dict.fromkeys(method for method, _, _ in observations))
    design = np.zeros((len(observations), len(methods) + 1))
    for row, (method, transfer, _) in zip(design, observations, strict=True):
        row[methods.index(method)], row[-1] = 1.0, transfer
    seconds = np.array([seconds for _, _, seconds in observations])
    *compute, factor = np.linalg.lstsq(design, seconds)[0].tolist()
    return dict(zip(methods, compute, strict=True)), factor


def break_even(saved, dearer):
    """Bits a second below which a method is the faster one.

    Args:
      saved: bits that it does not send, times the factor.
      dearer: seconds that it computes longer.

    Returns:
      0 where it saves none, inf where it is faster however fast the link.
    """
    if saved <= 0:
        return 0.0
    return saved / dearer if dearer > 0 else math.inf


def below(bandwidth):
    """In words, where a method is the faster one."""
    if bandwidth == 0:
        return "at no bandwidth"
    return f"below {named(bandwidth)}" if math.isfinite(bandwidth) else "at any bandwidth"


def named(bandwidth):
    """Bits a second, as one says them."""
    unit, size = ("Gbit/s", 1e9) if bandwidth >= 1e9 else ("Mbit/s", 1e6)
    return f"{bandwidth / size:.3g} {unit}"


def verdict(rate, ours, theirs, seconds):
    """Whether it pays, at this rate, to send less, from the seconds of a step of each method."""
    mine, other = seconds[ours], seconds[theirs]
    if abs(other / mine - 1) < NO_DIFFERENCE:
        outcome = "compression makes no difference"
    elif mine < other:
        outcome = f"compression pays, {other / mine:.2f} times"
    else:
        outcome = f"compression does not pay, {mine / other:.2f} times the seconds"
    return f"{rate}: {ours} takes {mine:.2f} s a step, {theirs} {other:.2f}: {outcome}."
