"""Turning a model's next-token logits into text."""

from pyattn.decoding.beam import Hypothesis, beam_search, by_length, gnmt
from pyattn.decoding.protocol import Decoder, State, pad_batch
from pyattn.decoding.rules import Rules
from pyattn.decoding.sampling import GREEDY, Sampling, generate, stream
from pyattn.decoding.translation import Translation, translate
from pyattn.face import showing

__all__ = [
    "GREEDY",
    "Decoder",
    "Hypothesis",
    "Rules",
    "Sampling",
    "State",
    "Translation",
    "beam_search",
    "by_length",
    "generate",
    "gnmt",
    "pad_batch",
    "stream",
    "translate",
]

__dir__ = showing(__all__)
