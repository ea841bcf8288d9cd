"""The Transformer (Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762), encoder and decoder.

    x      = scale * shared[tokens] + positions                      sections 3.4 and 3.5, in both stacks
    x      = norm(x + part(x))                                       norm="post": the paper, section 3.1
    x      = x + part(norm(x)), one more norm behind the stack       norm="pre": Wang et al. 2019, arXiv:1906.01787
    logits = x @ shared.T + final_logits_bias

The parts of an encoder layer are self-attention and a feed-forward network; a decoder layer has attention to what the
encoder made of the source between them. One matrix embeds sources and targets and gives the logits (section 3.4).

Parameters carry the names of transformers' MarianMTModel, whose architecture is the paper's. Its separate matrices for
queries, keys and values are slices of ours, which are fused where they multiply the same input. `final_logits_bias` is
a constant that converted Marian models have; it is zero in new ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyattn.check import RangeError, ShapeError
from pyattn.models.pretrained import Fields, Pretrained
from pyattn.nn.attend import ATTENTIONS, check_attention
from pyattn.nn.embedding import embed, sinusoids
from pyattn.nn.kv_cache import KVCache
from pyattn.nn.linear import Linear, linear
from pyattn.nn.memory import Memory

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}
# In config.json, of models that Marian has not got: transformers refuses it rather than computing something else.
OWN_TYPE = "pyattn-transformer"


LONGEST = 2**20  # of sinusoidal positions: no tensor of a file says how many of them there are


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """Sizes of one Transformer. The defaults are the paper's base model (Table 3).

    Args:
        vocab: tokens, of sources and targets together.
        context: positions, the most tokens of a source and of a target.
        layers: of the encoder, and of the decoder unless `decoder_layers` says otherwise, as distilled models do.
        heads, width, hidden: attention heads, size of a token's vector, size of the feed-forward networks.
        dropout: probability, of embeddings, attention weights and what each part of a layer adds.
        norm: "post" or "pre", where the LayerNorms stand.
        positions: "sinusoidal" or "learned", the latter of the encoder's and the decoder's own.
        activation: of the feed-forward networks, a name out of `ACTIVATIONS`.
        scale_embedding: whether embeddings are multiplied by the root of width (section 3.4).
        attention: a name out of `pyattn.nn.attend.ATTENTIONS`.
        pad, start, end: the tokens that fill batches, that every target begins with, and that ends one.

    Raises:
        RangeError: a size below 1, heads that do not divide width, dropout outside [0, 1), an unknown name, a token
            outside the vocabulary.
    """

    vocab: int = 37000
    context: int = 512
    layers: int = 6
    decoder_layers: int | None = None
    heads: int = 8
    width: int = 512
    hidden: int = 2048
    dropout: float = 0.0
    norm: str = "post"
    positions: str = "sinusoidal"
    activation: str = "relu"
    scale_embedding: bool = True
    attention: str = "pyattn"
    pad: int = 0
    start: int = 1
    end: int = 2

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "layers", "decoder_layers", "heads", "width", "hidden"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise RangeError(f"{name}: expected at least 1, got {size}")
        if self.positions == "sinusoidal" and self.context > LONGEST:
            raise RangeError(f"context: expected at most {LONGEST:,} sinusoidal positions, got {self.context:,}")
        if self.width % self.heads:
            raise RangeError(f"heads: expected a divisor of width={self.width}, got {self.heads}")
        if not 0 <= self.dropout < 1:
            raise RangeError(f"dropout: expected a probability in [0, 1), got {self.dropout}")
        if self.norm not in ("post", "pre"):
            raise RangeError(f"norm: expected post or pre, got {self.norm}")
        if self.positions not in ("sinusoidal", "learned"):
            raise RangeError(f"positions: expected sinusoidal or learned, got {self.positions}")
        if self.activation not in ACTIVATIONS:
            raise RangeError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation}")
        for name in ("pad", "start", "end"):
            if not 0 <= (token := getattr(self, name)) < self.vocab:
                raise RangeError(f"{name}: expected a token in [0, vocab={self.vocab}), got {token}")
        check_attention(self.attention)


# The paper's models for English-German (Table 3; "about 37000 tokens", section 5.1).
PUBLISHED = {
    "base": TransformerConfig(dropout=0.1),
    "big": TransformerConfig(heads=16, width=1024, hidden=4096, dropout=0.3),
}


class Reading(NamedTuple):
    """Translations being decoded: the start tokens, the sources, and the keys and values of what has been read."""

    read: list[list[int]]
    memory: Memory
    cache: KVCache

    def reorder(self, rows: Sequence[int]) -> None:
        self.memory.reorder(rows)
        self.cache.reorder(rows)


class SelfAttention(nn.Module):
    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.heads
        self.dropout = config.dropout
        self.attention = ATTENTIONS[config.attention]
        self.qkv_proj = Linear(config.width, 3 * config.width)
        self.out_proj = Linear(config.width, config.width)

    def forward(self, x: Tensor, causal: bool, lengths: Tensor | None, cache: KVCache | None) -> Tensor:
        q, k, v = (_heads(part, len(x), self.heads) for part in self.qkv_proj(x).chunk(3, -1))
        if cache is None:
            out = self.attention.full(q, k, v, causal, lengths, self.dropout if self.training else 0.0)
        else:
            out = cache.attend(self.attention, self.layer, q, k, v)
        return self.out_proj(out.transpose(1, 2).reshape(x.shape))


class CrossAttention(nn.Module):
    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.heads
        self.dropout = config.dropout
        self.attention = ATTENTIONS[config.attention]
        self.q_proj = Linear(config.width, config.width)
        self.kv_proj = Linear(config.width, 2 * config.width)
        self.out_proj = Linear(config.width, config.width)

    def keys_values(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (_heads(part, len(encoded), self.heads) for part in self.kv_proj(encoded).chunk(2, -1))
        return k, v

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        k, v = memory.layers[self.layer]
        q = _heads(memory.by_source(self.q_proj(x)), len(k), self.heads)
        out = self.attention.full(q, k, v, False, memory.lengths, self.dropout if self.training else 0.0)
        return self.out_proj(memory.by_row(out.transpose(1, 2).flatten(2), x.shape[1]))


def _heads(x: Tensor, rows: int, heads: int) -> Tensor:
    """x [b, m, width] as [rows, h, b * m / rows, d]: a view."""
    return x.view(rows, -1, heads, x.shape[-1] // heads).transpose(1, 2)


class Layer(nn.Module):
    """One layer of the encoder, or of the decoder with attention to the source."""

    def __init__(self, config: TransformerConfig, layer: int, decoder: bool) -> None:
        super().__init__()
        self.causal = decoder
        self.post_norm = config.norm == "post"
        self.dropout = config.dropout
        self.activation = ACTIVATIONS[config.activation]
        self.self_attn = SelfAttention(config, layer)
        self.self_attn_layer_norm = nn.LayerNorm(config.width)
        if decoder:
            self.encoder_attn = CrossAttention(config, layer)
            self.encoder_attn_layer_norm = nn.LayerNorm(config.width)
        self.fc1 = Linear(config.width, config.hidden)
        self.fc2 = Linear(config.hidden, config.width)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, lengths: Tensor | None, memory: Memory | None, cache: KVCache | None) -> Tensor:
        x = self._add(x, self.self_attn_layer_norm, self.self_attn, self.causal, lengths, cache)
        if memory is not None:
            x = self._add(x, self.encoder_attn_layer_norm, self.encoder_attn, memory)
        return self._add(x, self.final_layer_norm, self._feed_forward)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))

    def _add(self, x: Tensor, norm: nn.Module, part: Callable[..., Tensor], *others: Any) -> Tensor:
        if self.post_norm:
            return norm(x + F.dropout(part(x, *others), self.dropout, self.training))
        return x + F.dropout(part(norm(x), *others), self.dropout, self.training)


class Sinusoids(nn.Module):
    """PE(pos, 2i) = sin(pos / 10000^(2i / width)), PE(pos, 2i + 1) = cos of the same (section 3.5).

    All sines stand before all cosines, as in tensor2tensor and Marian. The paper's order is another one of the
    channels, and a model may learn under either.
    """

    table: Tensor

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        table = sinusoids(torch.arange(positions, dtype=torch.float64), width)[:, :width]
        self.register_buffer("table", table.to(torch.get_default_dtype()), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        return self.table[positions]


class Stack(nn.Module):
    """The encoder or the decoder."""

    def __init__(self, config: TransformerConfig, layers: int, decoder: bool) -> None:
        super().__init__()
        positions = Sinusoids if config.positions == "sinusoidal" else nn.Embedding
        self.scale = math.sqrt(config.width) if config.scale_embedding else 1.0
        self.dropout = config.dropout
        self.embed_positions = positions(config.context, config.width)
        self.layers = nn.ModuleList(Layer(config, layer, decoder) for layer in range(layers))
        self.layer_norm = nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()

    def forward(
        self,
        embedded: Tensor,
        positions: Tensor,
        lengths: Tensor | None = None,
        memory: Memory | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        x = torch.add(self.embed_positions(positions), embedded, alpha=self.scale)
        x = F.dropout(x, self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, lengths, memory, cache)
        return self.layer_norm(x)


class Transformer(Pretrained):
    """The translation model. Attention runs on whatever `config.attention` and pyattn's registry choose.

    The embedding of the pad token learns as any other does; that of transformers stays as it is.
    """

    config: TransformerConfig
    continues_prompt: ClassVar[bool] = False
    # Copies of the shared embedding, and sinusoids, that files may hold.
    ignored = re.compile(r"embed_tokens\.weight$|^lm_head\.weight$|embed_positions\.weight$")
    final_logits_bias: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab, config.width)
        self.encoder = Stack(config, config.layers, decoder=False)
        self.decoder = Stack(config, config.decoder_layers or config.layers, decoder=True)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab))
        self._initialize()

    def forward(self, source: Tensor, target: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Logits of the token behind each token of the targets.

        Args:
            source: [b, n] integer, padded behind.
            target: [b, m] integer, beginning with the start token. Padding behind it changes nothing before it.
                Of [t * b, m], rows i * t to i * t + t - 1 are targets of source i.
            source_lengths: [b] integer, tokens of each source; all n by default. Padding is not looked at.
        Returns:
            [b, m, vocab]
        Raises:
            RangeError: more tokens than the context has positions; on the CPU also tokens outside the vocabulary.
            ShapeError: targets or lengths do not fit the sources in number.
        """
        if len(target) % max(len(source), 1):
            raise ShapeError(f"target: expected a multiple of the {len(source)} sources, got {len(target)}")
        self._check_context("target", target)
        memory = self._memory("source", source, source_lengths)
        positions = torch.arange(target.shape[1], device=target.device)
        return self._logits(self.decoder(embed("target", target, self.shared.weight), positions, memory=memory))

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
            page: tokens per page of the cache of the decoder's self-attention.
        Returns:
            logits [b, vocab] of the first token of each target, and what `step` goes on with.
        Raises:
            RangeError: a source, or the start token and count, exceed the context.
        """
        c, b = self.config, len(prompt)
        most = count if isinstance(count, int) else max(count, default=0)
        if 1 + most > c.context:
            raise RangeError(f"count: expected at most {c.context - 1}, context={c.context} less the start, got {most}")
        cache = KVCache(len(self.decoder.layers), b, 1 + most, page=page)
        state = Reading([[c.start] for _ in range(b)], self._memory("prompt", prompt, lengths), cache)
        return self.step(prompt.new_full((b,), c.start), state), state

    def step(self, tokens: Tensor, state: Reading) -> Tensor:
        """Reads one more token of each row, tokens [b]. Returns the logits [b, vocab] of the one after it."""
        positions = state.cache.extend(1, tokens.device)
        embedded = embed("tokens", tokens[:, None], self.shared.weight)
        x = self.decoder(embedded, positions, memory=state.memory, cache=state.cache)
        return self._logits(x[:, 0])

    def _memory(self, name: str, source: Tensor, lengths: Tensor | None) -> Memory:
        """Encodes the sources, called `name`, and projects what comes of them for each layer of the decoder."""
        self._check_context(name, source)
        if lengths is not None and lengths.shape != source.shape[:1]:
            raise ShapeError(f"lengths: expected [{len(source)}], one for each {name}, got {list(lengths.shape)}")
        positions = torch.arange(source.shape[1], device=source.device)
        encoded = self.encoder(embed(name, source, self.shared.weight), positions, lengths)
        layers = [cast(Layer, layer).encoder_attn.keys_values(encoded) for layer in self.decoder.layers]
        return Memory(layers, len(source), lengths, source.device)

    def _check_context(self, name: str, tokens: Tensor) -> None:
        if tokens.shape[1] > self.config.context:
            raise RangeError(f"{name}: expected at most context={self.config.context}, got {tokens.shape[1]}")

    def _logits(self, x: Tensor) -> Tensor:
        return linear(x, self.shared.weight, self.final_logits_bias[0])

    @torch.no_grad()
    def _initialize(self) -> None:
        """As tensor2tensor's `transformer_base` ("uniform_unit_scaling"; `symbol_modality` for embeddings).

        Xavier uniform, each projection for itself although they are fused; embeddings, and learned positions as in
        fairseq, N(0, 1 / width), which scaling brings to the size of the sinusoids; biases 0.
        """
        for name, tensor in self.stored().items():
            if name.endswith("bias"):
                tensor.zero_()
            elif "shared" in name or "embed_positions" in name:
                nn.init.normal_(tensor, std=self.config.width**-0.5)
            elif tensor.ndim == 2:
                nn.init.xavier_uniform_(tensor)

    @classmethod
    def config_from(cls, fields: Fields) -> TransformerConfig:
        fields.expect(model_type=("marian", OWN_TYPE), tie_word_embeddings=True, share_encoder_decoder_embeddings=True)
        fields.expect(decoder_vocab_size=fields.integer("vocab_size"), normalize_embedding=False)
        fields.expect(decoder_attention_heads=fields["encoder_attention_heads"])
        fields.expect(decoder_ffn_dim=fields.integer("encoder_ffn_dim"), activation_function=(*ACTIVATIONS, "swish"))
        if fields["model_type"] == "marian":  # transformers computes these whatever the file says
            fields.expect(normalize_before=False, add_final_layer_norm=False, static_position_embeddings=True)
        layers, decoder_layers, activation = (
            fields[name] for name in ("encoder_layers", "decoder_layers", "activation_function")
        )
        return TransformerConfig(
            vocab=fields.integer("vocab_size"),
            context=fields.integer("max_position_embeddings"),
            layers=layers,
            decoder_layers=None if decoder_layers == layers else decoder_layers,
            heads=fields.integer("encoder_attention_heads"),
            width=fields.integer("d_model"),
            hidden=fields.integer("encoder_ffn_dim"),
            dropout=fields.get("dropout", 0.1),
            norm="pre" if fields.get("normalize_before", False) else "post",
            positions="sinusoidal" if fields.get("static_position_embeddings", True) else "learned",
            activation="silu" if activation == "swish" else activation,
            scale_embedding=fields.get("scale_embedding", False),
            pad=fields.integer("pad_token_id"),
            start=fields.integer("decoder_start_token_id"),
            end=fields.integer("eos_token_id"),
        )

    def config_fields(self) -> dict[str, Any]:
        c = self.config
        pre_norm, sinusoidal = c.norm == "pre", c.positions == "sinusoidal"
        if sinusoidal and not pre_norm:
            own = {"model_type": "marian", "architectures": ["MarianMTModel"]}
        else:
            own = {"model_type": OWN_TYPE, "architectures": ["Transformer"]}
        return own | {
            "vocab_size": c.vocab, "decoder_vocab_size": c.vocab, "max_position_embeddings": c.context,
            "encoder_layers": c.layers, "decoder_layers": c.decoder_layers or c.layers,
            "encoder_attention_heads": c.heads, "decoder_attention_heads": c.heads, "d_model": c.width,
            "encoder_ffn_dim": c.hidden, "decoder_ffn_dim": c.hidden, "activation_function": c.activation,
            "dropout": c.dropout, "attention_dropout": c.dropout, "activation_dropout": 0.0,
            "normalize_before": pre_norm, "add_final_layer_norm": pre_norm, "static_position_embeddings": sinusoidal,
            "scale_embedding": c.scale_embedding, "pad_token_id": c.pad, "decoder_start_token_id": c.start,
            "eos_token_id": c.end, "forced_eos_token_id": None, "bos_token_id": None,
        }  # fmt: skip

    def stored(self) -> dict[str, Tensor]:
        tensors = {"final_logits_bias": self.final_logits_bias}
        for name, parameter in self.named_parameters():
            if fused := re.fullmatch(r"(.+\.)([qkv]+)(_proj\..+)", name):
                before, letters, behind = fused.groups()
                parts = parameter.chunk(len(letters))
                tensors |= {f"model.{before}{x}{behind}": part for x, part in zip(letters, parts, strict=True)}
            else:
                tensors[f"model.{name}"] = parameter
        return tensors
