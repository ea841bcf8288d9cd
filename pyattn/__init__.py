"""Fused attention for PyTorch: import it in place of PyTorch's own."""

from typing import TYPE_CHECKING

from pyattn import interrupt, testing  # noqa: F401 (interrupt comes before torch)
from pyattn.api import (
    additive_attention,
    attention,
    attention_kvcache,
    attention_varlen,
    explain,
    relative_attention,
)
from pyattn.check import DeviceError, DtypeError, PyattnError, RangeError, ShapeError, UnsupportedError
from pyattn.compat.patch import patch
from pyattn.compat.torch import scaled_dot_product_attention
from pyattn.face import importing, showing
from pyattn.nn.multihead_attention import MultiheadAttention
from pyattn.registry import list_backends, use_backend

__version__ = "0.1.0"

__all__ = [
    "DeviceError",
    "DtypeError",
    "MultiheadAttention",
    "PyattnError",
    "RangeError",
    "ShapeError",
    "UnsupportedError",
    "additive_attention",
    "attention",
    "attention_kvcache",
    "attention_varlen",
    "compat",
    "decoding",
    "explain",
    "list_backends",
    "models",
    "nn",
    "patch",
    "relative_attention",
    "scaled_dot_product_attention",
    "testing",
    "use_backend",
]

__dir__ = showing(__all__)
if TYPE_CHECKING:
    from pyattn import compat, decoding, models, nn
else:  # type checkers would believe that a module with a __getattr__ has every name
    __getattr__ = importing(__name__, ("decoding", "models"))
