"""How the learning rate moves over a run. Steps count from 1; every schedule reaches its peak at step `warmup`."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "noam", "constant")


def learning_rate(schedule: str, step: int, *, steps: int, peak: float, warmup: int, floor: float) -> float:
    """The learning rate of one step.

    Args:
        schedule: a name out of SCHEDULES; all of them rise linearly to `peak` first.
            cosine: half a cosine down to `floor * peak` at the last step. Loshchilov and Hutter 2017, eq. 5, without
            restarts, with GPT-3's warm-up and floor (Brown et al. 2020, appendix B).
            noam: with the inverse square root of the step. Vaswani et al. 2017, eq. 3, which is this with a peak of
            (width * warmup) ** -0.5; here the peak is free.
            constant: stays there.
    """
    if step <= warmup:
        return peak * step / warmup
    if schedule == "noam":
        return peak * math.sqrt(warmup / step)
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2)
