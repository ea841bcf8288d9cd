"""Who is measured. A peer says why it cannot run a case, or prepares a callable that does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyattn

from .cases import Case, Direction, Inputs

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Peer(ABC):
    """One implementation of attention."""

    ours = False
    # What preparing one case is expected to take, where that is long enough to plan for; by device type.
    setup_seconds: ClassVar[dict[str, float]] = {}

    def __init__(self, name: str) -> None:
        self.name = name

    def refusal(self, case: Case, direction: Direction, device: str) -> str | None:
        """Why the peer is not asked to run this, known without trying; None when it is."""
        return None

    @abstractmethod
    def prepare(self, case: Case, device: str) -> Attention:
        """A function of q, k, v, with everything that is done once per shape already done."""


class Pyattn(Peer):
    """The backend is the one `auto` chooses, or that of `pyattn.use_backend` around the run."""

    ours = True

    def __init__(self) -> None:
        super().__init__("pyattn")

    def prepare(self, case: Case, device: str) -> Attention:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = pyattn.attention(q, k, v, causal=case.causal)
            assert isinstance(out, Tensor)
            return out

        return attention


class Sdpa(Peer):
    """torch's scaled_dot_product_attention held to one of its backends, which then runs or raises."""

    def __init__(self, name: str, backend: SDPBackend) -> None:
        super().__init__(name)
        self.backend = backend

    def prepare(self, case: Case, device: str) -> Attention:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(self.backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)

        return attention


class Flex(Peer):
    """torch's FlexAttention, compiled for the exact shape: compiled for any shape it runs at half the speed or less."""

    # On 2 CPU cores 25 s for the first shape, with nothing cached (AMD EPYC, torch 2.13, 2026-11).
    setup_seconds: ClassVar[dict[str, float]] = {"cpu": 25.0, "cuda": 15.0}

    def __init__(self) -> None:
        super().__init__("FlexAttention")

    def refusal(self, case: Case, direction: Direction, device: str) -> str | None:
        if device == "cpu" and direction == "backward":
            return "has no backward on the CPU"
        return None

    def prepare(self, case: Case, device: str) -> Attention:
        import torch._functorch.config
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        # Without it the backward may not run twice over one graph, as repeated timing does.
        torch._functorch.config.donated_buffer = False
        torch._dynamo.reset()  # earlier shapes count against the recompilation limit
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        blocks = create_block_mask(_causal, None, None, case.m, case.n, device=device) if case.causal else None
        return lambda q, k, v: compiled(q, k, v, block_mask=blocks)


def bound(peer: Peer, case: Case, direction: Direction, x: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """What is checked, timed and weighed: a call that returns (out,), or the gradients (d_q, d_k, d_v)."""
    attention = peer.prepare(case, x.q.device.type)
    if direction == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attention(x.q, x.k, x.v),)

        return forward
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
    out = attention(*leaves)
    return lambda: torch.autograd.grad(out, leaves, x.d_out, retain_graph=True)


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


# The first is ours, the second the one that ratios are taken against.
CPU_PEERS: tuple[Peer, ...] = (
    Pyattn(),
    Sdpa("SDPA fused", SDPBackend.FLASH_ATTENTION),
    Sdpa("SDPA math", SDPBackend.MATH),
    Flex(),
)
GPU_PEERS: tuple[Peer, ...] = (
    Pyattn(),
    Sdpa("SDPA flash", SDPBackend.FLASH_ATTENTION),
    Sdpa("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
    Sdpa("SDPA efficient", SDPBackend.EFFICIENT_ATTENTION),
    Flex(),
)
