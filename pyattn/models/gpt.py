"""GPT-2: a decoder-only Transformer language model (Radford et al. 2019, "Language Models are Unsupervised
Multitask Learners"; code released as openai/gpt-2).

    x     = wte[tokens] + wpe[positions]
    x     = x + attention(ln_1(x))                   for each block; LayerNorm stands before, not after
    x     = x + c_proj(gelu(c_fc(ln_2(x))))
    logits = ln_f(x) @ wte.T                         the head is the token embedding, transposed

Parameters carry the names of the released checkpoints (`wte`, `wpe`, `h.N.attn.c_attn`, ...). Their weight matrices
are stored [in, out]; ours are `nn.Linear`'s [out, in].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyattn.api import attention
from pyattn.check import RangeError


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """Sizes of one GPT. The defaults are the smallest released GPT-2 (124 million parameters).

    Raises:
        RangeError: a size below 1, heads that do not divide width, dropout outside [0, 1), an unknown attention.
    """

    vocab: int = 50257
    context: int = 1024
    layers: int = 12
    heads: int = 12
    width: int = 768
    dropout: float = 0.0
    attention: str = "pyattn"

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "layers", "heads", "width"):
            if (size := getattr(self, name)) < 1:
                raise RangeError(f"{name}: expected at least 1, got {size}")
        if self.width % self.heads:
            raise RangeError(f"heads: expected a divisor of width={self.width}, got {self.heads}")
        if not 0 <= self.dropout < 1:
            raise RangeError(f"dropout: expected a probability in [0, 1), got {self.dropout}")
        if self.attention not in ATTENTIONS:
            raise RangeError(f"attention: expected one of {', '.join(ATTENTIONS)}, got {self.attention}")


class KVCache:
    """The keys and values of every token read so far, so that a step costs one token and not the whole text."""

    def __init__(self, config: GPTConfig) -> None:
        self.context = config.context
        self.length = 0
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * config.layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v [b, h, m, d] behind what `layer` has; returns all of it, [b, h, length + m, d]."""
        b, h, m, d = k.shape
        buffers = self._buffers[layer] or (k.new_empty(b, h, self.context, d), v.new_empty(b, h, self.context, d))
        self._buffers[layer] = buffers
        end = self.length + m
        for buffer, new in zip(buffers, (k, v), strict=True):
            buffer[:, :, self.length : end] = new
        return buffers[0][:, :, :end], buffers[1][:, :, :end]


class SelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.heads
        self.dropout = config.dropout
        self.attend = ATTENTIONS[config.attention]
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        b, m, width = x.shape
        qkv = self.c_attn(x).view(b, m, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [b, h, m, d]
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        out = self.attend(q, k, v, self.dropout if self.training else 0.0)
        return F.dropout(self.c_proj(out.transpose(1, 2).reshape(b, m, width)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.width, 4 * config.width)
        self.c_proj = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.c_fc(x), approximate="tanh")
        return F.dropout(self.c_proj(hidden), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = SelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model. Attention runs on whatever `config.attention` and pyattn's registry choose."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        self._initialize()

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Next-token logits.

        Args:
            tokens: [b, m] integer. With a cache they follow the tokens it holds, and are added to it.
            cache: from `new_cache`; None reads the tokens as the whole text.
        Returns:
            [b, m, vocab]
        Raises:
            RangeError: more tokens than the context has positions.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.context:
            raise RangeError(f"tokens: expected at most {self.config.context} with those in the cache, got {end}")
        positions = torch.arange(start, end, device=tokens.device)
        x = F.dropout(self.wte(tokens) + self.wpe(positions), self.config.dropout, self.training)
        for block in self.h:
            x = block(x, cache)
        if cache is not None:
            cache.length = end
        return F.linear(self.ln_f(x), self.wte.weight)

    def new_cache(self) -> KVCache:
        """An empty cache for one batch of texts."""
        return KVCache(self.config)

    def _initialize(self) -> None:
        """N(0, 0.02); projections into the residual stream divided by the root of their number (section 2.3)."""
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.layers))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def _pyattn_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    return cast(Tensor, attention(q, k, v, causal=True, dropout_p=dropout_p))


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    m, n = q.shape[2], k.shape[2]
    if m == n:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
    # torch's is_causal aligns the first query with the first key; with a cache the last ones stand together.
    mask = torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


# What `GPTConfig.attention` may name: q [b, h, m, d] over k, v [b, h, n, d], causal, last query at the last key.
ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "pyattn": _pyattn_attention,
    "torch": _torch_attention,
}
