"""Adaptive softmax and embeddings: a vocabulary in parts, the rare ones of short vectors, and computed when needed.

Tokens are numbered from the most frequent one on. Part 0 is the head, where every token is looked at; part i has a
column c_i of the head, and is looked at where a target is in it:

    embedding of t = P_i E_i[t]                                         t in part i
    head           = softmax([E_0; C] (Q_0^T x) + [b_0; c])             C has a row for each part behind the head
    p(t)           = head[t]                                            t in part 0
    p(t)           = head[c_i] softmax(E_i (Q_i^T x) + b_i)[t]          t in part i > 0

E_i [tokens of part i, width / div_val^i] serves both ends; Q_i is P_i where projections are tied, but Q_0 is always one
of its own. With div_val 1 all vectors are as wide as x, and there are neither P nor Q.

Sources: Grave et al. 2017, arXiv:1609.04309, "Efficient softmax approximation for GPUs"; for embeddings, Baevski and
Auli 2019, arXiv:1809.10853. This is the form of Transformer-XL's files, with its biases and projections. That of
`torch.nn.AdaptiveLogSoftmaxWithLoss` is the same with b_i = 0 for i > 0, and with [E_0; C] Q_0^T as one matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyattn.check import RangeError, ShapeError
from pyattn.nn.embedding import check_ids, embed
from pyattn.nn.linear import linear


def check_cutoffs(vocab: int, width: int, cutoffs: Sequence[int], div_val: int) -> None:
    """Raises RangeError unless cutoffs divide the vocabulary, and the last part's vectors are not empty."""
    if list(cutoffs) != sorted({0, vocab, *cutoffs})[1:-1]:
        raise RangeError(f"cutoffs: expected increasing numbers in (0, vocab={vocab}), got {list(cutoffs)}")
    if div_val < 1:
        raise RangeError(f"div_val: expected at least 1, got {div_val}")
    if div_val > 1 and not cutoffs:
        raise RangeError(f"div_val: expected 1 without cutoffs, got {div_val}")
    size = width
    for _ in cutoffs:  # no power of numbers that a file may give
        size //= div_val
    if not size:
        expected = f"at most width={width} as a power of {len(cutoffs)}, one for each of the cutoffs"
        raise RangeError(f"div_val: expected {expected}, got {div_val}")


class AdaptiveVocabulary(nn.Module):
    """The vectors of tokens and, of the same tables, the probabilities of tokens: a model's first layer and its last.

    Parameters are left to be initialized.

    Args:
        vocab: tokens, the frequent ones first.
        width: size of the vectors that the model takes and gives.
        cutoffs: the first token of each part behind the head; at least one.
        div_val: by how much the vectors of a part are shorter than those of the part before.
        tie_projections: whether parts behind the head are projected by one matrix at both ends.
    Raises:
        RangeError: cutoffs that do not increase, or are not within the vocabulary; div_val below 1, or so large that
            the last part's vectors are empty.
    """

    def __init__(
        self, vocab: int, width: int, cutoffs: Sequence[int], div_val: int = 1, tie_projections: bool = True
    ) -> None:
        super().__init__()
        check_cutoffs(vocab, width, cutoffs, div_val)
        self.vocab, self.width, self.cutoffs, self.div_val = vocab, width, tuple(cutoffs), div_val
        self.sizes = [end - start for start, end in itertools.pairwise((0, *cutoffs, vocab))]
        # One table of all parts where their vectors are of one size.
        tables = [(size, width // div_val**i) for i, size in enumerate(self.sizes)] if div_val > 1 else [(vocab, width)]
        projections = [(width, size) for _, size in tables] if div_val > 1 else []
        self.tables = _parameters(tables)
        self.projections = _parameters(projections)
        self.out_projections = _parameters(projections[:1] if tie_projections else projections)
        self.biases = _parameters((tokens,) for tokens, _ in tables)
        self.cluster_weight = nn.Parameter(torch.empty(len(cutoffs), width))
        self.cluster_bias = nn.Parameter(torch.empty(len(cutoffs)))

    def embed(self, tokens: Tensor) -> Tensor:
        """The vectors [*, width] of tokens [*].

        Raises:
            DtypeError: tokens that are no integers.
            RangeError: on the CPU, tokens outside the vocabulary.
        """
        if self.div_val == 1:
            return embed("tokens", tokens, self.tables[0])
        check_ids("tokens", tokens, self.vocab)
        ids = tokens.flatten()
        part = self._part(ids)
        vectors = self.tables[0].new_zeros(len(ids), self.width)
        for i, (table, projection) in enumerate(zip(self.tables, self.projections, strict=True)):
            rows, numbers = self._within(i, ids, part)
            found = linear(F.embedding(numbers, table), projection)
            vectors = vectors.index_copy(0, rows, found.to(vectors.dtype))  # autocast's products are of fewer bits
        return vectors.view(*tokens.shape, self.width)

    def log_probs(self, x: Tensor) -> Tensor:
        """Of all tokens behind x [*, width]: [*, vocab]"""
        parts = self._outputs()
        head = self._head(x, *parts[0]).log_softmax(-1)
        shares = head[..., self.sizes[0] :, None].unbind(-2)  # of the parts behind the head
        tails = [share + _logits(x, *part).log_softmax(-1) for share, part in zip(shares, parts[1:], strict=True)]
        return torch.cat([head[..., : self.sizes[0]], *tails], -1)

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """-log p of targets [*] behind x [*, width], in float32 at least: [*]

        Each part is computed for the rows alone whose target is in it. A GPU is waited for, to know which they are.

        Raises:
            ShapeError: targets that do not fit x.
            DtypeError: targets that are no integers.
            RangeError: on the CPU, targets outside the vocabulary.
        """
        if targets.shape != x.shape[:-1]:
            raise ShapeError(f"targets: expected {list(x.shape[:-1])}, got {list(targets.shape)}")
        check_ids("targets", targets, self.vocab)
        x, ids = x.flatten(0, -2), targets.flatten().long()
        part, parts = self._part(ids), self._outputs()
        column = torch.where(part == 0, ids, self.sizes[0] + part - 1)
        losses = _cross_entropy(self._head(x, *parts[0]), column)
        for i in range(1, len(parts)):
            rows, numbers = self._within(i, ids, part)
            losses = losses.index_add(0, rows, _cross_entropy(_logits(x[rows], *parts[i]), numbers))
        return losses.view(targets.shape)

    def _part(self, ids: Tensor) -> Tensor:
        """The number of the part that each token is in."""
        return torch.stack([ids >= cutoff for cutoff in self.cutoffs]).sum(0)

    def _within(self, i: int, ids: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the tokens are in part i, and their numbers there."""
        rows = (part == i).nonzero()[:, 0]
        return rows, ids[rows] - (0, *self.cutoffs)[i]

    def _outputs(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Of each part the table, the biases, and what projects vectors to the table's size."""
        if self.div_val == 1:
            tables, biases = self.tables[0].split(self.sizes), self.biases[0].split(self.sizes)
            return [(table, bias, None) for table, bias in zip(tables, biases, strict=True)]
        projections = [*self.out_projections, *list(self.projections)[len(self.out_projections) :]]
        return list(zip(self.tables, self.biases, projections, strict=True))

    def _head(self, x: Tensor, table: Tensor, bias: Tensor, projection: Tensor | None) -> Tensor:
        """[*, tokens of part 0 and parts behind it]. Results are joined, as a step of decoding has few, not weights."""
        x = x if projection is None else linear(x, projection.T)
        return torch.cat([linear(x, table, bias), linear(x, self.cluster_weight, self.cluster_bias)], -1)


def _parameters(shapes: Iterable[tuple[int, ...]]) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)


def _logits(x: Tensor, table: Tensor, bias: Tensor, projection: Tensor | None) -> Tensor:
    return linear(x if projection is None else linear(x, projection.T), table, bias)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")
