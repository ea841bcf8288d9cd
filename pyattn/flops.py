"""What torch's FlopCounterMode counts for the operators: 2 for a multiply-add, as for its own, and for nothing else.

With b, h, m, n, d and dv of `pyattn.spec`, and a key counted for every query, whether that sees it or not:

    forward                       2 b h m n (d + dv)         q k^T and p v
    backward                      2 b h m n (3 d + 2 dv)     the scores again, dq, dk; dv and p's gradient
    backward of additive scores   2 b h m n (4 d + 2 dv)     the weight's gradient besides
    a relative term of size e     2 b h m n e, and 3 times that backward

Packed sequences count their own queries times their own keys. Without values (fake tensors), where nobody knows where
one ends, they count as one sequence. A head size of 0 counts as 1, the column of zeros that kernels get for it. The
reference is plain torch, of which torch counts the products that it has.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

import torch
from torch import Tensor

from pyattn.spec import Inputs, Results

_COUNTER = "torch.utils.flop_counter"
_N_TENSORS = len(Inputs._fields)
_BEFORE = 3 + len(Results._fields)  # arguments of the backward operator before those of `Inputs`


def register() -> None:
    """Gives the formulas to torch, now or when its counter is imported: that imports Triton, which takes long."""
    if _COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds torch's counter as Python does, and has the formulas registered as soon as it is there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == _COUNTER else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: Any) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.pyattn.attention, get_raw=True)(_forward)
    register_flop_formula(torch.ops.pyattn.attention_backward, get_raw=True)(_backward)


def _forward(*args: Any, out_val: Any) -> int:
    x = Inputs(*args[:_N_TENSORS])
    return 2 * _pairs(x) * (x.q.shape[3] + _relative(x) + x.v.shape[3])


def _backward(*args: Any, out_val: Any) -> int:
    x = Inputs(*args[_BEFORE : _BEFORE + _N_TENSORS])
    columns = (3 if x.weight is None else 4) * x.q.shape[3] + 3 * _relative(x)
    return 2 * _pairs(x) * (columns + 2 * x.v.shape[3])


def _relative(x: Inputs) -> int:
    return 0 if x.relative_q is None else x.relative_q.shape[3]


def _pairs(x: Inputs) -> int:
    """Of a query and a key, over all heads."""
    b, h, m, _ = x.q.shape
    starts_q, starts_k = x.cu_seqlens_q, x.cu_seqlens_k
    if starts_q is None or starts_k is None or not (_has_values(starts_q) and _has_values(starts_k)):
        return b * h * m * x.n
    return h * sum(m * n for m, n in zip(starts_q.diff().tolist(), starts_k.diff().tolist(), strict=True))


def _has_values(t: Tensor) -> bool:
    return type(t) is Tensor and not t.is_meta
