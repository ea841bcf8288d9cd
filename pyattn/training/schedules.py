"""How the learning rate moves over a run."""

from __future__ import annotations

import math


def warmup_cosine(step: int, steps: int, peak: float, *, warmup: int, floor: float = 0.1) -> float:
    """Linear from 0 to `peak` over `warmup` steps, then half a cosine down to `floor * peak` at the last step.

    Steps count from 1. Source: Loshchilov and Hutter 2017, eq. 5, without restarts, with GPT-3's warm-up and floor
    (Brown et al. 2020, appendix B).
    """
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2)
