"""What a decoder attends to of its sources, which the rows of one source share: beams, or targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Memory:
    """Per layer what it attends to, tensors [sources, ...] such as keys and values.

    Rows that read the same source (the beams of a sentence) share them. As attention to a source is not causal, the
    queries of its rows can be those of one batch element: a step reads each source once, however many rows there are.

    Args:
        layers: a tuple for each layer, of tensors, tuples of tensors and None.
        sources: how many there are; each has one row at first.
        lengths: [sources] integer, how many positions of each are no padding; all where None.
    """

    def __init__(self, layers: Sequence[tuple], sources: int, lengths: Tensor | None, device: torch.device) -> None:
        self.layers = list(layers)
        self.lengths = lengths
        self.device = device
        self.count = sources
        self.sources = list(range(sources))  # which one each row reads
        # Attention wants the rows in the order of their sources, equally many of each. Where they are not so, `slots`
        # says which row to put in each place of such an order, and `places` in which place each row is then.
        self.slots: Tensor | None = None
        self.places: Tensor | None = None

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i reads from now on what rows[i] does. Copies only when sources are left without rows: the others."""
        reads = [self.sources[row] for row in rows]
        kept = sorted(set(reads))
        if len(kept) < self.count:
            index = torch.tensor(kept, dtype=torch.long, device=self.device)
            self.layers = [_chosen(layer, index) for layer in self.layers]
            self.lengths = None if self.lengths is None else self.lengths[index]
            self.count = len(kept)
        renumbered = {source: i for i, source in enumerate(kept)}
        self.sources = [renumbered[source] for source in reads]
        most = max(Counter(self.sources).values(), default=0)
        filled = [0] * len(kept)
        slots = [0] * (len(kept) * most)  # a place that no row takes shows row 0, and nobody reads what comes of it
        places = []
        for row, source in enumerate(self.sources):
            places.append(source * most + filled[source])
            slots[places[-1]] = row
            filled[source] += 1
        in_order = slots == list(range(len(rows)))
        self.slots = None if in_order else torch.tensor(slots, device=self.device)
        self.places = None if in_order else torch.tensor(places, device=self.device)

    def by_source(self, x: Tensor) -> Tensor:
        """Queries of the rows [rows, m, width] as those of the sources [sources, rows of one * m, width]."""
        x = x if self.slots is None else x[self.slots]
        return x.reshape(self.count, len(x) * x.shape[1] // max(self.count, 1), x.shape[-1])

    def by_row(self, x: Tensor, m: int) -> Tensor:
        """Undoes `by_source` for what comes of the queries: [rows, m, width]."""
        x = x.reshape(len(x) * x.shape[1] // max(m, 1), m, x.shape[-1])
        return x if self.places is None else x[self.places]


def _chosen(prepared: Any, index: Tensor) -> Any:
    """The rows `index` of a tensor, or of each tensor in a tuple."""
    if isinstance(prepared, tuple):
        parts = [_chosen(part, index) for part in prepared]
        return type(prepared)(*parts) if hasattr(prepared, "_fields") else tuple(parts)
    return None if prepared is None else prepared[index]
