"""Mistakes in the CUDA kernels that the tests must see: what they are, and a case and a dtype that show each."""

from __future__ import annotations

import torch

from cuda_host import Change

HALF, SINGLE = torch.float16, torch.float32
_WAIT = "            copies_wait<AHEAD - 1>();\n"
_BARRIER = "            barrier();\n"


def _forward(file: str, old: str, new: str) -> Change:
    return Change("forward", file, old, new)


def _dq(file: str, old: str, new: str) -> Change:
    return Change("backward_q", file, old, new)


def _dkdv(file: str, old: str, new: str) -> Change:
    return Change("backward_kv", file, old, new)


def _dbias(old: str, new: str) -> Change:
    return Change("backward_bias", "backward_bias.cuh", old, new)


def _decode(old: str, new: str) -> Change:
    return Change("decode", "decode.cuh", old, new)


MUTANTS: dict[str, tuple[Change, str, torch.dtype]] = {
    "scale": (_forward("forward.cuh", "unit = a.unit;", "unit = a.unit * 1.02f;"), "plain", HALF),
    "last key seen": (_forward("mask.cuh", "j > i + l.offset + l.right", "j >= i + l.offset + l.right"),
                      "causal", HALF),
    "first key loaded": (_forward("sequence.cuh", "{max(first + l.offset - l.left, 0)",
                                  "{max(first + l.offset - l.left + 1, 0)"), "window", HALF),
    "full blocks": (_forward("sequence.cuh", "last_k - 1 <= first_q", "last_k - 1 <= last_q"), "causal", SINGLE),
    "wait": (_forward("tensor.cuh", _WAIT, ""), "plain", HALF),
    "barrier": (_forward("tensor.cuh", _WAIT + _BARRIER, _WAIT), "causal", HALF),
    "batch offset": (_forward("rows.cuh", "const T* at = static_cast<const T*>(x.at) + batch * x.batch",
                              "const T* at = static_cast<const T*>(x.at)"), "plain", HALF),
    "group": (_forward("forward.cuh", "kv_head = p.head / (a.h / a.hk)", "kv_head = p.head % a.hk"), "gqa", HALF),
    "NaN": (_forward("forward.cuh", "F::drop_unseen(v_tile, seen);", ""), "mask-per-key", HALF),
    "dropout": (_forward("dropout.cuh", "shuffle_xor(mine, 1)", "shuffle_xor(mine, 2)"), "dropout", HALF),
    "packed keys": (_forward("forward.cuh", "p.k_start, range, a.dv", "0, range, a.dv"), "packed", HALF),
    "sinks": (_forward("softmax.cuh", "if (ahead == lead) largest_logit = sink;", ""), "sinks-empty-rows", SINGLE),
    "plain barrier": (_forward("plain.cuh", "            copy_tile(b, column);\n" + _BARRIER,
                               "            copy_tile(b, column);\n"), "plain", SINGLE),
    "plain slice": (_forward("plain.cuh", "copy_tile(b, first_column + 8 * i)", "copy_tile(b, 8 * i)"),
                    "large-head-size", SINGLE),
    "dq scale": (_dq("backward_q.cuh", "factor[2] = {static_cast<Acc>(a.scale),", "factor[2] = {Acc(1),"),
                 "plain", HALF),
    "dq delta": (_dq("tensor.cuh", "4 * g + g / 2", "4 * g"), "plain", HALF),
    "dq softcap": (_dq("backward_q.cuh", "ds * of_pair.slope", "ds"), "softcap", HALF),
    "dq barrier": (_dq("backward_q.cuh", "        barrier();\n        q.load", "        q.load"), "plain", HALF),
    "dq NaN": (_dq("backward_q.cuh", "F::drop_unseen(k_tile, seen);", ""), "mask-per-key", HALF),
    "dq first key": (_dq("mask.cuh", "j < i + l.offset - l.left", "j <= i + l.offset - l.left"), "window", HALF),
    "dq bias": (_dq("backward_q.cuh", "patch, j, e, ds);", "patch, j, e, p_ij);"), "bias-full", HALF),
    "dk scale": (_dkdv("backward_kv.cuh", "scales[2] = {scale, scale}", "scales[2] = {scale, 1}"), "plain", HALF),
    "dk group": (_dkdv("backward_kv.cuh", "steps = of_head * group", "steps = of_head"), "gqa", HALF),
    "dk d_lse": (_dkdv("softmax.cuh", "(dp - row.delta + row.d_lse)", "(dp - row.delta)"), "plain", SINGLE),
    "dk dropout": (_dkdv("dropout.cuh", "drawn >> share & 1", "drawn >> (share ^ 1) & 1"), "dropout", HALF),
    "dk wait": (_dkdv("tensor.cuh", _WAIT, ""), "plain", HALF),
    "dk barrier": (_dkdv("tensor.cuh", _WAIT + _BARRIER, _WAIT), "gqa", HALF),
    "dk last query": (_dkdv("sequence.cuh", "min(last - l.offset + l.left, l.queries)",
                            "min(last - 1 - l.offset + l.left, l.queries)"), "window", HALF),
    "dv batch offset": (_dkdv("rows.cuh", "    T* at = static_cast<T*>(x.at) + batch * x.batch",
                              "    T* at = static_cast<T*>(x.at)"), "plain", HALF),
    "plain weights": (_dkdv("plain.cuh", "            copy_tile(b, first_column + 8 * i);\n" + _BARRIER,
                            "            copy_tile(b, first_column + 8 * i);\n"), "plain", SINGLE),
    "decode scale": (_decode("unit = a.unit;\n        OnlineSoftmax", "unit = a.unit * 1.02f;\n        OnlineSoftmax"),
                     "one-query", HALF),
    "decode chunk": (_decode("(c.number + 1) * share)", "(c.number + 1) * share - 1)"), "one-query", HALF),
    "decode heads": (_decode("patch.row[r] % c.group : 0", "0 : 0"), "decode-scores", HALF),
    "decode barrier": (_decode(_BARRIER + "            if (w != warp_index()) continue;\n",
                               "            if (w != warp_index()) continue;\n"), "one-query", HALF),
    "join weights": (Change("decode_join", "decode.cuh", "total += weight(c) * part[", "total += part["),
                     "one-query", HALF),
    "dbias warps": (_dbias("w < F::WARPS; ++w) x +=", "w < F::WARPS - 1; ++w) x +="), "bias-per-key", HALF),
    "dbias lanes": (_dbias("total[0][2 * r] = row_sum(sum);", "total[0][2 * r] = sum;"), "bias-per-query", HALF),
    "dbias heads": (_dbias("share(a, SUM_HEAD, a.h, rest)", "share(a, SUM_HEAD, a.h - 1, rest)"), "bias-per-key", HALF),
    "dbias barrier": (_dbias("8 * j + e] = x;\n        });\n        barrier();", "8 * j + e] = x;\n        });"),
                      "bias-per-key", HALF),
}  # fmt: skip
