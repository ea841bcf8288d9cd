"""Packed sequences in the definition, held against calls that pack nothing; the backends are in test_contract.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pyattn

LENGTHS = ((5, 7), (1, 9), (0, 3), (6, 4), (2, 0))  # (queries, keys) of each sequence
H, HK, D, DV = 4, 2, 8, 6
S = len(LENGTHS)
CU_Q, CU_K = (torch.tensor([0, *side]).cumsum(0) for side in zip(*LENGTHS, strict=True))


def packed_tensors() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((CU_Q[-1], H, D), (CU_K[-1], HK, D), (CU_K[-1], HK, DV))
    return tuple(
        torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes
    )  # fmt: skip


def varlen(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    return pyattn.attention_varlen(q, k, v, CU_Q, CU_K, return_lse=True, backend="reference", **options)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None = None, **options):
    """A call of `attention` for every sequence."""
    outs, lses = [], []
    for t in range(S):
        rows, keys = slice(CU_Q[t], CU_Q[t + 1]), slice(CU_K[t], CU_K[t + 1])
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[t]
        out, lse = pyattn.attention(
            *(x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])),
            alibi_slopes=slopes, return_lse=True, backend="reference", **options,
        )  # fmt: skip
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, -1)


def with_gradients(results: tuple[Tensor, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    out, lse = results
    loss = out.square().sum() + torch.where(lse.isfinite(), lse, 0.0).sin().sum()
    return out, lse, *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (2, 1)},
        {"window": (3, None), "causal": True, "scale": 0.4, "softcap": 2.0},
        {"causal": True, "alibi_slopes": torch.linspace(0.5, 0.1, H)},
        {"alibi_slopes": torch.linspace(0.5, 0.1, S * H).view(S, H)},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_varlen_gives_what_each_sequence_gives_alone(options: dict) -> None:
    tensors = packed_tensors()
    packed = with_gradients(varlen(*tensors, **options), tensors)
    alone = with_gradients(one_by_one(*tensors, **options), tensors)
    for got, want in zip(packed, alone, strict=True):
        torch.testing.assert_close(got, want)


def test_varlen_sinks_and_their_gradient_are_those_of_each_sequence_alone() -> None:
    tensors = (*packed_tensors(), torch.linspace(-1, 2, H, dtype=torch.float64, requires_grad=True))
    packed, alone = (
        with_gradients(call(*tensors[:3], sinks=tensors[3]), tensors) for call in (varlen, one_by_one)
    )  # fmt: skip
    for got, want in zip(packed, alone, strict=True):
        torch.testing.assert_close(got, want)


def test_varlen_drops_the_weights_that_the_padded_batch_drops() -> None:
    """With one-hot values out holds the weights themselves, and a dropped one is exactly 0."""
    n_most = max(n for _, n in LENGTHS)
    q, k = torch.zeros(int(CU_Q[-1]), H, D), torch.zeros(int(CU_K[-1]), HK, D)
    v = torch.cat([torch.eye(n_most)[:n] for _, n in LENGTHS])[:, None].expand(-1, HK, -1)
    out, _ = varlen(q, k, v, dropout_p=0.5, seed=11)

    m_most = max(m for m, _ in LENGTHS)
    eye = torch.eye(n_most).expand(S, HK, n_most, n_most)
    padded = pyattn.attention(
        torch.zeros(S, H, m_most, D), torch.zeros(S, HK, n_most, D), eye,
        key_lengths=torch.tensor([n for _, n in LENGTHS]), dropout_p=0.5, seed=11, backend="reference",
    )  # fmt: skip
    expected = torch.cat([padded[t, :, :m].transpose(0, 1) for t, (m, _) in enumerate(LENGTHS)])
    torch.testing.assert_close(out, expected)
    assert 0 < (out == 0).sum() < out.numel()


def test_varlen_output_is_contiguous_and_lse_is_per_head() -> None:
    out, lse = varlen(*packed_tensors())
    assert out.shape == (CU_Q[-1], H, DV)
    assert lse.shape == (H, CU_Q[-1])
    fused = pyattn.attention_varlen(*packed_tensors(), CU_Q, CU_K)
    assert isinstance(fused, Tensor)
    assert fused.is_contiguous()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_varlen_sequences_without_keys_stay_attached_to_autograd(backend: str) -> None:
    q, k, v = torch.randn(5, H, D), torch.randn(0, HK, D), torch.randn(0, HK, DV)
    tensors = tuple(t.requires_grad_() for t in (q, k, v))
    out, lse = pyattn.attention_varlen(
        *tensors, torch.tensor([0, 2, 5]), torch.tensor([0, 0, 0]), return_lse=True, backend=backend
    )
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    for tensor, grad in zip(tensors, torch.autograd.grad(out.sum(), tensors), strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_varlen_compiles_as_one_graph_for_every_length(backend: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        return pyattn.attention_varlen(q, k, v, cu_q, cu_k, causal=True, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for repeats in (1, 2, 3):
        tensors = tuple(t.detach().repeat(repeats, 1, 1).requires_grad_() for t in packed_tensors())
        starts = [
            torch.cat([*(cu[:-1] + i * cu[-1] for i in range(repeats)), cu[-1:] * repeats]) for cu in (CU_Q, CU_K)
        ]
        results = []
        for run in (function, compiled):
            out = run(*tensors, *starts)
            results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


def _changed(cu: Tensor, place: int, value: int) -> Tensor:
    cu = cu.clone()
    cu[place] = value
    return cu


Q, K, V = (t.detach() for t in packed_tensors())
WRONG: dict[str, tuple[dict, type[Exception], str]] = {
    "q is a batch": ({"q": Q[None]}, pyattn.ShapeError, r"q: expected 3 dimensions \[total_q, heads, head size\], got"),
    "v is a batch": ({"v": V[None]}, pyattn.ShapeError, r"v: expected 3 dimensions \[total_k"),
    "k has another head size": (
        {"k": K[..., 1:]},
        pyattn.ShapeError,
        r"k: expected \[total_k, hk, d=8\], got \[23, 2, 7\]: d is 8 in q",
    ),
    "v has another length": (
        {"v": V[1:]},
        pyattn.ShapeError,
        r"v: expected \[total_k=23, hk=2, dv\], got \[22, 2, 6\]: k is \[23, 2, 8\]",
    ),
    "cu_seqlens_q is None": ({"cu_seqlens_q": None}, pyattn.DtypeError, "cu_seqlens_q: expected a torch.Tensor, got N"),
    "cu_seqlens_k is None": ({"cu_seqlens_k": None}, pyattn.DtypeError, "cu_seqlens_k: expected a torch.Tensor, got N"),
    "cu_seqlens_q is float": ({"cu_seqlens_q": CU_Q.float()}, pyattn.DtypeError, "cu_seqlens_q: expected int8 or"),
    "cu_seqlens_k is 2-D": ({"cu_seqlens_k": CU_K[None]}, pyattn.ShapeError, r"cu_seqlens_k: expected \[s \+ 1\]"),
    "cu_seqlens_q is empty": ({"cu_seqlens_q": CU_Q[:0]}, pyattn.ShapeError, r"cu_seqlens_q: .*, got \[0\]"),
    "cu_seqlens differ in length": (
        {"cu_seqlens_k": CU_K[1:]},
        pyattn.ShapeError,
        r"cu_seqlens_k: expected \[s \+ 1=6\], got \[5\]: cu_seqlens_q has 6",
    ),
    "cu_seqlens_k is elsewhere": (
        {"cu_seqlens_k": CU_K.to("meta")},
        pyattn.DeviceError,
        "cu_seqlens_k: expected a tensor on cpu",
    ),
    "cu_seqlens_q starts late": (
        {"cu_seqlens_q": _changed(CU_Q, 0, 1)},
        pyattn.RangeError,
        "cu_seqlens_q: expected 0 at position 0, got 1",
    ),
    "cu_seqlens_q falls": (
        {"cu_seqlens_q": _changed(CU_Q, 2, 4)},
        pyattn.RangeError,
        "cu_seqlens_q: expected at least 5 at position 2, got 4",
    ),
    "cu_seqlens_k ends early": (
        {"cu_seqlens_k": _changed(CU_K, 5, 21)},
        pyattn.RangeError,
        "cu_seqlens_k: expected at least 23 at position 5, got 21",
    ),
    "cu_seqlens_k ends late": (
        {"cu_seqlens_k": _changed(CU_K, 5, 24)},
        pyattn.RangeError,
        "cu_seqlens_k: expected total_k=23 at its last position, 5, got 24: k has 23 rows",
    ),
    "cu_seqlens_q beyond 32 bits": (
        {"cu_seqlens_q": _changed(CU_Q, 5, 2**32)},
        pyattn.RangeError,
        "cu_seqlens_q: expected integers of 32 bits, got 4294967296",
    ),
    "alibi_slopes are per padded row": (
        {"alibi_slopes": torch.ones(3, H)},
        pyattn.ShapeError,
        r"alibi_slopes: expected \[h=4\] or \[s=5, h=4\], got \[3, 4\]",
    ),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)
def test_varlen_wrong_argument_raises_named_error(
    changes: dict, error: type[Exception], message: str, backend: str
) -> None:
    arguments = {"q": Q, "k": K, "v": V, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K} | changes
    with pytest.raises(error, match=message):
        pyattn.attention_varlen(**arguments, backend=backend)


def test_explain_counts_the_sequences() -> None:
    text = pyattn.explain(Q, K, V, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K)
    assert "sequences=5 b=1 h=4 hk=2 m=14 n=23 d=8 dv=6 float64 on cpu; features: dv, gqa, packed" in text
