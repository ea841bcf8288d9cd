"""Fused attention for PyTorch: import it in place of PyTorch's own."""

from pyattn import testing
from pyattn.api import attention, attention_kvcache, attention_varlen, explain
from pyattn.check import DeviceError, DtypeError, PyattnError, RangeError, ShapeError, UnsupportedError
from pyattn.compat.patch import patch
from pyattn.compat.torch import scaled_dot_product_attention
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
    "attention",
    "attention_kvcache",
    "attention_varlen",
    "explain",
    "list_backends",
    "patch",
    "scaled_dot_product_attention",
    "testing",
    "use_backend",
]
