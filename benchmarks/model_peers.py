"""The models that are timed side by side: pyattn's, the same with torch's attention, and transformers'."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyattn.decoding.beam import beam_search
from pyattn.decoding.sampling import generate
from pyattn.models import bert, gpt, xlnet

OURS = {"pyattn": "pyattn", "torch": "pyattn's model, torch's attention"}  # by the name of the attention
THEIRS = {"sdpa": "transformers sdpa", "eager": "transformers eager"}  # by attn_implementation
BASELINE = THEIRS["sdpa"]
_MASKED = 0.15  # of BERT's tokens

Step = Callable[[], object]
Losses = dict[str, Callable[[nn.Module], Tensor]]  # by the name of the peer


@dataclass(frozen=True, slots=True)
class Training:
    """One optimizer step of a model on b texts of m tokens."""

    model: str  # "GPT-2 124M", "BERT-base" or "XLNet-base"
    b: int
    m: int
    dtype: str  # "float32", or "bfloat16" under autocast
    dropout: float
    compiled: bool = False

    @property
    def label(self) -> str:
        return f"{self.model} {self.b} x {self.m} {self.dtype}" + (" dropout" if self.dropout else "")


@dataclass(frozen=True, slots=True)
class Generation:
    """New tokens behind b prompts, without an end token; GPT-2 124M. beams = 1 is greedy."""

    b: int
    beams: int
    dtype: str
    prompt: int = 512
    new: int = 128

    @property
    def label(self) -> str:
        return f"b{self.b} {'greedy' if self.beams == 1 else f'beam {self.beams}'} {self.dtype}"


def training_steps(case: Training, device: str) -> dict[str, Step]:
    """A step for each peer, all from the same weights on the same batch."""
    models = _trained(case.model, case.dropout, device)
    losses = _MODELS[case.model][1](models, case, device)
    return {name: _step(models[name].train(), loss, case, device) for name, loss in losses.items()}


def step_operations(case: Training) -> float:
    """Of a step, a multiply-add counting as two (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

    Six for each weight and token, and 12 * layers * width * m a token for attention, whole although it may be causal.
    BERT's head counts at the masked tokens alone, where it is needed. XLNet has one product more in attention, with
    distances, whose own projection, of 2 m rows and without a gradient of what is projected, is the whole batch's.
    """
    is_gpt, is_xlnet = case.model.startswith("GPT"), case.model.startswith("XLNet")
    config: Any = _config(case.model)
    hidden = 4 * config.width if is_gpt else config.hidden
    layers = config.layers * (4 * config.width**2 + 2 * config.width * hidden)
    head = config.vocab * config.width
    if case.model.startswith("BERT"):
        head = _MASKED * (head + config.width**2)
    attention = (18 if is_xlnet else 12) * config.layers * config.width * case.m
    distances = 8 * case.m * config.layers * config.width**2 if is_xlnet else 0
    return case.b * case.m * (6 * (layers + head) + attention) + distances


def generations(case: Generation, device: str) -> dict[str, Callable[[], list[list[int]]]]:
    """A call for each peer, which returns its texts."""
    prompt = torch.randint(0, 50256, (case.b, case.prompt), generator=torch.Generator().manual_seed(1)).to(device)
    return {
        name: partial(_ours if name in OURS.values() else _transformers_texts, model, prompt, case)
        for name, model in _writers(case.dtype, device).items()
    }


# Models of the last case, for the next one with the same.
@lru_cache(maxsize=1)
def _trained(model: str, dropout: float, device: str) -> dict[str, nn.Module]:
    return _MODELS[model][0](dropout, device)


@lru_cache(maxsize=1)
def _writers(dtype: str, device: str) -> dict[str, nn.Module]:
    models = _gpts(0.0, device)
    return {name: m.to(getattr(torch, dtype)).eval() for name, m in models.items() if name != THEIRS["eager"]}


def _ours(model: Any, prompt: Tensor, case: Generation) -> list[list[int]]:
    if case.beams == 1:
        return generate(model, prompt, case.new)
    return [best[0].tokens for best in beam_search(model, prompt, case.new, beams=case.beams)]


def _transformers_texts(model: Any, prompt: Tensor, case: Generation) -> list[list[int]]:
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=case.new, min_new_tokens=case.new,
        do_sample=False, num_beams=case.beams, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[:, prompt.shape[1] :].tolist()


def _gpts(dropout: float, device: str) -> dict[str, nn.Module]:
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    first = gpt.GPT(replace(gpt.PUBLISHED["gpt2"], dropout=dropout))
    return _peers(first, partial(gpt.GPT.from_pretrained, dropout=dropout), GPT2LMHeadModel, device)


def _berts(dropout: float, device: str) -> dict[str, nn.Module]:
    from transformers import BertForPreTraining

    torch.manual_seed(0)
    config = replace(bert.PUBLISHED["bert-base"], dropout=dropout, context=1024)
    return _peers(
        bert.BertForPreTraining(config),
        partial(bert.BertForPreTraining.from_pretrained, dropout=dropout),
        BertForPreTraining,
        device,
    )


def _xlnets(dropout: float, device: str) -> dict[str, nn.Module]:
    """Two: relative scores are no attention of torch's, and transformers has no fused one for them."""
    from transformers import XLNetLMHeadModel

    torch.manual_seed(0)
    first = xlnet.XLNetLMHead(replace(xlnet.PUBLISHED["xlnet-base-cased"], dropout=dropout))
    ours = partial(xlnet.XLNetLMHead.from_pretrained, dropout=dropout)
    return _peers(first, ours, XLNetLMHeadModel, device, ("pyattn",), ("eager",))


def _peers(
    first: Any,
    ours: Callable[..., nn.Module],
    theirs: Any,
    device: str,
    attentions: Iterable[str] = tuple(OURS),
    implementations: Iterable[str] = tuple(THEIRS),
) -> dict[str, nn.Module]:
    """Every peer with the weights of `first`, if they compute the same.

    Raises:
        AssertionError: a peer's logits are not the others'.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        first.save_pretrained(folder)
        models = {OURS[attention]: ours(folder, attention=attention) for attention in attentions}
        for kind in implementations:
            models[THEIRS[kind]] = theirs.from_pretrained(folder, attn_implementation=kind)
    for model in models.values():
        model.to(device)
    _check(models, device)
    return models


@torch.no_grad()
def _check(models: dict[str, nn.Module], device: str) -> None:
    tokens = torch.randint(0, 30000, (2, 24), generator=torch.Generator().manual_seed(2)).to(device)
    logits = {name: _logits(model.eval()(tokens)) for name, model in models.items()}
    for name, found in logits.items():
        assert torch.allclose(found, logits[THEIRS["eager"]], atol=1e-3, rtol=1e-3), f"{name} has other logits"


def _logits(result: Any) -> Tensor:
    """Of a GPT's tokens or a BERT's masked tokens."""
    if isinstance(result, Tensor):
        return result
    return result[0] if isinstance(result, tuple) else result.get("logits", result.get("prediction_logits"))


def _gpt_losses(models: dict[str, nn.Module], case: Training, device: str) -> Losses:
    windows = torch.randint(0, 50256, (case.b, case.m + 1), generator=torch.Generator().manual_seed(1)).to(device)
    inputs, targets = windows[:, :-1], windows[:, 1:]

    def ours(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())

    def theirs(model: nn.Module) -> Tensor:
        return model(inputs, labels=inputs, use_cache=False).loss

    return {name: ours if name in OURS.values() else theirs for name in models}


def _bert_losses(models: dict[str, nn.Module], case: Training, device: str) -> Losses:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1000, 30000, (case.b, case.m), generator=generator).to(device)
    segments = (torch.arange(case.m) >= case.m // 2).long().expand(case.b, -1).contiguous().to(device)
    follows = torch.randint(0, 2, (case.b,), generator=generator).to(device)
    places = torch.randperm(tokens.numel(), generator=generator)[: int(_MASKED * tokens.numel())].sort().values
    positions = places.to(device)
    targets = tokens.flatten()[positions]
    labels = torch.full_like(tokens, -100).flatten().index_put((positions,), targets).view_as(tokens)

    def ours(model: nn.Module) -> Tensor:
        masked, next_sentence = model(tokens, segments=segments, positions=positions)
        return F.cross_entropy(masked.float(), targets) + F.cross_entropy(next_sentence.float(), follows)

    def theirs(model: nn.Module) -> Tensor:
        return model(tokens, token_type_ids=segments, labels=labels, next_sentence_label=follows).loss

    return {name: ours if name in OURS.values() else theirs for name in models}


def _xlnet_losses(models: dict[str, nn.Module], case: Training, device: str) -> Losses:
    tokens = torch.randint(0, 32000, (case.b, case.m), generator=torch.Generator().manual_seed(1)).to(device)

    def ours(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(tokens)[0].flatten(0, 1).float(), tokens.flatten())

    def theirs(model: nn.Module) -> Tensor:
        return model(tokens, labels=tokens).loss

    return {name: ours if name in OURS.values() else theirs for name in models}


# By the name of the model: its peers, and their losses.
_MODELS: dict[str, tuple[Callable[..., dict[str, nn.Module]], Callable[..., Losses]]] = {
    "GPT-2 124M": (_gpts, _gpt_losses),
    "BERT-base": (_berts, _bert_losses),
    "XLNet-base": (_xlnets, _xlnet_losses),
}


def _config(model: str) -> Any:
    published: dict[str, Any] = {
        "GPT-2 124M": gpt.PUBLISHED["gpt2"],
        "BERT-base": bert.PUBLISHED["bert-base"],
        "XLNet-base": xlnet.PUBLISHED["xlnet-base-cased"],
    }
    return published[model]


def _step(model: nn.Module, loss: Callable[[nn.Module], Tensor], case: Training, device: str) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    run = torch.compile(loss) if case.compiled else loss

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=case.dtype == "bfloat16"):
            value = run(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
