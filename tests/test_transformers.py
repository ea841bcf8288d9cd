"""attn_implementation="pyattn" held against transformers' eager attention, in small models with random weights."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import masking_utils
from transformers.cache_utils import DynamicCache

import pyattn
from pyattn.compat import transformers as face
from pyattn.compat.transformers import BandMask, pyattn_attention_forward, pyattn_mask, register

B, LENGTH, TARGET, VOCABULARY = 2, 11, 6, 37
WINDOW = 4

register()

TEXT: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = TEXT | ENCODER
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
SEQ2SEQ = TEXT | {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "decoder_start_token_id": 1,
}  # fmt: skip

# name: (model class, the config's arguments)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("BertForMaskedLM", SMALL),
    "Roberta": ("RobertaForMaskedLM", SMALL),
    "ViT": ("ViTForImageClassification", ENCODER | {"image_size": 12, "patch_size": 4}),
    "GPT2": ("GPT2LMHeadModel", TEXT | {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "Llama": ("LlamaForCausalLM", GROUPED),
    "Mistral": ("MistralForCausalLM", GROUPED | {"sliding_window": WINDOW}),
    "Gemma2": ("Gemma2ForCausalLM", GROUPED | SLIDING | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "Qwen2": ("Qwen2ForCausalLM", GROUPED | {"use_sliding_window": False}),
    "Qwen3": ("Qwen3ForCausalLM", GROUPED | {"num_key_value_heads": 1}),
    "GptOss": ("GptOssForCausalLM", GROUPED | SLIDING | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "Bart": ("BartForConditionalGeneration", SEQ2SEQ),
    "T5": ("T5ForConditionalGeneration", TEXT | {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4,
                                                 "decoder_start_token_id": 1}),
    "Whisper": ("WhisperForConditionalGeneration", SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 9}),
    # In transformers no fused attention runs it, and its decoder does not say that it is causal.
    "NllbMoe": ("NllbMoeForConditionalGeneration", SEQ2SEQ | {"num_experts": 2, "decoder_layerdrop": 0.0}),
}  # fmt: skip
CAUSAL = ("GPT2", "Llama", "Mistral", "Gemma2", "Qwen2", "Qwen3", "GptOss")
ENCODER_DECODER = ("Bart", "T5", "Whisper", "NllbMoe")


@cache
def _original(name: str) -> Any:
    kind, options = MODELS[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    model = model_class._from_config(model_class.config_class(**options), attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 or key.endswith("sinks"):
                parameter.normal_(0, 0.3)  # by default they are so small that every key has about the same weight
    return model


def model_of(name: str) -> Any:
    return copy.deepcopy(_original(name))


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def padding_mask(side: str, length: int) -> Tensor:
    """int64 [B, length], 0 for the padding of the first sequence."""
    mask = torch.ones(B, length, dtype=torch.int64)
    mask[0, : 4 if side == "left" else 0] = 0
    mask[0, length - 3 if side == "right" else length :] = 0
    return mask


def call_of(name: str, padding: str) -> tuple[dict[str, Tensor], Tensor]:
    """What the model is called with, and bool [B, rows], which rows of its output are no padding's."""
    if name == "ViT":
        return {"pixel_values": torch.randn(B, 3, 12, 12, generator=torch.Generator().manual_seed(1))}, torch.ones(
            B
        ) > 0
    call: dict[str, Tensor] = {"input_ids": tokens(B, LENGTH)}
    real = padding_mask(padding, LENGTH)
    if padding != "none":
        call["attention_mask"] = real
    if name in ENCODER_DECODER:
        call["decoder_input_ids"] = tokens(B, TARGET, seed=2)
        real = padding_mask("right" if padding == "right" else "none", TARGET)
        if padding == "right":
            call["decoder_attention_mask"] = real
    if name == "Whisper":
        del call["input_ids"]
        call.pop("attention_mask", None)
        call["input_features"] = torch.randn(B, 8, 18, generator=torch.Generator().manual_seed(1))
    return call, real.bool()


def results(model: Any, implementation: str, call: dict[str, Any], real: Tensor) -> dict[str, Tensor]:
    """The logits of what is no padding, and the gradient of every parameter."""
    model.set_attn_implementation(implementation)
    logits = model(**call).logits[real]
    loss = (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))).sum()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return {"logits": logits.detach()} | dict(zip(parameters, grads, strict=True))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for roundings. That a bias of k has a gradient of 0 is one: it is held to the size of the others."""
    largest = max(t.abs().max() for name, t in expected.items() if name != "logits")
    for name, want in expected.items():
        error = (actual[name] - want).abs().max()
        assert error <= 2e-5 * want.abs().max() + 1e-6 * largest, f"{name}: off by {error}"


PADDED = [(name, side) for name in MODELS for side in (("none",) if name == "ViT" else ("none", "left", "right"))]


@pytest.mark.parametrize(("name", "padding"), PADDED)
def test_model_has_eagers_logits_and_gradients(name: str, padding: str) -> None:
    model, (call, real) = model_of(name), call_of(name, padding)
    assert_same(results(model, "pyattn", call, real), results(model, "eager", call, real))


def generated(model: Any, implementation: str, call: dict[str, Any], **options: Any) -> Any:
    model.set_attn_implementation(implementation)
    return model.generate(**call, max_new_tokens=7, min_new_tokens=7, do_sample=False, **options)


@pytest.mark.parametrize("name", [*CAUSAL, *ENCODER_DECODER])
def test_model_generates_eagers_tokens(name: str) -> None:
    model, (call, _) = model_of(name), call_of(name, "left")
    call = {key: t for key, t in call.items() if not key.startswith("decoder")}
    assert generated(model, "pyattn", call).equal(generated(model, "eager", call))


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "GptOss", "Whisper"])
def test_model_with_a_static_cache_generates_eagers_tokens(name: str) -> None:
    model, (call, _) = model_of(name), call_of(name, "left")
    call = {key: t for key, t in call.items() if not key.startswith("decoder")}
    static = generated(model, "pyattn", call, cache_implementation="static")
    assert static.equal(generated(model, "eager", call))


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Mistral", "Gemma2"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_model_fed_in_pieces_has_eagers_logits(name: str, padding: str) -> None:
    model, (call, real) = model_of(name), call_of(name, padding)
    model.set_attn_implementation("eager")
    expected = model(**call).logits
    model.set_attn_implementation("pyattn")
    cache, pieces = DynamicCache(config=model.config), []
    for start, end in itertools.pairwise((0, 6, 10, LENGTH)):
        piece = {"input_ids": call["input_ids"][:, start:end], "past_key_values": cache}
        piece |= {"position_ids": torch.arange(start, end)[None]}
        pieces.append(model(**piece, attention_mask=padding_mask(padding, LENGTH)[:, :end]).logits)
    torch.testing.assert_close(torch.cat(pieces, 1)[real], expected[real], rtol=0, atol=2e-5)


PACKED_POSITIONS = torch.cat([torch.arange(length) for length in (4, 2, 5)])[None]
STARTS = torch.tensor([0, 4, 6, LENGTH], dtype=torch.int32)
PACKED_CALL = {"input_ids": tokens(1, LENGTH), "position_ids": PACKED_POSITIONS}, torch.ones(1, LENGTH) > 0


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2"])
def test_packed_sequences_are_apart_as_in_eager(name: str) -> None:
    model, (call, real) = model_of(name), PACKED_CALL
    expected = results(model, "eager", call | {"use_cache": False}, real)
    assert_same(results(model, "pyattn", call | {"use_cache": False}, real), expected)
    # With a cache, transformers makes a mask in which they are not apart, and only the starts say so.
    starts = {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS, "max_length_q": 5, "max_length_k": 5}
    assert_same(results(model, "pyattn", call | starts, real), expected)
    # Without, it says so itself, and a mask is the whole truth.
    starts["cu_seq_lens_q"] = starts["cu_seq_lens_k"] = STARTS[[0, -1]]
    assert_same(results(model, "pyattn", call | starts | {"use_cache": False}, real), expected)


ATTENTIONS = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")


@pytest.mark.parametrize("name", [name for name in MODELS if name != "ViT"])
def test_output_attentions_are_eagers_and_differentiable(name: str) -> None:
    model, (call, real) = model_of(name), call_of(name, "right")
    found = []
    for implementation in ("pyattn", "eager"):
        model.set_attn_implementation(implementation)
        out = model(**call, output_attentions=True)
        kinds = {kind: out[kind] for kind in ATTENTIONS if out.get(kind)}
        last = torch.stack(list(kinds.values())[-1])[:, real.nonzero()[:, 0], :, real.nonzero()[:, 1]]
        parameter = next(
            p
            for key, p in model.named_parameters()
            if key.endswith(("q_proj.weight", "c_attn.weight", "query.weight", "q.weight"))
        )
        found.append((out.logits[real], kinds, torch.autograd.grad(last.square().sum(), parameter)[0]))
    (logits, ours, grad), (expected_logits, theirs, expected_grad) = found
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=2e-5 * expected_grad.abs().max().item())
    assert ours.keys() == theirs.keys()
    for kind, layers in theirs.items():
        assert len(ours[kind]) == len(layers) == 2, kind
        for got, want in zip(ours[kind], layers, strict=True):
            rows = real if real.shape[1] == want.shape[2] else padding_mask("right", want.shape[2]) > 0
            torch.testing.assert_close(got.transpose(1, 2)[rows], want.transpose(1, 2)[rows], rtol=0, atol=1e-5)


def test_output_attentions_not_asked_for_are_none() -> None:
    model, (call, _) = model_of("GPT2"), call_of("GPT2", "none")
    model.set_attn_implementation("pyattn")
    assert model(**call, output_attentions=True).attentions is not None
    assert model(**call).attentions is None
    assert pyattn_attention_forward(module_of(), *qkv(), None)[1] is None


def test_output_attentions_under_autocast_have_the_dtype_of_query() -> None:
    q, k, v = (t.float() for t in qkv())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, weights = pyattn_attention_forward(module_of(), q, k, v, None, output_attentions=True)
    assert out.dtype is torch.bfloat16 and weights.dtype is torch.float32
    torch.testing.assert_close(weights, defined(q, k, v, SEE_ALL)[1], rtol=0, atol=0.02)
    assert (weights.sum(-1) - 1).abs().max() < 1e-5


def test_output_attentions_collected_under_another_name_are_returned() -> None:
    collector = pytest.importorskip("transformers.utils.output_capturing")._active_collector
    token = collector.set({"cross_attentions": []})
    weights = pyattn_attention_forward(module_of(), *qkv(), None)[1]
    collector.reset(token)
    assert weights is not None


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 100 * sum(shape)), dtype=torch.float64)


def qkv(m: int = 5, n: int = 7, b: int = B) -> tuple[Tensor, Tensor, Tensor]:
    return normal(b, 4, m, 8), normal(b, 2, n, 8, seed=1), normal(b, 2, n, 6, seed=2)


def module_of(is_causal: bool | None = None, training: bool = False) -> nn.Module:
    module = nn.Module().train(training)
    if is_causal is not None:
        module.is_causal = is_causal
    return module


def defined(q: Tensor, k: Tensor, v: Tensor, see: Tensor, bias: Tensor | None = None, scaling: float = 8**-0.5,
            softcap: float | None = None, s_aux: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What transformers' models write as eager attention, in one."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.mT * scaling
    if softcap is not None:
        s = torch.tanh(s / softcap) * softcap
    s = s if bias is None else s + bias
    sinks = s.new_full((4,), -torch.inf) if s_aux is None else s_aux
    s = torch.cat([s.masked_fill(~see, -torch.inf), sinks.view(1, 4, 1, 1).expand(*s.shape[:3], 1)], -1)
    p = torch.softmax(s, -1)[..., :-1]
    return (p @ v).transpose(1, 2), p


def distance(m: int, n: int, offset: int = 0) -> Tensor:
    """[m, n], how far a key comes behind its query, where the first query stands at `offset`."""
    return torch.arange(n) - torch.arange(m)[:, None] - offset


SEE_ALL = torch.ones(5, 7) > 0
PER_HEAD = torch.rand(B, 4, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.7
PER_HEAD[..., 2] = True
ADDED = torch.where(PER_HEAD, normal(B, 4, 5, 7), -torch.inf)
LONGER = torch.cat([PER_HEAD, torch.ones(B, 4, 5, 2) > 0], -1)

# name: (is_causal of the module, m, arguments, who sees whom)
CALLS: dict[str, tuple[bool | None, int, dict[str, Any], Tensor]] = {
    "says-nothing": (None, 5, {}, SEE_ALL),
    "module-is-not-causal": (False, 5, {}, SEE_ALL),
    "module-is-causal": (True, 5, {}, distance(5, 7) <= 0),
    "argument-is-causal": (False, 5, {"is_causal": True}, distance(5, 7) <= 0),
    "argument-is-not-causal": (True, 5, {"is_causal": False}, SEE_ALL),
    "one-query": (True, 1, {}, SEE_ALL[:1]),
    "window": (True, 5, {"sliding_window": 3}, (distance(5, 7) <= 0) & (distance(5, 7) > -3)),
    "window-of-both-sides": (False, 5, {"sliding_window": 3}, distance(5, 7).abs() < 3),
    "window-of-one-query": (True, 1, {"sliding_window": 3}, distance(1, 7, offset=6) > -3),
    "bool-mask": (True, 5, {"attention_mask": PER_HEAD, "sliding_window": 2}, PER_HEAD),
    "float-mask": (True, 5, {"attention_mask": ADDED}, SEE_ALL),
    "float-mask-and-position-bias": (True, 5, {"attention_mask": ADDED, "position_bias": normal(1, 4, 5, 7)}, SEE_ALL),
    "position-bias-and-causal": (True, 5, {"position_bias": normal(1, 4, 5, 7)}, distance(5, 7) <= 0),
    "longer-mask": (None, 5, {"attention_mask": LONGER}, PER_HEAD),
    "all": (None, 5, {"attention_mask": PER_HEAD, "softcap": 0.7, "s_aux": normal(4), "scaling": 0.4}, PER_HEAD),
    "ignored": (
        None,
        5,
        {"position_ids": torch.arange(5), "use_cache": True, "head_mask": None, "new": False},
        SEE_ALL,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_attention_forward_means_what_eager_does(name: str) -> None:
    is_causal, m, options, see = CALLS[name]
    q, k, v = (t.requires_grad_() for t in qkv(m))
    options = {"attention_mask": None, "output_attentions": True} | options
    learned = [t.requires_grad_() for key, t in options.items() if key in ("position_bias", "s_aux")]
    mask, bias = options["attention_mask"], options.get("position_bias")
    if mask is not None and mask.dtype is not torch.bool:
        bias = mask if bias is None else mask + bias
    expected = defined(q, k, v, see, bias, **{key: options[key] for key in ("scaling", "softcap", "s_aux")
                                              if key in options})  # fmt: skip
    actual = pyattn_attention_forward(module_of(is_causal), q, k, v, **options)
    for got, want in zip(actual, expected, strict=True):
        d_out = normal(*want.shape, seed=5)
        torch.testing.assert_close(got, want)
        grads = (torch.autograd.grad((t * d_out).sum(), [q, k, v, *learned], retain_graph=True, materialize_grads=True)
                 for t in (got, want))  # fmt: skip
        for got_grad, want_grad in zip(*grads, strict=True):
            torch.testing.assert_close(got_grad, want_grad)


def test_attention_forward_one_query_batch_for_all_keys() -> None:
    q, k, v = qkv()
    out, _ = pyattn_attention_forward(module_of(), q[:1], k, v, None)
    torch.testing.assert_close(out, defined(q[:1], k, v, SEE_ALL)[0])


def test_attention_forward_query_that_sees_nothing_has_zeros_and_finite_gradients() -> None:
    q, k, v = (t.requires_grad_() for t in qkv())
    mask = PER_HEAD & (torch.arange(5) != 3)[:, None]
    out, weights = pyattn_attention_forward(module_of(), q, k, v, mask, output_attentions=True)
    assert out[:, 3].eq(0).all() and weights[:, :, 3].eq(0).all()
    for grad in torch.autograd.grad(out.square().sum() + weights.square().sum(), (q, k, v)):
        assert grad.isfinite().all()


def test_attention_forward_drops_while_training_and_returns_the_dropped_weights() -> None:
    q, k, v = qkv(m=40, n=50)
    torch.manual_seed(0)
    plain, kept = pyattn_attention_forward(module_of(), q, k, v, None, dropout=0.4, output_attentions=True)
    outs = []
    for _ in range(100):
        out, weights = pyattn_attention_forward(module_of(training=True), q, k, v, None, dropout=0.4,
                                                output_attentions=True)  # fmt: skip
        torch.testing.assert_close(out, (weights @ v.repeat_interleave(2, 1)).transpose(1, 2))
        dropped = weights == 0
        assert abs(dropped.double().mean() - 0.4) < 0.02
        torch.testing.assert_close(weights, torch.where(dropped, 0, kept / 0.6))
        outs.append(out)
    assert not outs[0].equal(outs[1])
    error, deviation = torch.stack(outs).mean(0) - plain, torch.stack(outs).std(0) / 10
    assert (error.abs() < 6 * deviation).all()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_model_drops_while_training_and_draws_the_same_again_for_a_checkpoint() -> None:
    model, (call, real) = model_of("GPT2").train(), call_of("GPT2", "left")
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(results(model, "pyattn", call, real))
        model.gradient_checkpointing_enable()
    assert_same(*found)
    assert not results(model, "pyattn", call, real)["logits"].equal(found[0]["logits"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_model_checkpointed_has_eagers_gradients(use_reentrant: bool) -> None:
    model, (call, real) = model_of("Mistral").train(), call_of("Mistral", "left")
    expected = results(model, "eager", call, real)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    call["use_cache"] = False
    model.set_attn_implementation("pyattn")
    loss = model(**call).logits[real] * torch.randn(
        expected["logits"].shape, generator=torch.Generator().manual_seed(3)
    )
    loss.sum().backward()
    assert_same(expected | {name: p.grad for name, p in model.named_parameters()}, expected)


PACKED = (PACKED_POSITIONS == 0).cumsum(-1).expand(B, -1) - 1
MASK_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "causal": lambda u: u.causal_mask_function,
    "bidirectional": lambda u: u.bidirectional_mask_function,
    "sliding": lambda u: u.sliding_window_causal_mask_function(WINDOW),
    "sliding-both-sides": lambda u: u.sliding_window_bidirectional_mask_function(WINDOW),
    "packed": lambda u: u.packed_sequence_compatibility_function(
        u.sliding_window_causal_mask_function(WINDOW), PACKED_POSITIONS.expand(B, -1), PACKED
    ),
    "chunked": lambda u: u.chunked_causal_mask_function(3, torch.tensor([0, 1])),
    "or": lambda u: u.or_masks(u.causal_mask_function, lambda b, h, q, k: k == 5),
    "two-windows": lambda u: u.and_masks(u.sliding_window_overlay(3), u.sliding_window_causal_mask_function(WINDOW)),
}
# (queries, keys, where the first query stands, where the first key stands)
PLACES = {
    "square": (LENGTH, LENGTH, 0, 0),
    "one-more-than-the-window": (WINDOW + 1, WINDOW + 1, 0, 0),
    "continued": (3, 9, 6, 0),
    "sliding-cache": (3, 7, 9, 5),
    "static-cache": (4, 9, 0, 0),
    "static-cache-continued": (3, 9, torch.tensor(4), 0),
}


def mask_call(function: str, padding: str, place: str, config: str = "Llama") -> dict[str, Any]:
    m, n, q_offset, kv_offset = PLACES[place]
    both_sides = function in ("bidirectional", "sliding-both-sides")
    return {
        "batch_size": B, "q_length": m, "kv_length": n, "q_offset": q_offset, "kv_offset": kv_offset,
        "mask_function": MASK_FUNCTIONS[function](masking_utils), "device": torch.device("cpu"), "dtype": torch.float32,
        "attention_mask": None if padding == "none" else padding_mask(padding, int(q_offset) + m) > 0,
        "local_size": {"sliding": WINDOW, "sliding-both-sides": WINDOW, "chunked": 3}.get(function),
        "allow_is_causal_skip": not both_sides and function not in ("packed", "or", "two-windows"),
        "allow_is_bidirectional_skip": both_sides, "config": _original(config).config,
    }  # fmt: skip


def unskipped(call: dict[str, Any]) -> Tensor:
    return masking_utils.sdpa_mask(**call | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("function", "place"),
    [(function, place) for function in MASK_FUNCTIONS for place in PLACES if function != "packed" or place == "square"],
)
def test_mask_is_sdpas_read_as_a_band_or_as_a_tensor(function: str, place: str, padding: str) -> None:
    call = mask_call(function, padding, place)
    expected, mask = unskipped(call), pyattn_mask(**call)
    if function in ("chunked", "or", "two-windows"):
        assert type(mask) is Tensor
    else:
        assert isinstance(mask, BandMask)
        assert mask.shape == expected.shape and mask.dtype is torch.bool
        q, k, v = qkv(*expected.shape[2:])
        out, _ = pyattn_attention_forward(module_of(), q, k, v, mask)
        assert mask.dense is None
        torch.testing.assert_close(out, pyattn_attention_forward(module_of(), q, k, v, expected)[0])
    assert torch.equal(mask & True, expected)


@pytest.mark.parametrize("name", ["Bert", *CAUSAL, "Bart", "T5", "Whisper"])
def test_mask_of_a_model_is_never_made_dense(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(BandMask, "_made_dense", lambda mask: pytest.fail(f"{mask.shape} was made dense"))
    monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, "pyattn",
                        lambda **call: seen.append(pyattn_mask(**call)) or seen[-1])  # fmt: skip
    model = model_of(name)
    model.set_attn_implementation("pyattn")
    for padding in ("none", "left", "right"):
        model(**call_of(name, padding)[0])
    assert seen and all(isinstance(mask, BandMask) for mask in seen)


def test_mask_right_padding_becomes_key_lengths_and_no_padding_nothing() -> None:
    right = pyattn_mask(**mask_call("causal", "right", "square"))
    assert right.key_lengths.tolist() == [LENGTH - 3, LENGTH] and right.keys is None
    assert pyattn_mask(**mask_call("causal", "left", "square")).keys.shape == (B, 1, 1, LENGTH)
    everything = pyattn_mask(**mask_call("causal", "none", "square") | {"attention_mask": torch.ones(B, LENGTH) > 0})
    assert everything.keys is None and everything.key_lengths is None


def test_mask_written_to_is_read_as_written() -> None:
    call = mask_call("causal", "left", "square")
    mask, expected = pyattn_mask(**call), unskipped(call).clone()
    for t in (mask, expected):
        t[:, :, :, 5:8] = True
        t[..., 2].fill_(False)
    q, k, v = qkv(LENGTH, LENGTH)
    out, _ = pyattn_attention_forward(module_of(), q, k, v, mask)
    torch.testing.assert_close(out, pyattn_attention_forward(module_of(), q, k, v, expected)[0])


@pytest.mark.parametrize(("config", "may_be_none"), [("Llama", True), ("GptOss", False)])
def test_mask_is_none_only_for_models_that_sdpa_runs(config: str, may_be_none: bool) -> None:
    call = mask_call("causal", "none", "square", config)
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=True)
    skips = compiled(lambda: masking_utils.sdpa_mask(**call))() is None  # in old torch not even sdpa's mask is None
    assert (compiled(lambda: pyattn_mask(**call))() is None) == (may_be_none and skips)
    wide = masking_utils.chunked_causal_mask_function(LENGTH + 1, torch.zeros(B, dtype=torch.int64))
    assert (pyattn_mask(**call | {"mask_function": wide, "local_size": LENGTH + 1}) is None) == may_be_none


def test_mask_of_a_model_that_only_eager_runs_is_eagers() -> None:
    call = mask_call("bidirectional", "none", "square", config="NllbMoe")
    assert pyattn_mask(**call).equal(torch.zeros(B, 1, LENGTH, LENGTH))


@pytest.mark.parametrize(("name", "kind"), [("GPT2", "none"), ("Llama", "left"), ("Mistral", "packed")])
def test_compiled_model_has_no_graph_break_and_eagers_results(name: str, kind: str) -> None:
    torch._dynamo.reset()
    model, (call, real) = model_of(name), PACKED_CALL if kind == "packed" else call_of(name, kind)
    expected = results(model, "eager", call | {"use_cache": False}, real)
    if kind == "packed":
        call = call | {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS}
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert_same(results(model, "pyattn", call, real), expected)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_compiled_layers_take_the_band(padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(BandMask, "_made_dense", lambda mask: pytest.fail(f"{mask.shape} was made dense"))
    model, (call, real) = model_of("Mistral"), call_of("Mistral", padding)
    expected = results(model, "eager", call, real)
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    assert_same(results(model, "pyattn", call, real), expected)


FLEX = torch.nn.attention.flex_attention.create_block_mask(lambda b, h, q, k: q >= k, B, 1, 5, 7, device="cpu")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"novel": torch.ones(1)}, pyattn.UnsupportedError, r"^novel: .*register\(ignore="),
        ({"head_mask": torch.ones(4)}, pyattn.UnsupportedError, "^head_mask: .*softmax"),
        ({"indices": torch.ones(4)}, pyattn.UnsupportedError, "^indices: .*eager"),
        ({"block_indices": torch.ones(4)}, pyattn.UnsupportedError, "^block_indices: .*eager"),
        ({"sinks": torch.ones(4)}, pyattn.UnsupportedError, "^sinks: .*s_aux"),
        ({"cache": object()}, pyattn.UnsupportedError, "^cache: .*continuous batching"),
        ({"attention_mask": FLEX}, pyattn.UnsupportedError, "^attention_mask: .*BlockMask"),
        ({"attention_mask": torch.ones(B, 7) > 0}, pyattn.ShapeError, r"^attention_mask: .*\[2, 7\]"),
        ({"attention_mask": torch.ones(B, 1, 5, 7).long()}, pyattn.DtypeError, "^attention_mask: .*int64"),
        ({"cu_seq_lens_q": STARTS}, pyattn.ShapeError, "^query: expected b=1"),
        ({"b": 1, "cu_seq_lens_q": STARTS}, pyattn.UnsupportedError, "^cu_seq_lens_q: .*m=5 and n=7"),
        (
            {"b": 1, "m": 7, "cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS + 1},
            pyattn.UnsupportedError,
            "^cu_seq_lens_k: ",
        ),
        ({"scaling": torch.ones(1)}, pyattn.DtypeError, "^scaling: "),
        ({"s_aux": torch.ones(3)}, pyattn.ShapeError, "^s_aux: "),
        (
            {"b": 1, "m": 7, "cu_seq_lens_k": STARTS},
            pyattn.UnsupportedError,
            "^cu_seq_lens_k: .* cu_seq_lens_q as well",
        ),
        ({"b": 1, "m": 7, "cu_seq_lens_q": STARTS + 1}, pyattn.RangeError, "^cu_seq_lens_q: "),
    ],
)
def test_attention_forward_bad_option_raises(options: dict, error: type, words: str) -> None:
    options = {"attention_mask": None, "m": 5, "b": B} | options
    with pytest.raises(error, match=words):
        pyattn_attention_forward(module_of(), *qkv(m=options.pop("m"), b=options.pop("b")), **options)


def test_register_ignores_what_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(face, "_IGNORED", set(face._IGNORED))
    register(ignore=["novel"])
    pyattn_attention_forward(module_of(), *qkv(), None, novel=torch.ones(1))
    with pytest.raises(pyattn.DtypeError, match="ignore: expected several names"):
        register("novel")


@pytest.mark.parametrize("name", ["Bloom", "MPNet"])
def test_model_that_computes_attention_itself_is_refused_by_name(name: str) -> None:
    config = getattr(transformers, f"{name}Config")()
    with pytest.raises(
        pyattn.UnsupportedError, match=f"attn_implementation: {name}Model computes attention in its own"
    ):
        transformers.AutoModel.from_config(config, attn_implementation="pyattn")


def test_mask_of_a_model_whose_file_is_not_found_is_bool_and_not_none() -> None:
    config = type("Config", (transformers.PretrainedConfig,), {"__module__": "of_a_user"})()
    config._attn_implementation = "pyattn"
    mask = transformers.masking_utils.create_causal_mask(config, torch.zeros(2, 1, 8), None, None)
    assert mask is not None and mask.dtype is torch.bool


def test_register_without_transformers_or_with_an_old_one_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", type(sys)("transformers"))
    sys.modules["transformers"].__version__ = "4.40.0"
    with pytest.raises(pyattn.UnsupportedError, match=r"^transformers: expected version 4\.57 or newer, got 4\.40\.0"):
        register()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(pyattn.UnsupportedError, match=r"^transformers: .* got none"):
        register()


def test_import_of_pyattn_leaves_transformers_alone() -> None:
    code = "import sys, pyattn, pyattn.compat.transformers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
