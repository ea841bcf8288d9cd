"""Sequence to sequence by recurrent layers (Sutskever et al. 2014, arXiv:1409.3215), with every form of attention.

    h_1 .. h_n = encoder(E x_1 .. E x_n)
    s_0        = bridge(the encoder's last states)

    order="luong"     the state of a step asks               Luong et al. 2015, arXiv:1508.04025
        s_i = decoder([E y_{i-1}; o_{i-1}], s_{i-1})         o_{i-1} with feed=True, section 3.3
        c_i = attend(s_i, h)
        o_i = tanh(W [s_i; c_i])                             readout="tanh", equation 5
    order="bahdanau"  the state before it asks               Bahdanau et al. 2015, arXiv:1409.0473
        c_i = attend(s_{i-1}, h)
        s_i = decoder([E y_{i-1}; c_i], s_{i-1})
        o_i = maxout(W [s_{i-1}; c_i; E y_{i-1}])            readout="maxout", appendix A.2.2

    logits = output(o_i)

Without a score there is no attention: all of a source goes through s_0. A context c_i may enter the step (`uses`
"input"), the second layer of the stack ("layer"), or what is read out ("readout"). To give a step the context that the
step before asked for is the same as to let the state before it ask: that use is Bahdanau's order.

The cells are torch's, whose GRU has its reset gate behind the product. In Bahdanau's paper it is before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, cast, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyattn.check import DtypeError, RangeError, ShapeError
from pyattn.models.pretrained import Fields, Pretrained
from pyattn.nn.attend import check_attention
from pyattn.nn.earlier import attend_earlier
from pyattn.nn.embedding import check_tokens, embed
from pyattn.nn.linear import Linear
from pyattn.nn.memory import Memory
from pyattn.nn.recurrent import Recurrent, check_cell
from pyattn.nn.scores import (
    AdditiveScore,
    CosineScore,
    DotScore,
    GeneralScore,
    LearnedValue,
    LocationScore,
    ScaledDotScore,
    Score,
)
from pyattn.spec import dtype_name

OWN_TYPE = "pyattn-seq2seq"  # in config.json
SCORES = ("dot", "scaled", "general", "low-rank", "additive", "cosine", "location")
ORDERS = ("luong", "bahdanau")
USES = ("input", "layer", "readout")
READOUTS = ("linear", "tanh", "maxout")
BRIDGES = ("copy", "linear", "backward")
_PIECES = 2  # of a maxout


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
        own = ("encoder_hidden", "score_size", "value_size", "readout_size")
        for name in ("vocab", "context", "layers", "width", "hidden", *own):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise RangeError(f"{name}: expected at least 1, got {size}")
        if not 0 <= self.dropout < 1:
            raise RangeError(f"dropout: expected a probability in [0, 1), got {self.dropout}")
        check_cell(self.cell)
        check_attention(self.attention)
        for name, known in (("score", (None, *SCORES)), ("order", ORDERS), ("readout", READOUTS), ("bridge", BRIDGES)):
            if (value := getattr(self, name)) not in known:
                raise RangeError(f"{name}: expected one of {', '.join(map(str, known))}, got {value}")
        for name in ("pad", "start", "end"):
            if not 0 <= (token := getattr(self, name)) < self.vocab:
                raise RangeError(f"{name}: expected a token in [0, vocab={self.vocab}), got {token}")
        self._check_encoder()
        self._check_context()
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


@dataclass(slots=True)
class Reading:
    """Targets as far as they are read, one row each."""

    read: list[list[int]]
    memory: Memory
    state: Tensor  # [parts, layers, rows, hidden]
    output: Tensor  # [rows, read_size]: o of the step before, zeros at first
    asked: Tensor  # [rows, i, hidden]: the states that asked; none without self-attention
    weights: list[Tensor] | None = None  # those of each step, where somebody wants them

    def reorder(self, rows: Sequence[int]) -> None:
        self.memory.reorder(rows)
        index = torch.tensor(rows, dtype=torch.long, device=self.state.device)
        self.read = [self.read[row] for row in rows]
        self.state, self.output, self.asked = self.state[:, :, index], self.output[index], self.asked[index]


class Readout(nn.Module):
    """o_i of a state, a context, and the embedding of the token before."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.form = config.readout
        self.dropout = config.dropout
        self.has_context = "readout" in config.context_uses
        size = config.hidden + (config.context_size if self.has_context else 0)
        if self.form == "tanh":
            self.linear = Linear(size, config.read_size)
        elif self.form == "maxout":
            self.linear = Linear(size + config.width, _PIECES * config.read_size)

    def forward(self, state: Tensor, context: Tensor, embedded: Tensor) -> Tensor:
        parts = [state, context] if self.has_context else [state]
        if self.form == "maxout":
            out = self.linear(torch.cat([*parts, embedded], -1)).unflatten(-1, (-1, _PIECES)).amax(-1)
        else:
            out = torch.cat(parts, -1)
            out = torch.tanh(self.linear(out)) if self.form == "tanh" else out
        return F.dropout(out, self.dropout, self.training)


class Seq2Seq(Pretrained):
    """The model. Attention runs on pyattn's registry, or on torch step by step, as `config.attention` says.

    All steps of a target attend at once where a step needs nothing of the one before but its state: in Luong's order
    without feeding. Otherwise each step attends for itself, by kernels for few queries.
    """

    config: Seq2SeqConfig
    continues_prompt: ClassVar[bool] = False

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        c = self.config = config
        self.source_embedding = nn.Embedding(c.vocab, c.width)
        self.target_embedding = self.source_embedding if c.tied else nn.Embedding(c.vocab, c.width)
        self.encoder = Recurrent(
            c.cell, c.width, c.encoder_size, c.layers, dropout=c.dropout, bidirectional=c.bidirectional, norm=c.norm
        )
        bridged = c.encoder_size if c.bridge == "backward" else c.memory_size
        self.bridge = nn.Identity() if c.bridge == "copy" else Linear(bridged, c.hidden)
        self.score = _score(c)
        size = c.width + c.feed * c.read_size + ("input" in c.context_uses) * c.context_size
        split = "layer" in c.context_uses
        self.lower = Recurrent(c.cell, size, c.hidden, 1 if split else c.layers, dropout=c.dropout, norm=c.norm)
        self.upper = (
            Recurrent(c.cell, c.hidden + c.context_size, c.hidden, c.layers - 1, dropout=c.dropout, norm=c.norm)
            if split
            else None
        )
        self.readout = Readout(c)
        self.output = Linear(c.read_size, c.vocab)
        self._initialize()

    def forward(self, source: Tensor, target: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Logits of the token behind each token of the targets.

        Args:
            source: [b, n] integer, padded behind.
            target: [b, m] integer, beginning with the start token. Padding behind it changes nothing before it.
                Of [t * b, m], rows i * t to i * t + t - 1 are targets of source i, which is read once.
            source_lengths: [b] integer, tokens of each source, in any order; all n by default. Of a source without
                tokens contexts are 0, and the first state is what the bridge makes of zeros.
        Returns:
            [b, m, vocab]
        Raises:
            RangeError: more tokens than the context; lengths outside [0, n]; on the CPU also tokens outside the
                vocabulary.
            ShapeError: targets or lengths do not fit the sources in number.
        """
        return self.output(self._outputs(target, self._read(source, target, source_lengths)))

    def alignment(self, source: Tensor, target: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Where each token of the targets was looked for in the sources.

        Args:
            source, target, source_lengths: as `forward` takes them. Row i of the result is that of the token behind
                target i.
        Returns:
            [b, m, n], the weights of attention.
        Raises:
            RangeError: the model has no attention; and as `forward`.
            ShapeError: as `forward`.
        """
        if self.score is None:
            raise RangeError("score: expected attention, got a model without; it aligns nothing")
        reading = self._read(source, target, source_lengths)
        reading.weights = []
        self._outputs(target, reading)
        nothing = reading.state.new_zeros(len(target), 0, source.shape[1])
        return torch.cat([nothing, *reading.weights], 1)

    def prefill(
        self,
        prompt: Tensor,
        lengths: Tensor | None = None,
        *,
        count: int | Sequence[int],
        page: int | None = None,
    ) -> tuple[Tensor, Reading]:
        """Reads the sources and the start token (`pyattn.decoding.protocol`).

        Args:
            prompt: the sources, [b, n] integer, padded behind.
            lengths: [b] integer, tokens of each source; all n by default.
            count: how many tokens `step` may be given afterwards; one number, or one for each source.
            page: of no use here, where a state has one size.
        Returns:
            logits [b, vocab] of the first token of each target, and what `step` goes on with.
        Raises:
            RangeError: a source, or the start token and count, exceed the context.
        """
        check_tokens("prompt", prompt)
        c, b = self.config, len(prompt)
        if not isinstance(count, int) and len(count) != b:
            raise RangeError(f"count: expected one number, or {b}, got {len(count)}")
        most = count if isinstance(count, int) else max(count, default=0)
        if 1 + most > c.context:
            raise RangeError(f"count: expected at most {c.context - 1}, context={c.context} less the start, got {most}")
        reading = self._begin("prompt", prompt, lengths, rows=b)
        return self.step(prompt.new_full((b,), c.start), reading), reading

    def step(self, tokens: Tensor, state: Reading) -> Tensor:
        """Reads one more token of each row, tokens [b]. Returns the logits [b, vocab] of the one after it."""
        embedded = self._embedded("tokens", tokens, self.target_embedding)
        state.output = self.readout(*self._advance(embedded, state), embedded)
        return self.output(state.output)

    def _read(self, source: Tensor, target: Tensor, lengths: Tensor | None) -> Reading:
        """What targets begin with."""
        check_tokens("source", source)
        check_tokens("target", target)
        if len(target) % len(source) if len(source) else len(target):
            raise ShapeError(f"target: expected a multiple of the {len(source)} sources, got {len(target)}")
        self._check_length("target", target)
        return self._begin("source", source, lengths, rows=len(target))

    def _begin(self, name: str, source: Tensor, lengths: Tensor | None, rows: int) -> Reading:
        """Encodes the sources, called `name`, prepares their keys, and starts `rows` targets, as many for each."""
        self._check_length(name, source)
        _check_lengths(lengths, name, source)
        c, b = self.config, len(source)
        x = self._embedded(name, source, self.source_embedding)
        states, last = self.encoder(_reversed(x, lengths) if c.reverse else x, lengths=lengths)
        states = _reversed(states, lengths) if c.reverse else states
        prepared = () if self.score is None else (self.score.keys(states), self.score.values(states))
        memory = Memory([prepared], b, lengths, source.device)
        state = self._bridged(last)
        if rows != b:
            targets = rows // max(b, 1)
            memory.reorder([i for i in range(b) for _ in range(targets)])
            state = state.repeat_interleave(targets, 2)
        output = x.new_zeros(rows, c.read_size)
        return Reading([[c.start] for _ in range(rows)], memory, state, output, x.new_zeros(rows, 0, c.hidden))

    def _bridged(self, last: Tensor) -> Tensor:
        """The decoder's first state [parts, layers, b, hidden], of the encoder's last."""
        c = self.config
        by_layer = last.unflatten(1, (c.layers, c.directions)).transpose(2, 3).flatten(3)
        if c.bridge == "copy":
            return by_layer
        top = last[0, -1] if c.bridge == "backward" else by_layer[0, -1]
        return torch.tanh(self.bridge(top)).expand(len(last), c.layers, -1, -1)

    def _outputs(self, target: Tensor, reading: Reading) -> Tensor:
        """o [rows, m, read_size] of whole targets."""
        c = self.config
        embedded = self._embedded("target", target, self.target_embedding)
        if target.shape[1] == 0:
            return reading.output[:, None][:, :0]
        if c.order == "luong" and not c.feed:
            return self._at_once(embedded, reading)
        found: list[tuple[Tensor, Tensor]] = []
        outputs: list[Tensor] = []
        for x in embedded.unbind(1):
            found.append(self._advance(x, reading))
            if c.feed:
                reading.output = self.readout(*found[-1], x)
                outputs.append(reading.output)
        if c.feed:
            return torch.stack(outputs, 1)
        states, contexts = (torch.stack(part, 1) for part in zip(*found, strict=True))
        return self.readout(states, contexts, embedded)

    def _at_once(self, embedded: Tensor, reading: Reading) -> Tensor:
        """`_outputs` of all steps together."""
        count = self.lower.stack
        states, _ = self.lower(embedded, reading.state[:, :count])
        context = self._ask(states, reading)
        if self.upper is not None:
            x = torch.cat([F.dropout(states, self.config.dropout, self.training), context], -1)
            states, _ = self.upper(x, reading.state[:, count:])
        return self.readout(states, context, embedded)

    def _advance(self, embedded: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        """One step of each row, embedded [rows, width]: what the readout reads, a state and the context."""
        c, count = self.config, self.lower.stack
        asking, context = reading.state[0, -1], embedded[:, :0]
        if c.order == "bahdanau":
            context = self._ask(asking.unsqueeze(1), reading).squeeze(1)
        x = [embedded, *([reading.output] if c.feed else []), *([context] if "input" in c.context_uses else [])]
        state, after = self.lower.step(torch.cat(x, -1), reading.state[:, :count])
        if c.order == "luong":
            context = self._ask(state.unsqueeze(1), reading).squeeze(1)
        if self.upper is not None:
            state = F.dropout(state, c.dropout, self.training)
            state, above = self.upper.step(torch.cat([state, context], -1), reading.state[:, count:])
            after = torch.cat([after, above], 1)
        reading.state = after
        return asking if c.order == "bahdanau" and c.readout == "maxout" else state, context

    def _ask(self, states: Tensor, reading: Reading) -> Tensor:
        """The contexts [rows, m, context_size] of the states [rows, m, hidden] of m steps."""
        contexts = []
        if self.score is not None:
            contexts.append(self._attend(states, reading))
        if self.config.self_attention:
            contexts.append(attend_earlier(self.config.attention, states, reading.asked))
            reading.asked = torch.cat([reading.asked, states], 1)
        return torch.cat(contexts, -1) if contexts else states[..., :0]

    def _attend(self, states: Tensor, reading: Reading) -> Tensor:
        memory, m = reading.memory, states.shape[1]
        score, (keys, values) = cast(Score, self.score), memory.layers[0]
        attend = score.attend if self.config.attention == "pyattn" else score.attend_unfused
        wanted = reading.weights is not None
        found = attend(memory.by_source(states), keys, values, memory.lengths, return_weights=wanted)
        if reading.weights is None:
            return memory.by_row(cast(Tensor, found), m)
        reading.weights.append(memory.by_row(found[1], m))
        return memory.by_row(found[0], m)

    def _embedded(self, name: str, tokens: Tensor, table: nn.Embedding) -> Tensor:
        return F.dropout(embed(name, tokens, table.weight), self.config.dropout, self.training)

    def _check_length(self, name: str, tokens: Tensor) -> None:
        if tokens.shape[1] > self.config.context:
            raise RangeError(f"{name}: expected at most context={self.config.context}, got {tokens.shape[1]}")

    @torch.no_grad()
    def _initialize(self) -> None:
        """Embeddings N(0, 1 / width), so that logits of a tied matrix begin at size 1; the rest as its modules do."""
        for table in (self.source_embedding, self.target_embedding):
            nn.init.normal_(table.weight, std=self.config.width**-0.5)
        if self.config.tied:
            self.output.weight = self.source_embedding.weight
        self.output.bias.zero_()

    @classmethod
    def config_from(cls, fields: Fields) -> Seq2SeqConfig:
        fields.expect(model_type=OWN_TYPE)
        types = get_type_hints(Seq2SeqConfig)
        return Seq2SeqConfig(**{name: fields.typed(name, types[name]) for name in Seq2SeqConfig.__dataclass_fields__})

    def config_fields(self) -> dict[str, Any]:
        return {"model_type": OWN_TYPE, "architectures": ["Seq2Seq"], **asdict(self.config)}

    def stored(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())


def _score(config: Seq2SeqConfig) -> Score | None:
    """The score that the configuration names, with its learned value."""
    c, memory = config, config.memory_size
    size = c.score_size or c.hidden
    scores: dict[str, Callable[[], Score]] = {
        "dot": DotScore,
        "scaled": ScaledDotScore,
        "general": lambda: GeneralScore(c.hidden, memory),
        "low-rank": lambda: GeneralScore(c.hidden, memory, size),
        "additive": lambda: AdditiveScore(c.hidden, memory, size),
        "cosine": lambda: CosineScore(learned=True),
        "location": lambda: LocationScore(c.hidden, c.context),
    }
    if c.score is None:
        return None
    score = scores[c.score]()
    return score if c.value_size is None else LearnedValue(score, memory, c.value_size)


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x [b, n, width] with the first lengths [b] elements of each row in the opposite order."""
    if lengths is None:
        return x.flip(1)
    places = torch.arange(x.shape[1], device=x.device)
    behind = lengths.to(x.device)[:, None] - 1 - places
    return x.gather(1, torch.where(behind < 0, places, behind)[..., None].expand_as(x))


def _check_lengths(lengths: Tensor | None, name: str, source: Tensor) -> None:
    if lengths is None:
        return
    b, n = source.shape
    if lengths.dtype not in (torch.int64, torch.int32):
        raise DtypeError(f"lengths: expected int64 or int32, got {dtype_name(lengths.dtype)}")
    if lengths.shape != (b,):
        raise ShapeError(f"lengths: expected [{b}], one for each {name}, got {list(lengths.shape)}")
    if b and not 0 <= int(lengths.min()) <= int(lengths.max()) <= n:
        raise RangeError(f"lengths: expected 0 to {n}, got {int(lengths.min())} to {int(lengths.max())}")
