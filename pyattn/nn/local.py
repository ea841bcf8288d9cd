"""Local attention: a query sees the keys of a window around a place in the source, and no others.

    local-m  p_t = t                                     the target runs along the source
    local-p  p_t = S sigmoid(v_p . tanh(W_p s_t))        the state says where in a source of S states
             out_t = sum_j a_tj exp(-(j - p_t)^2 / (2 sigma^2)) h_j,   sigma = D / 2

The weights a_t are the softmax of the scores over the window, the j in [p_t - D, p_t + D] with p_t rounded: its ends
have no gradient. Positions count from 0, the source's and p_t alike.

The paper multiplies by the Gaussian behind the softmax, so that what then are the weights sum to less than 1. Added to
the scores it is a bias, and the paper's sum is attention with that bias, times e to the difference of the two lse, with
it and without. `LocalRenormalized` is attention with the bias as it is, whose weights sum to 1.

Source: Luong et al. 2015, arXiv:1508.04025, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyattn import check
from pyattn.check import DtypeError, ShapeError
from pyattn.nn.linear import Linear
from pyattn.nn.scores import Keys, Score, ScoreAround, check_sizes

DEFAULT_HALF_WIDTH = 10  # the paper's D


class LocalScore(ScoreAround):
    """What local attention has in common: a score, and a window of keys for each query.

    Args:
        score: of queries and keys.
        half_width: D, the keys that a query sees on each side of its window's middle.
    """

    _has_window = True

    def __init__(self, score: Score, half_width: int = DEFAULT_HALF_WIDTH, *, query_size: int | None = None) -> None:
        check_sizes(half_width=half_width)
        super().__init__(score, query_size=query_size)
        self.half_width = half_width

    def centers(self, query: Tensor, lengths: Tensor, positions: Tensor) -> Tensor:
        """p, the middle of each window.

        Args:
            query: [b, m, query_size].
            lengths: [b, 1], how many keys each source has.
            positions: integer [b, m], which step of its target each query is.
        Returns:
            [b, m]
        """
        raise NotImplementedError

    def attend(
        self,
        query: Tensor,
        keys: Keys | Tensor,
        values: Tensor,
        key_lengths: Tensor | None = None,
        *,
        positions: Tensor | int | None = None,
        **options: Any,
    ) -> Any:
        """`Score.attend`, where each query sees its window alone.

        Args:
            query, keys, values, key_lengths: as there.
            positions: integer, broadcastable to [b, m], or to [b] for one step: which step of its target each query is,
                for `LocalMonotonic`; 0 to m - 1 by default.
            options: as there, without row_windows and bias.
        Returns:
            As there; 0 for a query whose window has no key.
        Raises:
            DtypeError, ShapeError: positions are no integers, or of another shape; and as there.
        """
        window = self._window("attend", query, values, key_lengths, positions, options)
        return super().attend(query, keys, values, key_lengths, **window, **options)

    def attend_unfused(
        self,
        query: Tensor,
        keys: Keys | Tensor,
        values: Tensor,
        key_lengths: Tensor | None = None,
        *,
        positions: Tensor | int | None = None,
        **options: Any,
    ) -> Any:
        window = self._window("attend_unfused", query, values, key_lengths, positions, options)
        return super().attend_unfused(query, keys, values, key_lengths, **window, **options)

    def _window(
        self,
        function: str,
        query: Tensor,
        values: Tensor,
        key_lengths: Tensor | None,
        positions: Tensor | int | None,
        options: dict[str, Any],
    ) -> dict[str, Any]:
        """What makes attention local, beside the options that the caller gave to the function of this name."""
        check.refuse_unknown(function, [name for name in ("row_windows", "bias") if name in options])
        for name, t in (("query", query), ("values", values)):
            check.check_dense(name, t)
        if query.dim() not in (2, 3) or (self.query_size is not None and query.shape[-1] != self.query_size):
            size = self.query_size or "size"
            raise ShapeError(f"query: expected [b, m, {size}] or [b, {size}], got {list(query.shape)}")
        if values.dim() != 3:
            raise ShapeError(f"values: expected [b, n, dv], got {list(values.shape)}")
        at, n = _positions(positions, query), values.shape[1]
        query = query.unsqueeze(1) if query.dim() == 2 else query
        if key_lengths is None:
            lengths = torch.full_like(at[:, :1], n)
        else:
            lengths = check.check_integers("key_lengths", key_lengths, (len(query),), query).unsqueeze(1)
        centers = self.centers(query, lengths, at)
        middle = centers.detach().round().long()
        # All that lies beyond the keys is the same, and int32 need not hold it.
        windows = tuple((middle + side).clamp(-1, n).int() for side in (-self.half_width, self.half_width + 1))
        return {"row_windows": windows} | self._bias(centers, n)

    def _bias(self, centers: Tensor, n: int) -> dict[str, Tensor]:
        """What is added to the scores of n keys."""
        return {}

    def _settings(self) -> dict[str, object]:
        return {"half_width": self.half_width}


class LocalMonotonic(LocalScore):
    """local-m: query t sees the keys t - D to t + D, with the weights of a softmax over these.

    Source and target are taken to run side by side. A query more than D behind the source's end sees nothing.
    """

    def centers(self, query: Tensor, lengths: Tensor, positions: Tensor) -> Tensor:
        return positions


class LocalPredictive(LocalScore):
    """local-p: a window around p = S sigmoid(v_p . tanh(W_p s)), weighted by a Gaussian behind the softmax.

    p is computed in float32 (float64 for float64 states), also under autocast: of 16 bits it would go by steps.

    Args:
        score: of queries and keys.
        query_size: of the states s that ask.
        half_width: D; the Gaussian's standard deviation is D / 2.
    """

    def __init__(
        self,
        score: Score,
        query_size: int,
        half_width: int = DEFAULT_HALF_WIDTH,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(query_size=query_size)
        super().__init__(score, half_width, query_size=query_size)
        self.center_projection = Linear(query_size, query_size, bias=False, device=device, dtype=dtype)  # W_p
        self.center_weight = nn.Parameter(torch.empty(query_size, device=device, dtype=dtype))  # v_p
        nn.init.uniform_(self.center_weight, -(query_size**-0.5), query_size**-0.5)

    def centers(self, query: Tensor, lengths: Tensor, positions: Tensor) -> Tensor:
        with check.without_autocast(query.device.type):
            wide = torch.promote_types(query.dtype, torch.float32)
            hidden = torch.tanh(F.linear(query.to(wide), self.center_projection.weight.to(wide)))
            return lengths * torch.sigmoid(hidden @ self.center_weight.to(wide))

    def _bias(self, centers: Tensor, n: int) -> dict[str, Tensor]:
        """The logarithm of the Gaussian, [b, 1, m, n]."""
        distance = torch.arange(n, device=centers.device) - centers[:, None, :, None]
        return {"bias": -2 * (distance / self.half_width).square()}

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        out, lse_with = self.score._attention(q, k, v, return_lse=True, **options)
        plain = {name: option for name, option in options.items() if name not in ("bias", "dropout_p", "seed")}
        _, lse = self.score._attention(q, k, v[..., :1], return_lse=True, **plain)
        factor = torch.where(lse == -torch.inf, 0.0, lse_with - lse).exp()
        return (out * factor[..., None]).to(out.dtype)

    def _weights(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        weights = scores.softmax(-1)
        return weights if bias is None else weights * bias.exp()


class LocalRenormalized(LocalPredictive):
    """`LocalPredictive` with the Gaussian inside the softmax: its weights sum to 1, where the paper's do not."""

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return self.score._attention(q, k, v, **options)

    def _weights(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        return self.score._weights(scores, bias)


def _positions(positions: Tensor | int | None, query: Tensor) -> Tensor:
    """The step of each query, int64 [b, m], of query [b, m, size] or, of one step, [b, size]."""
    shape = query.shape[:-1]
    m = 1 if len(shape) == 1 else shape[1]
    if positions is None:
        positions = torch.arange(m, device=query.device)
    at = torch.as_tensor(positions, device=query.device)
    if at.is_floating_point() or at.dtype is torch.bool:
        raise DtypeError(f"positions: expected integers, got {at.dtype}")
    try:
        return at.long().expand(shape).reshape(len(query), m)
    except RuntimeError:
        raise ShapeError(f"positions: expected {list(shape)}, or what broadcasts to it, got {list(at.shape)}") from None
