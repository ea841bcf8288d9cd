"""Which calls of pyattn's contract the machine runs on which chip.

CHOSEN is the part that every run of the tests takes. On sm_80 and, of the Gluon kernels, on sm_90a it enters every
branch of the kernels' source; on sm_90 and sm_100 it takes what these compile to other instructions than sm_80: wgmma
and tcgen05 in the place of mma.sync, under each kind of loop.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pyattn.testing import CASES, Case

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}

# Few queries over many keys, which the decoding kernels take.
_FEW: dict[str, Any] = {"b": 2, "h": 4, "hk": 2, "m": 1, "n": 300}
DECODING = (
    Case("decode", **_FEW),
    Case("decode-causal", **_FEW | {"m": 5}, causal=True),
    Case("decode-window", **_FEW | {"m": 3}, window=(100, 0)),
    Case("decode-window-of-one-chunk", **_FEW, window=(5, 0)),
    Case("decode-top-left", **_FEW | {"m": 3}, causal=True, top_left=True),
    Case("decode-key-lengths", **_FEW, key_lengths=(0, 133), unseen_nan=True),
    Case("decode-mask", **_FEW | {"m": 2}, mask="bhmn", unseen_nan=True),
    Case("decode-bias", **_FEW | {"m": 2}, bias="1hmn"),
    Case("decode-scale-negative", **_FEW | {"m": 3}, d=17, dv=40, scale=-0.4, layout="bmhd"),
    Case("decode-heads-alone", **_FEW | {"b": 1, "hk": 4}, d=17, dv=40, layout="bmhd", scale=-0.4),
    Case("decode-whole-group", **_FEW | {"h": 16, "hk": 1, "m": 3}, sinks=True, key_lengths=(300, 0)),
    Case("decode-everything", **_FEW | {"m": 7}, causal=True, key_lengths=(290, 150), mask="b1mn", bias="b11n",
         softcap=3.0, alibi=True, sinks=True),
)  # fmt: skip
# Steps of a decoder with additive scores, whose keys are split, with columns beyond those that are taken at a time.
_STEP = _FEW | {"additive": True, "n": 40, "d": 150, "dv": 20}
STEPS = (
    Case("additive-step", **_STEP),
    Case("additive-step-of-beams", **_STEP | {"h": 1, "hk": 1, "m": 16}, key_lengths=(0, 33), unseen_nan=True),
    Case("additive-step-of-groups", **_STEP | {"m": 5}, scale=-0.3, layout="bmhd", sinks=True),
    Case("additive-step-window", **_STEP | {"m": 3}, window=(20, 0), unseen_nan=True),
    Case("additive-step-saturated", **_STEP | {"m": 2}, powers=(-2, 2)),
    Case("additive-step-everything", **_STEP | {"m": 7}, causal=True, key_lengths=(38, 21), mask="b1mn", bias="b11n",
         softcap=3.0, alibi=True, sinks=True),
)  # fmt: skip
# More blocks than the contract's cases have: pipelines that are full, tiles that are skipped, every head size of the
# Gluon kernels.
_LARGE: dict[str, Any] = {"b": 1, "h": 2, "hk": 2, "m": 300, "n": 420}
LARGE = (
    Case("large", **_LARGE),
    Case("large-causal", **_LARGE, causal=True),
    Case("large-top-left", **_LARGE, causal=True, top_left=True),
    Case("large-window", **_LARGE, window=(130, 50)),
    Case("large-past", **_LARGE, window=(200, None)),
    Case("large-lengths", **_LARGE | {"b": 2}, key_lengths=(0, 300), unseen_nan=True),
    Case("unseen-after", **_LARGE, causal=True, top_left=True, unseen_nan=True),
    Case("unseen-around", **_LARGE | {"m": 150}, window=(20, 0), unseen_nan=True),
    Case("wide-128", **_LARGE, d=128, dv=128, causal=True),
    Case("wide-256", **_LARGE | {"m": 150, "n": 200}, d=256, dv=256, causal=True),
    Case("d64", **_LARGE, d=64, dv=64, causal=True),
    Case("d64-long", b=1, h=1, hk=1, m=400, n=900, d=64, dv=64, causal=True),
    Case("group", **_LARGE | {"h": 4, "hk": 1}, d=40, dv=72, causal=True),
    Case("fewer-keys", **_LARGE | {"n": 150}, causal=True, layout="bmhd"),
)
# Branches that no case of the contract enters.
FURTHER = (
    Case("bias-scale-negative", bias="1hmn", scale=-0.3),
    Case("additive-bias-full", additive=True, b=1, m=40, n=70, d=17, scale=-0.3, bias="bhmn", mask="b11n",
         unseen_nan=True),
)  # fmt: skip
ALL = {case.id: case for case in (*CASES, *DECODING, *STEPS, *FURTHER, *LARGE)}


class Row(NamedTuple):
    """One call, forward and backward, on one chip."""

    chip: str
    backend: str
    case: Case
    dtype: torch.dtype

    @property
    def id(self) -> str:
        return f"{self.chip}-{self.backend}-{self.case.id}-{str(self.dtype).removeprefix('torch.')}"


# chip: backend, and by kernel family "case:dtype".
CHOSEN: dict[str, tuple[str, dict[str, str]]] = {
    "sm_80": ("triton", {
        "forward, dq, dk/dv": "plain:bf16 causal:bf16 everything:bf16 window-left-only:bf16 mask-per-query:f16 "
                              "odd-head-sizes:bf16 scale-negative:f16 large-head-size:bf16 "
                              "large-lengths:bf16 plain:f32",
        "packed sequences": "packed-causal:f16 packed-dropout-alibi-sinks:bf16",
        "segments and their ranges": "segments-causal:f16",
        "bias gradient": "bias-full:bf16 bias-scale-negative:f16 bias-shared:bf16 bias-scalar:f16",
        "relative term and ranks": "relative:bf16 relative-ranks-everything:bf16 relative-scale-negative:f16 ranks:f16",
        "row windows": "row-windows:f16 row-windows-additive:bf16",
        "decode, join": "decode-causal:f16 decode-everything:f16 decode-scale-negative:bf16",
        "additive": "additive:f16 additive-everything:bf16 additive-packed:bf16 additive-saturated:f16 "
                    "additive-bias-full:bf16",
        "additive steps": "additive-one-query:f16 additive-step-everything:bf16 additive-step-of-groups:bf16",
    }),
    "sm_90": ("triton", {
        "forward, dq, dk/dv": "d64:bf16 plain:f16 everything:f16 window-left-only:bf16",
        "packed sequences": "packed-causal:f16",
        "segments and their ranges": "segments-causal:bf16",
        "bias gradient": "bias-shared:f16",
        "relative term and ranks": "relative:f16 relative-ranks-everything:bf16",
        "row windows": "row-windows:bf16",
        "decode, join": "decode-everything:bf16",
        "additive": "additive-everything:f16",
        "additive steps": "additive-one-query:bf16",
    }),
    "sm_90a": ("hopper", {
        "forward, dq, dk/dv": "d64:bf16 plain:f16 group:bf16 wide-128:f16",
        "masks": "key-lengths-causal:bf16 window:bf16 large-past:f16",
        "packed sequences": "packed-gqa-window:bf16 packed-causal:f16",
        "forward of wide heads": "wide-256:bf16",
    }),
    "sm_100": ("triton", {
        "forward, dq, dk/dv": "d64:bf16 plain:f16 everything:bf16 window-left-only:f16",
        "packed sequences": "packed-causal:bf16",
        "segments and their ranges": "segments-causal:f16",
        "bias gradient": "bias-shared:bf16",
        "relative term and ranks": "relative:bf16 relative-ranks-everything:f16",
        "decode, join": "decode-everything:f16",
        "additive": "additive-everything:bf16",
        "additive steps": "additive-one-query:f16",
    }),
}  # fmt: skip


def chosen(chip: str) -> list[Row]:
    backend, families = CHOSEN[chip]
    given = [pair.split(":") for text in families.values() for pair in text.split()]
    return [Row(chip, backend, ALL[name], DTYPES[dtype]) for name, dtype in given]


def whole(chip: str) -> list[Row]:
    """The contract, in all dtypes that GPUs have."""
    backend = CHOSEN[chip][0]
    return [Row(chip, backend, case, dtype) for case in ALL.values() for dtype in DTYPES.values()]
