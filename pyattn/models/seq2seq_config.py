"""What form a recurrent sequence to sequence model has: `Seq2SeqConfig`, and the papers' configurations."""

from __future__ import annotations

from dataclasses import dataclass

from pyattn.check import RangeError
from pyattn.nn.attend import check_attention
from pyattn.nn.hard import check_temperature
from pyattn.nn.recurrent import check_cell

SCORES = ("dot", "scaled", "general", "low-rank", "additive", "cosine", "location")
ORDERS = ("luong", "bahdanau")
WINDOWS = ("monotonic", "predictive", "renormalized")
USES = ("input", "layer", "readout")
READOUTS = ("linear", "tanh", "maxout")
BRIDGES = ("copy", "linear", "backward")


@dataclass(frozen=True, slots=True)
class Seq2SeqConfig:
    """Sizes and form of one model. The defaults are Luong's global attention with input feeding.

    Args:
        vocab: tokens, of sources and targets together.
        context: the most tokens of a source and of a target.
        layers: of the encoder and of the decoder.
        width, hidden: size of a token's vector, and of the decoder's states.
        encoder_hidden: size of a direction of the encoder; hidden shared among the directions by default.
        cell, norm: of the recurrent layers, see `pyattn.nn.recurrent.Recurrent`.
        dropout: probability, of embeddings, between layers, and of what is read out.
        bidirectional: whether the encoder also reads from the end.
        reverse: whether an encoder of one direction reads from the end, so that the first words of source and target
            are close to each other (Sutskever et al. 2014, section 3.3).
        bridge: the decoder's first state. "copy": layer by layer the encoder's last states, directions side by side.
            "linear": tanh(W [forward; backward] + b) of the top layer, for all layers. "backward": the same of the top
            layer's backward direction alone (Bahdanau's, appendix A.2.2).
        score: how well a state fits one of the source: a name out of SCORES; None for no attention.
        score_size: hidden layer of the additive score, rank of the low-rank one; hidden by default.
        value_size: of learned values W_v h; None sums up the states h themselves.
        order: which state asks, a name out of ORDERS.
        uses: where the context goes, out of USES; by default where the paper of the order has it: ("readout",) for
            Luong's, ("input", "readout") for Bahdanau's. "input" needs Bahdanau's order, "layer" two layers.
        readout: o_i. "linear": [s_i; c_i] as it is. "tanh": Luong's attentional vector. "maxout": Bahdanau's, the
            larger of every two columns; of the state that asked.
        readout_size: of tanh's and maxout's o_i; hidden by default.
        feed: whether the input of a step has o_{i-1}.
        window: None for attention to all of a source, or to the states around a place in it: that of the step itself
            ("monotonic", Luong's local-m), or one that the state says ("predictive", his local-p, or "renormalized",
            whose Gaussian is inside the softmax). See `pyattn.nn.local`.
        window_size: D, the states of a window on either side of its middle; the paper's 10 by default.
        hard: whether a step reads one state of the source (`pyattn.nn.hard`): a drawn one in training, where half of
            the sources are attended to softly, and else the most probable one. Scores of all steps are in memory.
        temperature: of the straight-through Gumbel-softmax, by which hard attention then learns, all of it hard;
            otherwise it is `pyattn.nn.reinforcement` that it learns by, and the loss is the caller's.
        self_attention: whether a state that asks also attends to those that asked before it (scaled products), with
            what comes of it at the context's side. Where steps follow one another (feed, bahdanau) training keeps what
            each of them has attended to: memory grows with the square of the target's length.
        tied: whether one matrix embeds sources and targets, and gives the logits.
        attention: "pyattn", or "torch": scores, softmax and sum one after the other. On a GPU pyattn takes products of
            states of at most 256, and additive scores of any size.
        pad, start, end: the tokens that fill batches, that every target begins with, and that ends one.

    Raises:
        RangeError: a size below 1, dropout outside [0, 1), an unknown name, a token outside the vocabulary, options
            or sizes that do not go together.
    """

    vocab: int = 8000
    context: int = 256
    layers: int = 2
    width: int = 512
    hidden: int = 512
    encoder_hidden: int | None = None
    cell: str = "lstm"
    norm: bool = False
    dropout: float = 0.0
    bidirectional: bool = True
    reverse: bool = False
    bridge: str = "copy"
    score: str | None = "general"
    score_size: int | None = None
    value_size: int | None = None
    order: str = "luong"
    uses: tuple[str, ...] | None = None
    window: str | None = None
    window_size: int | None = None
    hard: bool = False
    temperature: float | None = None
    readout: str = "tanh"
    readout_size: int | None = None
    feed: bool = True
    self_attention: bool = False
    tied: bool = False
    attention: str = "pyattn"
    pad: int = 0
    start: int = 1
    end: int = 2

    def __post_init__(self) -> None:
        if self.uses is not None:
            object.__setattr__(self, "uses", tuple(self.uses))  # a list would make two equal configurations differ
        own = ("encoder_hidden", "score_size", "value_size", "readout_size", "window_size")
        for name in ("vocab", "context", "layers", "width", "hidden", *own):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise RangeError(f"{name}: expected at least 1, got {size}")
        if not 0 <= self.dropout < 1:
            raise RangeError(f"dropout: expected a probability in [0, 1), got {self.dropout}")
        check_cell(self.cell)
        check_attention(self.attention)
        chosen = {"score": (None, *SCORES), "order": ORDERS, "readout": READOUTS, "bridge": BRIDGES}
        for name, known in (chosen | {"window": (None, *WINDOWS)}).items():
            if (value := getattr(self, name)) not in known:
                raise RangeError(f"{name}: expected one of {', '.join(map(str, known))}, got {value}")
        for name in ("pad", "start", "end"):
            if not 0 <= (token := getattr(self, name)) < self.vocab:
                raise RangeError(f"{name}: expected a token in [0, vocab={self.vocab}), got {token}")
        self._check_encoder()
        self._check_context()
        self._check_where()
        if self.readout == "linear" and self.readout_size is not None:
            raise RangeError(f"readout_size: expected None for readout=linear, got {self.readout_size}")
        if self.tied and self.read_size != self.width:
            raise RangeError(f"tied: expected a readout of width={self.width} columns, got {self.read_size}; "
                             "without a tied matrix it may have any")  # fmt: skip

    def _check_encoder(self) -> None:
        if self.reverse and self.bidirectional:
            raise RangeError("reverse: expected an encoder of one direction; a bidirectional one reads both ways")
        if self.bridge == "backward" and not self.bidirectional:
            raise RangeError("bridge: expected a bidirectional encoder for backward, got one of one direction")
        if self.encoder_hidden is None and self.hidden % self.directions:
            raise RangeError(f"hidden: expected an even number, half of it for each direction of the encoder, got "
                             f"{self.hidden}; or give encoder_hidden")  # fmt: skip
        if self.bridge == "copy" and self.memory_size != self.hidden:
            raise RangeError(f"bridge: expected states of hidden={self.hidden} columns from the encoder for copy, got "
                             f"{self.memory_size}; linear takes any size")  # fmt: skip

    def _check_context(self) -> None:
        uses = self.context_uses
        if (unknown := [use for use in uses if use not in USES]) or len(set(uses)) < len(uses):
            raise RangeError(f"uses: expected names out of {', '.join(USES)}, each once, got {unknown or uses}")
        if bool(uses) != self.has_context:
            expected = "at least one use of the context" if self.has_context else "none without score or self_attention"
            raise RangeError(f"uses: expected {expected}, got {uses}")
        if "input" in uses and self.order == "luong":
            raise RangeError("uses: expected order=bahdanau for input, in which the context is there before the step")
        if "layer" in uses and self.layers < 2:
            raise RangeError(f"uses: expected at least 2 layers for layer, got {self.layers}")
        if self.score in ("dot", "scaled", "cosine") and self.memory_size != self.hidden:
            raise RangeError(f"score: expected states of one size for {self.score}, got hidden={self.hidden} and "
                             f"{self.memory_size} from the encoder; general takes any sizes")  # fmt: skip
        for name, scores in (("score_size", ("additive", "low-rank")), ("value_size", SCORES)):
            if (size := getattr(self, name)) is not None and self.score not in scores:
                raise RangeError(f"{name}: expected None for score={self.score}, got {size}")

    def _check_where(self) -> None:
        """What says where in the source a step looks."""
        for name in ("window", "hard"):
            if self.score is None and (value := getattr(self, name)):
                raise RangeError(f"{name}: expected a score beside it, got {value} without attention to the source")
        if self.hard and self.window is not None:
            raise RangeError(f"hard: expected no window beside it, got {self.window}: its draw is from all of a source")
        if self.window is None and self.window_size is not None:
            raise RangeError(f"window_size: expected None without a window, got {self.window_size}")
        check_temperature(self.hard, self.temperature)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def encoder_size(self) -> int:
        """Of one direction's states."""
        return self.encoder_hidden or self.hidden // self.directions

    @property
    def memory_size(self) -> int:
        """Of the encoder's states, all directions."""
        return self.directions * self.encoder_size

    @property
    def has_context(self) -> bool:
        return self.score is not None or self.self_attention

    @property
    def context_size(self) -> int:
        of_source = (self.value_size or self.memory_size) if self.score is not None else 0
        return of_source + (self.hidden if self.self_attention else 0)

    @property
    def context_uses(self) -> tuple[str, ...]:
        """`uses`, or those of the order."""
        if self.uses is not None:
            return tuple(self.uses)
        by_order = {"luong": ("readout",), "bahdanau": ("input", "readout")}
        return by_order[self.order] if self.has_context else ()

    @property
    def read_size(self) -> int:
        """Of o_i."""
        if self.readout == "linear":
            return self.hidden + ("readout" in self.context_uses) * self.context_size
        return self.readout_size or self.hidden


# The papers' models, with one vocabulary of the target's size. Sutskever et al., section 3.4; Bahdanau et al.,
# RNNsearch (appendices A.2.3 and B.1); Luong et al., global attention with the general score and all that Table 1 adds
# to it: a reversed source, dropout, feeding.
PUBLISHED = {
    "sutskever": Seq2SeqConfig(
        vocab=80000, layers=4, width=1000, hidden=1000, bidirectional=False, reverse=True, score=None,
        readout="linear", feed=False,
    ),
    "bahdanau": Seq2SeqConfig(
        vocab=30000, layers=1, width=620, hidden=1000, encoder_hidden=1000, cell="gru", bridge="backward",
        score="additive", score_size=1000, order="bahdanau", readout="maxout", readout_size=500, feed=False,
    ),
    "luong": Seq2SeqConfig(
        vocab=50000, layers=4, width=1000, hidden=1000, bidirectional=False, reverse=True, dropout=0.2,
    ),
}  # fmt: skip
