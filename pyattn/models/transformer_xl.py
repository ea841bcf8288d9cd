"""Transformer-XL: language models that read a text in segments and remember (Dai et al. 2019, arXiv:1901.02860).

    x      = sqrt(width) embedding[tokens]
    seen   = [memory; x]                                       the layer's inputs at earlier positions, without gradient
    s_ij   = ((q_i + u) . k_j + (q_i + w) . r_D) / sqrt(head_size)      D: the distance from j back to i, 0 for oneself
    r_D    = W_r [sin(D / 10000^(2c / width)); cos(D / 10000^(2c / width))]             c = 0 .. width / 2 - 1
    x      = norm_1(x + attn(seen));   x = norm_2(x + mlp(x))           norm="post": the paper
    x      = x + attn(norm_1(seen));   x = x + mlp(norm_2(x))           norm="pre": an option of the authors' code
    logits = embedding x + bias                                         or an adaptive softmax (`pyattn.nn.adaptive`)

Section 3.3 of the paper has s_ij and the whole model; its appendix B computes the second term for all i and j by
shifting the rows of a matrix. Here that matrix is nowhere (`pyattn.relative_attention`).

A segment without memory sees itself alone. The authors' PyTorch code does that, too; transformers' TransfoXL attends to
vectors of zeros in the place of memory that is not there, as this model does when it is given them. Folders of that
model are read, whether its softmax is one over the whole vocabulary (`cutoffs` empty) or adaptive.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyattn.api import relative_attention
from pyattn.check import DtypeError, RangeError, ShapeError
from pyattn.decoding.protocol import check_prompt
from pyattn.models import transfo_xl
from pyattn.models.pretrained import Fields, Pretrained
from pyattn.nn.adaptive import AdaptiveVocabulary, check_cutoffs
from pyattn.nn.attend import check_attention
from pyattn.nn.embedding import check_ids, check_tokens, embed, sinusoids
from pyattn.nn.linear import Linear, linear
from pyattn.spec import dtype_name

OWN_TYPE = "pyattn-transformer-xl"  # in config.json


@dataclass(frozen=True, slots=True)
class TransformerXLConfig:
    """Sizes of one Transformer-XL. The defaults are the paper's standard model on WikiText-103, but for its softmax.

    Args:
        vocab: tokens.
        layers, heads, width: blocks, attention heads per block, size of a token's vector, an even number.
        head_size: of a head's queries, keys and values.
        hidden: size of the layer between a block's two linear maps.
        memory: positions before a segment that it sees at most.
        clamp: the largest distance that is told apart: all beyond it count as this one.
        same_length: whether every token sees the last `memory` positions, itself among them, and not also what precedes
            it in its segment. What a model tells then does not depend on how a text is cut into segments.
        norm: "post" or "pre", where the LayerNorms stand. After the last block there is none in either case.
        tie_biases: whether all layers share one u and one w.
        cutoffs: of an adaptive softmax, with embeddings like it, the first token of each part behind the most frequent
            ones, as (20000, 40000, 200000) in the paper; without any, one softmax over the whole vocabulary.
        div_val: by how much each part's vectors are shorter than those of the part before; 1 is not at all.
        tie_projections: whether parts behind the first one project vectors alike in the embedding and the softmax.
        dropout: probability, of embeddings, of the sinusoids, of what each part of a block adds and has between its
            linear maps, and of the last vectors.
        attention_dropout: probability, of attention weights.
        attention: a name out of `RELATIVE_ATTENTIONS`.
        end: the token that ends a text, where there is one.

    Raises:
        RangeError: a size below 1, an odd width, dropout outside [0, 1), an unknown name, end outside the vocabulary,
            same_length without memory, cutoffs that do not increase or are outside the vocabulary, a div_val below 1,
            or one that leaves nothing of the last part's vectors.
    """

    vocab: int = 267735
    layers: int = 16
    heads: int = 10
    width: int = 410
    head_size: int = 41
    hidden: int = 2100
    memory: int = 150
    clamp: int | None = None
    same_length: bool = False
    norm: str = "post"
    tie_biases: bool = False
    cutoffs: tuple[int, ...] = ()
    div_val: int = 1
    tie_projections: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    attention: str = "pyattn"
    end: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab", "layers", "heads", "width", "head_size", "hidden", "clamp"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise RangeError(f"{name}: expected at least 1, got {size}")
        if self.width % 2:
            raise RangeError(f"width: expected an even number, for sines and cosines, got {self.width}")
        if self.memory < self.same_length:
            why = " with same_length, for a token to see itself" if self.same_length else ""
            raise RangeError(f"memory: expected at least {int(self.same_length)}{why}, got {self.memory}")
        if self.norm not in ("post", "pre"):
            raise RangeError(f"norm: expected post or pre, got {self.norm}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= (probability := getattr(self, name)) < 1:
                raise RangeError(f"{name}: expected a probability in [0, 1), got {probability}")
        if self.end is not None and not 0 <= self.end < self.vocab:
            raise RangeError(f"end: expected a token in [0, vocab={self.vocab}), got {self.end}")
        check_cutoffs(self.vocab, self.width, self.cutoffs, self.div_val)
        check_attention(self.attention)

    @property
    def context(self) -> int:
        """The most tokens of a text, as `pyattn.decoding` asks for them: distances have no limit."""
        return sys.maxsize

    @property
    def left(self) -> int | None:
        """How many positions before its own a token sees, if they do not depend on its segment."""
        return self.memory - 1 if self.same_length else None

    @property
    def sight(self) -> int:
        """How many positions a token sees that is a segment of its own, itself among them."""
        return self.memory if self.same_length else self.memory + 1


def _pyattn_relative(
    q: Tensor, k: Tensor, v: Tensor, relative_q: Tensor, relative_k: Tensor,
    left: int | None, mask: Tensor | None, dropout_p: float,
) -> Tensor:  # fmt: skip
    window = None if left is None else (left, 0)
    return relative_attention(
        q, k, v, relative_q, relative_k, 0, causal=True, window=window, mask=mask, dropout_p=dropout_p
    )


def _torch_relative(
    q: Tensor, k: Tensor, v: Tensor, relative_q: Tensor, relative_k: Tensor,
    left: int | None, mask: Tensor | None, dropout_p: float,
) -> Tensor:  # fmt: skip
    m, n = q.shape[2], k.shape[2]
    distance = torch.arange(n - m, n, device=q.device)[:, None] - torch.arange(n, device=q.device)
    visible = (distance >= 0) & (distance <= (n if left is None else left))
    visible = visible if mask is None else visible & mask
    row = distance.clamp(0, relative_k.shape[2] - 1).expand(*q.shape[:3], n)
    bias = (relative_q @ relative_k.transpose(-1, -2)).gather(-1, row) / math.sqrt(q.shape[3])  # [b, h, m, n]
    return F.scaled_dot_product_attention(q, k, v, bias.masked_fill(~visible, -torch.inf), dropout_p=dropout_p)


# By the names of `pyattn.nn.attend.ATTENTIONS`: q, relative_q [b, h, m, d] over k, v [b, h, n, d], of which the last m
# are the queries' own positions; relative_k [1, h, distances, d] from distance 0 on; how far a query sees to the left;
# which keys there are, bool [b, 1, 1, n].
RELATIVE_ATTENTIONS: dict[str, Callable[..., Tensor]] = {"pyattn": _pyattn_relative, "torch": _torch_relative}


class Layer(NamedTuple):
    """What decoding keeps of a layer: keys and values by slot, and r of each distance, twice over."""

    k: Tensor  # [rows, h, slots, d]
    v: Tensor  # [rows, h, slots, d]
    r: Tensor  # [1, h, 2 slots, d]: row t is the distance t % slots


class Place(NamedTuple):
    """Where a step writes and what it sees, in every layer the same."""

    slot: int  # of the token that is read
    held: int  # slots that are in use
    first: int  # the row of `Layer.r` for the last of these slots, from which on slots go down
    mask: Tensor | None  # bool [rows, 1, 1, held]: slots of the row's own text; None where all are


@dataclass(slots=True)
class Reading:
    """Texts that are being decoded: the prompts, and keys and values of as many last positions as a token sees.

    Texts stand flush right: the next token of each is at the same `position`, and row r begins at starts[r]. Position p
    is in slot p % slots, so a token takes the place of the oldest one and nothing is moved.
    """

    read: list[list[int]]
    layers: list[Layer]
    position: int
    starts: list[int]
    may_wrap: bool  # whether there is a slot for all that a token sees; else for all that was asked for

    def reorder(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, dtype=torch.long, device=self.layers[0].k.device)
        self.layers = [Layer(layer.k[index], layer.v[index], layer.r) for layer in self.layers]
        self.starts = [self.starts[row] for row in rows]

    def advance(self) -> Place:
        """The place of one more token in each row."""
        k = self.layers[0].k
        slots = k.shape[2]
        if self.position >= slots and not self.may_wrap:
            raise RangeError(f"tokens: expected at most {slots} with those that were read, got {self.position + 1}")
        slot, held = self.position % slots, min(self.position + 1, slots)
        mask = None
        if self.position + 1 - held < max(self.starts, default=0):
            positions = self.position - (slot - torch.arange(held, device=k.device)) % slots
            mask = (positions >= torch.tensor(self.starts, device=k.device)[:, None])[:, None, None]
        # Attention takes the row first + held - 1 - j for slot j, and its distance is slot - j, modulo slots.
        place = Place(slot, held, (slot + 1 - held) % slots, mask)
        self.position += 1
        return place


class Biases(nn.Module):
    """u and w: added to every query before it meets keys, and before it meets distances."""

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.empty(config.heads, config.head_size))
        self.w = nn.Parameter(torch.empty(config.heads, config.head_size))


class SelfAttention(nn.Module):
    def __init__(self, config: TransformerXLConfig, biases: Biases) -> None:
        super().__init__()
        self.config = config
        self.biases = biases
        self.size = config.heads * config.head_size
        self.qkv = Linear(config.width, 3 * self.size, bias=False)
        self.r = Linear(config.width, self.size, bias=False)
        self.out = Linear(self.size, config.width, bias=False)

    def forward(self, seen: Tensor, m: int, table: Tensor) -> Tensor:
        """Of the last m positions in seen [b, n, width]; table [distances, width]. Returns [b, m, width]."""
        q = self._by_head(linear(seen[:, seen.shape[1] - m :], self.qkv.weight[: self.size]), 1)[0]
        k, v = self.keys_and_values(seen)
        return self._attend(q, k, v, self.distances(table), self.config.left, None)

    def step(self, x: Tensor, layer: Layer, place: Place) -> Tensor:
        """Of one more position x [rows, 1, width], which joins the layer's."""
        q, k, v = self._by_head(self.qkv(x), 3)
        layer.k[:, :, place.slot] = k[:, :, 0]
        layer.v[:, :, place.slot] = v[:, :, 0]
        r = layer.r[:, :, place.first : place.first + place.held]
        return self._attend(q, layer.k[:, :, : place.held], layer.v[:, :, : place.held], r, None, place.mask)

    def keys_and_values(self, seen: Tensor) -> Tensor:
        """[2, b, h, n, d]"""
        return self._by_head(linear(seen, self.qkv.weight[self.size :]), 2)

    def distances(self, table: Tensor) -> Tensor:
        """r for each row of the table: [1, h, distances, d]"""
        return self._by_head(self.r(table[None]), 1)[0]

    def _by_head(self, x: Tensor, parts: int) -> Tensor:
        """[b, n, parts h d] as [parts, b, h, n, d]"""
        return x.unflatten(2, (parts, self.config.heads, self.config.head_size)).permute(2, 0, 3, 1, 4)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, r: Tensor, left: int | None, mask: Tensor | None) -> Tensor:
        dropout_p = self.config.attention_dropout if self.training else 0.0
        attend = RELATIVE_ATTENTIONS[self.config.attention]
        found = attend(q + self.biases.u[:, None], k, v, q + self.biases.w[:, None], r, left, mask, dropout_p)
        return F.dropout(self.out(found.transpose(1, 2).flatten(2)), self.config.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.up = Linear(config.width, config.hidden)
        self.down = Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.relu(self.up(x)), self.dropout, self.training)
        return F.dropout(self.down(hidden), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: TransformerXLConfig, biases: Biases) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.norm_1 = nn.LayerNorm(config.width)
        self.attn = SelfAttention(config, biases)
        self.norm_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, memory: Tensor, table: Tensor) -> Tensor:
        """x [b, m, width] behind memory [b, M, width]"""
        seen = self.looked_at(torch.cat([memory, x], 1))
        return self._behind_attention(x + self.attn(seen, x.shape[1], table))

    def step(self, x: Tensor, layer: Layer, place: Place) -> Tensor:
        return self._behind_attention(x + self.attn.step(self.looked_at(x), layer, place))

    def looked_at(self, x: Tensor) -> Tensor:
        """Layer inputs as attention takes them, memory or not."""
        return self.norm_1(x) if self.pre_norm else x

    def _behind_attention(self, x: Tensor) -> Tensor:
        if self.pre_norm:
            return x + self.mlp(self.norm_2(x))
        x = self.norm_1(x)
        return self.norm_2(x + self.mlp(x))


class TransformerXL(Pretrained):
    """The language model.

    Matrices, u and w start N(0, 0.02), projections of an adaptive vocabulary N(0, 0.01), as the authors'; biases 0.
    """

    config: TransformerXLConfig
    continues_prompt: ClassVar[bool] = True
    ignored = transfo_xl.IGNORED

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        self.config = config
        self.adaptive: AdaptiveVocabulary | None = None
        if config.cutoffs:
            sizes = config.vocab, config.width, config.cutoffs, config.div_val
            self.adaptive = AdaptiveVocabulary(*sizes, tie_projections=config.tie_projections)
        else:
            self.embedding = nn.Embedding(config.vocab, config.width)
        shared = Biases(config)
        self.layers = nn.ModuleList(
            Block(config, shared if config.tie_biases else Biases(config)) for _ in range(config.layers)
        )
        if not config.cutoffs:
            self.bias = nn.Parameter(torch.empty(config.vocab))
        self._initialize()

    def initial(self, rows: int) -> Tensor:
        """The memory [layers, rows, 0, width] before a text: of nothing."""
        return self._weight.new_empty(self.config.layers, rows, 0, self.config.width)

    def forward(
        self, tokens: Tensor, memory: Tensor | None = None, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Next-token logits of a segment, or the losses of what follows, and what the next segment remembers.

        Args:
            tokens: [b, m] integer. Padding behind a text changes nothing before it.
            memory: [layers, b, M, width] with M of at most config.memory, in the model's dtype: what reading the
                segment before has returned; none by default. Each row may be of another text.
            targets: [b, m] integer, the token behind each. With cutoffs, parts of the vocabulary are computed for the
                targets in them alone.
        Returns:
            logits [b, m, vocab] (with cutoffs, log-probabilities), or of targets -log p [b, m]; and the inputs of each
            layer at the last positions of memory and segment together, detached:
            [layers, b, min(M + m, config.memory), width].
        Raises:
            ShapeError: a tensor of another shape.
            RangeError: on the CPU, tokens or targets outside the vocabulary.
            DtypeError: tokens or targets that are no integers, memory in another dtype.
        """
        check_tokens("tokens", tokens)
        memory = self.initial(len(tokens)) if memory is None else self._checked_memory(memory, len(tokens))
        if targets is not None:
            if targets.shape != tokens.shape:
                raise ShapeError(f"targets: expected {list(tokens.shape)}, as tokens, got {list(targets.shape)}")
            check_ids("targets", targets, self.config.vocab)
        x, inputs = self._blocks(tokens, memory)
        together = torch.cat([memory, torch.stack(inputs).detach()], 2)
        kept = min(together.shape[2], self.config.memory)
        found = self._logits(x) if targets is None else self._losses(x, targets)
        return found, together[:, :, together.shape[2] - kept :]

    def prefill(
        self,
        prompt: Tensor,
        lengths: Tensor | None = None,
        *,
        count: int | Sequence[int],
        page: int | None = None,
    ) -> tuple[Tensor, Reading]:
        """Reads the prompts, each as one segment (`pyattn.decoding.protocol`).

        Args:
            prompt: [b, m] integer, padded behind.
            lengths: [b] integer, tokens of each prompt, at least 1, in any order; all m by default.
            count: how many tokens `step` may be given afterwards, as for `GPT.prefill`; with prompts that are as long
                as the memory, any.
            page: nothing is kept in pages.
        Returns:
            logits [b, vocab] of the token behind each prompt, and what `step` goes on with.
        Raises:
            RangeError, ShapeError, DtypeError: as `forward`; an empty prompt, lengths that do not fit it.
        """
        check_prompt(prompt, lengths)
        b, m = prompt.shape
        held = [m] * b if lengths is None else lengths.tolist()
        longest = max(held, default=m)
        prompt = prompt[:, :longest]
        x, inputs = self._blocks(prompt, self.initial(b))
        read = [row[:length] for row, length in zip(prompt.tolist(), held, strict=True)]
        room = longest + (count if isinstance(count, int) else max(count, default=0))
        starts = [longest - length for length in held]
        layers = self._kept(inputs, starts, min(room, self.config.sight))
        last = torch.tensor(held, dtype=torch.long, device=x.device) - 1
        logits = self._logits(x[torch.arange(b, device=x.device), last])
        return logits, Reading(read, layers, longest, starts, room >= self.config.sight)

    def step(self, tokens: Tensor, state: Reading) -> Tensor:
        """Reads one more token of each row, tokens [b]: a segment behind as much memory as the configuration has.

        Returns the logits [b, vocab] of the token after it.
        """
        x = self._embed(tokens[:, None])
        place = state.advance()
        for block, layer in zip(cast(Iterable[Block], self.layers), state.layers, strict=True):
            x = block.step(x, layer, place)
        return self._logits(x[:, 0])

    def _checked_memory(self, memory: Tensor, rows: int) -> Tensor:
        c, dtype = self.config, self._weight.dtype
        fits = memory.ndim == 4 and memory.shape == (c.layers, rows, memory.shape[2], c.width)
        if not fits or memory.shape[2] > c.memory:
            expected = f"[layers={c.layers}, b={rows}, at most memory={c.memory}, width={c.width}]"
            raise ShapeError(f"memory: expected {expected}, got {list(memory.shape)}")
        if memory.dtype is not dtype:
            raise DtypeError(f"memory: expected {dtype_name(dtype)}, got {dtype_name(memory.dtype)}")
        return memory.detach()

    @property
    def _weight(self) -> Tensor:
        """Of the vectors of tokens, for what is to be of its dtype and on its device."""
        return self.embedding.weight if self.adaptive is None else self.adaptive.tables[0]

    def _blocks(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The last block's output [b, m, width], and every block's input."""
        x = self._embed(tokens)
        n = memory.shape[2] + tokens.shape[1]
        table = self._sinusoids(n if self.config.left is None else min(n, self.config.left + 1))
        inputs = []
        for block, before in zip(self.layers, memory, strict=True):
            inputs.append(x)
            x = block(x, before, table)
        return x, inputs

    def _kept(self, inputs: list[Tensor], starts: list[int], slots: int) -> list[Layer]:
        """The slots that the last positions of prompts come to; inputs [b, m, width] of each layer, flush left."""
        _, m, width = inputs[0].shape
        device = inputs[0].device
        # Flush right, and at most slots - 1, because the next token takes the place of the oldest one.
        positions = torch.arange(max(0, m - slots + 1), m, device=device)
        tokens = (positions - torch.tensor(starts, dtype=torch.long, device=device)[:, None]).clamp(min=0)
        table = self._sinusoids(slots)
        layers = []
        for block, x in zip(cast(Iterable[Block], self.layers), inputs, strict=True):
            last = x.gather(1, tokens[:, :, None].expand(-1, -1, width))
            new = block.attn.keys_and_values(block.looked_at(last))  # [2, b, h, len(positions), d]
            k, v = (
                part.new_zeros(*part.shape[:2], slots, part.shape[3]).index_copy(2, positions % slots, part)
                for part in new
            )
            layers.append(Layer(k, v, block.attn.distances(table).repeat(1, 1, 2, 1)))
        return layers

    def _embed(self, tokens: Tensor) -> Tensor:
        if self.adaptive is None:
            x = embed("tokens", tokens, self.embedding.weight)
        else:
            x = self.adaptive.embed(tokens)
        return self._dropped(x * math.sqrt(self.config.width))

    def _sinusoids(self, distances: int) -> Tensor:
        """R_D for D = 0 .. distances - 1, [distances, width]"""
        weight, clamp = self._weight, self.config.clamp
        distance = torch.arange(distances, device=weight.device, dtype=torch.float64)
        distance = distance.clamp(max=math.inf if clamp is None else clamp)
        return self._dropped(sinusoids(distance, self.config.width).to(weight.dtype))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    def _logits(self, x: Tensor) -> Tensor:
        x = self._dropped(x)
        return linear(x, self.embedding.weight, self.bias) if self.adaptive is None else self.adaptive.log_probs(x)

    def _losses(self, x: Tensor, targets: Tensor) -> Tensor:
        if self.adaptive is not None:
            return self.adaptive.losses(self._dropped(x), targets)
        logits = self._logits(x)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), reduction="none").view(targets.shape)

    def _initialize(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.01 if "projections" in name else 0.02)
            elif "bias" in name:
                nn.init.zeros_(parameter)

    @classmethod
    def config_from(cls, fields: Fields) -> TransformerXLConfig:
        fields.expect(model_type=(OWN_TYPE, "transfo-xl"))
        if fields["model_type"] == "transfo-xl":
            return TransformerXLConfig(**transfo_xl.options(fields))
        fields.expect(architectures=[cls.__name__])
        is_adaptive = "cutoffs" in fields.values
        return TransformerXLConfig(
            vocab=fields.integer("vocab_size"),
            layers=fields.integer("num_hidden_layers"),
            heads=fields.integer("num_attention_heads"),
            width=fields.integer("hidden_size"),
            head_size=fields.integer("head_size"),
            hidden=fields.integer("intermediate_size"),
            memory=fields.integer("memory"),
            clamp=fields.typed("clamp", int | None),
            same_length=fields.typed("same_length", bool),
            norm=fields.typed("norm", str),
            tie_biases=fields.typed("tie_biases", bool),
            cutoffs=fields.typed("cutoffs", tuple[int, ...]) if is_adaptive else (),
            div_val=fields.integer("div_val") if is_adaptive else 1,
            tie_projections=fields.typed("tie_projections", bool) if is_adaptive else True,
            dropout=fields.typed("dropout", float),
            attention_dropout=fields.typed("attention_dropout", float),
            end=fields.typed("eos_token_id", int | None),
        )

    def config_fields(self) -> dict[str, Any]:
        c = self.config
        adaptive = {"cutoffs": list(c.cutoffs), "div_val": c.div_val, "tie_projections": c.tie_projections}
        return {
            "model_type": OWN_TYPE, "architectures": [type(self).__name__], "vocab_size": c.vocab,
            "num_hidden_layers": c.layers, "num_attention_heads": c.heads, "hidden_size": c.width,
            "head_size": c.head_size, "intermediate_size": c.hidden, "memory": c.memory, "clamp": c.clamp,
            "same_length": c.same_length, "norm": c.norm, "tie_biases": c.tie_biases, "dropout": c.dropout,
            "attention_dropout": c.attention_dropout, "eos_token_id": c.end,
            **(adaptive if c.cutoffs else {}),
        }  # fmt: skip

    def stored(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())

    def current_name(self, name: str) -> str:
        """The names of TransfoXLLMHeadModel, too."""
        c = self.config
        return transfo_xl.our_name(name, adaptive=bool(c.cutoffs), tie_projections=c.tie_projections)
