"""Translation by hard attention, whose choices learn by REINFORCE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyattn.nn.hard import next_baseline, reinforcement
from pyattn.training import parallel
from pyattn.training.translation import PAD, PairBatch, ParallelCorpus, TranslationTask


class HardTranslationTask(TranslationTask):
    """`TranslationTask` for models that draw what they attend to while they learn:
    `model(source, target, source_lengths=[b], return_choices=True) -> (logits, (log_prob [b, m], entropy [b, m]))`.

    The reward of a target's choices is its log-likelihood, all of its tokens together, less what was usual before: a
    moving average, which goes from step to step. The loss that is shown is the log-likelihood's alone. Where there is
    no gradient, as in validation, nothing is drawn, and the loss is that of the most probable choices.

    Args:
        weight, entropy_weight: of `pyattn.nn.hard.reinforcement`.

    Source: Xu et al. 2015, arXiv:1502.03044, section 4.1.
    """

    def __init__(
        self, corpus: ParallelCorpus, *, max_tokens: int, seed: int, weight: float, entropy_weight: float
    ) -> None:
        super().__init__(corpus, max_tokens=max_tokens, seed=seed)
        self.weight = weight
        self.entropy_weight = entropy_weight
        self._baseline = torch.zeros((), dtype=torch.float64)
        self._seen: Tensor | None = None  # of the step so far: the sum of log-likelihoods, and of how many targets

    def examples(self, step: int) -> Sequence[Any]:
        self._end_step()
        return super().examples(step)

    def losses(self, model: nn.Module, batch: PairBatch, smoothing: float) -> dict[str, Tensor]:
        if not torch.is_grad_enabled():
            return super().losses(model, batch, smoothing)
        logits, choices = model(batch.source, batch.target_in, source_lengths=batch.source_lengths, return_choices=True)
        by_token = F.cross_entropy(
            logits.float().mT, batch.target_out, ignore_index=PAD, reduction="none", label_smoothing=smoothing
        )
        log_likelihood, is_token = -by_token.sum(1), batch.target_out != PAD
        of_choices = reinforcement(
            log_likelihood, choices.log_prob * is_token, choices.entropy * is_token, self._baseline.to(by_token),
            weight=self.weight, entropy_weight=self.entropy_weight,
        ).sum()  # fmt: skip
        seen = torch.stack([log_likelihood.detach().double().sum(), log_likelihood.new_tensor(len(by_token)).double()])
        self._seen = seen if self._seen is None else self._seen + seen
        return {"loss": by_token.sum() + of_choices - of_choices.detach()}

    def carried(self, model: nn.Module) -> dict[str, Tensor]:
        self._end_step()
        return {"baseline": self._baseline}

    def restore_carried(self, model: nn.Module, carried: dict[str, Tensor]) -> None:
        self._baseline = carried["baseline"]

    def _end_step(self) -> None:
        """Moves the baseline by what all parts and processes of the step have seen: every part had the one before."""
        if self._seen is not None:
            total, count = parallel.summed(self._seen).tolist()
            self._baseline = next_baseline(self._baseline, torch.tensor([total / count], dtype=torch.float64))
            self._seen = None
