"""GPT: decoder-only Transformer language models.

GPT-1 (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training") normalizes after each part
of a block, GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") before it and at the end:

    x      = wte[tokens] + wpe[positions]
    x      = x + attn(ln_1(x));   x = x + mlp(ln_2(x))         norm="pre":  GPT-2
    x      = ln_1(x + attn(x));   x = ln_2(x + mlp(x))         norm="post": GPT-1
    logits = ln_f(x) @ wte.T                                   the head is the token embedding, transposed

Parameters carry the names of the released GPT-2 checkpoints (`wte`, `wpe`, `h.N.attn.c_attn`, ...). The weight
matrices of those are stored [in, out]; ours are `nn.Linear`'s [out, in].
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyattn.check import RangeError
from pyattn.decoding.protocol import check_prompt
from pyattn.models.pretrained import Fields, Pretrained
from pyattn.nn.attend import ATTENTIONS, check_attention
from pyattn.nn.embedding import embed
from pyattn.nn.kv_cache import KVCache
from pyattn.nn.linear import Linear, linear


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """Sizes of one GPT. The defaults are the smallest released GPT-2 (124 million parameters).

    Args:
        vocab: tokens.
        context: positions, the most tokens that the model looks at.
        layers, heads, width: blocks, attention heads per block, size of a token's vector.
        norm: "pre" (GPT-2) or "post" (GPT-1): where the LayerNorms stand.
        dropout: probability, of embeddings, attention weights and what each part of a block adds.
        attention: a name out of `pyattn.nn.attend.ATTENTIONS`.
        end: the token that ends a text, where there is one.

    Raises:
        RangeError: a size below 1, heads that do not divide width, dropout outside [0, 1), an unknown name.
    """

    vocab: int = 50257
    context: int = 1024
    layers: int = 12
    heads: int = 12
    width: int = 768
    norm: str = "pre"
    dropout: float = 0.0
    attention: str = "pyattn"
    end: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "layers", "heads", "width"):
            if (size := getattr(self, name)) < 1:
                raise RangeError(f"{name}: expected at least 1, got {size}")
        if self.width % self.heads:
            raise RangeError(f"heads: expected a divisor of width={self.width}, got {self.heads}")
        if self.norm not in ("pre", "post"):
            raise RangeError(f"norm: expected pre or post, got {self.norm}")
        if not 0 <= self.dropout < 1:
            raise RangeError(f"dropout: expected a probability in [0, 1), got {self.dropout}")
        if self.end is not None and not 0 <= self.end < self.vocab:
            raise RangeError(f"end: expected a token in [0, vocab={self.vocab}), got {self.end}")
        check_attention(self.attention)


# The published models by their names on the Hugging Face hub.
PUBLISHED = {
    "openai-gpt": GPTConfig(vocab=40478, context=512, norm="post"),
    "gpt2": GPTConfig(end=50256),
    "gpt2-medium": GPTConfig(layers=24, heads=16, width=1024, end=50256),
    "gpt2-large": GPTConfig(layers=36, heads=20, width=1280, end=50256),
    "gpt2-xl": GPTConfig(layers=48, heads=25, width=1600, end=50256),
}


class Reading(NamedTuple):
    """Texts that are being decoded: the prompts, and the keys and values of all that has been read."""

    read: list[list[int]]
    cache: KVCache

    def reorder(self, rows: Sequence[int]) -> None:
        self.cache.reorder(rows)


class SelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.heads
        self.dropout = config.dropout
        self.attention = ATTENTIONS[config.attention]
        self.c_attn = Linear(config.width, 3 * config.width)
        self.c_proj = Linear(config.width, config.width)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        b, m, width = x.shape
        qkv = self.c_attn(x).view(b, m, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [b, h, m, d]
        if cache is None:
            out = self.attention.full(q, k, v, True, None, self.dropout if self.training else 0.0)
        else:
            out = cache.attend(self.attention, self.layer, q, k, v)
        return F.dropout(self.c_proj(out.transpose(1, 2).reshape(b, m, width)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = Linear(config.width, 4 * config.width)
        self.c_proj = Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.c_fc(x), approximate="tanh")
        return F.dropout(self.c_proj(hidden), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.post_norm = config.norm == "post"
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = SelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        if self.post_norm:
            x = self.ln_1(x + self.attn(x, cache))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(Pretrained):
    """The language model. Attention runs on whatever `config.attention` and pyattn's registry choose."""

    config: GPTConfig
    continues_prompt: ClassVar[bool] = True
    # Causal masks that old files hold, and the head, which is the embedding.
    ignored = re.compile(r"\.attn\.(masked_)?bias$|^lm_head\.weight$")

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()
        self._initialize()

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits.

        Args:
            tokens: [b, m] integer. Padding behind a text changes nothing before it.
        Returns:
            [b, m, vocab]
        Raises:
            RangeError: more tokens than the context has positions; on the CPU also tokens outside the vocabulary.
        """
        if tokens.shape[1] > self.config.context:
            raise RangeError(f"tokens: expected at most context={self.config.context}, got {tokens.shape[1]}")
        return self._logits(self._blocks(tokens, torch.arange(tokens.shape[1], device=tokens.device), None))

    def prefill(
        self,
        prompt: Tensor,
        lengths: Tensor | None = None,
        *,
        count: int | Sequence[int],
        page: int | None = None,
    ) -> tuple[Tensor, Reading]:
        """Reads the prompts (`pyattn.decoding.protocol`).

        Args:
            prompt: [b, m] integer, padded behind.
            lengths: [b] integer, tokens of each prompt, at least 1; all m by default.
            count: how many tokens `step` may be given afterwards; one number, or one for each prompt, which must leave
                the batch (`Reading.reorder`) before the others go beyond it.
            page: tokens per page of the cache.
        Returns:
            logits [b, vocab] of the token behind each prompt, and what `step` goes on with.
        Raises:
            RangeError: a prompt and its count, or the padded prompts, exceed the context.
        """
        check_prompt(prompt, lengths)
        b, m = prompt.shape
        held = [m] * b if lengths is None else lengths.tolist()
        counts = [count] * b if isinstance(count, int) else count
        longest, most = max([(m, 0), *zip(held, counts, strict=True)], key=sum)
        if longest + most > self.config.context:
            limit = f"context={self.config.context}"
            raise RangeError(f"count: expected prompt and count within {limit}, got {longest} and {most} tokens")
        cache = KVCache(self.config.layers, b, longest + most, page=page)
        x = self._blocks(prompt, cache.extend(m, prompt.device), cache)
        cache.truncate(held)
        last = torch.tensor(held, device=x.device) - 1
        read = [row[:length] for row, length in zip(prompt.tolist(), held, strict=True)]
        return self._logits(x[torch.arange(b, device=x.device), last]), Reading(read, cache)

    def step(self, tokens: Tensor, state: Reading) -> Tensor:
        """Reads one more token of each row, tokens [b]. Returns the logits [b, vocab] of the one after it."""
        positions = state.cache.extend(1, tokens.device)
        return self._logits(self._blocks(tokens[:, None], positions, state.cache)[:, -1])

    def _blocks(self, tokens: Tensor, positions: Tensor, cache: KVCache | None) -> Tensor:
        x = embed("tokens", tokens, self.wte.weight) + self.wpe(positions)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            x = block(x, cache)
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return linear(self.ln_f(x), self.wte.weight)

    def _initialize(self) -> None:
        """N(0, 0.02); in GPT-2, projections into the residual stream over the root of their number (section 2.3)."""
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight") and self.config.norm == "pre":
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.layers))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @classmethod
    def config_from(cls, fields: Fields) -> GPTConfig:
        fields.expect(model_type=("gpt2", "openai-gpt"), tie_word_embeddings=True, layer_norm_epsilon=1e-5)
        fields.expect(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
        fields.expect(
            n_inner=4 * fields.integer("n_embd"), activation_function=("gelu_new", "gelu_pytorch_tanh"), afn="gelu"
        )
        return GPTConfig(
            vocab=fields.integer("vocab_size"),
            context=fields.integer("n_positions"),
            layers=fields.integer("n_layer"),
            heads=fields.integer("n_head"),
            width=fields.integer("n_embd"),
            norm="pre" if fields["model_type"] == "gpt2" else "post",
            dropout=fields.get("resid_pdrop", 0.1),
            end=fields.end(),
        )

    def config_fields(self) -> dict[str, Any]:
        c = self.config
        fields: dict[str, Any] = {
            "vocab_size": c.vocab, "n_positions": c.context, "n_layer": c.layers, "n_head": c.heads, "n_embd": c.width,
            "layer_norm_epsilon": 1e-5, "attn_pdrop": c.dropout, "embd_pdrop": c.dropout, "resid_pdrop": c.dropout,
            "bos_token_id": c.end, "eos_token_id": c.end,
        }  # fmt: skip
        if c.norm == "pre":
            own = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}
        else:
            own = {"model_type": "openai-gpt", "architectures": ["OpenAIGPTLMHeadModel"], "afn": "gelu"}
        return own | fields

    def stored(self) -> dict[str, Tensor]:
        names = {} if self.config.norm == "pre" else {"wte": "tokens_embed", "wpe": "positions_embed"}
        tensors = {}
        for name, parameter in self.named_parameters():
            first, _, rest = name.partition(".")
            matrix_of_block = first == "h" and parameter.ndim == 2
            tensors[f"transformer.{names.get(first, first)}.{rest}"] = parameter.T if matrix_of_block else parameter
        return tensors

    @classmethod
    def current_name(cls, name: str) -> str:
        """The files on the hub have no `transformer.` before their names."""
        return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
