"""Modules built on `pyattn.attention`."""

from pyattn.face import showing
from pyattn.nn.multihead_attention import MultiheadAttention

__all__ = ["MultiheadAttention"]

__dir__ = showing(__all__)
