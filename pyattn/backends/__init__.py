"""The backends: one file each, spec to kernel arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pyattn.spec import FEATURES, AttentionSpec, Grads, Inputs, Results, dtype_name


class KernelError(Exception):
    """A kernel could not be compiled or launched for a call. Its backend refuses calls of that kind from then
    on, once every GPU has been tried."""


class Proof(NamedTuple):
    """In which ways a backend's contract suite has been run, and where; words for a table."""

    source: str  # interpreted, operation by operation
    compiled: str  # PTX, executed on a CPU instruction by instruction
    hardware: str  # the date of the last run, and the devices


class Backend(ABC):
    """One implementation of the contract in `pyattn.spec`.

    A backend declares what it accepts; anything it has not declared is refused by default.
    """

    name: ClassVar[str]
    devices: ClassVar[frozenset[str]]
    dtypes: ClassVar[frozenset[torch.dtype]]
    features: ClassVar[frozenset[str]]
    max_head_dim: ClassVar[int]  # of queries and keys, and of values where these have no limit of their own
    max_value_dim: ClassVar[int | None] = None
    proof: ClassVar[Proof]

    @property
    def head_sizes(self) -> str:
        """For the README's table."""
        return f"1 to {self.max_head_dim}"

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this machine cannot run the backend at all; None when it is ready."""

    def refusal(self, spec: AttentionSpec) -> str | None:
        """Why `spec` cannot run here, in words for the user; None when it can. Reads no tensor."""
        # Tensors elsewhere are no reason to look for a GPU: in a forked process that is an error.
        return _undeclared(self, spec) or self.unavailable()

    @abstractmethod
    def forward(self, spec: AttentionSpec, x: Inputs) -> Results:
        """
        Raises:
            KernelError: as does `backward`.
        """

    @abstractmethod
    def backward(
        self,
        spec: AttentionSpec,
        x: Inputs,
        y: Results,
        d_out: Tensor,
        d_lse: Tensor | None,
        bias_gradient: bool,
    ) -> Grads:
        """Gradients of sum(out * d_out) + sum(lse * d_lse). `d_out` may have any strides, zero ones included.

        y: what `forward` gave for x.
        bias_gradient: False for a bias that is a constant, such as an additive mask; its gradient is then None.
        """

    @abstractmethod
    def workspace_bytes(self, spec: AttentionSpec) -> tuple[int, int]:
        """Peak scratch memory of (forward, backward) beyond inputs, results and the gradients themselves."""


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor, d_lse: Tensor | None) -> Tensor:
    """Of kernels that leave delta. A sink is one more key, with a value of 0: its ds is p (0 - delta + d_lse),
    which sums over the head's rows.

    Args:
        sinks: [h]; lse, delta, d_lse: [b, h, m]
    """
    if d_lse is not None:
        delta = delta - d_lse
    p = (sinks[:, None] - lse).exp()
    return -torch.where(lse == -torch.inf, 0.0, p * delta).sum((0, 2))


def kind_of(spec: AttentionSpec) -> tuple[object, ...]:
    """What a kernel is compiled for. A kind whose kernel could not be compiled is refused from then on."""
    return spec.dtype, spec.d, spec.dv, spec.features


@lru_cache(maxsize=4096)  # a look-up takes 0.3 us, to go through the declaration 2 us
def _undeclared(backend: Backend, spec: AttentionSpec) -> str | None:
    """What of `spec` the backend has not declared; None when there is nothing."""
    if spec.device not in backend.devices:
        return f"runs on {_listed(backend.devices)}, got tensors on {spec.device}"
    if spec.dtype not in backend.dtypes:
        return f"accepts {_listed(map(dtype_name, backend.dtypes))}, got {dtype_name(spec.dtype)}"
    if missing := spec.features - backend.features:
        return f"does not do {_listed(FEATURES[name] for name in missing)}"
    if spec.d > backend.max_head_dim or spec.dv > (backend.max_value_dim or backend.max_head_dim):
        return f"head size is at most {backend.max_head_dim}, got d={spec.d}, dv={spec.dv}"
    if spec.relative is not None and (e := spec.relative[1]) > backend.max_head_dim:
        return f"size of a relative term is at most {backend.max_head_dim}, got e={e}"
    return None


def _listed(words: Iterable[str]) -> str:
    return ", ".join(sorted(words))
