"""XLNet's heads for fine-tuning (Yang et al. 2019, arXiv:1906.08237, section 3 and appendix A.4).

    XLNetForSequenceClassification     a text, or a pair of texts as segments      from the last token, [CLS]
    XLNetForTokenClassification        a label for each token
    XLNetForMultipleChoice             which of several texts
    XLNetForQuestionAnsweringSimple    start and end of the answer, each by itself
    XLNetForQuestionAnswering          the end given the start, and whether there is an answer

Models return logits; losses are the training's. The files are those of transformers, whose classes have these names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyattn.check import ShapeError
from pyattn.models.pretrained import Fields
from pyattn.models.xlnet import _EPS, XLNetConfig, _check_integers, _initialize, _padding, _rows, _XLNetHead
from pyattn.spec import dtype_name


class Summary(nn.Module):
    """A text's vector, out of its last token's."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.summary = nn.Linear(config.width, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.dropout(torch.tanh(self.summary(hidden[:, -1])), self.dropout, self.training)


class _Summarized(_XLNetHead):
    def __init__(self, config: XLNetConfig, outputs: int) -> None:
        super().__init__(config)
        self.sequence_summary = _initialize(Summary(config))
        self.logits_proj = _initialize(nn.Linear(config.width, outputs))

    @classmethod
    def config_from(cls, fields: Fields) -> XLNetConfig:
        fields.expect(summary_type="last", summary_use_proj=True, summary_activation="tanh")
        return super().config_from(fields)

    def _summarized(self, tokens: Tensor, segments: Tensor | None, lengths: Tensor | None) -> Tensor:
        hidden, _ = self.transformer(tokens, segments, lengths)
        return self.logits_proj(self.sequence_summary(hidden))


class XLNetForSequenceClassification(_Summarized):
    """A label for a text, or for a pair of texts as segments 0 and 1, from the token that stands last: [CLS]."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config, config.labels)

    def forward(self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Logits [b, labels]. Arguments and errors are `XLNet`'s."""
        return self._summarized(tokens, segments, lengths)


class XLNetForMultipleChoice(_Summarized):
    """Which of several texts, such as a question with each of its answers, is the one."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config, 1)

    def forward(self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Logits [b, choices] of tokens and segments [b, choices, m] and lengths [b, choices].

        Otherwise arguments and errors are `XLNet`'s.
        """
        if tokens.ndim != 3:
            raise ShapeError(f"tokens: expected [b, choices, m], got {list(tokens.shape)}")
        flat = (None if t is None else t.flatten(0, 1) for t in (segments, lengths))
        return self._summarized(tokens.flatten(0, 1), *flat).view(tokens.shape[:2])


class XLNetForTokenClassification(_XLNetHead):
    """A label for each token, such as the kind of name that it belongs to."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config)
        self.classifier = _initialize(nn.Linear(config.width, config.labels))

    def forward(self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Logits [b, m, labels]; those of padding are without meaning. Arguments and errors are `XLNet`'s."""
        return self.classifier(self.transformer(tokens, segments, lengths)[0])


class XLNetForQuestionAnsweringSimple(_XLNetHead):
    """Where in a passage the answer to a question starts and ends, each by itself."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(replace(config, labels=2, label_names=None))  # a start and an end
        self.qa_outputs = _initialize(nn.Linear(config.width, 2))

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits of the start and of the end, each [b, m]; those of padding are without meaning.

        Arguments and errors are `XLNet`'s.
        """
        start, end = self.qa_outputs(self.transformer(tokens, segments, lengths)[0]).unbind(-1)
        return start, end


class Answers(NamedTuple):
    """What `XLNetForQuestionAnswering.search` finds, the most probable first."""

    start_probabilities: Tensor  # [b, s]
    starts: Tensor  # int64 [b, s]
    end_probabilities: Tensor  # [b, s, e], each given its start
    ends: Tensor  # int64 [b, s, e]
    impossible: Tensor  # [b], the logit of there being no answer


class XLNetForQuestionAnswering(_XLNetHead):
    """Where in a passage the answer to a question starts, where it ends given that start, and whether there is one."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config)
        width = config.width
        self.start_logits = nn.ModuleDict({"dense": nn.Linear(width, 1)})
        self.end_logits = nn.ModuleDict(
            {
                "dense_0": nn.Linear(2 * width, width),
                "LayerNorm": nn.LayerNorm(width, _EPS),
                "dense_1": nn.Linear(width, 1),
            }
        )
        self.answer_class = nn.ModuleDict(
            {"dense_0": nn.Linear(2 * width, width), "dense_1": nn.Linear(width, 1, bias=False)}
        )
        for head in (self.start_logits, self.end_logits, self.answer_class):
            _initialize(head)

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None, *, starts: Tensor,
        barred: Tensor | None = None, cls: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """For training: logits of the start, of the end given the true start, and of there being no answer.

        Args:
            tokens, segments, lengths: as for `XLNet`.
            starts: [b] integer, where the answers start.
            barred: [b, m] bool, tokens that no answer starts or ends with; padding does not either.
            cls: [b] integer, where [CLS] stands; last by default.
        Returns:
            [b, m], [b, m] and [b]
        Raises:
            As `XLNet`, and of starts, barred and cls.
        """
        hidden, barred = self._read(tokens, segments, lengths, barred)
        chosen = _rows(hidden, _positions("starts", starts, hidden)[:, None])  # [b, 1, width]
        return self._start(hidden, barred), self._end(hidden, chosen, barred)[..., 0], self._none(hidden, chosen, cls)

    def search(
        self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None, *,
        barred: Tensor | None = None, cls: Tensor | None = None,
    ) -> Answers:  # fmt: skip
        """The most probable starts, `config.starts` of them, and `config.ends` ends of each. Arguments as `forward`."""
        hidden, barred = self._read(tokens, segments, lengths, barred)
        m = hidden.shape[1]
        probabilities = self._start(hidden, barred).softmax(-1)
        best, starts = probabilities.topk(min(self.config.starts, m), -1)
        ends = self._end(hidden, _rows(hidden, starts), barred).softmax(1).topk(min(self.config.ends, m), 1)
        mean = probabilities[:, None] @ hidden  # of the start's vector, [b, 1, width]
        return Answers(best, starts, ends.values.mT, ends.indices.mT, self._none(hidden, mean, cls))

    def _read(
        self, tokens: Tensor, segments: Tensor | None, lengths: Tensor | None, barred: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Vectors [b, m, width], and which tokens are out of the question [b, m]."""
        hidden, _ = self.transformer(tokens, segments, lengths)
        if barred is None:
            barred = torch.zeros_like(tokens, dtype=torch.bool)
        elif barred.shape != tokens.shape or barred.dtype is not torch.bool:
            shape = list(tokens.shape)
            raise ShapeError(
                f"barred: expected bool {shape}, as tokens, got {dtype_name(barred.dtype)} {list(barred.shape)}"
            )
        return hidden, barred if lengths is None else barred | _padding(lengths, tokens)

    def _start(self, hidden: Tensor, barred: Tensor) -> Tensor:
        logits = self.start_logits["dense"](hidden)[..., 0]
        return logits.masked_fill(barred, torch.finfo(logits.dtype).min)

    def _end(self, hidden: Tensor, starts: Tensor, barred: Tensor) -> Tensor:
        """[b, m, s] of starts [b, s, width]. The matrix's halves are applied apart, not to [b, m, s, 2 width]."""
        head = self.end_logits
        ours, theirs = cast(nn.Linear, head["dense_0"]).weight.chunk(2, 1)
        inner = (hidden @ ours.T)[:, :, None] + F.linear(starts, theirs, cast(nn.Linear, head["dense_0"]).bias)[:, None]
        logits = head["dense_1"](head["LayerNorm"](torch.tanh(inner)))[..., 0]
        return logits.masked_fill(barred[..., None], torch.finfo(logits.dtype).min)

    def _none(self, hidden: Tensor, start: Tensor, cls: Tensor | None) -> Tensor:
        last = hidden[:, -1:] if cls is None else _rows(hidden, _positions("cls", cls, hidden)[:, None])
        head = self.answer_class
        return head["dense_1"](torch.tanh(head["dense_0"](torch.cat([start, last], -1))))[:, 0, 0]


def _positions(name: str, at: Tensor, hidden: Tensor) -> Tensor:
    """int64 [b], where in hidden [b, m, width]."""
    b, m, _ = hidden.shape
    if at.shape != (b,):
        raise ShapeError(f"{name}: expected [b={b}], got {list(at.shape)}")
    _check_integers(name, at, 0, m - 1)
    return at.long()
