"""Recurrent language models, and recurrent networks that label texts.

    x      = embedding[tokens], beside the condition with condition_use="input"
    h      = the states of a stack of LSTM, GRU or plain layers that reads x
    logits = W h + b                                        RNNLM: each state tells the next token

    c_i    = sum over j < i of softmax_j(h_i . h_j / sqrt(hidden)) h_j      self_attention: states look at earlier ones
    logits = W tanh(V [h; c]) + b

    RNNLM                          Mikolov et al. 2010, "Recurrent neural network based language model"
    RNNForTokenClassification      a label at each step
    RNNForSequenceClassification   a label from the last states

Self-attention over the network's own outputs is the attention of Daniluk et al. 2017 (arXiv:1702.04521),
there additive and within a window. Cheng et al. 2016 (arXiv:1601.06733) also let it feed the next state.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyattn.check import DtypeError, RangeError, ShapeError
from pyattn.decoding.protocol import check_prompt
from pyattn.models.pretrained import Fields, Pretrained
from pyattn.nn.attend import ATTENTIONS, check_attention
from pyattn.nn.embedding import check_tokens, embed
from pyattn.nn.kv_cache import KVCache
from pyattn.nn.linear import Linear
from pyattn.nn.recurrent import PARTS, Recurrent, check_cell
from pyattn.spec import dtype_name

OWN_TYPE = "pyattn-rnn"  # in config.json
CONDITION_USES = ("state", "input")


@dataclass(frozen=True, slots=True)
class RNNConfig:
    """Sizes of one recurrent network. The defaults are the medium one of Zaremba et al. 2014 (arXiv:1409.2329).

    Args:
        vocab: tokens.
        width: size of a token's vector.
        hidden: size of a state, in each direction.
        layers: of the stack.
        cell: a name out of `pyattn.nn.recurrent.CELLS`.
        dropout: probability, of embeddings, between layers and of what the last matrix multiplies, but never from a
            state to the next (Zaremba et al., section 3.2). With self_attention that is tanh(V [h; c]).
        norm: layer normalization inside the cell (`pyattn.nn.recurrent.NormedLayer`).
        bidirectional: whether layers also read from the end; for the heads, as a language model may not see what comes.
        tied: whether the last matrix is the embedding, so that width is hidden (Press and Wolf 2017, arXiv:1608.05859).
        self_attention: whether states attend to earlier ones before they tell the next token. In training these are
            the segment's; in decoding all that were read, for which `count` says at once how much memory is taken.
        attention: what that runs on, a name out of `pyattn.nn.attend.ATTENTIONS`. On a GPU pyattn's takes states of at
            most 256, torch's of any size.
        condition: size of the vector that a text is conditioned on, where there is one.
        condition_use: "state", each layer starts from tanh of a linear map of it, of an LSTM h and c each by its own
            (as Xu et al. 2015, arXiv:1502.03044, section 3.1.2); "input", it stands beside each embedding (Mikolov and
            Zweig 2012, "Context dependent recurrent neural network language model").
        end: the token that ends a text, where there is one.
        labels: outputs of a classification head.
        label_names: what the labels are called in files, where they have names.

    Raises:
        RangeError: a size below 1, dropout outside [0, 1), an unknown name, a tied matrix of two sizes, end outside
            the vocabulary, names that are not as many as the labels.
    """

    vocab: int = 10000
    width: int = 650
    hidden: int = 650
    layers: int = 2
    cell: str = "lstm"
    dropout: float = 0.0
    norm: bool = False
    bidirectional: bool = False
    tied: bool = False
    self_attention: bool = False
    attention: str = "pyattn"
    condition: int | None = None
    condition_use: str = "state"
    end: int | None = None
    labels: int = 2
    label_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("vocab", "width", "hidden", "layers", "condition", "labels"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise RangeError(f"{name}: expected at least 1, got {size}")
        if not 0 <= self.dropout < 1:
            raise RangeError(f"dropout: expected a probability in [0, 1), got {self.dropout}")
        if self.tied and self.width != self.hidden:
            raise RangeError(f"tied: expected width and hidden of one size, got {self.width} and {self.hidden}")
        if self.condition_use not in CONDITION_USES:
            raise RangeError(f"condition_use: expected one of {', '.join(CONDITION_USES)}, got {self.condition_use}")
        if self.end is not None and not 0 <= self.end < self.vocab:
            raise RangeError(f"end: expected a token in [0, vocab={self.vocab}), got {self.end}")
        if self.label_names is not None and len(self.label_names) != self.labels:
            raise RangeError(f"label_names: expected labels={self.labels} names, got {list(self.label_names)}")
        check_cell(self.cell)
        check_attention(self.attention)

    @property
    def context(self) -> int:
        """The most tokens of a text, as `pyattn.decoding` asks for them: a recurrent network knows no limit."""
        return sys.maxsize


class _RNN(Pretrained):
    """The embedding, the stack and the file, which all these models have."""

    config: RNNConfig
    unused: ClassVar[tuple[str, ...]]  # what a configuration may not ask for, because this model has not got it

    def __init__(self, config: RNNConfig) -> None:
        super().__init__()
        self.config = self._usable(config)
        self.embedding = nn.Embedding(config.vocab, config.width)
        beside = config.condition if config.condition_use == "input" else None
        self.recurrent = Recurrent(
            config.cell, config.width + (beside or 0), config.hidden, config.layers, dropout=config.dropout,
            bidirectional=config.bidirectional, norm=config.norm,
        )  # fmt: skip

    def _embed(self, tokens: Tensor) -> Tensor:
        return self._dropped(embed("tokens", tokens, self.embedding.weight))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    @classmethod
    def _usable(cls, config: RNNConfig) -> RNNConfig:
        for name in cls.unused:
            if value := getattr(config, name):
                raise RangeError(f"{name}: expected none in {cls.__name__}, got {value}")
        return config

    @classmethod
    def config_from(cls, fields: Fields) -> RNNConfig:
        fields.expect(model_type=OWN_TYPE, architectures=[cls.__name__])
        switches = "layer_norm", "bidirectional", "tie_word_embeddings", "self_attention"
        fields.expect(**dict.fromkeys(switches, (False, True)))
        names = fields.typed("label_names", tuple[str, ...] | None)
        return cls._usable(
            RNNConfig(
                vocab=fields.integer("vocab_size"),
                width=fields.integer("embedding_size"),
                hidden=fields.integer("hidden_size"),
                layers=fields.integer("num_hidden_layers"),
                cell=fields["cell"],
                dropout=fields.get("dropout", 0.0),
                norm=fields["layer_norm"],
                bidirectional=fields["bidirectional"],
                tied=fields["tie_word_embeddings"],
                self_attention=fields["self_attention"],
                condition=None if fields.get("condition_size") is None else fields.integer("condition_size"),
                condition_use=fields["condition_use"],
                end=None if fields.get("eos_token_id") is None else fields.integer("eos_token_id"),
                labels=fields.integer("num_labels"),
                label_names=names,
            )
        )

    def config_fields(self) -> dict[str, Any]:
        c = self.config
        return {
            "model_type": OWN_TYPE, "architectures": [type(self).__name__], "vocab_size": c.vocab,
            "embedding_size": c.width, "hidden_size": c.hidden, "num_hidden_layers": c.layers, "cell": c.cell,
            "dropout": c.dropout, "layer_norm": c.norm, "bidirectional": c.bidirectional,
            "tie_word_embeddings": c.tied, "self_attention": c.self_attention, "condition_size": c.condition,
            "condition_use": c.condition_use, "eos_token_id": c.end, "num_labels": c.labels,
            "label_names": c.label_names,
        }  # fmt: skip

    def stored(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())


@dataclass(slots=True)
class Reading:
    """Texts that are being decoded: the prompts, the state behind all that has been read, and what else a step needs.

    state [parts, layers, rows, hidden]; the condition [rows, condition] that stands beside embeddings, and the states
    before the last one, where the model has use for them.
    """

    read: list[list[int]]
    state: Tensor
    condition: Tensor | None
    earlier: KVCache | None

    def reorder(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, dtype=torch.long, device=self.state.device)
        self.state = self.state[:, :, index]
        if self.condition is not None:
            self.condition = self.condition[index]
        if self.earlier is not None:
            self.earlier.reorder(rows)


class SelfAttention(nn.Module):
    """tanh(V [h; c]) of states h, where c is what each of them gets from those before it; of the first, 0.

    Queries from the second on and keys up to the last but one: causal attention of these ends at the state before.
    """

    def __init__(self, config: RNNConfig) -> None:
        super().__init__()
        self.attention = ATTENTIONS[config.attention]
        self.join = Linear(2 * config.hidden, config.hidden, bias=False)

    def forward(self, h: Tensor, cache: KVCache | None) -> Tensor:
        """h [b, m, hidden]. All states but the last are left in the cache, where there is one."""
        q, k = h[:, None, 1:], h[:, None, :-1]  # [b, 1, m - 1, hidden]
        if cache is None:
            found = self.attention.full(q, k, k, True, None, 0.0)
        else:
            cache.extend(q.shape[2], h.device)
            found = cache.attend(self.attention, 0, q, k, k)
        return self._joined(h, torch.cat([torch.zeros_like(h[:, :1]), found[:, 0]], 1))

    def step(self, h: Tensor, before: Tensor, cache: KVCache) -> Tensor:
        """The next states h [b, hidden]; those `before` them, which the cache has not got yet, join it."""
        cache.extend(1, h.device)
        q, k = (x[:, None, None] for x in (h, before.to(h.dtype)))
        return self._joined(h, cache.attend(self.attention, 0, q, k, k)[:, 0, 0])

    def _joined(self, h: Tensor, context: Tensor) -> Tensor:
        return torch.tanh(self.join(torch.cat([h, context], -1)))


class RNNLM(_RNN):
    """The language model.

    A new text starts from a token for that; a given beginning is read first, and then continued. Both are prompts of
    `pyattn.decoding.generate`, which for a model with a condition takes `model.conditioned(condition)`.

    Embeddings start N(0, 1) and matrices uniform in +-1 / sqrt(inputs), as torch's do; the bias of the logits 0; the
    stack as `Recurrent` says. N(0, 1) is for a tied matrix, too, because states start small, and logits with them: a
    model of bytes, width 96, was at 1.6 nats after 300 steps, from N(0, 1 / width) at 2.6.
    """

    continues_prompt: ClassVar[bool] = True
    unused = ("bidirectional",)

    def __init__(self, config: RNNConfig) -> None:
        super().__init__(config)
        self.self_attention = SelfAttention(config) if config.self_attention else None
        self.start: Linear | None = None  # the initial states from the condition
        if config.condition is not None and config.condition_use == "state":
            self.start = Linear(config.condition, PARTS[config.cell] * config.layers * config.hidden)
        self.readout = Linear(config.hidden, config.vocab)
        nn.init.zeros_(self.readout.bias)
        if config.tied:
            self.readout.weight = self.embedding.weight

    def initial(self, rows: int, condition: Tensor | None = None) -> Tensor:
        """The state [parts, layers, rows, hidden] before a text: zeros, or with condition_use="state" the condition's.

        It is in the model's dtype, under autocast, too: a state that many steps add to needs the precision.

        Raises:
            RangeError, ShapeError, DtypeError: the condition is needed and missing, or does not fit.
        """
        if self.start is None:
            return self.recurrent.initial(rows, self.embedding.weight)
        sizes = PARTS[self.config.cell], self.config.layers, self.config.hidden
        states = torch.tanh(self.start(self._checked_condition(condition, rows)))
        return states.to(self.embedding.weight.dtype).unflatten(1, sizes).permute(1, 2, 0, 3)

    def forward(
        self, tokens: Tensor, condition: Tensor | None = None, *, state: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Next-token logits.

        A long text can be read in segments, with the state behind one given to the next: `initial` before the first,
        and `detach` between them where gradients end there. Self-attention sees the states of its segment alone.

        Args:
            tokens: [b, m] integer. Padding behind a text changes nothing before it.
            condition: [b, condition] of a floating dtype, where the model has one. With condition_use="state" it is in
                the state, and not given beside one.
            state: [parts, layers, b, hidden] to go on from.
        Returns:
            logits [b, m, vocab]; where a state was given also the one behind the tokens.
        Raises:
            ShapeError: a tensor of another shape.
            RangeError: a condition that is missing, or that the model has no use for; on the CPU also tokens outside
                the vocabulary.
            DtypeError: tokens that are no integers, a condition that is no floating dtype.
        """
        check_tokens("tokens", tokens)
        beside, before = self._begin(len(tokens), condition, state)
        h, after = self.recurrent(self._inputs(tokens, beside), before)
        if self.self_attention is not None:
            h = self.self_attention(h, None)
        logits = self._logits(h)
        return logits if state is None else (logits, after)

    def prefill(
        self,
        prompt: Tensor,
        lengths: Tensor | None = None,
        *,
        count: int | Sequence[int],
        page: int | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, Reading]:
        """Reads the prompts (`pyattn.decoding.protocol`).

        Args:
            prompt: [b, m] integer, padded behind.
            lengths: [b] integer, tokens of each prompt, at least 1, in any order; all m by default.
            count: how many tokens `step` may be given afterwards, as for `GPT.prefill`; without self_attention any.
            page: states per page of what self_attention keeps.
            condition: as for `forward`.
        Returns:
            logits [b, vocab] of the token behind each prompt, and what `step` goes on with.
        Raises:
            RangeError, ShapeError, DtypeError: as `forward`; an empty prompt, lengths that do not fit it.
        """
        check_prompt(prompt, lengths)
        b, m = prompt.shape
        held = [m] * b if lengths is None else lengths.tolist()
        beside, before = self._begin(b, condition, None)
        h, after = self.recurrent(self._inputs(prompt, beside), before, lengths)
        earlier = None
        if self.self_attention is not None:
            counts = [count] * b if isinstance(count, int) else count
            earlier = KVCache(1, b, max([m, *map(sum, zip(held, counts, strict=True))]), page=page)
            h = self.self_attention(h, earlier)
            earlier.truncate([length - 1 for length in held])
        last = torch.tensor(held, device=h.device) - 1
        read = [row[:length] for row, length in zip(prompt.tolist(), held, strict=True)]
        return self._logits(h[torch.arange(b, device=h.device), last]), Reading(read, after, beside, earlier)

    def step(self, tokens: Tensor, state: Reading) -> Tensor:
        """Reads one more token of each row, tokens [b]. Returns the logits [b, vocab] of the one after it."""
        before = state.state[0, -1]
        h, state.state = self.recurrent.step(self._inputs(tokens, state.condition), state.state)
        if self.self_attention is not None and state.earlier is not None:
            h = self.self_attention.step(h, before, state.earlier)
        return self._logits(h)

    def conditioned(self, condition: Tensor) -> Conditioned:
        """This model for the functions of `pyattn.decoding`, with row i of condition [b, condition] for prompt i."""
        return Conditioned(self, condition)

    def _begin(self, rows: int, condition: Tensor | None, state: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """What stands beside each embedding, and the state to start from."""
        in_state = self.start is not None
        if condition is not None and (self.config.condition is None or (in_state and state is not None)):
            why = "the state has it already" if in_state else "the model's configuration has none"
            raise RangeError(f"condition: expected None, got {list(condition.shape)}: {why}")
        beside = None if in_state or self.config.condition is None else self._checked_condition(condition, rows)
        return beside, self.initial(rows, condition) if state is None else state

    def _checked_condition(self, condition: Tensor | None, rows: int) -> Tensor:
        shape = f"[b={rows}, condition={self.config.condition}]"
        if condition is None:
            raise RangeError(f"condition: expected {shape}, got None (decoding takes `model.conditioned(condition)`)")
        if condition.shape != (rows, self.config.condition):
            raise ShapeError(f"condition: expected {shape}, got {list(condition.shape)}")
        if not condition.is_floating_point():
            raise DtypeError(f"condition: expected a floating dtype, got {dtype_name(condition.dtype)}")
        return condition.to(self.embedding.weight.dtype)

    def _inputs(self, tokens: Tensor, beside: Tensor | None) -> Tensor:
        """What the stack reads for tokens [b, m] or [b]."""
        x = self._embed(tokens)
        if beside is None:
            return x
        beside = beside if tokens.ndim == 1 else beside[:, None].expand(-1, tokens.shape[1], -1)
        return torch.cat([x, beside], -1)

    def _logits(self, h: Tensor) -> Tensor:
        return self.readout(self._dropped(h))


class Conditioned:
    """A language model with the conditions of the prompts to come, of which `pyattn.decoding` knows nothing."""

    continues_prompt: ClassVar[bool] = True

    def __init__(self, model: RNNLM, condition: Tensor) -> None:
        self.model = model
        self.condition = condition
        self.config = model.config

    def prefill(
        self,
        prompt: Tensor,
        lengths: Tensor | None = None,
        *,
        count: int | Sequence[int],
        page: int | None = None,
    ) -> tuple[Tensor, Reading]:
        return self.model.prefill(prompt, lengths, count=count, page=page, condition=self.condition)

    def step(self, tokens: Tensor, state: Reading) -> Tensor:
        return self.model.step(tokens, state)


class _RNNHead(_RNN):
    """A stack that reads whole texts, perhaps in both directions, and a classifier, which starts as torch's Linear."""

    unused = ("tied", "self_attention", "condition")

    def __init__(self, config: RNNConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(self.recurrent.directions * config.hidden, config.labels)

    def _read(self, tokens: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        check_tokens("tokens", tokens)
        return self.recurrent(self._embed(tokens), None, lengths)


class RNNForTokenClassification(_RNNHead):
    """A label for each token, such as its part of speech. Both directions: Huang et al. 2015, arXiv:1508.01991."""

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits [b, m, labels]; those behind a text are without meaning.

        Args:
            tokens: [b, m] integer, padded behind.
            lengths: [b] integer, tokens of each text, in any order, from 0 on; all m by default. Padding changes
                nothing before it.
        Raises:
            ShapeError: a tensor of another shape.
            RangeError: lengths outside [0, m]; on the CPU also tokens outside the vocabulary.
            DtypeError: tokens or lengths that are no integers.
        """
        hidden, _ = self._read(tokens, lengths)
        return self.classifier(self._dropped(hidden))


class RNNForSequenceClassification(_RNNHead):
    """A label for a text, from the last layer's state behind it; of two directions, from both ends' side by side."""

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits [b, labels]; a text without tokens has those of states of zeros, the classifier's bias.

        Arguments and errors are those of `RNNForTokenClassification`.
        """
        _, state = self._read(tokens, lengths)
        last = state[0, -self.recurrent.directions :]  # [directions, b, hidden]
        return self.classifier(self._dropped(last.transpose(0, 1).flatten(1)))
