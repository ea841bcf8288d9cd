"""Choices of hard attention in training, which learn by REINFORCE, and translation by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyattn.nn.hard import next_baseline, reinforcement
from pyattn.training import parallel
from pyattn.training.translation import PAD, PairBatch, ParallelCorpus, TranslationTask


class Reinforcement:
    """What the loss of a task has beside its likelihood, so that choices learn, and the baseline.

    The reward of an example's choices is the log-likelihood of all its tokens together (smoothed where the loss is),
    less what was usual before: a moving average, which goes from step to step. All parts of a step, in every process,
    have the one before it.

    Args:
        weight, entropy_weight: of `pyattn.nn.hard.reinforcement`.

    Source: Xu et al. 2015, arXiv:1502.03044, section 4.1.
    """

    def __init__(self, *, weight: float, entropy_weight: float) -> None:
        self.weight = weight
        self.entropy_weight = entropy_weight
        self.baseline = torch.zeros((), dtype=torch.float64)
        self._seen: Tensor | None = None  # of the step so far: the sum of log-likelihoods, and of how many examples

    def term(self, log_likelihood: Tensor, log_prob: Tensor, entropy: Tensor) -> Tensor:
        """0, with the gradient of `pyattn.nn.hard.reinforcement` of a batch; log_prob and entropy are [b, m]."""
        seen = torch.stack([log_likelihood.detach().double().sum(), log_likelihood.new_tensor(len(log_prob)).double()])
        self._seen = seen if self._seen is None else self._seen + seen
        of_choices = reinforcement(
            log_likelihood, log_prob, entropy, self.baseline.to(log_likelihood),
            weight=self.weight, entropy_weight=self.entropy_weight,
        ).sum()  # fmt: skip
        return of_choices - of_choices.detach()

    def end_step(self) -> None:
        """Moves the baseline, if anything was seen. All processes come here together."""
        if self._seen is not None:
            total, count = parallel.summed(self._seen).tolist()
            self.baseline = next_baseline(self.baseline, torch.tensor([total / count], dtype=torch.float64))
            self._seen = None

    def carried(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        self.end_step()
        return {"baseline": self.baseline}

    def restore(self, carried: dict[str, Tensor]) -> None:
        self.baseline = carried["baseline"]


class HardTranslationTask(TranslationTask):
    """`TranslationTask` for models that draw what they attend to while they learn:
    `model(source, target, source_lengths=[b], return_choices=True) -> (logits, (log_prob [b, m], entropy [b, m]))`.

    The loss that is shown is the likelihood's alone. Where there is no gradient, as in validation, nothing is drawn,
    and the loss is that of the most probable choices.
    """

    def __init__(self, corpus: ParallelCorpus, *, max_tokens: int, seed: int, reinforcement: Reinforcement) -> None:
        super().__init__(corpus, max_tokens=max_tokens, seed=seed)
        self.reinforcement = reinforcement

    def examples(self, step: int) -> Sequence[Any]:
        self.reinforcement.end_step()
        return super().examples(step)

    def losses(self, model: nn.Module, batch: PairBatch, smoothing: float) -> dict[str, Tensor]:
        if not torch.is_grad_enabled():
            return super().losses(model, batch, smoothing)
        logits, choices = model(batch.source, batch.target_in, source_lengths=batch.source_lengths, return_choices=True)
        by_token = F.cross_entropy(
            logits.float().mT, batch.target_out, ignore_index=PAD, reduction="none", label_smoothing=smoothing
        )
        is_token = batch.target_out != PAD
        added = self.reinforcement.term(-by_token.sum(1), choices.log_prob * is_token, choices.entropy * is_token)
        return {"loss": by_token.sum() + added}

    def carried(self, model: nn.Module) -> dict[str, Tensor]:
        return self.reinforcement.carried()

    def restore_carried(self, model: nn.Module, carried: dict[str, Tensor]) -> None:
        self.reinforcement.restore(carried)
