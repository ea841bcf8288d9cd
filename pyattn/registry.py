"""Which backends there are, and which one runs a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TypeVar

from pyattn.backends import Backend, KernelError
from pyattn.backends.cpu import CpuBackend
from pyattn.backends.cuda import CudaBackend
from pyattn.backends.hopper import HopperBackend
from pyattn.backends.reference import ReferenceBackend
from pyattn.backends.triton import TritonBackend
from pyattn.check import RangeError, UnsupportedError
from pyattn.spec import FEATURES, AttentionSpec, dtype_name

Result = TypeVar("Result")

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (HopperBackend(), TritonBackend(), CudaBackend(), CpuBackend(), ReferenceBackend())
}
# Those that are fused. The reference is not: it holds whole score matrices.
FUSED = ("hopper", "triton", "cuda", "cpu")
# The date and device of the run of the contract suite that allowed `auto` to take the Hopper kernels: none so far, so
# they must be asked for, as must the reference.
HOPPER_ALLOWED_BY: str | None = None
# `auto` tries these in order. No GPU has run the CUDA kernels yet either, but what comes after them is an error.
AUTOMATIC = FUSED if HOPPER_ALLOWED_BY else ("triton", "cuda", "cpu")

# How a backend may have been held against the definition, by the fields of `Proof`.
PROOFS = {
    "source": "source run on a CPU, interpreted or emulated",
    "compiled": "compiled PTX run on a CPU (`tests/ptx`)",
    "hardware": "run on hardware",
}

# A plain global, because torch.compile neither traces a ContextVar nor guards a threading.local.
_default = "auto"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the `with` block, calls that leave `backend="auto"` use the backend `name`, in every thread.

    A call's backward uses the backend of its forward, also after the block has ended.
    """
    global _default
    before, _default = _default, _known(name)
    try:
        yield
    finally:
        _default = before


def requested(name: str) -> str:
    """The backend a call asks for: its own argument, else that of `use_backend`, else "auto"."""
    return _default if name == "auto" else _known(name)


def choose(spec: AttentionSpec, name: str, failed: Mapping[Backend, str] = MappingProxyType({})) -> Backend:
    """The first backend that takes `spec`; with a name other than "auto", that one or none.

    failed: backends that could not run the call, with their reasons.

    Raises:
        UnsupportedError: one line per backend with its reason.
    """
    candidates = AUTOMATIC if name == "auto" else (name,)
    reasons = {}
    for candidate in candidates:
        backend = BACKENDS[candidate]
        reason = failed.get(backend) or backend.refusal(spec)
        if reason is None:
            return backend
        reasons[candidate] = reason
    lines = "\n".join(f"  {candidate}: {reason}" for candidate, reason in reasons.items())
    hint = '\nbackend="reference" runs everything, in float64 and in O(m * n) memory' if name != "reference" else ""
    raise UnsupportedError(f"no backend can run this attention:\n{lines}{hint}")


def run(spec: AttentionSpec, name: str, call: Callable[[Backend], Result]) -> Result:
    """`call` of the backend that `choose` finds; of the next one, where that cannot compile its kernel."""
    failed: dict[Backend, str] = {}
    while True:
        backend = choose(spec, name, failed)
        try:
            return call(backend)
        except KernelError as error:
            failed[backend] = str(error)


def list_backends() -> dict[str, str]:
    """Every backend's name with "ready", or the reason why this machine cannot run it."""
    return {name: backend.unavailable() or "ready" for name, backend in BACKENDS.items()}


def feature_table() -> str:
    """What each fused backend declares, as the README's Markdown table."""
    columns = [BACKENDS[name] for name in FUSED]
    rows = [("", *(f"`{backend.name}`" for backend in columns))]
    rows.append(("---", *("---" for _ in columns)))
    rows.append(("runs on", *(", ".join(sorted(backend.devices)) for backend in columns)))
    rows.append(("dtypes", *(", ".join(sorted(map(dtype_name, backend.dtypes))) for backend in columns)))
    rows.append(("head sizes", *(backend.head_sizes for backend in columns)))
    for feature, words in FEATURES.items():
        rows.append((words, *("yes" if feature in backend.features else "no" for backend in columns)))
    for way, words in PROOFS.items():
        rows.append((words, *(getattr(backend.proof, way) for backend in columns)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _known(name: str) -> str:
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        raise RangeError(f"backend: expected auto, {', '.join(BACKENDS)}, got {name!r}")
    return name
