"""The border into C++: whatever Python has checked before, a call that would read or write astray is refused there.

What Python itself refuses is in test_check.py and test_varlen.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pyattn.backends import cpu
from pyattn.check import DtypeError
from pyattn.spec import Inputs

B, H, HK, M, N, D, DV = 3, 4, 2, 5, 7, 8, 6
SEQUENCES = 3
E, DISTANCES = 4, 12
POISON = 7.0
WRITTEN = {
    "forward": ("out", "lse", "row_max", "row_sum"),
    "backward": (
        "delta",
        "d_q",
        "d_k",
        "d_v",
        "d_bias",
        "d_sinks",
        "d_weight",
        "d_relative_q",
        "d_relative_k",
    ),
}
ROWS = (
    "q",
    "k",
    "v",
    "out",
    "d_out",
    "d_q",
    "d_k",
    "d_v",
    "exp_keys",
    "relative_q",
    "relative_k",
    "d_relative_q",
    "d_relative_k",
)  # read and written row by row: the last stride must be 1
STATISTICS = ("lse", "row_max", "row_sum")
LISTS = (
    "key_lengths", "q_segments", "k_segments", "alibi_slopes", "sinks", "weight", *STATISTICS, "d_lse", "delta",
    "d_sinks", "d_weight", "q_ranks", "k_ranks", "row_first", "row_stop",
)  # fmt: skip
SCORES = ("mask", "bias", "d_bias")
BATCH = (*ROWS, *LISTS, *SCORES)
PACKED = ("cu_seqlens_q", "cu_seqlens_k")


def kind_with(name: str) -> str:
    """The kind of call that has a tensor of that name: "batch", "packed", or "relative"."""
    return (
        "packed"
        if name in PACKED
        else "relative"
        if any(x in name for x in ("relative", "ranks", "row_first", "row_stop"))
        else "batch"
    )


class Border:
    """One call of pyattn._C, sound until something in it is changed. Tensors are kept as they cross: as tuples."""

    def __init__(self, direction: str, kind: str = "batch") -> None:
        self.direction = direction
        packed = kind == "packed"
        b = 1 if packed else B
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.tensors = {
            "q": normal(b, H, M, D), "k": normal(b, HK, N, D), "v": normal(b, HK, N, DV),
            "out": normal(b, H, M, DV), "sinks": normal(H), **{name: normal(b, H, M) for name in STATISTICS},
            "alibi_slopes": normal(SEQUENCES if packed else b, H),
        }  # fmt: skip
        if packed:
            self.tensors["cu_seqlens_q"] = torch.tensor([0, 2, 2, M], dtype=torch.int32)
            self.tensors["cu_seqlens_k"] = torch.tensor([0, 3, 4, N], dtype=torch.int32)
        else:
            self.tensors |= {
                "mask": torch.ones(b, H, M, N, dtype=torch.bool), "bias": normal(b, H, M, N),
                "key_lengths": torch.tensor([N, 3, 0], dtype=torch.int32),
                "q_segments": torch.zeros(b, M, dtype=torch.int32), "k_segments": torch.zeros(b, N, dtype=torch.int32),
            }  # fmt: skip
        if kind == "batch":
            self.tensors |= {"weight": normal(H, D), "exp_keys": normal(b, HK, N, D).exp()}
        if kind == "relative":
            self.tensors |= {"relative_q": normal(b, H, M, E), "relative_k": normal(b, H, DISTANCES, E)}
            ranks = torch.ones(b, M, dtype=torch.int32), torch.zeros(b, N, dtype=torch.int32)
            self.tensors |= dict(zip(("q_ranks", "k_ranks"), ranks, strict=True))
            windows = torch.zeros(b, M, dtype=torch.int32), torch.full((b, M), N, dtype=torch.int32)
            self.tensors |= dict(zip(("row_first", "row_stop"), windows, strict=True))
        if direction == "backward":
            self.tensors |= {"d_out": normal(b, H, M, DV), "d_lse": normal(b, H, M), "delta": normal(b, H, M)}
            self.tensors |= {f"d_{x}": self.tensors[x].clone() for x in ("q", "k", "v", "sinks")}
            others = {"batch": ("bias", "weight"), "relative": ("bias", "relative_q", "relative_k"), "packed": ()}[kind]
            self.tensors |= {f"d_{x}": self.tensors[x].clone() for x in others}
        self.given = {name: list(cpu._described(t)) for name, t in self.tensors.items()}
        self.arguments: dict[str, Any] = {
            "isa": "generic", "dtype": "float32", "bias_dtype": "float32",
            "sizes": [b, H, HK, M, N, D, DV, SEQUENCES if packed else b],
            "numbers": [0.5, N - M, None, None, None, 0.1, 42],
            "relative": [1 - M, DISTANCES, E] if kind == "relative" else None,
            "threads": 1,
        }  # fmt: skip

    def run(self) -> None:
        isa, dtype, bias_dtype, sizes, numbers, relative, threads = self.arguments.values()
        tensors = {name: tuple(parts) for name, parts in self.given.items()}
        getattr(cpu._module(), self.direction)(
            isa, dtype, bias_dtype, tuple(sizes), tuple(numbers), relative and tuple(relative), tensors, threads
        )

    def written(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.tensors[name]) for name in WRITTEN[self.direction] if name in self.tensors)

    def assert_refused(self, message: str) -> None:
        for _, t in self.written():
            t.fill_(POISON)
        with pytest.raises(ValueError, match=message):
            self.run()
        for name, t in self.written():
            assert (t == POISON).all(), f"{name} was written"

    def set_size(self, name: str, size: int) -> None:
        self.arguments["sizes"][("b", "h", "hk", "m", "n", "d", "dv", "sequences").index(name)] = size

    def set_number(self, name: str, value: object) -> None:
        names = ("scale", "offset", "left", "right", "softcap", "dropout_p", "seed")
        self.arguments["numbers"][names.index(name)] = value

    def drop(self, *names: str) -> None:
        for name in names:
            del self.given[name]

    def scale_stride(self, name: str, axis: int, factor: int) -> None:
        _, _, strides, _, _ = self.given[name]
        self.given[name][2] = tuple(stride * factor if at == axis else stride for at, stride in enumerate(strides))

    def resize(self, name: str, axis: int, by: int) -> None:
        _, shape, _, _, _ = self.given[name]
        self.given[name][1] = tuple(size + by if at == axis else size for at, size in enumerate(shape))


@pytest.mark.parametrize("direction", WRITTEN)
@pytest.mark.parametrize("kind", ["batch", "packed", "relative"])
def test_border_sound_call_writes_everything(direction, kind):
    border = Border(direction, kind)
    for _, t in border.written():
        t.fill_(torch.nan)
    border.run()
    for name, t in border.written():
        assert not t.isnan().any(), name


def _put(name: str, place: int, value: Any) -> Callable[[Border], None]:
    """Replaces one part of a tensor: 0 the pointer, 1 the shape, 2 the strides, 3 the storage, 4 its bytes."""

    def change(border: Border) -> None:
        border.given[name][place] = value(border.given[name][place]) if callable(value) else value

    return change


ASTRAY = {
    "one byte short": lambda name: _put(name, 4, lambda size: size - 1),
    "no bytes": lambda name: _put(name, 4, 0),
    "negative bytes": lambda name: _put(name, 4, -(2**63)),
    "starts before its storage": lambda name: _put(name, 3, lambda base: base + 1),
    "starts late": lambda name: _put(name, 0, lambda pointer: pointer + 1),
    "starts beyond its storage": lambda name: _put(name, 0, lambda pointer: pointer + (1 << 40)),
    "at the end of the address space": lambda name: _put(name, 0, 2**64 - 1),
    "null": lambda name: _put(name, 0, 0),
}


@pytest.mark.parametrize("astray", ASTRAY.values(), ids=ASTRAY)
@pytest.mark.parametrize("name", (*BATCH, *PACKED))
def test_border_tensor_outside_its_storage_is_refused(name, astray):
    border = Border("backward", kind_with(name))
    astray(name)(border)
    border.assert_refused(f"^{name}: reaches outside its storage")


@pytest.mark.parametrize("name", sorted({*BATCH, *PACKED} - {"mask"}))
def test_border_tensor_whose_elements_lie_askew_is_refused(name):
    border = Border("backward", kind_with(name))
    for place in (0, 4):  # from its second byte on, in a storage of one more
        _put(name, place, lambda value: value + 1)(border)
    border.assert_refused(f"^{name}: expected elements aligned to their 4 bytes")


@pytest.mark.parametrize("name", (*ROWS, *SCORES))
def test_border_strides_that_reach_outside_are_refused(name):
    for axis in range(4 if name in SCORES else 3):
        for factor in (2, -1):
            border = Border("backward", kind_with(name))
            border.scale_stride(name, axis, factor)
            border.assert_refused(f"^{name}: reaches outside its storage")


@pytest.mark.parametrize("name", (*ROWS, *SCORES))
def test_border_strides_that_overflow_are_refused(name):
    for axis in range(4 if name in SCORES else 3):
        for stride in (2**62, -(2**62), 2**63 - 1, -(2**63)):
            border = Border("backward", kind_with(name))
            strides = border.given[name][2]
            border.given[name][2] = (*strides[:axis], stride, *strides[axis + 1 :])
            border.assert_refused(f"^{name}: (sizes and strides overflow 63 bits|reaches outside)")


@pytest.mark.parametrize("name", (*BATCH, *PACKED))
def test_border_wrong_size_or_rank_is_refused(name):
    rank = len(Border("backward", kind_with(name)).given[name][1])
    for axis in range(rank):
        for by in (1, -1):
            border = Border("backward", kind_with(name))
            border.resize(name, axis, by)
            border.assert_refused(f"^{name}: expected size")
    for place in (1, 2):
        border = Border("backward", kind_with(name))
        border.given[name][place] = border.given[name][place][1:]
        border.assert_refused(f"^{name}: expected {rank} dimensions")
    border = Border("backward", kind_with(name))
    border.given[name].pop()
    border.assert_refused(f"^{name}: expected .pointer, shape, strides")


@pytest.mark.parametrize("name", ROWS)
def test_border_last_stride_other_than_1_is_refused(name):
    for stride in (0, 2, -1):
        border = Border("backward", kind_with(name))
        border.given[name][2] = (*border.given[name][2][:3], stride)
        border.assert_refused(f"^{name}: last stride must be 1")


@pytest.mark.parametrize("name", (*LISTS, *PACKED))
def test_border_list_that_is_not_contiguous_is_refused(name):
    for axis in range(len(Border("backward", kind_with(name)).given[name][1])):
        for factor in (0, 2, -1):
            border = Border("backward", kind_with(name))
            border.scale_stride(name, axis, factor)
            border.assert_refused(f"^{name}: expected a contiguous tensor")


def test_border_sizes_whose_product_overflows_are_refused():
    for sizes in ((B, 2**37, 1, 2**37, N), (2**37, 2**37, 1, M, N), (B, 2**31, 1, 2**31, 2**31)):
        border = Border("forward")
        for name, size in zip(("b", "h", "hk", "m", "n"), sizes, strict=True):
            border.set_size(name, size)
        b, h, _, m, _ = sizes
        border.given["q"][1:3] = (b, h, m, D), (0, 0, 0, 1)
        border.assert_refused(r"^\w+: (sizes and strides overflow 63 bits|expected size)")


def paged() -> Border:
    """Pages [2 B, HK, 4, *], two to a batch element, which so has room for 8 keys and holds 7, 3 and 0."""
    border = Border("forward")
    border.drop("mask", "bias", "q_segments", "k_segments", "weight", "exp_keys")
    border.set_number("offset", None)
    border.arguments["sizes"][4] = 8
    border.tensors |= {"k": torch.randn(2 * B, HK, 4, D), "v": torch.randn(2 * B, HK, 4, DV)}
    border.tensors["block_table"] = torch.arange(2 * B, dtype=torch.int32).view(B, 2)
    border.given |= {name: list(cpu._described(border.tensors[name])) for name in ("k", "v", "block_table")}
    return border


def test_border_pages_are_taken():
    paged().run()


WRONG_PAGES: dict[str, tuple[Callable[[Border], object], str]] = {
    "page beyond the last": (
        lambda x: x.tensors["block_table"][1].fill_(2 * B),
        "^block_table: expected 0 to 5, got 6",
    ),
    "page before the first": (lambda x: x.tensors["block_table"][0].fill_(-1), "^block_table: expected 0 to 5, got -1"),
    "pages that do not divide n": (lambda x: x.arguments["sizes"].__setitem__(4, 9), "^block_table: n is not a"),
    "pages of no keys": (lambda x: x.resize("k", 2, -4), "^block_table: n is not a"),
    "v with pages of another size": (lambda x: x.resize("v", 2, -1), "^v: expected size 4"),
    "an offset": (lambda x: x.set_number("offset", 0), "^block_table: expected no offset"),
    "no lengths": (lambda x: x.drop("key_lengths"), "^offset: expected a number, without key_lengths"),
    "no k": (lambda x: x.drop("k"), "^block_table: there is no k"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_PAGES.values(), ids=WRONG_PAGES)
def test_border_wrong_pages_are_refused(change, message):
    border = paged()
    change(border)
    border.assert_refused(message)


MISSING = "q", "k", "v", "out", *STATISTICS, "d_out", "d_q", "d_k", "d_v", "delta"


@pytest.mark.parametrize("name", MISSING)
def test_border_missing_tensor_is_refused(name):
    border = Border("backward")
    border.drop(name)
    border.assert_refused(f"{name}\\b.*: expected all")


WRONG: dict[str, tuple[Callable[[Border], object], str]] = {
    "isa unknown": (lambda x: x.arguments.update(isa="mmx"), "^isa: mmx is not usable"),
    "isa empty": (lambda x: x.arguments.update(isa=""), "^isa: "),
    "dtype unknown": (lambda x: x.arguments.update(dtype="int8"), "^dtype: expected float32, .*got int8"),
    "bias_dtype unknown": (lambda x: x.arguments.update(bias_dtype=""), "dtype: expected float32, "),
    "dtype wider than the tensors": (lambda x: x.arguments.update(dtype="float64"), r"^\w+: reaches outside"),
    "bias_dtype wider than the bias": (lambda x: x.arguments.update(bias_dtype="float64"), "bias: reaches outside"),
    "no threads": (lambda x: x.arguments.update(threads=0), "^threads: expected at least 1, got 0"),
    "negative threads": (lambda x: x.arguments.update(threads=-3), "^threads: expected at least 1, got -3"),
    "sizes too few": (lambda x: x.arguments["sizes"].pop(), "^sizes: expected "),
    "numbers too many": (lambda x: x.arguments["numbers"].append(0), "^numbers: expected "),
    "b negative": (lambda x: x.set_size("b", -1), "^sizes: out of range"),
    "n beyond any memory": (lambda x: x.set_size("n", 2**62), "^sizes: out of range"),
    "no heads": (lambda x: x.set_size("h", 0), "^sizes: h must be a positive multiple of hk"),
    "no key heads": (lambda x: x.set_size("hk", 0), "^sizes: h must be a positive multiple of hk"),
    "key heads that do not divide": (lambda x: x.set_size("hk", 3), "^sizes: h must be a positive multiple of hk"),
    "d 0": (lambda x: x.set_size("d", 0), "^d: expected 1 to 4096, got 0"),
    "d 4097": (lambda x: x.set_size("d", 4097), "^d: expected 1 to 4096, got 4097"),
    "dv 0": (lambda x: x.set_size("dv", 0), "^dv: expected 1 to 4096, got 0"),
    "dv 4097": (lambda x: x.set_size("dv", 4097), "^dv: expected 1 to 4096, got 4097"),
    "m other than in q": (lambda x: x.set_size("m", M + 1), r"^\w+: expected size 6"),
    "sequences without packing": (lambda x: x.set_size("sequences", 5), "^(alibi_slopes|sequences): "),
    "offset out of range": (lambda x: x.set_number("offset", 2**40), "^offset: out of range"),
    "offset out of range below": (lambda x: x.set_number("offset", -(2**40)), "^offset: out of range"),
    "dropout_p 1": (lambda x: x.set_number("dropout_p", 1.0), r"^dropout_p: expected \[0, 1\)"),
    "dropout_p negative": (lambda x: x.set_number("dropout_p", -0.1), r"^dropout_p: expected \[0, 1\)"),
    "dropout_p NaN": (lambda x: x.set_number("dropout_p", float("nan")), r"^dropout_p: expected \[0, 1\)"),
    "a tensor of no meaning": (lambda x: x.given.update(z=x.given["q"]), "^z: no such tensor"),
    "q_segments alone": (lambda x: x.drop("k_segments"), "^q_segments, k_segments: expected both or neither"),
    "k_segments alone": (lambda x: x.drop("q_segments"), "^q_segments, k_segments: expected both or neither"),
    "d_sinks missing": (lambda x: x.drop("d_sinks"), "^d_sinks: expected with sinks, and only with them"),
    "d_weight missing": (lambda x: x.drop("d_weight"), "^d_weight: expected with weight, and only with it"),
    "weight missing": (lambda x: x.drop("weight"), "^d_weight: expected with weight, and only with it"),
    "bias missing": (lambda x: x.drop("bias"), "^d_bias: there is no bias"),
    "sinks missing": (lambda x: x.drop("sinks"), "^d_sinks: expected with sinks, and only with them"),
    "d_bias broadcast and bias not": (lambda x: x.resize("d_bias", 0, 1 - B), "^d_bias: expected the sizes of bias"),
    "key_lengths negative": (lambda x: x.tensors["key_lengths"].fill_(-1), "^key_lengths: expected 0 to n, got -1"),
    "key_lengths beyond n": (lambda x: x.tensors["key_lengths"].fill_(8), "^key_lengths: expected 0 to n, got 8"),
}


def _drop(*names: str) -> Callable[[Border], None]:
    return lambda border: border.drop(*names)


def _relative(place: int, value: object) -> Callable[[Border], None]:
    return lambda border: border.arguments["relative"].__setitem__(place, value)


WRONG_RELATIVE: dict[str, tuple[Callable[[Border], None], str]] = {
    "relative too short": (lambda x: x.arguments["relative"].pop(), "^relative: expected "),
    "first out of range": (_relative(0, 2**40), "^first: out of range"),
    "distances out of range": (_relative(1, -1), "^distances: out of range"),
    "distances other than in relative_k": (_relative(1, 5), r"^d?_?relative_k: expected size 5"),
    "first too late": (_relative(0, 2 - M), r"^relative_k: expected rows for the distances -4 to 6, got 12 from -3 on"),
    "first too early": (_relative(0, -6 - M), "^relative_k: expected rows for .*got 12 from -11 on"),
    "e 0": (_relative(2, 0), "^e: expected 1 to 4096, got 0"),
    "e 4097": (_relative(2, 4097), "^e: expected 1 to 4096, got 4097"),
    "relative_q missing": (_drop("relative_q"), "^relative_q, relative_k: expected both or neither"),
    "relative_k missing": (_drop("relative_k"), "^relative_q, relative_k: expected both or neither"),
    "d_relative_q missing": (_drop("d_relative_q"), "^d_relative_q, d_relative_k: expected with relative_q"),
    "d_relative_k missing": (_drop("d_relative_k"), "^d_relative_q, d_relative_k: expected with relative_q"),
    "d_relative_k shared": (lambda x: x.resize("d_relative_k", 0, 1 - B), "^d_relative_k: expected the sizes of"),
    "q_ranks alone": (_drop("k_ranks"), "^q_ranks, k_ranks: expected both or neither"),
    "row_first alone": (_drop("row_stop"), "^row_first, row_stop: expected both or neither"),
    "a weight": (
        lambda x: x.given.update(weight=Border("backward").given["weight"]), "^relative_k: excludes packed sequences",
    ),
}  # fmt: skip


def _starts(name: str, *starts: int) -> Callable[[Border], object]:
    return lambda border: border.tensors[name].copy_(torch.tensor(starts))


def _lend(name: str) -> Callable[[Border], None]:
    """A tensor of the batch form in a packed call, of the right size for it."""

    def change(border: Border) -> None:
        sizes = {"mask": (1, H, M, N), "bias": (1, H, M, N), "key_lengths": (1,), "q_segments": (1, M)}
        lent = torch.zeros(sizes[name], dtype=Border("forward").tensors[name].dtype)
        border.tensors[name], border.given[name] = lent, list(cpu._described(lent))

    return change


WRONG_PACKED = {
    f"{name} {words}": (_starts(name, *starts), f"^{name}: {message}")
    for name, rows in (("cu_seqlens_q", M), ("cu_seqlens_k", N))
    for words, starts, message in (
        ("begins late", (1, 2, 3, rows), "expected to begin with 0, got 1"),
        ("begins below 0", (-1, 2, 3, rows), "expected to begin with 0, got -1"),
        ("decreases", (0, 3, 2, rows), "decreases after entry 1"),
        ("overruns", (0, 1, 2, rows + 1), f"ends at {rows + 1}, beyond the {rows} rows"),
        ("overruns and returns", (0, rows + 1, rows, rows), "decreases after entry 1"),
    )
} | {
    "cu_seqlens_q alone": (lambda x: x.drop("cu_seqlens_k"), "^cu_seqlens_q, cu_seqlens_k: expected both or neither"),
    "cu_seqlens_k alone": (lambda x: x.drop("cu_seqlens_q"), "^cu_seqlens_q, cu_seqlens_k: expected both or neither"),
    **{f"packed and {name}": (_lend(name), "^cu_seqlens_q: excludes")
       for name in ("mask", "bias", "key_lengths", "q_segments")},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        pytest.param(kind, *given, id=f"{kind} {name}")
        for kind, wrong in (("batch", WRONG), ("relative", WRONG_RELATIVE), ("packed", WRONG_PACKED))
        for name, given in wrong.items()
    ],
)
def test_border_wrong_argument_is_refused(kind, change, message):
    border = Border("backward", kind)
    change(border)
    border.assert_refused(message)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("key_lengths", torch.int64), ("key_lengths", torch.float64), ("k", torch.float64), ("mask", torch.uint8)],
)
def test_border_operator_called_past_the_checks_refuses_other_dtypes(name, dtype):
    q, k, v = torch.randn(B, H, M, D), torch.randn(B, HK, N, D), torch.randn(B, HK, N, DV)
    x = dict.fromkeys(Inputs._fields) | {"q": q, "k": k, "v": v}
    x |= {"key_lengths": torch.tensor([3, 0, 7], dtype=torch.int32), "mask": torch.ones(B, 1, M, N, dtype=torch.bool)}
    numbers = (0.3, N - M, None, None, None, 0.0, None, "cpu")
    torch.ops.pyattn.attention(*x.values(), *numbers)
    x[name] = x[name].to(dtype)
    with pytest.raises(DtypeError, match=f"^{name}: expected torch"):
        torch.ops.pyattn.attention(*x.values(), *numbers)
