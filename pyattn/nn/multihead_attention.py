"""torch.nn.MultiheadAttention on fused attention: the same signature, parameters and results."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyattn import core, dropout, transforms
from pyattn.check import DtypeError, RangeError, ShapeError, UnsupportedError, without_autocast


class MultiheadAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2) as torch.nn.MultiheadAttention has it.

    Takes the arguments, loads and saves the state_dict, and from one seed draws the parameters of
    torch.nn.MultiheadAttention. `need_weights=False` keeps memory linear in the lengths; the weights otherwise cost a
    second pass and the memory of what is returned. Differs in that a query which may see no key gets weights 0 and the
    bias of `out_proj`, and not NaN.

    Args:
        embed_dim: size of query and output; num_heads divides it.
        num_heads: heads of embed_dim // num_heads each.
        dropout: probability of dropping an attention weight while training.
        bias: whether the input and output projections have biases.
        add_bias_kv: append a learned key and value, seen by every query.
        add_zero_attn: append a key and value of zeros, seen by every query.
        kdim, vdim: sizes of key and value; embed_dim by default.
        batch_first: tensors are [b, m, e] and not [m, b, e].

    Raises:
        RangeError: a size is not positive, or num_heads does not divide embed_dim.
    """

    # Read by torch.nn.TransformerEncoderLayer, which in inference replaces its self_attn by a kernel of its own that
    # takes the weights and never calls forward. False keeps it from doing so.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads != 0:
            raise RangeError(
                f"embed_dim, num_heads: expected positive numbers, the second dividing the first, "
                f"got {embed_dim} and {num_heads}"
            )
        if not 0 <= dropout <= 1:
            raise RangeError(f"dropout: expected a probability in [0, 1], got {dropout}")
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.add_zero_attn = add_zero_attn
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.batch_first = batch_first

        def parameter(present: bool, *shape: int) -> Any:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if present else None

        packed = self.kdim == embed_dim and self.vdim == embed_dim
        self.in_proj_weight = parameter(packed, 3 * embed_dim, embed_dim)
        self.q_proj_weight = parameter(not packed, embed_dim, embed_dim)
        self.k_proj_weight = parameter(not packed, embed_dim, self.kdim)
        self.v_proj_weight = parameter(not packed, embed_dim, self.vdim)
        self.in_proj_bias = parameter(bias, 3 * embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.bias_k = parameter(add_bias_kv, 1, 1, embed_dim)
        self.bias_v = parameter(add_bias_kv, 1, 1, embed_dim)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Draws in torch.nn.MultiheadAttention's order, so that one seed gives the same parameters."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for appended in (self.bias_k, self.bias_v):
            if appended is not None:
                nn.init.xavier_normal_(appended)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from query to key and value.

        Args:
            query: [m, b, embed_dim], with batch_first [b, m, embed_dim], unbatched [m, embed_dim].
            key: [n, b, kdim] and so on.
            value: [n, b, vdim] and so on.
            key_padding_mask: [b, n], unbatched [n]. bool: True means ignore. Floating: added to the scores.
            need_weights: also return the attention weights, as they multiplied the values: after dropout.
            attn_mask: [m, n] or [b * num_heads, m, n]. bool: True means ignore. Floating: added to the scores.
            average_attn_weights: average the returned weights over the heads.
            is_causal: a hint that attn_mask is causal, first query aligned with first key. Without key_padding_mask and
                need_weights the mask itself is then not read.

        Returns:
            The output, shaped as query, and None or the weights [b, m, n], per head [b, num_heads, m, n], unbatched
            without b. add_bias_kv and add_zero_attn each lengthen n by one.

        Raises:
            ShapeError, DtypeError, RangeError: an argument does not fit.
        """
        ours = MultiheadAttention  # not self: `pyattn.patch` runs this on torch's modules, which have no such methods
        if isinstance(query, Tensor) and query.is_nested:
            is_plain = query is key and key is value and key_padding_mask is None and attn_mask is None
            if not (is_plain and self.batch_first):
                raise UnsupportedError(
                    "query: nested tensors are for batch_first self-attention without masks, as in torch"
                )
            return ours._forward_nested(self, query, need_weights, average_attn_weights)
        if is_causal and attn_mask is None:
            raise RangeError("is_causal: expected attn_mask as well: is_causal is a hint that attn_mask is causal")
        causal = is_causal and key_padding_mask is None and not need_weights
        if causal:
            attn_mask = None
        ours._check_inputs(self, query, key, value)
        is_batched = query.dim() == 3
        q, k, v = (ours._split_heads(self, t, is_batched) for t in ours._project(self, query, key, value))
        mask, bias = ours._masks(self, key_padding_mask, attn_mask, q, k, is_batched)
        k, v = ours._append_keys(self, k, v)
        out, weights = ours._attend(self, q, k, v, mask, bias, causal, need_weights, average_attn_weights)
        out = self.out_proj(ours._join_heads(self, out, is_batched))
        if weights is not None and not is_batched:
            weights = weights.squeeze(0)
        return out, weights

    def _forward_nested(self, x: Tensor, need_weights: bool, average: bool) -> tuple[Tensor, Tensor | None]:
        """Self-attention over a nested [b, *, e], as which torch.nn.TransformerEncoder passes padded input on."""
        if x.layout is torch.jagged and MultiheadAttention._stays_packed(self, x, need_weights):
            return MultiheadAttention._forward_jagged(self, x), None
        lengths = [sequence.shape[0] for sequence in x.unbind()]
        padded = x.to_padded_tensor(0.0)  # [b, m, e]
        is_padding = torch.arange(padded.shape[1], device=x.device) >= torch.tensor(lengths, device=x.device)[:, None]
        out, weights = MultiheadAttention.forward(
            self, padded, padded, padded, is_padding, need_weights, average_attn_weights=average
        )
        rows = [row[:length] for row, length in zip(out, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=x.layout), weights

    def _stays_packed(self, x: Any, need_weights: bool) -> bool:
        """Whether nothing asks for a padded batch: weights, keys appended to each sequence, gaps between sequences."""
        drops_all = self.training and self.dropout == 1
        return not (
            need_weights or self.bias_k is not None or self.add_zero_attn or x.lengths() is not None or drops_all
        )

    def _forward_jagged(self, x: Any) -> Tensor:
        """`_forward_nested` without padding, for a nested tensor [b, *, e] of layout torch.jagged."""
        rows, starts = x.values(), x.offsets()
        q, k, v = (
            t.unflatten(-1, (self.num_heads, self.head_dim))
            for t in MultiheadAttention._project(self, rows, rows, rows)
        )
        dropout_p = self.dropout if self.training else 0.0
        out, _ = core.attend(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, dropout_p=dropout_p)
        known = {"min_seqlen": x._maybe_min_seqlen, "max_seqlen": x._maybe_max_seqlen}
        return torch.nested.nested_tensor_from_jagged(self.out_proj(out.flatten(1)), starts, **known)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, each [..., embed_dim]; one matrix product for inputs that are one tensor."""
        packed, e = self.in_proj_weight, self.embed_dim
        if packed is not None and query is key and key is value:
            return F.linear(query, packed, self.in_proj_bias).chunk(3, -1)
        b_q, b_k, b_v = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if packed is not None and key is value:
            b_kv = None if self.in_proj_bias is None else self.in_proj_bias[e:]
            return F.linear(query, packed[:e], b_q), *F.linear(key, packed[e:], b_kv).chunk(2, -1)
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        w_q, w_k, w_v = separate if packed is None else packed.chunk(3)
        return F.linear(query, w_q, b_q), F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)

    def _split_heads(self, t: Tensor, is_batched: bool) -> Tensor:
        """[m, b, e], [b, m, e] or [m, e] as a view [b, h, m, d]."""
        heads = t.unflatten(-1, (self.num_heads, self.head_dim))
        if not is_batched:
            return heads.transpose(0, 1).unsqueeze(0)
        return heads.transpose(1, 2) if self.batch_first else heads.permute(1, 2, 0, 3)

    def _join_heads(self, t: Tensor, is_batched: bool) -> Tensor:
        """Undoes `_split_heads`."""
        if not is_batched:
            return t.squeeze(0).transpose(0, 1).flatten(1)
        return (t.transpose(1, 2) if self.batch_first else t.permute(2, 0, 1, 3)).flatten(2)

    def _append_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v [b, h, n, d] with the columns of add_bias_kv and add_zero_attn."""
        shape = (k.shape[0], self.num_heads, 1, self.head_dim)
        if self.bias_k is not None and self.bias_v is not None:
            b_k, b_v = (t.view(1, *shape[1:]).expand(shape).to(k.dtype) for t in (self.bias_k, self.bias_v))
            k, v = torch.cat([k, b_k], 2), torch.cat([v, b_v], 2)
        if self.add_zero_attn:
            k, v = torch.cat([k, k.new_zeros(shape)], 2), torch.cat([v, v.new_zeros(shape)], 2)
        return k, v

    def _masks(
        self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, q: Tensor, k: Tensor, is_batched: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The masks as attention takes them: (mask with True for attend, bias), broadcastable to [b, h, m, n]."""
        (b, h, m, _), n = q.shape, k.shape[2]
        parts = []
        if attn_mask is not None:
            _check_mask("attn_mask", attn_mask, [(m, n), (b * h, m, n)], q.dtype)
            parts.append(attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (b, h)))
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask, [(b, n) if is_batched else (n,)], q.dtype)
            parts.append(key_padding_mask.reshape(b, 1, 1, n))
        appended = (self.bias_k is not None) + self.add_zero_attn
        mask: Tensor | None = None
        bias: Tensor | None = None
        for part in parts:
            part = F.pad(part, (0, appended)) if appended else part  # False or 0: appended keys are seen by all
            if part.dtype is torch.bool:
                mask = ~part if mask is None else mask & ~part
            else:
                bias = part if bias is None else bias + part
        return mask, bias

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        causal: bool,
        need_weights: bool,
        average: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The fused output [b, h, m, d], and the weights in a second pass with the same dropout."""
        dropout_p = self.dropout if self.training else 0.0
        if dropout_p == 1:  # no weight is kept: the same as queries that see nothing
            dropout_p, mask = 0.0, torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=q.device)
        seed = None
        if dropout_p > 0:
            seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=q.device)
        out, lse = core.attend(
            q, k, v, mask=mask, bias=bias, causal=causal, top_left=True, dropout_p=dropout_p, seed=seed
        )
        if not need_weights:
            return out, None
        # Without mask and bias there is no row that sees nothing, and two passes over the weights are saved.
        sees_none = None if mask is None and bias is None else lse == -torch.inf
        hidden = None if mask is None else ~mask
        return out, attention_weights(q, k, hidden, bias, sees_none, dropout_p, seed, average)

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        sizes = (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim))
        for name, t, size in sizes:
            if not isinstance(t, Tensor):
                raise DtypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
            if t.dim() not in (2, 3) or t.dim() != query.dim():
                dims = "2 (unbatched) or 3 dimensions" if name == "query" else f"the {query.dim()} dimensions of query"
                raise ShapeError(f"{name}: expected {dims}, got {list(t.shape)}")
            if t.shape[-1] != size:
                raise ShapeError(f"{name}: expected a last dimension of {size}, got {list(t.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ShapeError(f"value: expected key's {list(key.shape[:-1])} before the last dimension, "
                             f"got {list(value.shape)}")  # fmt: skip
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and key.shape[batch] != query.shape[batch]:
            raise ShapeError(f"key: expected the batch size of query, {query.shape[batch]}, in dimension {batch}, "
                             f"got {list(key.shape)}")  # fmt: skip


def attention_weights(
    q: Tensor,
    k: Tensor,
    hidden: Tensor | None,
    bias: Tensor | None,
    sees_none: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    average: bool,
) -> Tensor:
    """The weights that `attention` multiplies the values with: softmax of the scores, after dropout.

    One head at a time, and each recomputed in the backward, so that no more than the result stays in memory. In
    torch.func's transforms, which know no checkpoints, what the backward needs stays, too.

    Args:
        q, k: [b, h, m, d], [b, h, n, d].
        hidden: bool, the opposite of the mask that `attention` was given.
        bias, dropout_p, seed: as they were given to `attention`. hidden and bias broadcast to [b, h, m, n].
        sees_none: bool [b, h, m], the rows whose weights are 0, if there may be such.
        average: over the heads.

    Returns:
        [b, m, n] if average, else [b, h, m, n]; in q's dtype, differentiable.
    """
    recomputed: Callable[..., Any] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    of_head: Callable[..., Tensor] = _head_weights if transforms.active() else partial(recomputed, _head_weights)

    def weights(head: int) -> Tensor:
        optional = (None if t is None else t[:, head if t.shape[1] > 1 else 0] for t in (hidden, bias, sees_none))
        return of_head(q[:, head], k[:, head], *optional, dropout_p, seed, head)

    h = q.shape[1]
    if not average:
        return torch.stack([weights(head).to(q.dtype) for head in range(h)], 1)
    total = weights(0)
    for head in range(1, h):
        total = total + weights(head)
    return (total / h).to(q.dtype)


def _head_weights(
    q: Tensor,
    k: Tensor,
    hidden: Tensor | None,
    bias: Tensor | None,
    sees_none: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    head: int,
) -> Tensor:
    """The weights [b, m, n] of one head, in float32 or float64."""
    accumulator = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q.device.type):
        s = (q.to(accumulator) / math.sqrt(q.shape[-1])) @ k.to(accumulator).mT
    if bias is not None:
        s = s + bias
    if hidden is not None:
        s = s.masked_fill(hidden, -torch.inf)
    if sees_none is None:
        p = torch.softmax(s, -1)
    else:  # the softmax of a row of nothing but -inf would be NaN, and so would its gradient
        p = torch.softmax(s.masked_fill(sees_none[..., None], 0.0), -1).masked_fill(sees_none[..., None], 0.0)
    if seed is None:
        return p
    i_b, i_h, i_m = (torch.arange(size, device=p.device) for size in (p.shape[0], 1, p.shape[1]))
    kept = dropout.keep(seed, dropout_p, i_b[:, None], i_h + head, i_m, p.shape[2])
    return torch.where(kept, p / (1 - dropout_p), 0.0)


def _check_mask(name: str, mask: Tensor, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    if not isinstance(mask, Tensor):
        raise DtypeError(f"{name}: expected a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype not in (torch.bool, torch.float32, dtype):
        raise DtypeError(f"{name}: expected torch.bool, torch.float32 or the projections' {dtype}, got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        raise ShapeError(f"{name}: expected {' or '.join(str(list(s)) for s in shapes)}, got {list(mask.shape)}")
