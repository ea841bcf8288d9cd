"""Modules built on `pyattn.attention`."""

from pyattn.face import showing
from pyattn.nn.additive_attention import AdditiveAttention
from pyattn.nn.multihead_attention import MultiheadAttention
from pyattn.nn.scores import (
    AdditiveScore,
    CosineScore,
    DotScore,
    GeneralScore,
    Keys,
    LearnedValue,
    LocationScore,
    ScaledDotScore,
    Score,
)

__all__ = [
    "AdditiveAttention",
    "AdditiveScore",
    "CosineScore",
    "DotScore",
    "GeneralScore",
    "Keys",
    "LearnedValue",
    "LocationScore",
    "MultiheadAttention",
    "ScaledDotScore",
    "Score",
]

__dir__ = showing(__all__)
