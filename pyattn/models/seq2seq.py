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
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyattn.check import DtypeError, RangeError, ShapeError
from pyattn.models.pretrained import Fields, Pretrained
from pyattn.models.seq2seq_config import Seq2SeqConfig
from pyattn.nn.earlier import attend_earlier
from pyattn.nn.embedding import check_tokens, embed
from pyattn.nn.hard import half, hard_attention_of_scores
from pyattn.nn.linear import Linear
from pyattn.nn.local import DEFAULT_HALF_WIDTH, LocalMonotonic, LocalPredictive, LocalRenormalized, LocalScore
from pyattn.nn.memory import Memory
from pyattn.nn.recurrent import Recurrent
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
_PIECES = 2  # of a maxout


class Choices(NamedTuple):
    """What hard attention chose for targets, step by step: `log_prob` and `entropy` of `pyattn.nn.hard.Chosen`."""

    log_prob: Tensor  # [b, m]; 0 where nothing was drawn
    entropy: Tensor  # [b, m]


@dataclass(slots=True)
class Reading:
    """Targets as far as they are read, one row each."""

    read: list[list[int]]
    memory: Memory
    state: Tensor  # [parts, layers, rows, hidden]
    output: Tensor  # [rows, read_size]: o of the step before, zeros at first
    asked: Tensor  # [rows, i, hidden]: the states that asked; none without self-attention
    steps: int = 0  # of attention, so far
    choices: list[Choices] | None = None  # those of hard attention, where somebody wants them
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

    def forward(
        self, source: Tensor, target: Tensor, source_lengths: Tensor | None = None, *, return_choices: bool = False
    ) -> Tensor | tuple[Tensor, Choices]:
        """Logits of the token behind each token of the targets.

        Args:
            source: [b, n] integer, padded behind.
            target: [b, m] integer, beginning with the start token. Padding behind it changes nothing before it.
                Of [t * b, m], rows i * t to i * t + t - 1 are targets of source i, which is read once.
            source_lengths: [b] integer, tokens of each source, in any order; all n by default. Of a source without
                tokens contexts are 0, and the first state is what the bridge makes of zeros.
            return_choices: also return what hard attention chose.
        Returns:
            [b, m, vocab], with return_choices also Choices.
        Raises:
            RangeError: more tokens than the context; lengths outside [0, n]; on the CPU also tokens outside the
                vocabulary; choices of attention that is not hard.
            ShapeError: targets or lengths do not fit the sources in number.
        """
        if return_choices and not self.config.hard:
            raise RangeError("return_choices: expected hard attention, got a model whose attention chooses nothing")
        reading = self._read(source, target, source_lengths)
        nothing = reading.state.new_zeros(len(target), 0)
        reading.choices = [Choices(nothing, nothing)] if return_choices else None
        logits = self.output(self._outputs(target, reading))
        if reading.choices is None:
            return logits
        return logits, Choices(*(torch.cat(steps, 1) for steps in zip(*reading.choices, strict=True)))

    def alignment(self, source: Tensor, target: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Where each token of the targets was looked for in the sources.

        Args:
            source, target, source_lengths: as `forward` takes them. Row i of the result is that of the token behind
                target i.
        Returns:
            [b, m, n], the weights of attention; of hard attention 1 where it looked, and nothing for a source that is
            soft in training.
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
        is_soft = half(b, source.device) if c.hard and c.temperature is None and self.training else None
        prepared = () if self.score is None else (self.score.keys(states), self.score.values(states), is_soft)
        memory = Memory([prepared], b, lengths, source.device)
        state = self._bridged(last)
        if rows != b:
            targets = rows // max(b, 1)
            memory.reorder([i for i in range(b) for _ in range(targets)])
            state = state.repeat_interleave(targets, 2)
        output = x.new_zeros(rows, c.read_size)
        reading = Reading([[c.start] for _ in range(rows)], memory, state, output, x.new_zeros(rows, 0, c.hidden))
        return reading

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
        reading.steps += states.shape[1]
        return torch.cat(contexts, -1) if contexts else states[..., :0]

    def _attend(self, states: Tensor, reading: Reading) -> Tensor:
        memory, m = reading.memory, states.shape[1]
        score, (keys, values, is_soft) = cast(Score, self.score), memory.layers[0]
        query = memory.by_source(states)
        if self.config.hard:
            return self._choose(score.scores(query, keys), values, is_soft, reading, m)
        attend = score.attend if self.config.attention == "pyattn" else score.attend_unfused
        options: dict[str, Any] = {"return_weights": reading.weights is not None}
        if isinstance(score, LocalScore):
            steps = torch.arange(reading.steps, reading.steps + m, device=query.device)
            options["positions"] = steps.repeat(query.shape[1] // m)
        found = attend(query, keys, values, memory.lengths, **options)
        if reading.weights is None:
            return memory.by_row(cast(Tensor, found), m)
        reading.weights.append(memory.by_row(found[1], m))
        return memory.by_row(found[0], m)

    def _choose(self, scores: Tensor, values: Tensor, is_soft: Tensor | None, reading: Reading, m: int) -> Tensor:
        """The contexts of hard attention by scores [sources, 1, rows of one * m, n]; some sources may be soft."""
        memory, n = reading.memory, values.shape[1]
        chosen = hard_attention_of_scores(
            scores, values.unsqueeze(1), key_lengths=memory.lengths, greedy=not self.training,
            temperature=self.config.temperature, soft=is_soft,
        )  # fmt: skip
        if reading.choices is not None:
            by_step = (memory.by_row(t.transpose(1, 2), m).squeeze(2) for t in (chosen.log_prob, chosen.entropy))
            reading.choices.append(Choices(*by_step))
        if reading.weights is not None:
            one = torch.arange(n, device=values.device) == chosen.indices.squeeze(1)[..., None]
            reading.weights.append(memory.by_row(one.to(scores.dtype), m))
        return memory.by_row(chosen.out.squeeze(1), m)

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
        return fields.all_of(Seq2SeqConfig)

    def config_fields(self) -> dict[str, Any]:
        return {"model_type": OWN_TYPE, "architectures": ["Seq2Seq"], **asdict(self.config)}

    def stored(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())


def _score(config: Seq2SeqConfig) -> Score | None:
    """The score that the configuration names, with its learned value and its window."""
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
    score = score if c.value_size is None else LearnedValue(score, memory, c.value_size)
    half_width = c.window_size or DEFAULT_HALF_WIDTH
    windows: dict[str | None, Callable[[], Score]] = {
        None: lambda: score,
        "monotonic": lambda: LocalMonotonic(score, half_width),
        "predictive": lambda: LocalPredictive(score, c.hidden, half_width),
        "renormalized": lambda: LocalRenormalized(score, c.hidden, half_width),
    }
    return windows[c.window]()


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
