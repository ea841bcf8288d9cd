"""Every validation of what users pass in, and the text of every error.

An error names the argument, what was expected, what came, and why it was expected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, SupportsFloat, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor

from pyattn.spec import Inputs, as_batch, as_packed, band_distances, dtype_name, unit_stride

Result = TypeVar("Result")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOAT32 = torch.finfo(torch.float32)
_LARGEST_SCALE = _FLOAT32.max * math.log(2)  # kernels take powers of 2, and so multiply it by log2(e)
_UNLIMITED = 2**62  # a window this wide hides nothing and still fits 64 bits when positions are added
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
# Options by the names that they have elsewhere.
_ELSEWHERE = {
    "is_causal": "did you mean causal=, which aligns the last query with the last key (torch: first with first)?",
    "attn_mask": "did you mean mask=, where it is boolean, or bias=, where it is added to the scores?",
    "attn_bias": "did you mean bias=, or mask=, where it is boolean?",
    "key_padding_mask": "did you mean key_lengths=, or mask=~key_padding_mask[:, None, None]?",
    "enable_gqa": "without it, too, k and v may have fewer heads than q",
    "softmax_scale": "did you mean scale=?",
    "window_size": "did you mean window=, where None is an unlimited side, and not -1?",
    "return_attn_probs": "did you mean return_lse=? The weights are never in memory",
    "cu_seqlens_q": "did you mean pyattn.attention_varlen?",
    "max_seqlen_q": "without it, too, sequences may have any length",
    "cache_seqlens": "did you mean key_lengths= of pyattn.attention_kvcache?",
    "block_table": "did you mean pyattn.attention_kvcache?",
}


class PyattnError(RuntimeError):
    """Base of every error pyattn raises about its input.

    A RuntimeError, because that is what torch raises: code that catches torch's errors catches these. Most are a
    ValueError or a TypeError as well, as Python's own functions raise.
    """


class ShapeError(PyattnError, ValueError):
    """A tensor has the wrong number of dimensions or the wrong sizes."""


class DtypeError(PyattnError, TypeError):
    """A tensor has the wrong dtype, or an argument the wrong type."""


class DeviceError(PyattnError, ValueError):
    """Tensors lie on different devices."""


class RangeError(PyattnError, ValueError):
    """A value lies outside what its argument allows, or two arguments exclude each other."""


class UnsupportedError(PyattnError, ValueError):
    """No backend, or not the one asked for, can run this call; one reason per backend."""


def by_names(names: dict[str, str], function: Callable[..., Result], *given: Any, **options: Any) -> Result:
    """`function(*given, **options)`, for a caller that knows its arguments by other names: errors use those.

    names: ours to the caller's. Beyond the beginning of a message only q, k and v are translated.
    """
    try:
        return function(*given, **options)
    except PyattnError as error:
        head, colon, rest = str(error).partition(":")
        head = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), head)
        rest = re.sub(r"\b[qkv]\b", lambda word: names.get(word[0], word[0]), rest)
        raise type(error)(head + colon + rest) from None


def refuse_unknown(function: str, options: Iterable[str]) -> None:
    """Raises TypeError for options that `function` has not, as Python would, and says which one of ours was meant."""
    for option in options:
        hint = f": {_ELSEWHERE[option]}" if option in _ELSEWHERE else ""
        raise TypeError(f"{function}: expected no argument {option}{hint}")


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    segment_ids: tuple[Tensor, Tensor] | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: int | Tensor | None,
    dropout_p: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    weight: Tensor | None,
    exp_keys: Tensor | None,
    relative_q: Tensor | None,
    relative_k: Tensor | None,
    ranks: tuple[Tensor, Tensor] | None,
    row_windows: tuple[Tensor, Tensor] | None,
) -> Inputs:
    """Checks every tensor by its metadata alone and returns them in the form `Inputs` promises."""
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if packed:
        _refuse_packed(
            mask=mask, bias=bias, key_lengths=key_lengths, segment_ids=segment_ids, relative_k=relative_k, ranks=ranks,
            row_windows=row_windows,
        )  # fmt: skip
    q, k, v = _check_qkv(q, k, v, packed, block_table is not None, "d" if weight is None else "a")
    n = k.shape[2]
    if block_table is not None:
        block_table = _check_block_table(block_table, q, k)
        n *= block_table.shape[1]
    q_segments = k_segments = q_ranks = k_ranks = row_first = row_stop = None
    if mask is not None:
        mask = _broadcastable("mask", mask, (torch.bool,), q, n)
    if bias is not None:
        bias = _broadcastable("bias", bias, (q.dtype, torch.float32), q, n)
    if key_lengths is not None:
        key_lengths = check_integers("key_lengths", key_lengths, (q.shape[0],), q)
    if segment_ids is not None:
        q_segments, k_segments = _check_segments(segment_ids, q, k)
    if ranks is not None:
        q_ranks, k_ranks = _check_ranks(ranks, q, k)
    if row_windows is not None:
        row_first, row_stop = _check_row_windows(row_windows, q)
    if packed:
        cu_seqlens_q, cu_seqlens_k = check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, q)
    if alibi_slopes is not None:
        alibi_slopes = _check_slopes(alibi_slopes, q, cu_seqlens_q)
    if sinks is not None:
        sinks = _check_sinks(sinks, q)
    if weight is not None:
        weight = _check_weight(weight, q)
    if exp_keys is not None:
        exp_keys = _check_exp_keys(exp_keys, k, packed)
    if relative_q is not None or relative_k is not None:
        if weight is not None:
            raise RangeError("relative_k: expected None beside a weight: additive scores have no relative term")
        relative_q, relative_k = _check_relative(relative_q, relative_k, q)
    return Inputs(
        unit_stride(q), unit_stride(k), unit_stride(v), mask, bias, key_lengths, q_segments, k_segments, alibi_slopes,
        sinks, check_seed(seed, q.device) if dropout_p > 0 else None, cu_seqlens_q, cu_seqlens_k,
        block_table, weight, exp_keys, relative_q, relative_k, q_ranks, k_ranks, row_first, row_stop,
    )  # fmt: skip


def check_dense(name: str, t: Tensor) -> None:
    """Whether t is a tensor, of the plain layout."""
    if not isinstance(t, Tensor):
        raise DtypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.layout is not torch.strided or t.is_nested:
        kind = "a nested tensor" if t.is_nested else f"the layout {t.layout}"
        raise DtypeError(f"{name}: expected a dense tensor, got {kind}")


def autocast_dtype(t: Tensor) -> torch.dtype:
    """What torch's own attention makes of t's dtype: autocast lowers every floating dtype but float64."""
    if not t.is_floating_point() or t.dtype is torch.float64 or not torch._C._is_any_autocast_enabled():
        return t.dtype
    device = t.device.type
    if not torch.amp.is_autocast_available(device):
        return t.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else t.dtype


def without_autocast(device: str) -> AbstractContextManager[object]:
    """torch.autocast, off; it refuses devices that it does not know, even where it is off."""
    return torch.autocast(device, enabled=False) if torch._C._is_any_autocast_enabled() else nullcontext()


def check_scale(scale: SupportsFloat | None, d: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(d) if d > 0 else 1.0
    if not abs(_number("scale", scale)) <= _LARGEST_SCALE:
        raise RangeError(
            f"scale: expected a finite number in float32's range, at most {_LARGEST_SCALE:.3g}, got {scale}"
        )
    return float(scale)


def check_softcap(softcap: SupportsFloat | None) -> float | None:
    if softcap is None:
        return None
    if not _FLOAT32.tiny <= _number("softcap", softcap) <= _FLOAT32.max:
        raise RangeError(f"softcap: expected a positive number in float32's range (None means no cap), got {softcap}")
    return float(softcap)


def check_dropout(dropout_p: SupportsFloat) -> float:
    if not 0 <= _number("dropout_p", dropout_p) < 1:
        raise RangeError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    return float(dropout_p)


def check_band(causal: bool, window: Sequence[int | None] | None) -> tuple[int | None, int | None]:
    """The number of visible keys (left, right) of one's own position; None is unlimited."""
    if not isinstance(causal, bool):
        raise DtypeError(f"causal: expected a bool, got {causal!r}")
    if window is None:
        return None, 0 if causal else None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise DtypeError(f"window: expected a pair (left, right), got {window!r}")
    for side, keys in zip(("left", "right"), window, strict=True):
        if keys is None:
            continue
        if isinstance(keys, bool) or not isinstance(keys, (Integral, torch.SymInt)):
            raise DtypeError(f"window: expected an int or None on the {side}, got {keys!r}")
        if keys < 0:
            raise RangeError(f"window: expected at least 0 keys on the {side} (None means unlimited), got {keys}")
    left, right = (None if keys is None else min(keys, _UNLIMITED) for keys in window)
    return left, 0 if causal else right


def check_dtypes(x: Inputs) -> None:
    """Raises DtypeError for dtypes that `check_inputs` does not return: the operator may be called without it."""
    sums = torch.float64 if x.q.dtype is torch.float64 else torch.float32
    integers = "key_lengths", "cu_seqlens_q", "cu_seqlens_k", "block_table"
    ids = dict.fromkeys(("q_segments", "k_segments"), (torch.int32, torch.int64))
    expected = {"k": (x.q.dtype,), "v": (x.q.dtype,), "mask": (torch.bool,), "bias": (x.q.dtype, torch.float32)}
    expected |= ids | dict.fromkeys(integers, (torch.int32,)) | {"alibi_slopes": (torch.float32,), "sinks": (sums,)}
    expected |= {"seed": (torch.int64,), "weight": (x.q.dtype, torch.float32), "exp_keys": (sums,)}
    expected |= dict.fromkeys(("relative_q", "relative_k"), (x.q.dtype,))
    expected |= dict.fromkeys(("q_ranks", "k_ranks", "row_first", "row_stop"), (torch.int32,))
    for name, dtypes in expected.items():
        t = getattr(x, name)
        if t is not None and t.dtype not in dtypes:
            raise DtypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {t.dtype}")


def check_values(x: Inputs) -> None:
    """Checks what only the values can tell. For tensors on the CPU; reading a GPU's values would stall it."""
    lengths = x.key_lengths
    if lengths is not None:
        check_lengths(lengths, x.n)
    if x.block_table is not None and lengths is not None and lengths.device.type == "cpu":
        _check_pages(x.block_table, lengths, *x.k.shape[::2])
    cu_q, cu_k = x.cu_seqlens_q, x.cu_seqlens_k
    if cu_q is not None and cu_k is not None and cu_q.device.type == "cpu":
        check_starts("cu_seqlens_q", cu_q.tolist(), x.q.shape[2])
        check_starts("cu_seqlens_k", cu_k.tolist(), x.k.shape[2])


def check_lengths(lengths: Tensor, n: int) -> None:
    """Whether no length is beyond n keys, for tensors on the CPU."""
    if lengths.numel() > 0 and lengths.device.type == "cpu":
        low, high = (int(t) for t in torch.aminmax(lengths))
        if low < 0 or high > n:
            wrong = low if low < 0 else high
            raise RangeError(f"key_lengths: expected values in [0, n={n}], got {wrong}: there are {n} keys")


def _check_pages(block_table: Tensor, lengths: Tensor, pages: int, page_size: int) -> None:
    """Whether the table's entries up to each length are pages."""
    used = torch.arange(block_table.shape[1]) * page_size < lengths[:, None]
    wrong = (used & ((block_table < 0) | (block_table >= pages))).nonzero()
    if len(wrong) > 0:
        b, place = wrong[0].tolist()
        raise RangeError(
            f"block_table: expected pages in [0, {pages}) up to key_lengths, got {int(block_table[b, place])} at "
            f"[{b}, {place}]: key_lengths[{b}] is {int(lengths[b])} and a page has {page_size} keys"
        )


def check_starts(name: str, starts: list[int], rows: int) -> None:
    """Whether the sequences begin at row 0, follow one another, and end with the rows of q or k."""
    side = name.removeprefix("cu_seqlens_")
    if starts[0] != 0:
        raise RangeError(f"{name}: expected 0 at position 0, got {starts[0]}: the first sequence starts at row 0")
    for place, (start, end) in enumerate(pairwise(starts), 1):
        if end < start:
            raise RangeError(f"{name}: expected at least {start} at position {place}, got {end}: the value before it "
                             f"is {start}")  # fmt: skip
    if starts[-1] != rows:
        raise RangeError(
            f"{name}: expected total_{side}={rows} at its last position, {len(starts) - 1}, got {starts[-1]}: "
            f"{side} has {rows} rows"
        )


def _refuse_packed(**options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise RangeError(
                f"{name}: expected None beside cu_seqlens_q and cu_seqlens_k, got a {type(value).__name__}: packed "
                "sequences have no batch, m and n in common"
            )


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, packed: bool, paged: bool, size: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as 4-D; packed ones are [total length, heads, head size], paged k and v [pages, heads, page size, *].

    size: what the caller's text calls the head size.
    """
    rank = 3 if packed else 4
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_dense(name, t)
        if t.dim() != rank:
            rows = "total_q" if name == "q" else "total_k"
            form = f"{rows}, heads, head size" if packed else "batch, heads, length, head size"
            raise ShapeError(f"{name}: expected {rank} dimensions [{form}], got {_shape(t)}")
    dtype, device = q.dtype, q.device
    if dtype not in DTYPES:
        raise DtypeError(f"q: expected float16, bfloat16, float32 or float64, got {dtype}")
    for name, t in (("k", k), ("v", v)):
        if t.dtype is not dtype:
            raise DtypeError(f"{name}: expected {dtype}, the dtype of q, got {t.dtype}")
        _check_device(name, t, device)
    given_k, given_v = k, v
    if packed:
        q, k, v = as_batch(q), as_batch(k), as_batch(v)
    b, h, _, d = q.shape
    k_b, hk, n, k_d = k.shape
    v_b, v_hk, v_n, _ = v.shape
    if (k_b != b and not paged) or k_d != d:
        form = "total_k, hk" if packed else "pages, hk, page size" if paged else f"b={b}, hk, n"
        why = f"{size} is {d} in q" if k_d != d else f"b is {b} in q"
        raise ShapeError(f"k: expected [{form}, {size}={d}], got {_shape(given_k)}: {why}")
    if v_b != k_b or v_hk != hk or v_n != n:
        form = f"total_k={n}, hk={hk}, dv" if packed else f"{'pages' if paged else 'b'}={k_b}, hk={hk}, n={n}, dv"
        raise ShapeError(f"v: expected [{form}], got {_shape(given_v)}: k is {_shape(given_k)}")
    if h == 0 or hk == 0:
        raise ShapeError(f"q, k: expected at least 1 head, got h={h}, hk={hk}")
    if h % hk != 0:
        raise ShapeError(f"k: expected a number of heads that divides the {h} heads of q, got {hk}")
    return q, k, v


def _broadcastable(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], q: Tensor, n: int) -> Tensor:
    """t as 4-D, each size 1 or that of the scores [b, h, m, n]."""
    check_tensor(name, t, dtypes, q)
    shape = (*q.shape[:3], n)
    padded = t[(None,) * (4 - t.dim())] if t.dim() < 4 else t
    fits = padded.dim() == 4 and all(have == want or have == 1 for have, want in zip(padded.shape, shape, strict=True))
    if not fits:
        b, h, m, n = shape
        hint = f": {name}[:, None, None] does" if tuple(t.shape) == (b, n) else ""
        hint += ", and key_lengths says the same of padding" if hint and name == "mask" else ""
        raise ShapeError(
            f"{name}: expected a shape that broadcasts to [b={b}, h={h}, m={m}, n={n}], got {_shape(t)}{hint}"
        )
    return padded


def _check_block_table(block_table: Tensor, q: Tensor, k: Tensor) -> Tensor:
    check_tensor("block_table", block_table, _INTEGERS, q)
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
        raise ShapeError(
            f"block_table: expected [b={q.shape[0]}, pages of one batch element], got {_shape(block_table)}"
        )
    if k.shape[2] == 0:
        raise ShapeError(f"k: expected pages of at least 1 key, got {_shape(k)}")
    return check_integers("block_table", block_table, tuple(block_table.shape), q).contiguous()


def check_cu_seqlens(cu_seqlens_q: Any, cu_seqlens_k: Any, q: Tensor) -> tuple[Tensor, Tensor]:
    for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(name, t, _INTEGERS, q)
        if t.dim() != 1 or t.shape[0] == 0:
            raise ShapeError(f"{name}: expected [s + 1], the start of each of s sequences and the end, got {_shape(t)}")
    size = cu_seqlens_q.shape[0]
    if cu_seqlens_k.shape[0] != size:
        why = f"cu_seqlens_q has {size} elements"
        raise ShapeError(f"cu_seqlens_k: expected [s + 1={size}], got {_shape(cu_seqlens_k)}: {why}")
    return (
        check_integers("cu_seqlens_q", cu_seqlens_q, (size,), q).contiguous(),
        check_integers("cu_seqlens_k", cu_seqlens_k, (size,), q).contiguous(),
    )


def _check_segments(ids: tuple[Tensor, Tensor], q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(ids, (tuple, list)) or len(ids) != 2:
        raise DtypeError(f"segment_ids: expected a pair (q_ids [b, m], k_ids [b, n]), got {type(ids).__name__}")
    b = q.shape[0]
    q_ids = _check_whole_numbers("segment_ids[0]", ids[0], (b, q.shape[2]), q)
    k_ids = _check_whole_numbers("segment_ids[1]", ids[1], (b, k.shape[2]), q)
    return tuple(t if t.dtype is torch.int64 else t.to(torch.int32) for t in (q_ids, k_ids))  # type: ignore[return-value]


def _check_ranks(ranks: tuple[Tensor, Tensor], q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(ranks, (tuple, list)) or len(ranks) != 2:
        raise DtypeError(f"ranks: expected a pair (q_ranks [b, m], k_ranks [b, n]), got {type(ranks).__name__}")
    b = q.shape[0]
    return (
        check_integers("ranks[0]", ranks[0], (b, q.shape[2]), q),
        check_integers("ranks[1]", ranks[1], (b, k.shape[2]), q),
    )


def _check_row_windows(windows: tuple[Tensor, Tensor], q: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(windows, (tuple, list)) or len(windows) != 2:
        raise DtypeError(f"row_windows: expected a pair (first [b, m], stop [b, m]), got {type(windows).__name__}")
    shape = (q.shape[0], q.shape[2])
    return (
        check_integers("row_windows[0]", windows[0], shape, q),
        check_integers("row_windows[1]", windows[1], shape, q),
    )


def _check_relative(relative_q: Any, relative_k: Any, q: Tensor) -> tuple[Tensor, Tensor]:
    for name, t in (("relative_q", relative_q), ("relative_k", relative_k)):
        check_dense(name, t)
    relative_q, relative_k = (t.to(autocast_dtype(t)) for t in (relative_q, relative_k))
    b, h, m, _ = q.shape
    for name, t in (("relative_q", relative_q), ("relative_k", relative_k)):
        check_tensor(name, t, (q.dtype,), q)
    if relative_q.dim() != 4 or tuple(relative_q.shape[:3]) != (b, h, m) or relative_q.shape[3] == 0:
        raise ShapeError(
            f"relative_q: expected [b={b}, h={h}, m={m}, e] with e of at least 1, got {_shape(relative_q)}"
        )
    e, shape = relative_q.shape[3], tuple(relative_k.shape)
    if len(shape) != 4 or shape[0] not in (1, b) or shape[1] != h or shape[3] != e:
        raise ShapeError(f"relative_k: expected [1 or b={b}, h={h}, distances, e={e}], got {_shape(relative_k)}")
    return unit_stride(relative_q), unit_stride(relative_k)


def check_distances(first: Any, x: Inputs, offset: int | None, left: int | None, right: int | None) -> int:
    """`first`, where relative_k has a row for every distance that the band leaves."""
    kinds: Any = (Integral, torch.SymInt)
    if isinstance(first, bool) or not isinstance(first, kinds):
        raise DtypeError(f"first: expected an int, the distance of relative_k's first row, got {first!r}")
    if offset is None:
        raise RangeError("relative_k: expected None over a cache whose queries stand at key_lengths")
    assert x.relative_k is not None
    rows = x.relative_k.shape[2]
    lowest, highest = band_distances(x.q.shape[2], x.k.shape[2], offset, left, right)
    if lowest > highest:
        return 0  # no pair has a distance: `first` has no meaning, and may have more bits than the operator takes
    if not (first <= lowest and highest < first + rows):
        raise RangeError(
            f"relative_k: expected rows for the distances {lowest} to {highest} from key to query, got "
            f"{rows} from {first} on"
        )
    return first


def _check_slopes(slopes: Tensor, q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[b, h], or [s, h] for packed sequences."""
    b, h = q.shape[:2]
    name = "b"
    if cu_seqlens is not None:
        name, b = "s", cu_seqlens.shape[0] - 1
    check_tensor("alibi_slopes", slopes, DTYPES, q)
    if tuple(slopes.shape) not in ((h,), (b, h)):
        raise ShapeError(f"alibi_slopes: expected [h={h}] or [{name}={b}, h={h}], got {_shape(slopes)}")
    if slopes.requires_grad:
        raise RangeError(
            "alibi_slopes: expected a tensor without gradient, got requires_grad=True: "
            "slopes are constants; to learn them pass the distances times the slopes as `bias`"
        )
    return slopes.to(torch.float32).expand(b, h)


def _check_sinks(sinks: Tensor, q: Tensor) -> Tensor:
    h = q.shape[1]
    check_tensor("sinks", sinks, DTYPES, q)
    if tuple(sinks.shape) != (h,):
        raise ShapeError(f"sinks: expected [h={h}], one logit per query head, got {_shape(sinks)}")
    return sinks.to(torch.float64 if q.dtype is torch.float64 else torch.float32)


def _check_weight(weight: Tensor, q: Tensor) -> Tensor:
    check_dense("weight", weight)
    if weight.dtype is not torch.float32:  # which stays as exact as it is
        weight = weight.to(autocast_dtype(weight))
    h, a = q.shape[1], q.shape[3]
    check_tensor("weight", weight, (q.dtype, torch.float32), q)
    if tuple(weight.shape) != (h, a):
        raise ShapeError(f"weight: expected [h={h}, a={a}], a number for every column of q, got {_shape(weight)}")
    return weight


def _check_exp_keys(exp_keys: Tensor, k: Tensor, packed: bool) -> Tensor:
    check_tensor("exp_keys", exp_keys, (torch.float64 if k.dtype is torch.float64 else torch.float32,), k)
    shape = (as_packed(k) if packed else k).shape
    if exp_keys.shape != shape:
        raise ShapeError(f"exp_keys: expected the shape of k, {list(shape)}, got {_shape(exp_keys)}")
    exp_keys = exp_keys.detach()
    return unit_stride(as_batch(exp_keys) if packed else exp_keys)


def check_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed of random words as an int64 scalar on `device`; drawn from torch's generator when none was given."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype is not torch.int64 or seed.dim() != 0:
            raise DtypeError(f"seed: expected an int or an int64 scalar tensor, got {_described(seed)}")
        return seed.to(device)
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise DtypeError(f"seed: expected an int or an int64 scalar tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise RangeError(f"seed: expected an integer of 64 bits, got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=device)


def check_integers(name: str, t: Tensor, shape: tuple[int, ...], q: Tensor) -> Tensor:
    """t as int32. Values of more bits are an error where they can be read."""
    _check_whole_numbers(name, t, shape, q)
    if t.dtype is torch.int64 and t.device.type == "cpu" and t.numel() > 0 and not is_traced(t):
        low, high = (int(end) for end in torch.aminmax(t))
        if low < -(2**31) or high >= 2**31:
            raise RangeError(f"{name}: expected integers of 32 bits, got {low if low < -(2**31) else high}")
    return t.to(torch.int32)


def _check_whole_numbers(name: str, t: Tensor, shape: tuple[int, ...], q: Tensor) -> Tensor:
    check_tensor(name, t, _INTEGERS, q)
    if tuple(t.shape) != shape:
        raise ShapeError(f"{name}: expected shape {list(shape)}, got {_shape(t)}")
    return t


def is_traced(t: Tensor) -> bool:
    """Whether t has no values to look at: torch.compile traces it, it is fake, or many tensors in torch.func's vmap."""
    return torch.compiler.is_compiling() or isinstance(t, FakeTensor) or is_functorch_wrapped_tensor(t)


def check_tensor(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], q: Tensor) -> None:
    check_dense(name, t)
    if t.dtype not in dtypes:
        expected = " or ".join(dict.fromkeys(map(dtype_name, dtypes)))
        hint = _mask_hint(t) if name == "mask" else ""
        raise DtypeError(f"{name}: expected {expected}, got {dtype_name(t.dtype)}{hint}")
    _check_device(name, t, q.device)


def _mask_hint(t: Tensor) -> str:
    return ": one that is added is bias=" if t.is_floating_point() else ": its .bool() attends where it is not 0"


def _check_device(name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        raise DeviceError(f"{name}: expected a tensor on {device}, the device of q, got {t.device}")


def number(name: str, value: Any) -> float:
    """A real number of any type as one of Python's; of a tensor without dimensions, its value.

    For that a GPU is waited for, as torch does where it is given such a tensor.
    """
    if type(value) in (int, float, torch.SymFloat):
        return value
    if isinstance(value, Tensor) and value.dim() == 0 and not (value.requires_grad or value.is_complex()):
        value = value.item()
    elif torch.compiler.is_compiling() and getattr(value, "ndim", None) == 0:
        return float(value)  # one of numpy's numbers, for which an array without dimensions stands here
    if not isinstance(value, Real):
        raise DtypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool):
        raise DtypeError(f"{name}: expected a number, got bool")
    return number(name, value)


def _shape(t: Tensor) -> str:
    return str(list(t.shape))


def _described(t: Tensor) -> str:
    return f"{dtype_name(t.dtype)} {_shape(t)}"
