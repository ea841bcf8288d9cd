"""BERT: a bidirectional Transformer encoder, pre-trained on masked tokens and fine-tuned with small heads.

Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding".

    x      = norm(tokens + positions + segments)                    section 3, figure 2
    x      = norm_1(x + attention(x));   x = norm_2(x + mlp(x))     each layer: post-norm, as in Vaswani et al. 2017
    pooled = tanh(pooler(x[:, 0]))                                  the [CLS] token stands for the whole text

    BertForPreTraining              masked tokens and next sentence            section 3.1
    BertForMaskedLM                 masked tokens alone
    BertForSequenceClassification   a text, or a pair of texts as segments     figure 4 (a), (b)
    BertForQuestionAnswering        start and end of the answer                figure 4 (c)
    BertForTokenClassification      a label for each token                     figure 4 (d)

Models return logits; losses are the training's. The files are those of transformers, whose classes have these names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyattn.check import RangeError, ShapeError, is_traced
from pyattn.models.pretrained import Fields, Pretrained, default_names
from pyattn.nn.attend import ATTENTIONS, check_attention
from pyattn.nn.embedding import embed
from pyattn.nn.linear import Linear, linear

_EPS = 1e-12  # of every LayerNorm
_SEGMENTS = 2
Head = TypeVar("Head", bound="_BertHead")
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class BertConfig:
    """Sizes of one BERT. The defaults are the paper's BERT-base (110 million parameters).

    Args:
        vocab: tokens.
        context: positions, the most tokens that a text may have.
        layers, heads, width: encoder layers, attention heads per layer, size of a token's vector.
        hidden: size of the feed-forward part between its two matrices.
        dropout: probability, of embeddings, attention weights, what each part of a layer adds, and before classifiers.
        attention: a name out of `pyattn.nn.attend.ATTENTIONS`.
        pad: the token that fills texts up, where there is one; its vector gets no gradient as an input.
        labels: outputs of a classification head.
        pooler: whether a `Bert` has one. The heads have it where they need it.
        label_names: what the labels are called in files; None is LABEL_0, LABEL_1 and so on.

    Raises:
        RangeError: a size below 1, heads that do not divide width, dropout outside [0, 1), pad outside the vocabulary,
            an unknown name, names that are not as many as the labels.
    """

    vocab: int = 30522
    context: int = 512
    layers: int = 12
    heads: int = 12
    width: int = 768
    hidden: int = 3072
    dropout: float = 0.1
    attention: str = "pyattn"
    pad: int | None = 0
    labels: int = 2
    pooler: bool = True
    label_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "layers", "heads", "width", "hidden", "labels"):
            if (size := getattr(self, name)) < 1:
                raise RangeError(f"{name}: expected at least 1, got {size}")
        if self.width % self.heads:
            raise RangeError(f"heads: expected a divisor of width={self.width}, got {self.heads}")
        if not 0 <= self.dropout < 1:
            raise RangeError(f"dropout: expected a probability in [0, 1), got {self.dropout}")
        if self.pad is not None and not 0 <= self.pad < self.vocab:
            raise RangeError(f"pad: expected a token in [0, vocab={self.vocab}), got {self.pad}")
        if self.label_names is not None and len(self.label_names) != self.labels:
            raise RangeError(f"label_names: expected labels={self.labels} names, got {list(self.label_names)}")
        check_attention(self.attention)


# The models of section 3. The vocabulary is the released English uncased one's.
PUBLISHED = {
    "bert-base": BertConfig(),
    "bert-large": BertConfig(layers=24, heads=16, width=1024, hidden=4096),
}


class Layer(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.attention = ATTENTIONS[config.attention]
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)
        self.norm_1 = nn.LayerNorm(config.width, _EPS)
        self.up = Linear(config.width, config.hidden)
        self.down = Linear(config.hidden, config.width)
        self.norm_2 = nn.LayerNorm(config.width, _EPS)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        x = self.norm_1(x + F.dropout(self.out(self._attend(x, lengths)), self.dropout, self.training))
        return self.norm_2(x + F.dropout(self.down(F.gelu(self.up(x))), self.dropout, self.training))

    def _attend(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        b, m, width = x.shape
        # Parts of the last dimension, whose gradients come back together in one pass.
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (part.view(b, m, self.heads, width // self.heads).transpose(1, 2) for part in parts)  # [b, h, m, d]
        out = self.attention.full(q, k, v, False, lengths, self.dropout if self.training else 0.0)
        return out.transpose(1, 2).reshape(b, m, width)

    def stored(self) -> dict[str, Tensor]:
        """The tensors by their names in files, behind the layer's own."""
        tensors = (
            _parameters("attention.output.dense", self.out)
            | _parameters("attention.output.LayerNorm", self.norm_1)
            | _parameters("intermediate.dense", self.up)
            | _parameters("output.dense", self.down)
            | _parameters("output.LayerNorm", self.norm_2)
        )
        for kind, parameter in self.qkv.named_parameters():
            for name, part in zip(("query", "key", "value"), parameter.chunk(3), strict=True):
                tensors[f"attention.self.{name}.{kind}"] = part
        return tensors


class _BertModel(Pretrained):
    """What config.json and the names of tensors have in common, with and without a head."""

    config: BertConfig
    # The heads that this model does not have, the decoder, which is the embedding, and positions that old files hold.
    ignored = re.compile(r"^(cls|classifier|qa_outputs|bert\.pooler)\.|^bert\.embeddings\.position_ids$")

    @classmethod
    def config_from(cls, fields: Fields) -> BertConfig:
        fields.expect(model_type="bert", hidden_act="gelu", layer_norm_eps=_EPS, type_vocab_size=_SEGMENTS)
        fields.expect(position_embedding_type="absolute", is_decoder=False, tie_word_embeddings=True)
        labels = fields.get("num_labels") or len(fields.get("id2label", range(2)))
        return BertConfig(
            vocab=fields.integer("vocab_size"),
            context=fields.integer("max_position_embeddings"),
            layers=fields.integer("num_hidden_layers"),
            heads=fields.integer("num_attention_heads"),
            width=fields.integer("hidden_size"),
            hidden=fields.integer("intermediate_size"),
            dropout=fields.get("hidden_dropout_prob", 0.1),
            pad=fields.get("pad_token_id"),
            labels=labels,
            label_names=fields.label_names(labels),
        )

    def config_fields(self) -> dict[str, Any]:
        c, name = self.config, type(self).__name__
        labels = c.label_names or default_names(c.labels)
        return {
            "model_type": "bert", "architectures": ["BertModel" if name == "Bert" else name], "vocab_size": c.vocab,
            "max_position_embeddings": c.context, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
            "hidden_size": c.width, "intermediate_size": c.hidden, "hidden_act": "gelu", "layer_norm_eps": _EPS,
            "type_vocab_size": _SEGMENTS, "hidden_dropout_prob": c.dropout, "attention_probs_dropout_prob": c.dropout,
            "pad_token_id": c.pad, "tie_word_embeddings": True,
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
        }  # fmt: skip

    @classmethod
    def current_name(cls, name: str) -> str:
        """The files on the hub call a LayerNorm's parameters as TensorFlow does; a body alone has no `bert.`."""
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


class Bert(_BertModel):
    """The encoder without a head. Attention runs on whatever `config.attention` and pyattn's registry choose.

    `Bert.from_pretrained` reads the folder of any head. Those of masked language models, question answering and token
    classification hold no pooler: read them with `pooler=False`.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.segments = nn.Embedding(_SEGMENTS, config.width)
        self.norm = nn.LayerNorm(config.width, _EPS)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.pooler = Linear(config.width, config.width) if config.pooler else None
        _initialize(self)

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Every token's vector, and the text's.

        Args:
            tokens: [b, m] integer, padded behind.
            segments: [b, m] integer, 0 for the first of two texts and 1 for the second; all 0 by default.
            lengths: [b] integer, tokens of each text, at least 1; all m by default. Padding changes nothing before
                it. transformers' attention_mask, with its ones in front, is lengths = attention_mask.sum(1).
        Returns:
            hidden [b, m, width], of which rows behind a text are without meaning, and pooled [b, width], or None where
            the model has no pooler.
        Raises:
            ShapeError: a tensor of another shape.
            RangeError: more tokens than the context has positions; on the CPU also ids outside their tables and
                lengths outside [1, m]. Reading a GPU's would stall it.
        """
        _check(tokens, segments, lengths, self.config.context)
        x = embed("tokens", tokens, self.tokens.weight, self.config.pad)
        # The tables of m positions are added first: they are smaller than [b, m, width].
        places = self.positions.weight[: tokens.shape[1]]
        if segments is None:
            x = x + (places + self.segments.weight[0])
        else:
            x = x + places + embed("segments", segments, self.segments.weight)
        x = F.dropout(self.norm(x), self.config.dropout, self.training)
        for layer in self.layers:
            x = layer(x, lengths)
        return x, None if self.pooler is None else torch.tanh(self.pooler(x[:, 0]))

    def stored(self) -> dict[str, Tensor]:
        tensors = (
            _parameters("bert.embeddings.word_embeddings", self.tokens)
            | _parameters("bert.embeddings.position_embeddings", self.positions)
            | _parameters("bert.embeddings.token_type_embeddings", self.segments)
            | _parameters("bert.embeddings.LayerNorm", self.norm)
        )
        for i, layer in enumerate(cast(Iterable[Layer], self.layers)):
            tensors |= {f"bert.encoder.layer.{i}.{name}": tensor for name, tensor in layer.stored().items()}
        return tensors if self.pooler is None else tensors | _parameters("bert.pooler.dense", self.pooler)


class MaskedTokens(nn.Module):
    """The head of masked tokens. Its last matrix is the embedding, transposed (section 3.1, task 1)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, _EPS)
        self.bias = nn.Parameter(torch.zeros(config.vocab))
        _initialize(self)

    def forward(self, hidden: Tensor, positions: Tensor | None, embedding: Tensor) -> Tensor:
        if positions is not None:
            if positions.ndim != 1:
                raise ShapeError(f"positions: expected [p], places in tokens.flatten(), got {list(positions.shape)}")
            hidden = embed("positions", positions, hidden.flatten(0, 1))
        return linear(self.norm(F.gelu(self.transform(hidden))), embedding, self.bias)

    def stored(self) -> dict[str, Tensor]:
        return (
            {"cls.predictions.bias": self.bias}
            | _parameters("cls.predictions.transform.dense", self.transform)
            | _parameters("cls.predictions.transform.LayerNorm", self.norm)
        )


class _BertHead(_BertModel):
    """A body, `bert`, and what stands on it."""

    bert: Bert

    @classmethod
    def with_new_head(cls: type[Head], folder: str | Path, *, new_pooler: bool = False, **changes: Any) -> Head:
        """Reads the body out of any BERT's folder, for fine-tuning; what stands on it starts anew. In eval mode.

        Args:
            folder, changes: as for `from_pretrained`. The names of labels are the old head's, and not read.
            new_pooler: start the pooler anew, too. Masked language models' folders hold none.
        Raises:
            PretrainedError: as `from_pretrained`; tensors of heads may be missing, the body's may not.
        """
        folder = Path(folder)
        model = cls(replace(cls.read_config(folder), **({"label_names": None} | changes)))
        body = Bert.from_pretrained(folder, pooler=model.bert.config.pooler and not new_pooler)
        model.bert.load_state_dict(body.state_dict(), strict=not new_pooler)
        return model.eval()


class BertForPreTraining(_BertHead):
    """Masked tokens and next sentence: the released models."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = Bert(replace(config, pooler=True))
        self.config = self.bert.config
        self.predictions = MaskedTokens(config)
        self.next_sentence = _initialize(nn.Linear(config.width, 2))

    def forward(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits of the masked tokens, and of whether the second text follows the first.

        Args:
            tokens, segments, lengths: as for `Bert`.
            positions: [p] integer, places in tokens.flatten() whose logits are wanted, all b * m by default. Training
                reads the masked tokens' alone, and the others' would be most of this head's work.
        Returns:
            [p, vocab], or [b, m, vocab] without positions, and [b, 2]: logit 0 says that it follows, logit 1 that not.
        Raises:
            ShapeError, RangeError: as `Bert`, and of positions.
        """
        hidden, pooled = self.bert(tokens, segments, lengths)
        return self.predictions(hidden, positions, self.bert.tokens.weight), self.next_sentence(pooled)

    def stored(self) -> dict[str, Tensor]:
        return self.bert.stored() | self.predictions.stored() | _parameters("cls.seq_relationship", self.next_sentence)


class BertForMaskedLM(_BertHead):
    """Masked tokens alone, without a pooler."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = Bert(replace(config, pooler=False))
        self.config = self.bert.config
        self.predictions = MaskedTokens(config)

    def forward(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The first of what `BertForPreTraining` returns, for the same arguments."""
        hidden, _ = self.bert(tokens, segments, lengths)
        return self.predictions(hidden, positions, self.bert.tokens.weight)

    def stored(self) -> dict[str, Tensor]:
        return self.bert.stored() | self.predictions.stored()


class BertForSequenceClassification(_BertHead):
    """A label for a text, or for a pair of texts as segments 0 and 1.

    model = BertForSequenceClassification.with_new_head("bert-base-uncased/", labels=3)    to fine-tune
    model = BertForSequenceClassification.from_pretrained("fine-tuned/")                   what that has saved
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = Bert(replace(config, pooler=True))
        self.config = self.bert.config
        self.classifier = _initialize(nn.Linear(config.width, config.labels))

    def forward(self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Logits [b, labels]. Arguments and errors are `Bert`'s."""
        _, pooled = self.bert(tokens, segments, lengths)
        return self.classifier(F.dropout(pooled, self.config.dropout, self.training))

    def stored(self) -> dict[str, Tensor]:
        return self.bert.stored() | _parameters("classifier", self.classifier)


class BertForQuestionAnswering(_BertHead):
    """Where in a passage, segment 1, the answer to a question, segment 0, starts and ends.

    model = BertForQuestionAnswering.with_new_head("bert-base-uncased/")    to fine-tune
    model = BertForQuestionAnswering.from_pretrained("fine-tuned/")         what that has saved
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = Bert(replace(config, pooler=False, labels=2, label_names=None))  # a start and an end
        self.config = self.bert.config
        self.qa_outputs = _initialize(nn.Linear(config.width, 2))

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits of the start and of the end, each [b, m]; those behind a text are without meaning.

        Arguments and errors are `Bert`'s.
        """
        hidden, _ = self.bert(tokens, segments, lengths)
        start, end = self.qa_outputs(hidden).unbind(-1)
        return start, end

    def stored(self) -> dict[str, Tensor]:
        return self.bert.stored() | _parameters("qa_outputs", self.qa_outputs)


class BertForTokenClassification(_BertHead):
    """A label for each token, such as the kind of name that it belongs to.

    model = BertForTokenClassification.with_new_head("bert-base-uncased/", labels=9)    to fine-tune
    model = BertForTokenClassification.from_pretrained("fine-tuned/")                   what that has saved
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = Bert(replace(config, pooler=False))
        self.config = self.bert.config
        self.classifier = _initialize(nn.Linear(config.width, config.labels))

    def forward(self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Logits [b, m, labels]; those behind a text are without meaning. Arguments and errors are `Bert`'s."""
        hidden, _ = self.bert(tokens, segments, lengths)
        return self.classifier(F.dropout(hidden, self.config.dropout, self.training))

    def stored(self) -> dict[str, Tensor]:
        return self.bert.stored() | _parameters("classifier", self.classifier)


def _initialize(module: Module) -> Module:
    """N(0, 0.02), and zero for biases. The authors' code cuts off at two deviations, which takes ten times as long."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return module


def _parameters(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module that files call `name`."""
    return {f"{name}.{kind}": parameter for kind, parameter in module.named_parameters()}


def _check(tokens: Tensor, segments: Tensor | None, lengths: Tensor | None, context: int) -> None:
    if tokens.ndim != 2 or not tokens.shape[1]:
        raise ShapeError(f"tokens: expected [b, m] with m >= 1, got {list(tokens.shape)}")
    b, m = tokens.shape
    if m > context:
        raise RangeError(f"tokens: expected at most context={context}, got {m}")
    if segments is not None and segments.shape != tokens.shape:
        raise ShapeError(f"segments: expected [b={b}, m={m}], as tokens, got {list(segments.shape)}")
    if lengths is None:
        return
    if lengths.shape != (b,):
        why = " (of an attention_mask with its ones in front they are attention_mask.sum(1))" * (lengths.ndim == 2)
        raise ShapeError(f"lengths: expected [b={b}], got {list(lengths.shape)}{why}")
    if b and lengths.device.type == "cpu" and not is_traced(lengths):
        low, high = lengths.aminmax()
        if low < 1 or high > m:
            raise RangeError(f"lengths: expected values in [1, m={m}], got {int(low)} to {int(high)}")
