"""keras.layers.AdditiveAttention on fused attention, for code that is used to it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pyattn import check, core
from pyattn.check import DtypeError, ShapeError
from pyattn.nn.scores import check_sizes
from pyattn.nn.weights import weights_of

# Arguments of `core.attend`, as the module has them.
_NAMES = {"q": "query", "k": "key", "v": "value", "weight": "scale", "causal": "use_causal_mask"}


class AdditiveAttention(nn.Module):
    """Additive attention by scores sum(scale * tanh(query + key)), as keras.layers.AdditiveAttention has it.

    As there, projections are the caller's (`AdditiveScore` has them), inputs are [query, value, key], and a mask is
    True where there is something. Differs from Keras in that a query that may see no key gets 0, and not the mean of
    the values; in that dropout follows the module's training and not an argument; and in that `dim` is given, not found
    in the first call.

    keras.layers.Attention(score_mode="concat") is the function `pyattn.additive_attention` of scale * query,
    scale * key, value, and a weight that has its `concat_score_weight` in every column.

    Args:
        dim: columns of query and key.
        use_scale: whether to learn `scale` [dim], the weight of `pyattn.additive_attention`; 1 otherwise.
        dropout: probability of dropping a weight while training, in [0, 1).

    Raises:
        RangeError: dim is not positive, or dropout no such probability.

    Source: Bahdanau, Cho and Bengio 2015, arXiv:1409.0473, appendix A.1.2.
    """

    def __init__(
        self,
        dim: int,
        use_scale: bool = True,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(dim=dim)
        super().__init__()
        self.dim = dim
        self.dropout = check.by_names({"dropout_p": "dropout"}, check.check_dropout, dropout)
        self.scale = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if use_scale else None
        if self.scale is not None:
            limit = (3 / dim) ** 0.5  # Glorot's, of dim inputs and dim outputs, as Keras sees a vector
            nn.init.uniform_(self.scale, -limit, limit)

    def forward(
        self,
        inputs: Sequence[Tensor],
        mask: Sequence[Tensor | None] | None = None,
        *,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends from query to key.

        Args:
            inputs: [query, value] or [query, value, key]: query [b, m, dim], value [b, n, dv], key [b, n, dim]; without
                a key the value is the key, too.
            mask: [query_mask, value_mask], each bool or None: the output is 0 where query_mask [b, m] is False; keys
                where value_mask [b, n] is False are not seen.
            return_attention_scores: also return the weights, in one more pass for every 256 keys.
            use_causal_mask: query i sees keys j <= i: the first query is aligned with the first key.

        Returns:
            [b, m, dv], with return_attention_scores also the weights [b, m, n], after dropout.

        Raises:
            ShapeError, DtypeError, DeviceError, UnsupportedError: an argument does not fit, or no backend can run it.
        """
        query, value, key = self._check_inputs(inputs)
        query_mask, value_mask = self._check_mask(mask, query, value)
        q, k, v = (t.unsqueeze(1) for t in (query, key, value))
        dropout_p = self.dropout if self.training else 0.0
        attend = partial(
            check.by_names, _NAMES, core.attend, q, k,
            weight=q.new_ones(1, self.dim) if self.scale is None else self.scale.unsqueeze(0),
            mask=None if value_mask is None else value_mask[:, None, None],
            causal=use_causal_mask, top_left=True, dropout_p=dropout_p,
            seed=torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=q.device) if dropout_p > 0 else None,
        )  # fmt: skip
        out = attend(v)[0].squeeze(1)
        if query_mask is not None:
            out = torch.where(query_mask[..., None], out, 0.0)
        if not return_attention_scores:
            return out
        return out, weights_of(lambda v: attend(v)[0], k).squeeze(1)

    def extra_repr(self) -> str:
        return f"{self.dim}, use_scale={self.scale is not None}, dropout={self.dropout}"

    def _check_inputs(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """query, value and key."""
        if not isinstance(inputs, (list, tuple)) or len(inputs) not in (2, 3):
            got = f"{len(inputs)} of them" if isinstance(inputs, (list, tuple)) else type(inputs).__name__
            raise DtypeError(f"inputs: expected [query, value] or [query, value, key], got {got}")
        query, value, key = inputs if len(inputs) == 3 else (*inputs, inputs[1])
        for name, t in (("query", query), ("value", value), ("key", key)):
            check.check_dense(name, t)
            if t.dim() != 3 or (name != "value" and t.shape[2] != self.dim):
                rows, columns = "b, m" if name == "query" else "b, n", "dv" if name == "value" else f"dim={self.dim}"
                raise ShapeError(f"{name}: expected [{rows}, {columns}], got {list(t.shape)}")
        b, n = len(query), key.shape[1]
        for name, t in (("value", value), ("key", key)):
            if len(t) != b:
                raise ShapeError(f"{name}: expected b={b}, as of query, got {list(t.shape)}")
        if value.shape[1] != n:
            raise ShapeError(f"value: expected n={n}, as of key, got {list(value.shape)}")
        return query, value, key

    def _check_mask(
        self, mask: Sequence[Tensor | None] | None, query: Tensor, value: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """query_mask and value_mask."""
        if mask is None:
            return None, None
        if not isinstance(mask, (list, tuple)) or len(mask) not in (2, 3):  # Keras takes one of key, and ignores it
            raise DtypeError(f"mask: expected [query_mask, value_mask], got {type(mask).__name__}")
        for name, t, of in (("query_mask", mask[0], query), ("value_mask", mask[1], value)):
            if t is not None:
                check.check_tensor(name, t, (torch.bool,), query)
                if t.shape != of.shape[:2]:
                    raise ShapeError(f"{name}: expected {list(of.shape[:2])}, got {list(t.shape)}")
        return mask[0], mask[1]
