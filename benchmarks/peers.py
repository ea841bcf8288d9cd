"""Who is measured. A peer says why it cannot run a case, or prepares a callable that does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyattn

from .cases import Case, Direction, Inputs
from .gate import SEED

Attention = Callable[..., Tensor]  # of q, k, v and, in a case that has one, the bias


class Peer(ABC):
    """One implementation of attention."""

    ours = False
    # What preparing one case is expected to take, where that is long enough to plan for; by device type.
    setup_seconds: ClassVar[dict[str, float]] = {}

    def __init__(self, name: str, *, threads: int | None = None, takes: Callable[[Case], bool] | None = None) -> None:
        """threads: of the CPU, instead of all that torch uses. takes: the cases that there is time for; None is all."""
        self.name = name
        self.threads = threads
        self._takes = takes

    def refusal(self, case: Case, direction: Direction, device: str) -> str | None:
        """Why the peer is not asked to run this, known without trying; None when it is."""
        return None if self._takes is None or self._takes(case) else "left out of this case to save time"

    def comparable(self, case: Case) -> bool:
        """Whether the definition determines its result: not that of a dropout mask of its own."""
        return self.ours or case.dropout_p == 0

    @abstractmethod
    def prepare(self, case: Case, x: Inputs) -> Attention:
        """A function of q, k, v and the bias, if any, with everything that is done once per shape already done."""


class Pyattn(Peer):
    """By default the backend is the one `auto` chooses, or that of `pyattn.use_backend` around the run."""

    ours = True

    def __init__(self, name: str = "pyattn", *, threads: int | None = None, backend: str = "auto") -> None:
        super().__init__(name, threads=threads)
        self.backend = backend

    def refusal(self, case: Case, direction: Direction, device: str) -> str | None:
        reason = pyattn.list_backends().get(self.backend, "ready")
        return super().refusal(case, direction, device) if reason == "ready" else reason

    def prepare(self, case: Case, x: Inputs) -> Attention:
        options: dict[str, Any] = {"causal": case.causal, "backend": self.backend}
        if case.left is not None:
            options["window"] = (case.left, 0)
        if case.dropout_p > 0:
            options |= {"dropout_p": case.dropout_p, "seed": SEED}
        if case.lengths is not None:
            starts = torch.tensor([0, *accumulate(case.lengths)], dtype=torch.int32, device=x.q.device)
            return lambda q, k, v: pyattn.attention_varlen(q, k, v, starts, starts, **options)
        if x.documents is not None:
            options["segment_ids"] = x.documents, x.documents
        if x.row_windows is not None:
            options["row_windows"] = x.row_windows
        return lambda q, k, v, bias=None: pyattn.attention(q, k, v, bias=bias, mask=x.mask, **options)


class Sdpa(Peer):
    """torch's scaled_dot_product_attention, held to one of its backends, which then runs or raises, or free.

    Windows and documents it can only take as a boolean matrix.
    """

    def __init__(
        self, name: str, backend: SDPBackend | None = None, *, takes: Callable[[Case], bool] | None = None
    ) -> None:
        super().__init__(name, takes=takes)
        self.backend = backend

    def refusal(self, case: Case, direction: Direction, device: str) -> str | None:
        return "has no packed sequences" if case.lengths is not None else super().refusal(case, direction, device)

    def prepare(self, case: Case, x: Inputs) -> Attention:
        seen = x.mask
        if case.left is not None or x.documents is not None or x.row_windows is not None:
            b, i, j = (torch.arange(size, device=x.q.device) for size in (case.b, case.m, case.n))
            b = b[:, None, None]
            seen = _mask_mod(case, x)(b, b, i[:, None], j).expand(case.b, -1, -1)[:, None]
        options: dict[str, Any] = {"is_causal": case.causal and seen is None}
        if case.dropout_p > 0:
            options["dropout_p"] = case.dropout_p
        if case.group != 1:
            options["enable_gqa"] = True

        def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen if bias is None else bias, **options)

        if self.backend is None:
            return attention
        backend = self.backend

        def held(*leaves: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return attention(*leaves)

        return held


class Flex(Peer):
    """torch's FlexAttention, compiled for the exact shape: compiled for any shape it runs at half the speed or less."""

    # Of each direction. On 2 CPU cores 25 s for the first shape, with nothing cached (AMD EPYC, torch 2.13, 2026-11).
    setup_seconds: ClassVar[dict[str, float]] = {"cpu": 25.0, "cuda": 8.0}

    def __init__(self, takes: Callable[[Case], bool] | None = None) -> None:
        super().__init__("FlexAttention", takes=takes)

    def refusal(self, case: Case, direction: Direction, device: str) -> str | None:
        if case.dropout_p > 0 or case.lengths is not None or case.bias not in (None, "1hmn", "bh1n"):
            return "is not written for dropout, packed sequences or such a bias"
        if device == "cpu" and direction != "forward":
            return "has no backward on the CPU"
        return super().refusal(case, direction, device)

    def prepare(self, case: Case, x: Inputs) -> Attention:
        import torch._functorch.config
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        # Without it the backward may not run twice over one graph, as repeated timing does.
        torch._functorch.config.donated_buffer = False
        torch._dynamo.reset()  # earlier shapes count against the recompilation limit
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        blocks = None
        by_batch = x.mask is not None or x.documents is not None or x.row_windows is not None
        if case.causal or by_batch:
            b = case.b if by_batch else None
            blocks = create_block_mask(_mask_mod(case, x), b, None, case.m, case.n, device=str(x.q.device))
        return lambda q, k, v, bias=None: compiled(q, k, v, score_mod=_score_mod(case, bias), block_mask=blocks)


class Copy(Peer):
    """No attention: a plain copy of as many bytes as k and v have, which says what the memory is able to do."""

    def __init__(self) -> None:
        super().__init__("copy")

    def comparable(self, case: Case) -> bool:
        return False

    def prepare(self, case: Case, x: Inputs) -> Attention:
        source = torch.cat((x.k, x.v), -1)
        target = torch.empty_like(source)
        return lambda q, k, v: target.copy_(source)


def bound(peer: Peer, case: Case, direction: Direction, x: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """What is checked, timed and weighed: a call that returns (out,), the gradients (d_q, d_k, d_v, ...), or all."""
    attention = peer.prepare(case, x)
    if direction == "forward":
        given = tuple(x.leaves.values())

        def forward() -> tuple[Tensor, ...]:
            return (attention(*given),)

        return _on_threads(forward, peer.threads)
    leaves = [t.detach().requires_grad_() for t in x.leaves.values()]
    if direction == "backward":
        out = attention(*leaves)
        return _on_threads(lambda: torch.autograd.grad(out, leaves, x.d_out, retain_graph=True), peer.threads)

    def both() -> tuple[Tensor, ...]:
        result = attention(*leaves)
        return result.detach(), *torch.autograd.grad(result, leaves, x.d_out)

    return _on_threads(both, peer.threads)


def _on_threads(call: Callable[[], tuple[Tensor, ...]], threads: int | None) -> Callable[[], tuple[Tensor, ...]]:
    if threads is None:
        return call

    def run() -> tuple[Tensor, ...]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return call()
        finally:
            torch.set_num_threads(before)

    return run


def _mask_mod(case: Case, x: Inputs) -> Callable[..., Tensor]:
    """Whether query i sees key j of batch element b, in any head h, as FlexAttention asks it."""
    from torch.nn.attention.flex_attention import and_masks

    conditions: list[Callable[..., Tensor]] = []
    if case.causal:
        conditions.append(lambda b, h, i, j: i >= j)
    if case.left is not None:
        left = case.left
        conditions.append(lambda b, h, i, j: i - j <= left)
    if x.mask is not None:
        mask = x.mask[:, 0]
        conditions.append(lambda b, h, i, j: mask[b, i, j])
    if x.documents is not None:
        documents = x.documents
        conditions.append(lambda b, h, i, j: documents[b, i] == documents[b, j])
    if x.row_windows is not None:
        first, stop = x.row_windows
        conditions.append(lambda b, h, i, j: (first[b, i] <= j) & (j < stop[b, i]))
    return and_masks(*conditions)


def _score_mod(case: Case, bias: Tensor | None) -> Callable[..., Tensor] | None:
    """Adds the bias, as FlexAttention does it."""
    if bias is None:
        return None
    if case.bias == "1hmn":
        table = bias[0]
        return lambda score, b, h, i, j: score + table[h, i, j]
    table = bias[:, :, 0]
    return lambda score, b, h, i, j: score + table[b, h, j]


# The first is ours, the second the one that ratios are taken against; the unfused one takes seconds from 2048 on.
CPU_PEERS: tuple[Peer, ...] = (
    Pyattn(),
    Sdpa("SDPA fused", SDPBackend.FLASH_ATTENTION),
    Sdpa("SDPA math", SDPBackend.MATH, takes=lambda case: case.m <= 1024),
    Flex(),
)
GPU_PEERS: tuple[Peer, ...] = (
    Pyattn(),
    Pyattn("pyattn cuda", backend="cuda"),
    Sdpa("SDPA flash", SDPBackend.FLASH_ATTENTION),
    Sdpa("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
    Sdpa("SDPA efficient", SDPBackend.EFFICIENT_ATTENTION),
    Flex(takes=lambda case: case.dtype is torch.bfloat16 and case.m == 4096 and case.causal),
)
