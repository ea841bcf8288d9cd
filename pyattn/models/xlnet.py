"""XLNet: a Transformer that learns to predict its tokens in permuted orders, with a memory and relative positions.

Yang et al. 2019, arXiv:1906.08237, "XLNet: Generalized Autoregressive Pretraining for Language Understanding".

    h = norm(h + attention(h, [memory; h]));   h = ff(h)    content: sees itself and those before it in the order
    g = norm(g + attention(g, [memory; h]));   g = ff(g)    query: sees those before it alone, and predicts the token
    score(i, j) = scale * ((q_i + r_w) . k_j + (q_i + r_r) . r_{i - j} + (q_i + r_s) . e_{are segments equal})

Both streams have the same weights (section 2.3). h starts from the tokens, g from one learned vector. r projects the
sinusoids of the distances (Dai et al. 2019, arXiv:1901.02860), e has a row for "one segment" and one for "two" (2.5).
Who sees whom is one comparison of `ranks`, so no matrix [m, n] is made, of masks, distances or segments.

`XLNet` is both streams, `XLNetLMHead` predicts tokens at targets, or the next one; `pyattn.models.xlnet_heads` has the
others. Models return logits; losses are the training's. The files are those of transformers, where these two classes
are `XLNetModel` and `XLNetLMHeadModel`, and parameters are called as there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyattn.api import relative_attention
from pyattn.check import DtypeError, RangeError, ShapeError, is_traced
from pyattn.decoding.protocol import check_prompt
from pyattn.models.pretrained import Fields, Pretrained, default_names
from pyattn.nn.embedding import embed, sinusoids
from pyattn.nn.linear import Linear, linear
from pyattn.spec import dtype_name

_EPS = 1e-12  # of every LayerNorm
_SEGMENTS = 8  # ids of segments. Those of the released models are 0 to 4; eight columns keep rows of keys aligned.
_SEEN, _NEVER = -2, 2**31 - 1  # ranks of keys that every query sees, and that none sees
Head = TypeVar("Head", bound="_XLNetHead")
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class XLNetConfig:
    """Sizes of one XLNet. The defaults are the paper's XLNet-Large (360 million parameters).

    Args:
        vocab: tokens.
        layers, heads, width: of the model: layers, attention heads per layer, size of a token's vector, an even number.
        hidden: size of the feed-forward part between its two matrices.
        dropout: probability, of embeddings, distances, attention weights, what each part of a layer adds, the result,
            and before classifiers.
        attention: "pyattn", the one that has relative scores.
        causal: whether a token sees no later one, whatever the order ("attn_type" "uni" in files): Transformer-XL.
        clamp: the largest distance that is told from others, in both directions; None for no limit.
        two_ways: whether the second half of a batch is read from its end ("bi_data" in files), as when pre-training.
        memory: the most tokens that a memory holds; None for no limit.
        reuse: of a text, how many of its first tokens enter the memory; None for all.
        pad, end: tokens that fill texts up and that end them, where there are such.
        labels: outputs of a classification head.
        label_names: what the labels are called in files; None is LABEL_0, LABEL_1 and so on.
        starts, ends: of `XLNetForQuestionAnswering.search`: how many starts of an answer it tries, and ends of each.

    Raises:
        RangeError: a size below 1, heads that do not divide width, an odd width, dropout outside [0, 1), another
            attention, a token outside the vocabulary, names that are not as many as the labels.
    """

    vocab: int = 32000
    layers: int = 24
    heads: int = 16
    width: int = 1024
    hidden: int = 4096
    dropout: float = 0.1
    attention: str = "pyattn"
    causal: bool = False
    clamp: int | None = None
    two_ways: bool = False
    memory: int | None = None
    reuse: int | None = None
    pad: int | None = 5
    end: int | None = 2
    labels: int = 2
    label_names: tuple[str, ...] | None = None
    starts: int = 5
    ends: int = 5

    def __post_init__(self) -> None:
        sizes = ("vocab", "layers", "heads", "width", "hidden", "clamp", "memory", "reuse", "labels", "starts", "ends")
        for name in sizes:
            if (size := getattr(self, name)) is not None and size < 1:
                raise RangeError(f"{name}: expected at least 1, got {size}")
        if self.width % self.heads:
            raise RangeError(f"heads: expected a divisor of width={self.width}, got {self.heads}")
        if self.width % 2:
            raise RangeError(f"width: expected an even number, of sines and cosines, got {self.width}")
        if not 0 <= self.dropout < 1:
            raise RangeError(f"dropout: expected a probability in [0, 1), got {self.dropout}")
        if self.attention != "pyattn":
            raise RangeError(f"attention: expected pyattn, which has relative scores, got {self.attention}")
        for name in ("pad", "end"):
            if (token := getattr(self, name)) is not None and not 0 <= token < self.vocab:
                raise RangeError(f"{name}: expected a token in [0, vocab={self.vocab}), got {token}")
        if self.label_names is not None and len(self.label_names) != self.labels:
            raise RangeError(f"label_names: expected labels={self.labels} names, got {list(self.label_names)}")

    @property
    def context(self) -> int:
        """The most tokens of a text, as `pyattn.decoding` asks for them: distances have no limit."""
        return sys.maxsize


# The models of section 3 and appendix A.4.
PUBLISHED = {
    "xlnet-base-cased": XLNetConfig(layers=12, heads=12, width=768, hidden=3072),
    "xlnet-large-cased": XLNetConfig(),
}


class Stream(NamedTuple):
    """What the queries of one stream are and see, alike in every layer."""

    first: int  # the distance of the first row of r
    causal: bool
    ranks: tuple[Tensor, Tensor] | None = None  # of queries [b, m] and of keys [b, n]
    segments: Tensor | None = None  # [b, 1, m, _SEGMENTS], one 1 in each row
    targets: Tensor | None = None  # int64 [b, p], where in the text each query stands; None where p = m, in a row
    rows: Tensor | None = None  # int64 [b, m], of targets the inverse: which query stands there


class RelativeAttention(nn.Module):
    def __init__(self, config: XLNetConfig) -> None:
        super().__init__()
        self.heads, d = config.heads, config.width // config.heads
        self.dropout = config.dropout
        shape = (config.width, config.heads, d)
        self.q, self.k, self.v, self.o, self.r = (nn.Parameter(torch.empty(shape)) for _ in range(5))
        self.r_r_bias, self.r_s_bias, self.r_w_bias = (nn.Parameter(torch.empty(config.heads, d)) for _ in range(3))
        self.seg_embed = nn.Parameter(torch.empty(2, config.heads, d))
        self.layer_norm = nn.LayerNorm(config.width, _EPS)

    def keys(self, x: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
        """k [b, h, n, d], with segments [b, 1, n, _SEGMENTS] beside it, and v [b, h, n, d] of x [b, n, width]."""
        k, v = self._split(linear(x, self.k.flatten(1).T)), self._split(linear(x, self.v.flatten(1).T))
        return (k if segments is None else torch.cat([k, segments.expand(-1, self.heads, -1, -1)], -1)), v

    def distances(self, sinusoids: Tensor, b: int) -> Tensor:
        """r [1, h, distances, d] of sinusoids [1, distances, width]; [b, ...] of two, one for each half of a batch."""
        r = self._split(linear(sinusoids, self.r.flatten(1).T))
        return r if len(r) == 1 else r.repeat_interleave(b // 2, 0)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, r: Tensor, stream: Stream) -> Tensor:
        q = linear(x, self.q.flatten(1).T)
        # The kernel's query i stands at key i + n - m, but a target stands anywhere. So its attention is computed in a
        # row of the text's m, of which only p are read: m / p times the work, as in transformers. All else has p rows.
        q = self._split(q if stream.rows is None else _rows(q, stream.rows))
        out = self._attend(q, k, v, r, stream).transpose(1, 2).flatten(2)
        out = linear(out if stream.targets is None else _rows(out, stream.targets), self.o.flatten(1))
        return self.layer_norm(x + F.dropout(out, self.dropout, self.training))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, r: Tensor, stream: Stream) -> Tensor:
        """[b, h, m, d]"""
        query = q + self.r_w_bias[:, None]
        if stream.segments is not None:
            # Softmax does not see what all scores of a query have in common. So the term of two segments is taken off
            # them all, and what then is left where segments are equal is a product of columns beside those of q and k.
            same = (q + self.r_s_bias[:, None]) @ (self.seg_embed[0] - self.seg_embed[1])[..., None]  # [b, h, m, 1]
            query = torch.cat([query, same * stream.segments], -1)
        return relative_attention(
            query, k, v, q + self.r_r_bias[:, None], r, stream.first, ranks=stream.ranks, causal=stream.causal,
            scale=q.shape[-1] ** -0.5, dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip

    def _split(self, x: Tensor) -> Tensor:
        """[b, m, width] as [b, h, m, d]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, config: XLNetConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.layer_norm = nn.LayerNorm(config.width, _EPS)
        self.layer_1 = Linear(config.width, config.hidden)
        self.layer_2 = Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.dropout(F.gelu(self.layer_1(x)), self.dropout, self.training)
        return self.layer_norm(x + F.dropout(self.layer_2(inner), self.dropout, self.training))


class Layer(nn.Module):
    def __init__(self, config: XLNetConfig) -> None:
        super().__init__()
        self.rel_attn = RelativeAttention(config)
        self.ff = FeedForward(config)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, r: Tensor, stream: Stream) -> Tensor:
        return self.ff(self.rel_attn(x, k, v, r, stream))


class _XLNetModel(Pretrained):
    """What config.json and the names of tensors have in common, with and without a head."""

    config: XLNetConfig
    # The heads that this model does not have, and the matrix of the language model's, which is the embedding.
    ignored = re.compile(
        r"^(lm_loss|sequence_summary|logits_proj|classifier|qa_outputs|start_logits|end_logits|answer_class)\."
    )

    @classmethod
    def config_from(cls, fields: Fields) -> XLNetConfig:
        width, heads = fields.integer("d_model"), fields.integer("n_head")
        fields.expect(model_type="xlnet", ff_activation="gelu", layer_norm_eps=_EPS, tie_word_embeddings=True)
        fields.expect(attn_type=("bi", "uni"), same_length=False, untie_r=True, d_head=width // max(heads, 1))
        labels = fields.optional("num_labels", int) or len(fields.get("id2label", range(2)))
        clamp = fields.optional("clamp_len", int, -1)
        return XLNetConfig(
            vocab=fields.integer("vocab_size"), layers=fields.integer("n_layer"), heads=heads, width=width,
            hidden=fields.integer("d_inner"), dropout=fields.optional("dropout", float, 0.1),
            causal=fields.get("attn_type", "bi") == "uni", clamp=clamp if clamp > 0 else None,
            two_ways=fields.optional("bi_data", bool, False),
            memory=fields.optional("mem_len", int) or None,  # 0 is no limit, too
            reuse=fields.optional("reuse_len", int) or None,
            pad=fields.optional("pad_token_id", int), end=fields.end(),
            labels=labels, label_names=fields.label_names(labels),
            starts=fields.optional("start_n_top", int, 5), ends=fields.optional("end_n_top", int, 5),
        )  # fmt: skip

    def config_fields(self) -> dict[str, Any]:
        c, name = self.config, type(self).__name__
        name = {"XLNet": "XLNetModel", "XLNetLMHead": "XLNetLMHeadModel"}.get(name, name)
        labels = c.label_names or default_names(c.labels)
        return {
            "model_type": "xlnet", "architectures": [name], "vocab_size": c.vocab,
            "n_layer": c.layers, "n_head": c.heads, "d_model": c.width, "d_inner": c.hidden,
            "d_head": c.width // c.heads, "ff_activation": "gelu", "layer_norm_eps": _EPS, "dropout": c.dropout,
            "attn_type": "uni" if c.causal else "bi", "clamp_len": c.clamp or -1, "bi_data": c.two_ways,
            "same_length": False, "mem_len": c.memory, "reuse_len": c.reuse, "summary_type": "last",
            "summary_use_proj": True, "summary_activation": "tanh", "summary_last_dropout": c.dropout,
            "start_n_top": c.starts, "end_n_top": c.ends, "pad_token_id": c.pad, "eos_token_id": c.end,
            "tie_word_embeddings": True,
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
        }  # fmt: skip

    def stored(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())

    @classmethod
    def current_name(cls, name: str) -> str:
        """A body alone has no `transformer.`."""
        return f"transformer.{name}" if name.startswith(("word_embedding.", "mask_emb", "layer.")) else name


class XLNet(_XLNetModel):
    """Both streams without a head. Attention runs on whatever pyattn's registry chooses.

    `XLNet.from_pretrained` reads the folder of any head.
    """

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embedding = nn.Embedding(config.vocab, config.width)
        self.mask_emb = nn.Parameter(torch.empty(1, 1, config.width))
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.layers))
        _initialize(self)

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None, *,
        order: Tensor | None = None, masked: Tensor | None = None, targets: Tensor | None = None,
        memory: Sequence[Tensor] | None = None, remember: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:  # fmt: skip
        """Every token's vector, or every target's.

        Args:
            tokens: [b, m] integer, padded **in front**.
            segments: [b, m] integer in [0, 8), of which only matters which are equal; all the same by default.
            lengths: [b] integer, tokens of each text, at least 1; all m by default. transformers' attention_mask, with
                its ones behind, is lengths = attention_mask.sum(1).
            order: [b, m] integer, each token's place in the order of prediction, in [-1, m). A token is not seen from
                lower places, nor by a target of its own; one with -1 is seen by all, and sees those with -1. Tokens
                that share a place see one another, and targets there are predicted apart. By default all see all.
            masked: [b, m] bool, which tokens the order hides; by default those with a place. One that is not masked is
                seen by all, and sees what comes before its place (separators, when pre-training).
            targets: [b, p] integer, positions whose tokens are to be predicted: from those of lower places, not from
                the tokens there. Without an order they see their own tokens, and one that sees nothing has no
                attention. To fill up, repeat a position.
            memory: what was returned for the pieces of text before: `layers` tensors [b, any, width] in the model's
                dtype. All of it is seen, also what had been padding, and is of segment 0.
            remember: whether to return such a memory.
        Returns:
            hidden [b, m, width], or [b, p, width] of targets. Rows of padding are without meaning.
            memory, without gradients: the last `config.memory` rows of the memory before and of the first
                `config.reuse` of this text, in each layer; None unless wanted.
        Raises:
            ShapeError, DtypeError: a tensor of another shape or dtype; two_ways and an odd number of texts.
            RangeError: on the CPU, ids outside their tables, lengths, places or targets outside the text. Reading a
                GPU's would stall it.
        """
        _check_texts(tokens, lengths, self.config, segments=segments, order=order, masked=masked)
        _check_order(len(tokens), tokens.shape[1], order, masked, targets)
        (b, m), past = tokens.shape, _check_memory(memory, tokens, self.config, self.mask_emb.dtype)
        h, ids = self.embed(tokens), _one_hot(segments, past, self.mask_emb)
        content, query = self._streams(tokens, lengths, order, masked, targets, ids, past)
        g = None if targets is None else self._dropped(self.mask_emb.expand(b, targets.shape[1], -1))
        # Dropped for the batch, not for each text as in transformers, which would make b tables out of one.
        sinusoids = self._dropped(self.sinusoids(content.first, past + m, self.config.two_ways))
        kept = []
        for i, layer in enumerate(self.layers()):
            x = h if memory is None else torch.cat([memory[i], h], 1)
            if remember:
                kept.append(self._remembered(h, x[:, :past]))
            (k, v), r = layer.rel_attn.keys(x, ids), layer.rel_attn.distances(sinusoids, b)
            if g is not None:
                g = layer(g, k, v, r, query)
            if g is None or i + 1 < len(self.layer):  # where there are targets, nobody reads the last h
                h = layer(h, k, v, r, content)
        return self._dropped(h if g is None else g), tuple(kept) if remember else None

    def stored(self) -> dict[str, Tensor]:
        return {f"transformer.{name}": parameter for name, parameter in self.named_parameters()}

    def layers(self) -> Iterable[Layer]:
        return cast(Iterable[Layer], self.layer)

    def embed(self, tokens: Tensor) -> Tensor:
        return self._dropped(embed("tokens", tokens, self.word_embedding.weight))

    def sinusoids(self, first: int, end: int, two_ways: bool = False) -> Tensor:
        """Of the distances from first to end - 1, sines and then cosines: [1, distances, width].

        Two ways are [2, distances, width]: the second is for texts whose tokens come from the last to the first.
        """
        weight = self.mask_emb
        # transformers computes them in float32, also for models of fewer bits.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        places = torch.arange(first, end, dtype=dtype, device=weight.device)[None]
        if two_ways:
            places = torch.cat([places, -places])
        if self.config.clamp is not None:
            places = places.clamp(-self.config.clamp, self.config.clamp)
        return sinusoids(places, self.config.width).to(weight.dtype)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    def _remembered(self, h: Tensor, before: Tensor) -> Tensor:
        """What is left in memory of a layer's inputs h and those before."""
        new = torch.cat([before, h[:, : self.config.reuse]], 1)
        return new[:, -self.config.memory if self.config.memory else 0 :].detach()

    def _streams(
        self, tokens: Tensor, lengths: Tensor | None, order: Tensor | None, masked: Tensor | None,
        targets: Tensor | None, ids: Tensor | None, past: int,
    ) -> tuple[Stream, Stream]:  # fmt: skip
        """Content and query."""
        (b, m), causal = tokens.shape, self.config.causal
        content = query = Stream(0 if causal else 1 - m, causal, segments=None if ids is None else ids[:, :, past:])
        if order is not None or lengths is not None:
            place = tokens.new_full((b, m), -1) if order is None else order
            masked = place >= 0 if masked is None else masked
            keys = place.where(masked, _SEEN)
            if lengths is not None:
                keys = keys.masked_fill(_padding(lengths, tokens), _NEVER)
            keys = F.pad(keys, (past, 0), value=_SEEN)
            # In the content's stream a masked token sees its own place, and so itself.
            content, query = content._replace(ranks=(place + masked, keys)), query._replace(ranks=(place, keys))
        if targets is not None:
            targets, numbers = targets.long(), torch.arange(targets.shape[1], device=targets.device)
            # Rows where no target stands compute for nothing, with the first one's query.
            rows = targets.new_zeros(b, m).scatter(1, targets, numbers.expand(b, -1))
            query = query._replace(targets=targets, rows=rows)
        return content, query


class _XLNetHead(_XLNetModel):
    """A body, `transformer`, and what stands on it."""

    transformer: XLNet

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = XLNet(config)

    @classmethod
    def with_new_head(cls: type[Head], folder: str | Path, **changes: Any) -> Head:
        """Reads the body out of any XLNet's folder, for fine-tuning; what stands on it starts anew. In eval mode.

        Args:
            folder, changes: as for `from_pretrained`. The names of labels are the old head's, and not read.
        Raises:
            PretrainedError: as `from_pretrained`; tensors of heads may be missing, the body's may not.
        """
        folder = Path(folder)
        model = cls(replace(cls.read_config(folder), **({"label_names": None} | changes)))
        model.transformer.load_state_dict(XLNet.from_pretrained(folder, **changes).state_dict())
        return model.eval()


@dataclass(slots=True)
class Reading:
    """Texts that are being decoded: the prompts, and the keys and values of all that has been read.

    Rows end in one column, whatever their lengths, as distances alone matter: shorter ones begin with padding.
    """

    read: list[list[int]]
    stores: list[tuple[Tensor, Tensor]]  # k and v of each layer, [rows, h, room, d]
    distances: list[Tensor]  # r of each layer, [1, h, room + 1, d]
    ranks: Tensor  # of keys, [rows, room]
    count: int = 0  # columns that are filled

    def reorder(self, rows: Sequence[int]) -> None:
        chosen = torch.tensor(rows, device=self.ranks.device)
        self.stores = [(k[chosen], v[chosen]) for k, v in self.stores]
        self.ranks = self.ranks[chosen]

    def extend(self, count: int) -> int:
        """The columns that are filled with `count` more."""
        if (filled := self.count + count) > self.ranks.shape[1]:
            raise RangeError(f"tokens: expected at most {self.ranks.shape[1]} with those in the cache, got {filled}")
        self.count = filled
        return filled


class XLNetLMHead(_XLNetHead):
    """The language model: predicts tokens at targets, or, decoding, the next one from those before it.

    Decoding is exact: a token's content sees what comes before it and is computed once, and the query of the next token
    is one row more. It gives what `forward` gives with the order 0, 1, 2, ... for the target behind the text.
    """

    continues_prompt: ClassVar[bool] = True

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config)
        self.lm_bias = nn.Parameter(torch.zeros(config.vocab))

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Logits [b, m, vocab], or [b, p, vocab] of targets, and the memory. Arguments and errors are `XLNet`'s."""
        hidden, memory = self.transformer(tokens, segments, lengths, **options)
        return self._logits(hidden), memory

    def prefill(
        self, prompt: Tensor, lengths: Tensor | None = None, *, count: int | Sequence[int], page: int | None = None
    ) -> tuple[Tensor, Reading]:
        """Reads the prompts (`pyattn.decoding.protocol`).

        Args:
            prompt: [b, m] integer, padded behind.
            lengths: [b] integer, tokens of each prompt, at least 1; all m by default.
            count: how many tokens `step` may be given afterwards; of one number for each prompt the largest.
            page: of no use here: reordering rows copies them.
        Returns:
            logits [b, vocab] of the token behind each prompt, and what `step` goes on with.
        """
        check_prompt(prompt, lengths)
        (b, m), c, device = prompt.shape, self.config, prompt.device
        held = prompt.new_full((b,), m) if lengths is None else lengths.to(device)
        room = m + (count if isinstance(count, int) else max(count, default=0))
        columns = torch.arange(room, device=device)
        padding = m - held[:, None]  # which goes to the front
        ranks = torch.zeros(b, room, dtype=torch.int32, device=device).masked_fill(columns < padding, _NEVER)
        shape = (b, c.heads, room, c.width // c.heads)
        sinusoids = self.transformer.sinusoids(0, room + 1)
        state = Reading(
            [row[:length] for row, length in zip(prompt.tolist(), held.tolist(), strict=True)],
            [(sinusoids.new_zeros(shape), sinusoids.new_zeros(shape)) for _ in range(c.layers)],
            [layer.rel_attn.distances(sinusoids, b) for layer in self.transformer.layers()],
            ranks,
        )
        return self._read(prompt.gather(1, (columns[:m] - padding).clamp(min=0)), state), state

    def step(self, tokens: Tensor, state: Reading) -> Tensor:
        """Reads one more token of each row, tokens [b]. Returns the logits [b, vocab] of the one after it."""
        return self._read(tokens[:, None], state)

    def _read(self, tokens: Tensor, state: Reading) -> Tensor:
        (b, m), old = tokens.shape, state.count
        n = state.extend(m)
        keys = state.ranks[:, :n]
        content = Stream(0, True, (keys.new_ones(b, m), keys))
        # The next token's query stands one behind the last key, where the kernel has it stand at that key.
        query = Stream(-1, True, (keys.new_ones(b, 1), keys))
        h, g = self.transformer.embed(tokens), self.transformer.mask_emb.expand(b, 1, -1)
        for layer, store, r in zip(self.transformer.layers(), state.stores, state.distances, strict=True):
            for columns, new in zip(store, layer.rel_attn.keys(h, None), strict=True):
                columns[:, :, old:n] = new
            k, v = (columns[:, :, :n] for columns in store)
            h, g = layer(h, k, v, r, content), layer(g, k, v, r, query)
        return self._logits(g[:, 0])

    def _logits(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.transformer.word_embedding.weight, self.lm_bias)

    def stored(self) -> dict[str, Tensor]:
        return self.transformer.stored() | {"lm_loss.bias": self.lm_bias}


def _initialize(module: Module) -> Module:
    """N(0, 0.02), and zero for the biases of matrices."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return module


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """Rows of x [b, *, width] at places [b, rows]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def _padding(lengths: Tensor, tokens: Tensor) -> Tensor:
    """Which tokens [b, m] are none."""
    m = tokens.shape[1]
    return torch.arange(m, device=tokens.device) < m - lengths[:, None]


def _one_hot(segments: Tensor | None, past: int, like: Tensor) -> Tensor | None:
    """[b, 1, past + m, _SEGMENTS], behind the memory's segment, 0."""
    if segments is None:
        return None
    table = torch.eye(_SEGMENTS, dtype=like.dtype, device=like.device)
    return embed("segments", F.pad(segments, (past, 0)), table)[:, None]


def _check_texts(tokens: Tensor, lengths: Tensor | None, config: XLNetConfig, **beside: Tensor | None) -> None:
    if tokens.ndim != 2 or not tokens.shape[1]:
        raise ShapeError(f"tokens: expected [b, m] with m >= 1, got {list(tokens.shape)}")
    b, m = tokens.shape
    if config.two_ways and b % 2:
        raise ShapeError(f"tokens: expected an even number of texts, half of them from the end (two_ways), got {b}")
    for name, t in beside.items():
        if t is not None and t.shape != tokens.shape:
            raise ShapeError(f"{name}: expected [b={b}, m={m}], as tokens, got {list(t.shape)}")
    if lengths is not None:
        if lengths.shape != (b,):
            why = " (of an attention_mask with its ones behind they are attention_mask.sum(1))" * (lengths.ndim == 2)
            raise ShapeError(f"lengths: expected [b={b}], got {list(lengths.shape)}{why}")
        _check_integers("lengths", lengths, 1, m)


def _check_order(b: int, m: int, order: Tensor | None, masked: Tensor | None, targets: Tensor | None) -> None:
    if order is not None:
        _check_integers("order", order, -1, m - 1)
    if masked is not None:
        if masked.dtype is not torch.bool:
            raise DtypeError(f"masked: expected bool, got {dtype_name(masked.dtype)}")
        if order is None or (_is_readable(masked) and bool((masked & (order < 0)).any())):
            raise RangeError("masked: expected a place in the order for each masked token")
    if targets is not None:
        if targets.ndim != 2 or len(targets) != b or not targets.shape[1]:
            raise ShapeError(f"targets: expected [b={b}, p] with p >= 1, got {list(targets.shape)}")
        _check_integers("targets", targets, 0, m - 1)


def _check_memory(memory: Sequence[Tensor] | None, tokens: Tensor, config: XLNetConfig, dtype: torch.dtype) -> int:
    """How many rows the memory has."""
    if memory is None:
        return 0
    if len(memory) != config.layers:
        raise ShapeError(f"memory: expected layers={config.layers} tensors, got {len(memory)}")
    b, past = len(tokens), memory[0].shape[1] if memory[0].ndim == 3 else "any"
    for x in memory:
        if list(x.shape) != [b, past, config.width]:
            raise ShapeError(f"memory: expected [b={b}, {past}, width={config.width}] each, got {list(x.shape)}")
        if x.dtype is not dtype:
            raise DtypeError(f"memory: expected {dtype_name(dtype)}, got {dtype_name(x.dtype)}")
    return cast(int, past)


def _check_integers(name: str, t: Tensor, least: int, most: int) -> None:
    if t.dtype not in (torch.int64, torch.int32):
        raise DtypeError(f"{name}: expected int64 or int32, got {dtype_name(t.dtype)}")
    if _is_readable(t):
        low, high = t.aminmax()
        if low < least or high > most:
            raise RangeError(f"{name}: expected values in [{least}, {most}], got {int(low)} to {int(high)}")


def _is_readable(t: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a GPU."""
    return t.numel() > 0 and t.device.type == "cpu" and not is_traced(t)
