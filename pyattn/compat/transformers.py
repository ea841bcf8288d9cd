"""attn_implementation="pyattn" in Hugging Face transformers, 4.57 and 5: `register()` and what it registers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pyattn import core
from pyattn.backends.reference import cast, dropout_keep, scores, visible
from pyattn.check import DtypeError, ShapeError, UnsupportedError, by_names, check_starts, is_traced, without_autocast
from pyattn.face import showing
from pyattn.spec import AttentionSpec, Inputs, Numbers, dtype_name

__all__ = ["BandMask", "pyattn_attention_forward", "pyattn_mask", "register"]

__dir__ = showing(__all__)

# Keywords that come with a call and leave attention alone: a model hands down whatever nobody on the way has taken.
_IGNORED = {
    # What to return or to keep. Whether to return the weights is `output_attentions`, which is read.
    "use_cache", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep",
    # Where tokens stand and what they are, which by now is in q, k and the mask.
    "position_ids", "cache_position", "position_embeddings", "token_type_ids", "mm_token_type_ids",
    # For the recurrent layers of a hybrid model, and for the loss.
    "seq_idx", "labels", "num_items_in_batch",
    # For FlashAttention: pyattn need not know the longest sequence, and its gradients are always the same bits.
    "max_length_q", "max_length_k", "deterministic",
}  # fmt: skip

_REFUSED = {
    "head_mask": "weights are not scaled after the softmax; attn_implementation='eager' does so",
    "sinks": "they are one per query, and pyattn has one per head, as `s_aux`",
    "indices": "they choose each query's keys, and stand in no mask; with attn_implementation='eager' they do",
    "block_indices": "they choose each query's keys, and stand in no mask; with attn_implementation='eager' they do",
    "cache": "continuous batching needs an implementation that reads its pages; attn_implementation='sdpa' does",
}

_NAMES = {
    "q": "query", "k": "key", "v": "value", "mask": "attention_mask", "bias": "attention_mask", "dropout_p": "dropout",
    "scale": "scaling", "sinks": "s_aux", "window": "sliding_window",
}  # fmt: skip

# What transformers has been asked to collect. Newer ones ask for weights by this: of the models that take
# `output_attentions`, some, like GPT-2, do not hand it down to attention.
_collector: Any = None


def register(ignore: Iterable[str] = ()) -> None:
    """Makes attn_implementation="pyattn" known to transformers, for the models that let attention be exchanged.

    `from_pretrained(..., attn_implementation="pyattn")` and `model.set_attn_implementation("pyattn")` then take it.
    May be called again.

    Args:
        ignore: further keywords that come with a call and do not concern attention. An unknown one raises, because
            attention without it could be another.

    Raises:
        UnsupportedError: transformers is missing, or too old. Later, from a model that computes attention by itself.

    Source: https://huggingface.co/docs/transformers/attention_interface
    """
    global _collector
    try:
        import transformers
    except ModuleNotFoundError:
        raise UnsupportedError("transformers: expected version 4.57 or newer, got none: it is not installed") from None
    if not hasattr(transformers, "AttentionMaskInterface"):
        raise UnsupportedError(f"transformers: expected version 4.57 or newer, got {transformers.__version__}: "
                               "attention and its mask cannot be exchanged in it")  # fmt: skip
    if isinstance(ignore, str):
        raise DtypeError(f"ignore: expected several names, got the string {ignore!r}")
    _refuse_models_without_the_interface(transformers.PreTrainedModel)
    transformers.AttentionInterface.register("pyattn", pyattn_attention_forward)
    transformers.AttentionMaskInterface.register("pyattn", pyattn_mask)
    try:
        from transformers.utils.output_capturing import _active_collector

        _collector = _active_collector
    except ModuleNotFoundError:  # as in 5.0, where a model that does not hand `output_attentions` down gets no weights
        _collector = None
    _IGNORED.update(ignore)


def _refuse_models_without_the_interface(base: Any) -> None:
    """Of an implementation that it does not know transformers thinks that every model has it."""
    original = base.get_correct_attn_implementation
    if original.__module__ == __name__:
        return

    def get_correct_attn_implementation(self: Any, requested_attention: str | None, *rest: Any, **options: Any) -> str:
        if requested_attention == "pyattn" and _computes_attention_itself(type(self), self.config):
            raise UnsupportedError(
                f"attn_implementation: {type(self).__name__} computes attention in its own code, which cannot be "
                "exchanged; attn_implementation='eager' runs it"
            )
        return original(self, requested_attention, *rest, **options)

    base.get_correct_attn_implementation = get_correct_attn_implementation


def _computes_attention_itself(model: type, config: Any) -> bool:
    """Whether the model's file has attention in it and not the interface. One made of models may be of both kinds."""
    file = sys.modules[model.__module__]
    return (
        not getattr(config, "sub_configs", None)
        and not hasattr(file, "ALL_ATTENTION_FUNCTIONS")
        and any(
            isinstance(c, type) and "Attention" in name and c.__module__ == file.__name__
            for name, c in vars(file).items()
        )
    )


def pyattn_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the attention modules of transformers call; means what their eager attention does.

    Args:
        module: its `training` turns dropout on. Its `is_causal` counts where there is neither a mask nor the argument.
        query: [b, h, m, d]; or [1, h, m, d] for all.
        key: [b, hk, n, d]; hk divides h, and head i reads key/value head i // (h // hk).
        value: [b, hk, n, dv].
        attention_mask: from `pyattn_mask`, or [1|b, 1|h, 1|m, n]: bool, True means attend, or floating, added to the
            scores. Where there is one, neither is_causal nor sliding_window is read.
        dropout: probability of dropping a weight.
        scaling: 1 / sqrt(d) by default.
        is_causal: query i sees the keys j <= i, a single one all keys.
        position_bias: broadcastable to [b, h, m, n]; added to the scores, with gradient.
        sliding_window: how many keys up to its own a query sees; where not causal, also from its own on.
        softcap: scores become softcap * tanh(score / softcap).
        s_aux: [h], attention sinks.
        output_attentions: also return the weights, by a second pass that has the memory of m * n.
        cu_seq_lens_q, cu_seq_lens_k: [s + 1], the starts of s sequences that lie packed in a batch of 1, and the end.
        kwargs: what does not concern attention.

    Returns:
        out [b, m, h, dv], and None or the weights [b, h, m, n] that the values were multiplied with, so after dropout
        and with sinks. A query that sees no key has zeros in both, where eager has the average of all keys.

    Raises:
        UnsupportedError: a keyword without which attention would be another, or that is unknown.
        ShapeError, DtypeError, DeviceError, RangeError: as `pyattn.attention`.
    """
    _refuse_unknown(kwargs)
    b = key.shape[0]
    if query.shape[0] == 1 < b:
        query = query.expand(b, -1, -1, -1)
    offset, options = _visibility(module, query, key, attention_mask, is_causal, sliding_window)
    if cu_seq_lens_k is not None and cu_seq_lens_q is None:
        raise UnsupportedError("cu_seq_lens_k: expected cu_seq_lens_q as well: sequences are packed on both sides")
    if cu_seq_lens_q is not None and "segment_ids" not in options:
        options["segment_ids"] = _segments(query, key, cu_seq_lens_q, cu_seq_lens_k)
    if position_bias is not None:
        options["bias"] = position_bias + options["bias"] if "bias" in options else position_bias
    x, numbers = by_names(
        _NAMES | ({"bias": "position_bias"} if position_bias is not None else {}), core.prepare,
        query, key, value, scale=scaling, softcap=softcap, sinks=s_aux, dropout_p=dropout if module.training else 0.0,
        **options,
    )  # fmt: skip
    numbers = numbers._replace(offset=offset)
    out, lse = core.run(x, numbers, "auto")
    out = out.transpose(1, 2).contiguous()
    return out, _weights(x, numbers, lse).to(query.dtype) if output_attentions or _collects_weights() else None


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    for name, argument in kwargs.items():
        if argument is not None and argument is not False and name not in _IGNORED:
            reason = _REFUSED.get(name, "pyattn does not know it; if it does not concern attention, name it in "
                                        "pyattn.compat.transformers.register(ignore=[...])")  # fmt: skip
            raise UnsupportedError(f"{name}: expected None, got {type(argument).__name__}: {reason}")


def _visibility(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> tuple[int, dict[str, Any]]:
    """Who sees whom: the offset of `pyattn.spec`, and arguments of pyattn.attention."""
    b, m, n = key.shape[0], query.shape[2], key.shape[2]
    if attention_mask is None:
        # Of a module that says nothing sdpa thinks that it is causal, and eager that it is not.
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        side = None if sliding_window is None else sliding_window - 1
        # Several queries begin with the first key, as in a static cache just begun; a single one is the last.
        return (0 if m > 1 else n - 1), {"window": (side, 0 if causal else side)}
    if isinstance(attention_mask, BandMask) and attention_mask.dense is None and attention_mask.shape == (b, 1, m, n):
        offset, left, right = attention_mask.band
        options: dict[str, Any] = {"window": (left, right)}
        if attention_mask.keys is not None:
            options["mask"] = attention_mask.keys
        if attention_mask.key_lengths is not None:
            options["key_lengths"] = attention_mask.key_lengths
        if attention_mask.segments is not None:
            options["segment_ids"] = attention_mask.segments, attention_mask.segments
        return offset, options
    if not isinstance(attention_mask, Tensor):
        raise UnsupportedError(f"attention_mask: expected a tensor, got {type(attention_mask).__name__}")
    if attention_mask.dim() != 4:
        raise ShapeError(f"attention_mask: expected [b={b}, 1 or h, m={m}, n={n}], got {list(attention_mask.shape)}")
    attention_mask = attention_mask[..., :n]  # in transformers 4 it may reach beyond the keys
    if attention_mask.dtype is torch.bool:
        return 0, {"mask": attention_mask}
    if not attention_mask.is_floating_point():
        raise DtypeError(f"attention_mask: expected bool or a floating dtype, got {dtype_name(attention_mask.dtype)}")
    return 0, {"bias": attention_mask}


def _segments(query: Tensor, key: Tensor, starts_q: Tensor, starts_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """The number of the packed sequence that each query, and each key, is in: int32 [1, m], twice."""
    if query.shape[0] != 1:
        raise ShapeError(f"query: expected b=1 with cu_seq_lens_q, got b={query.shape[0]}: sequences are packed in one")
    m, n = query.shape[2], key.shape[2]
    if m != n:
        raise UnsupportedError(f"cu_seq_lens_q: expected as many keys as queries, got m={m} and n={n}: "
                               "packed sequences do not go on from cached keys")  # fmt: skip
    if starts_k is not None and starts_k.is_cpu and not is_traced(starts_k) and not starts_k.equal(starts_q):
        raise UnsupportedError(
            "cu_seq_lens_k: expected cu_seq_lens_q, got others: queries attend to their own sequence"
        )
    if starts_q.is_cpu and not is_traced(starts_q):
        check_starts("cu_seq_lens_q", starts_q.tolist(), m)
    places = torch.arange(m, dtype=starts_q.dtype, device=query.device)
    segments = torch.searchsorted(starts_q[1:], places, right=True, out_int32=True)[None]
    return segments, segments


def _collects_weights() -> bool:
    # torch.compile traces a collector that was set while compiling, and no other.
    if _collector is None or (torch.compiler.is_compiling() and not _collector.compiling):
        return False
    collected = _collector.get()
    return collected is not None and any(name.endswith("attentions") for name in collected)


def _weights(x: Inputs, numbers: Numbers, lse: Tensor) -> Tensor:
    """The weights [b, h, m, n] that the values were multiplied with, in float32 or float64; differentiable."""
    spec = AttentionSpec.of(x, numbers)
    x = cast(x, spec.accumulator)
    with without_autocast(x.q.device.type):
        s = scores(spec, x, x.k.repeat_interleave(spec.h // spec.hk, 1))
    # Hidden before exp, not after: exp may overflow there, and its gradient would be NaN.
    p = torch.where(visible(spec, x), s - lse[..., None], -torch.inf).exp()
    if x.seed is not None:
        p = p * dropout_keep(spec, x) / (1 - spec.dropout_p)
    return p


class BandMask(Tensor):
    """A bool mask [b, 1, m, n] held as the parts that pyattn reads; True means attend.

    To everything else it is the tensor that it means: the first operation makes that, and works on it. From then on it
    is the mask, so that one may write into it, too.
    """

    band: tuple[int, int | None, int | None]  # offset, left and right, as `pyattn.spec` has them
    keys: Tensor | None  # bool [b, 1, 1, n], which are no padding
    key_lengths: Tensor | None  # int32 [b], how many keys come before the padding
    segments: Tensor | None  # [b, m], the sequences that queries, and as many keys, belong to
    dense: Tensor | None  # bool [b, 1, m, n], once there was need of it
    anchor: Tensor  # of no elements: torch.compile wants to find a tensor inside

    _TENSORS = ("keys", "key_lengths", "segments", "dense", "anchor")
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, shape: Sequence[int], band: tuple[int, int | None, int | None], **tensors: Tensor) -> BandMask:
        device = tensors["anchor"].device
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        self.band = band
        for name in cls._TENSORS:
            setattr(self, name, tensors.get(name))
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(BandMask, BandMask._made_dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [name for name in self._TENSORS if getattr(self, name) is not None], self.band

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], band: Any, shape: Sequence[int], stride: Any) -> BandMask:
        return BandMask(shape, band, **tensors)

    def _made_dense(self) -> Tensor:
        if self.dense is None:
            b, _, m, n = self.shape
            offset, left, right = self.band
            i, j = torch.arange(m, device=self.device)[:, None] + offset, torch.arange(n, device=self.device)
            see = torch.ones(b, 1, m, n, dtype=torch.bool, device=self.device)
            if left is not None:
                see &= j >= i - left
            if right is not None:
                see &= j <= i + right
            if self.keys is not None:
                see &= self.keys
            if self.key_lengths is not None:
                see &= j < self.key_lengths[:, None, None, None]
            if self.segments is not None:
                see &= self.segments[:, None, :, None] == self.segments[:, None, None, :]
            self.dense = see
        return self.dense


def pyattn_mask(**call: Any) -> Tensor | None:
    """The mask that every layer of a kind shares, made of what transformers says about it once per call of a model.

    A band (causal, a window) over keys that are there or are padding, packed into sequences or not, becomes a
    `BandMask`, in which nothing is m * n. Anything else becomes bool [b, 1, m, n], as sdpa's mask is; so does what is
    for one query, comes from transformers before 5.4, or is traced. The mask may be None, and leave it to each module
    whether it is causal, only for models that sdpa may run: of others, not all modules tell.

    Models that transformers lets neither sdpa nor FlashAttention run expect the floating mask of eager, and get it.

    Args:
        call: the arguments of `transformers.masking_utils.sdpa_mask`, and `config`.
    """
    from transformers.masking_utils import eager_mask, sdpa_mask
    from transformers.utils import import_utils

    config = type(call.get("config"))
    if not _declares(config, "_supports_sdpa", "_supports_flash_attn"):
        return eager_mask(**call | {"allow_is_bidirectional_skip": False})
    if call.get("q_length", 1) > 1 and not import_utils.is_tracing(call["attention_mask"]):
        band = _band(call["mask_function"])
        if band is not None:
            return _band_mask(call, **band)
    if not _declares(config, "_supports_sdpa"):
        call |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(**call)


@torch.compiler.assume_constant_result
def _declares(config: type, *flags: str) -> bool:
    """Whether a model that is made from such a config sets one of the flags."""
    return not _declared(config).isdisjoint(flags)


@cache
def _declared(config: type) -> set[str]:
    """The flags set in the file of models that goes with the file of the config; where that is not to be found, one
    that says of a mask what is true anywhere: that it may be bool, and not None."""
    flags = set()
    if config.__module__.replace("configuration_", "modeling_") == config.__module__:
        flags.add("_supports_flash_attn")
    for base in config.__mro__:
        file = sys.modules.get(base.__module__.replace("configuration_", "modeling_"))
        models = (
            [c for c in vars(file).values() if isinstance(c, type) and c.__module__ == file.__name__] if file else []
        )
        flags |= {
            flag for flag in ("_supports_sdpa", "_supports_flash_attn") for c in models if getattr(c, flag, False)
        }
    return flags


def _band(mask_function: Callable) -> dict[str, Any] | None:
    """Left, right and segments of one of transformers' own mask functions; None if it may say anything else."""
    if getattr(mask_function, "__module__", None) != "transformers.masking_utils":
        return None
    cells = zip(mask_function.__code__.co_freevars, mask_function.__closure__ or (), strict=True)
    inner = {name: cell.cell_contents for name, cell in cells}
    match mask_function.__qualname__.removesuffix(".<locals>.inner_mask"):
        case "causal_mask_function":
            return {"right": 0}
        case "bidirectional_mask_function":
            return {}
        case "sliding_window_overlay":
            return {"left": inner["sliding_window"] - 1}
        case "sliding_window_bidirectional_overlay":
            return {"left": inner["sliding_window"], "right": inner["sliding_window"]}
        case "packed_sequence_mask_function":
            return {"segments": inner["packed_sequence_mask"]}
        case "remap_positions_for_packed_sequence":  # in one sequence positions count up by one, as indices do
            return _band(inner["mask_function"])
        case "and_masks.<locals>.and_mask":
            together: dict[str, Any] = {}
            for part in map(_band, inner["mask_functions"]):
                if part is None or part.keys() & together.keys():
                    return None
                together |= part
            return together
    return None


def _band_mask(
    call: dict[str, Any], left: int | None = None, right: int | None = None, segments: Tensor | None = None
) -> BandMask:
    from transformers.masking_utils import prepare_padding_mask

    n, first = call["kv_length"], int(call["kv_offset"])
    tensors = {"anchor": torch.empty(0, device=call["device"])}
    if segments is not None:
        tensors["segments"] = segments.to(torch.int32)
    padding = prepare_padding_mask(call["attention_mask"], n, first)
    if padding is not None:
        keys = padding[:, first : first + n]
        lengths = keys.sum(-1, dtype=torch.int32)
        at_the_end = keys == (torch.arange(n, device=keys.device) < lengths[:, None])
        is_absent, is_at_the_end = torch.stack([keys.all(), at_the_end.all()]).tolist()  # one wait for the device
        if not is_absent:
            tensors |= {"key_lengths": lengths} if is_at_the_end else {"keys": keys[:, None, None, :]}
    band = int(call["q_offset"]) - first, left, right
    return BandMask((call["batch_size"], 1, call["q_length"], n), band, **tensors)
