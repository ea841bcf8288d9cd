"""Modules built on `pyattn.attention`."""

from pyattn.face import showing
from pyattn.nn.additive_attention import AdditiveAttention
from pyattn.nn.hard import Chosen, hard_attention, hard_attention_of_scores, next_baseline, reinforcement
from pyattn.nn.local import LocalMonotonic, LocalPredictive, LocalRenormalized
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
    "Chosen",
    "CosineScore",
    "DotScore",
    "GeneralScore",
    "Keys",
    "LearnedValue",
    "LocalMonotonic",
    "LocalPredictive",
    "LocalRenormalized",
    "LocationScore",
    "MultiheadAttention",
    "ScaledDotScore",
    "Score",
    "hard_attention",
    "hard_attention_of_scores",
    "next_baseline",
    "reinforcement",
]

__dir__ = showing(__all__)
