"""Score functions of attention over the states of a sentence: how well a query fits a key.

Every score is used the same way: keys are prepared once for a sentence, then queries attend, as many as come, whenever
they come.

    score = AdditiveScore(query_size=512, memory_size=1024, size=256)
    keys = score.keys(memory)  # once per sentence
    for ...:
        context = score.attend(state, keys, memory, key_lengths)

All run on fused attention: `AdditiveScore` on `pyattn.additive_attention`; the others are products after a projection
of either side, and run on `pyattn.attention`. Neither holds the scores [b, m, n] in memory.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from pyattn import check
from pyattn.api import additive_attention, attention
from pyattn.check import RangeError, ShapeError
from pyattn.nn.linear import Linear
from pyattn.nn.weights import weights_of

# Options of the functions of attention that a score sets itself or has no use for.
_NOT_OPTIONS = ("scale", "return_lse", "cu_seqlens_q", "cu_seqlens_k")
# Of the arguments of those, as `attend` has them.
_NAMES = {"q": "query", "k": "keys", "v": "values", "exp_keys": "keys.exponentials"}


class Keys(NamedTuple):
    """The keys of sentences, prepared by a score for any number of its queries."""

    states: Tensor  # [b, n, size]
    exponentials: Tensor | None = None  # `exp_keys` of `pyattn.additive_attention`, [b, n, size]


class Score(nn.Module):
    """What all scores have in common. Where a score says nothing else, it is the product of the states as they come.

    Args:
        query_size, memory_size: of the states that come; of any size without one.
        heads: the columns of prepared queries, keys and values are split into so many heads, each with a softmax of its
            own; contexts of heads stand side by side.
    """

    _has_exponentials = False  # whether its keys have them
    _has_window = False  # whether a query sees a part of the keys

    def __init__(self, *, query_size: int | None = None, memory_size: int | None = None, heads: int = 1) -> None:
        check_sizes(query_size=query_size, memory_size=memory_size, heads=heads)
        super().__init__()
        self.query_size = query_size
        self.memory_size = memory_size
        self.heads = heads

    def keys(self, memory: Tensor) -> Keys:
        """The keys of a sentence, prepared for any number of queries.

        Args:
            memory: [b, n, memory_size], the states that are attended to.
        Returns:
            Keys, whose states are [b, n, size], of the size that queries have once they are prepared.
        Raises:
            ShapeError: memory has another shape.
        """
        _check_states("memory", memory, self.memory_size)
        return Keys(self._keys(memory))

    def values(self, memory: Tensor) -> Tensor:
        """What `forward` sums up: memory itself."""
        return memory

    def _keys(self, memory: Tensor) -> Tensor:
        return memory

    def _queries(self, query: Tensor) -> Tensor:
        """query [b, m, query_size] as [b, m, size], prepared as the keys are."""
        return query

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """The contexts of heads [b, h, m, dv]; with return_lse also lse [b, h, m]."""
        return attention(q, k, v, scale=1.0, **options)

    @overload
    def attend(
        self, query: Tensor, keys: Keys | Tensor, values: Tensor, key_lengths: Tensor | None = None, *,
        return_weights: Literal[False] = False, **options: Any,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def attend(
        self, query: Tensor, keys: Keys | Tensor, values: Tensor, key_lengths: Tensor | None = None, *,
        return_weights: Literal[True], **options: Any,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    @overload
    def attend(
        self, query: Tensor, keys: Keys | Tensor, values: Tensor, key_lengths: Tensor | None = None, *,
        return_weights: bool, **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
    def attend(
        self,
        query: Tensor,
        keys: Keys | Tensor,
        values: Tensor,
        key_lengths: Tensor | None = None,
        *,
        return_weights: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The context of each query: the sum of the values, weighted by the softmax of its scores.

        Args:
            query: [b, m, query_size], or [b, query_size] for one step of a decoder.
            keys: from `keys`, or the states [b, n, size] of such.
            values: [b, n, dv].
            key_lengths: integer [b]; batch element b has its first key_lengths[b] keys alone.
            return_weights: also return the weights. They take one more pass for every 256 keys, and the memory of what
                is returned.
            options: mask, bias, causal, window, segment_ids, ranks, row_windows, softcap, alibi_slopes, sinks,
                dropout_p, seed and backend of `pyattn.attention`, which has the heads of this score for its h.

        Returns:
            context [b, m, dv], or [b, dv] for one step: 0 for a query that has no key. With return_weights also the
            weights as they multiplied the values, after dropout: [b, m, n] or [b, n], of several heads [b, heads, m, n]
            or [b, heads, n].

        Raises:
            ShapeError, DtypeError, DeviceError, RangeError, UnsupportedError: as `pyattn.attention`, by the names here.
        """
        check.refuse_unknown("attend", [name for name in _NOT_OPTIONS if name in options])
        keys = keys if isinstance(keys, Keys) else Keys(keys)
        for name, t in (("query", query), ("keys", keys.states), ("values", values)):
            check.check_dense(name, t)
        is_step = query.dim() == 2
        query = query.unsqueeze(1) if is_step else query
        _check_states("query", query, self.query_size)
        q = self._queries(query)
        (b, _, size), given = q.shape, list(keys.states.shape)
        if len(given) != 3 or given[0] != b or given[2] != size:
            raise ShapeError(f"keys: expected [b={b}, n, {size}], got {given}: query is {list(query.shape)}, and has "
                             f"{size} columns once prepared; GeneralScore takes keys of another size")  # fmt: skip
        if values.dim() != 3 or list(values.shape[:2]) != given[:2]:
            raise ShapeError(f"values: expected [b={b}, n={given[1]}, dv], got {list(values.shape)}: keys is {given}")
        q, k, v = (self._split(name, t) for name, t in (("query", q), ("keys", keys.states), ("values", values)))
        options |= {"key_lengths": key_lengths}
        if keys.exponentials is not None:
            options |= {"exp_keys": self._split("keys", self._checked(keys.exponentials, keys.states))}
        if return_weights and options.get("dropout_p") and options.get("seed") is None:
            options["seed"] = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=q.device)

        def contexts(v: Tensor) -> Tensor:
            return check.by_names(_NAMES, self._attention, q, k, v, **options)

        context = contexts(v).transpose(1, 2).flatten(2)
        context = context.squeeze(1) if is_step else context
        if not return_weights:
            return context
        weights = weights_of(contexts, k)
        weights = weights.squeeze(1) if self.heads == 1 else weights
        return context, weights.squeeze(-2) if is_step else weights

    def scores(self, query: Tensor, keys: Keys | Tensor) -> Tensor:
        """The scores themselves, one beside the other: for a pointer network, a picture, or to compare with.

        Args:
            query, keys: as `attend` takes them, query [b, m, query_size].
        Returns:
            [b, heads, m, n], in memory; an additive score's products [b, heads, m, n, size / heads] were there, too.
        """
        q = self._split("query", self._queries(query))
        return self._scores(q, self._split("keys", keys.states if isinstance(keys, Keys) else keys))

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT

    def attend_unfused(
        self,
        query: Tensor,
        keys: Keys | Tensor,
        values: Tensor,
        key_lengths: Tensor | None = None,
        *,
        row_windows: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`attend` as torch computes it: scores, softmax and sum one after the other, each of them in memory.

        What fused attention is measured against. Arguments and results are those of `attend`, query [b, m, query_size].
        """
        scores = self.scores(query, keys)
        j = torch.arange(values.shape[1], device=values.device)
        mask = None if key_lengths is None else (j < key_lengths[:, None])[:, None, None]
        if row_windows is not None:
            first, stop = (t[:, None, :, None] for t in row_windows)
            mask = (j >= first) & (j < stop) & (True if mask is None else mask)
        if mask is None:
            weights = self._weights(scores, bias)
        else:
            is_empty = ~mask.any(-1, keepdim=True)  # the softmax of no score is NaN
            scores = scores.masked_fill(~mask, -torch.inf).masked_fill(is_empty, 0.0)
            weights = self._weights(scores, bias).masked_fill(is_empty, 0.0)
        context = (weights @ self._split("values", values)).transpose(1, 2).flatten(2)
        return (context, weights.squeeze(1) if self.heads == 1 else weights) if return_weights else context

    def _weights(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        return (scores if bias is None else scores + bias).softmax(-1)

    def forward(
        self, query: Tensor, memory: Tensor, key_lengths: Tensor | None = None, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`attend` over the memory of one sentence, whose keys and values are used once."""
        _check_states("memory", memory, self.memory_size)
        return self.attend(query, Keys(self._keys(memory)), self.values(memory), key_lengths, **options)

    def extra_repr(self) -> str:
        settings = self._settings() | ({"heads": self.heads} if self.heads > 1 else {})
        return ", ".join(f"{name}={value}" for name, value in settings.items())

    def _settings(self) -> dict[str, object]:
        """What no parameter or module inside shows, for `repr`."""
        return {}

    def _checked(self, exponentials: Tensor, states: Tensor) -> Tensor:
        """The exponentials of such keys."""
        if not self._has_exponentials:
            raise RangeError("keys: expected those of this score, got some with exponentials, which an AdditiveScore "
                             "prepares; keys.states are a tensor that any score takes")  # fmt: skip
        check.check_dense("keys.exponentials", exponentials)
        if exponentials.shape != states.shape:
            raise ShapeError(f"keys.exponentials: expected {list(states.shape)}, the shape of keys.states, got "
                             f"{list(exponentials.shape)}")  # fmt: skip
        return exponentials

    def _split(self, name: str, t: Tensor) -> Tensor:
        """[b, n, size] as the view [b, h, n, size / h]."""
        if t.shape[2] % self.heads != 0:
            raise ShapeError(f"{name}: expected a last dimension that heads={self.heads} divides, got {list(t.shape)}")
        return t.unflatten(2, (self.heads, t.shape[2] // self.heads)).transpose(1, 2)


class DotScore(Score):
    """score = s . h, the product of query and key as they are, which therefore have one size.

    `pyattn.attention` with scale 1. Source: Luong et al. 2015, arXiv:1508.04025, equation 8, "dot".
    """


class ScaledDotScore(Score):
    """score = s . h / sqrt(d), with d the size of a head: the product's variance then does not grow with it.

    `pyattn.attention` with its own scale. Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1.
    """

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return attention(q, k, v, **options)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT / math.sqrt(q.shape[-1])


class GeneralScore(Score):
    """score = s^T W h, or with a rank W_q s . W_k h, for queries and keys of any two sizes.

    The product of projected states, so `pyattn.attention` with scale 1. Without a rank W is `key_projection.weight`,
    [query_size, memory_size]; it is the keys that it projects, once per sentence, to the size of queries. With a rank W
    is W_q^T W_k, of no higher rank.

    Source: Luong et al. 2015, arXiv:1508.04025, equation 8, "general".
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        rank: int | None = None,
        *,
        heads: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        size = query_size if rank is None else rank
        check_sizes(rank=rank)
        super().__init__(query_size=query_size, memory_size=memory_size, heads=heads)
        _check_heads("query_size" if rank is None else "rank", size, heads)
        self.query_projection = (
            nn.Identity() if rank is None else Linear(query_size, rank, bias=False, device=device, dtype=dtype)
        )
        self.key_projection = Linear(memory_size, size, bias=False, device=device, dtype=dtype)

    def _keys(self, memory: Tensor) -> Tensor:
        return self.key_projection(memory)

    def _queries(self, query: Tensor) -> Tensor:
        return self.query_projection(query)


class AdditiveScore(Score):
    """score = v . tanh(W_s s + W_h h + b), a hidden layer's; as the paper has it without b.

    The same as v . tanh(W [s; h] + b) with W = [W_s W_h]: `from_concat` splits such a weight. W_h h is computed once
    per sentence. `pyattn.additive_attention`, whose memory does not grow with m times n times size.

    Args:
        query_size, memory_size: of s and h.
        size: of the hidden layer.
        bias: whether there is a b.

    Source: Bahdanau, Cho and Bengio 2015, arXiv:1409.0473, appendix A.1.2; Luong et al. 2015, arXiv:1508.04025,
    equation 8, "concat".
    """

    _has_exponentials = True

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        size: int,
        *,
        bias: bool = False,
        heads: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(size=size)
        super().__init__(query_size=query_size, memory_size=memory_size, heads=heads)
        _check_heads("size", size, heads)
        self.query_projection = Linear(query_size, size, bias=bias, device=device, dtype=dtype)
        self.key_projection = Linear(memory_size, size, bias=False, device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(heads, size // heads, device=device, dtype=dtype))  # v of each head
        _draw(self.weight)

    @classmethod
    def from_concat(cls, concat: Tensor, weight: Tensor, query_size: int, bias: Tensor | None = None) -> AdditiveScore:
        """The score weight . tanh(concat [s; h] + bias), with copies of these as its parameters.

        Args:
            concat: [size, query_size + memory_size], the query's columns first.
            weight: [size], or [heads, size / heads].
            query_size: how many columns are the query's.
            bias: [size].
        Raises:
            DtypeError: an argument is no tensor.
            ShapeError, RangeError: the sizes do not fit together.
        """
        given = (("concat", concat), ("weight", weight))
        for name, t in given if bias is None else (*given, ("bias", bias)):
            check.check_dense(name, t)
        if concat.dim() != 2 or len(concat) == 0 or not 0 < query_size < concat.shape[1]:
            raise ShapeError(f"concat: expected [size, query_size + memory_size], query_size={query_size} columns and "
                             f"at least one more, got {list(concat.shape)}")  # fmt: skip
        size, columns = concat.shape
        if weight.dim() not in (1, 2) or weight.numel() != size:
            raise ShapeError(f"weight: expected {size} elements, [size] or [heads, size / heads], got "
                             f"{list(weight.shape)}: concat has {size} rows")  # fmt: skip
        if bias is not None and bias.shape != (size,):
            raise ShapeError(f"bias: expected [{size}], got {list(bias.shape)}: concat has {size} rows")
        score = cls(
            query_size, columns - query_size, size, bias=bias is not None, heads=weight.numel() // weight.shape[-1],
            device=concat.device, dtype=concat.dtype,
        )  # fmt: skip
        with torch.no_grad():
            score.query_projection.weight.copy_(concat[:, :query_size])
            score.key_projection.weight.copy_(concat[:, query_size:])
            score.weight.copy_(weight.view_as(score.weight))
            if bias is not None:
                score.query_projection.bias.copy_(bias)
        return score

    def keys(self, memory: Tensor) -> Keys:
        """As of every score. On a CPU with the exponentials of the keys, which then are not computed at each step."""
        states = super().keys(memory).states
        if not states.is_cpu:  # elsewhere they would take longer to read than to compute
            return Keys(states)
        wide = states.detach().to(torch.promote_types(states.dtype, torch.float32))
        return Keys(states, (2 * wide).exp())

    def _keys(self, memory: Tensor) -> Tensor:
        return self.key_projection(memory)

    def _queries(self, query: Tensor) -> Tensor:
        return self.query_projection(query)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return additive_attention(q, k, v, self.weight, **options)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        # [b, h, m, n, a] @ [h, 1, a, 1]
        return (torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3)) @ self.weight[:, None, :, None]).squeeze(-1)


class CosineScore(Score):
    """score = sharpening * (s . h) / (|s| |h|): content-based addressing, which the lengths of s and h do not change.

    The product of the directions, so `pyattn.attention` with the sharpening for its scale. A vector of zeros has no
    direction: its scores are 0, and its gradient is 0.

    Args:
        sharpening: a positive factor of all scores, the paper's beta.
        learned: whether to learn it, from that value on; it stays positive, as e to the `log_sharpening`.

    Source: Graves, Wayne and Danihelka 2014, arXiv:1410.5401, equations 5 and 6.
    """

    def __init__(
        self,
        sharpening: float = 1.0,
        *,
        learned: bool = False,
        heads: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 < check.number("sharpening", sharpening) < math.inf:
            raise RangeError(f"sharpening: expected a positive number, got {sharpening}")
        super().__init__(heads=heads)
        self.log_sharpening: nn.Parameter | None = None
        self.scale = float(sharpening)
        if learned:
            self.log_sharpening = nn.Parameter(torch.full((), math.log(sharpening), device=device, dtype=dtype))
            self.scale = 1.0

    def _keys(self, memory: Tensor) -> Tensor:
        return self._directions("memory", memory)

    def _queries(self, query: Tensor) -> Tensor:
        directions = self._directions("query", query)
        return directions if self.log_sharpening is None else directions * self.log_sharpening.exp()

    def _directions(self, name: str, t: Tensor) -> Tensor:
        return _directions(self._split(name, t)).transpose(1, 2).flatten(2)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return attention(q, k, v, scale=self.scale, **options)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self.scale * (q @ k.mT)

    def _settings(self) -> dict[str, object]:
        return {"sharpening": self.scale} if self.log_sharpening is None else {"learned": True}


class LocationScore(Score):
    """score of position i = (W s)_i: it depends on the query and on the position alone, not on what stands there.

    The product of the query with row i of W, so `pyattn.attention` with scale 1, whose keys are the first n rows. The
    softmax is over the positions that the sentence has.

    Args:
        query_size: of s.
        max_length: rows of W, `weight` [max_length, query_size]; no sentence may be longer.

    Source: Luong et al. 2015, arXiv:1508.04025, section 3.1, "location".
    """

    def __init__(
        self,
        query_size: int,
        max_length: int,
        *,
        heads: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(max_length=max_length)
        super().__init__(query_size=query_size, heads=heads)
        _check_heads("query_size", query_size, heads)
        self.weight = nn.Parameter(torch.empty(max_length, query_size, device=device, dtype=dtype))
        _draw(self.weight)

    def _keys(self, memory: Tensor) -> Tensor:
        b, n, _ = memory.shape
        if n > len(self.weight):
            raise RangeError(f"memory: expected at most max_length={len(self.weight)} positions, got {n}: there are no "
                             "weights for more")  # fmt: skip
        return self.weight[:n].expand(b, -1, -1)

    def _settings(self) -> dict[str, object]:
        return {"query_size": self.query_size, "max_length": len(self.weight)}


class ScoreAround(Score):
    """What adds something to the attention of another score, whose keys and queries are its own."""

    def __init__(self, score: Score, *, query_size: int | None = None, memory_size: int | None = None) -> None:
        if score._has_window:
            raise RangeError(f"score: expected a window around all the rest, got {type(score).__name__} inside")
        super().__init__(
            query_size=query_size or score.query_size, memory_size=memory_size or score.memory_size, heads=score.heads
        )
        self._has_exponentials = score._has_exponentials
        self.score = score

    def keys(self, memory: Tensor) -> Keys:
        return self.score.keys(memory)

    def values(self, memory: Tensor) -> Tensor:
        return self.score.values(memory)

    def _keys(self, memory: Tensor) -> Tensor:
        return self.score._keys(memory)

    def _queries(self, query: Tensor) -> Tensor:
        return self.score._queries(query)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return self.score._attention(q, k, v, **options)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self.score._scores(q, k)


class LearnedValue(ScoreAround):
    """A score with a learned projection of memory for the values: what a key is found by is not what it says.

    With `GeneralScore(rank=...)`, this is attention by queries W_q s, keys W_k h and values W_v h.

    Args:
        score: the score of queries and keys.
        memory_size: of the states that are attended to.
        value_size: of the context.
    """

    def __init__(
        self,
        score: Score,
        memory_size: int,
        value_size: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(value_size=value_size)
        super().__init__(score, memory_size=memory_size)
        _check_heads("value_size", value_size, score.heads)
        self.value_projection = Linear(memory_size, value_size, bias=bias, device=device, dtype=dtype)

    def values(self, memory: Tensor) -> Tensor:
        """[b, n, value_size], once per sentence, for `attend`."""
        _check_states("memory", memory, self.memory_size)
        return self.value_projection(memory)


def check_sizes(**sizes: int | None) -> None:
    """Raises RangeError for a size that is given and not positive."""
    for name, size in sizes.items():
        if size is not None and size <= 0:
            raise RangeError(f"{name}: expected a positive number, got {size}")


def _check_heads(name: str, size: int, heads: int) -> None:
    if size % heads != 0:
        raise RangeError(f"heads: expected a number that divides {name}={size}, got {heads}")


def _check_states(name: str, t: Tensor, size: int | None = None) -> None:
    """Whether t is [b, n, size]; of any size from 1 on without one."""
    check.check_dense(name, t)
    if t.dim() != 3 or t.shape[2] == 0 or (size is not None and t.shape[2] != size):
        last = "size >= 1" if size is None else size
        form = f"[b, m, {last}] or [b, {last}]" if name == "query" else f"[b, n, {last}]"
        raise ShapeError(f"{name}: expected {form}, got {list(t.shape)}")


def _directions(t: Tensor) -> Tensor:
    """t [..., d] over its length along d, whatever its magnitude; 0 where t is 0, and the gradient 0 with it.

    Not F.normalize: its eps is a length like any other, below float16's least number, and makes gradients of 1e12.
    """
    wide = t.to(torch.promote_types(t.dtype, torch.float32))
    largest = wide.detach().abs().amax(-1, keepdim=True)
    is_zero = largest == 0
    wide = wide / largest.masked_fill(is_zero, 1.0)  # squares neither overflow nor vanish
    length = wide.square().sum(-1, keepdim=True).masked_fill(is_zero, 1.0).sqrt()
    return (wide / length).masked_fill(is_zero, 0.0).to(t.dtype)


def _draw(weight: Tensor) -> None:
    """As torch.nn.Linear draws its rows."""
    nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
