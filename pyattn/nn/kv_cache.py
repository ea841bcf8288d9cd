"""The keys and values that a decoder has computed, so that a step costs one token and not the whole text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from pyattn.check import RangeError
from pyattn.nn.attend import Attention


class KVCache:
    """Keys and values of every token that the rows of a batch have read, in pages that rows may share.

    Token t of row r is at place t % page of page table[r][t // page]. Rows that begin alike (the beams of one prompt)
    have the same pages there, and a page is copied only when a row writes to it while another reads it: reordering rows
    moves numbers in the table and no keys (Kwon et al. 2023, arXiv:2309.06180, section 4.4).

    Args:
        layers: of the model.
        rows: texts in the batch.
        room: the most tokens that a row may have.
        page: tokens per page. All of `room` (the default) is fastest where rows are never reordered.
    """

    def __init__(self, layers: int, rows: int, room: int, *, page: int | None = None) -> None:
        self.room = room
        self.page = min(page or room, room)
        self.table: list[list[int]] = [[] for _ in range(rows)]
        self._counts = [0] * rows  # tokens of each row, where Python reads them without waiting for the device
        self._pages = rows * self._columns
        self._stores: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self._begun = False
        self._lengths = self._block_table = torch.empty(0)  # `_counts` and `table` on the device
        self._pages_now: Tensor | slice = slice(0)  # where in a store the tokens being read belong
        self._places_now: Tensor | slice = slice(0)

    def __len__(self) -> int:
        """The tokens of the longest row."""
        return max(self._counts, default=0)

    def extend(self, count: int, device: torch.device) -> Tensor:
        """Makes room for `count` more tokens behind every row.

        Returns:
            Their positions in the text, int64 [rows, count].
        Raises:
            RangeError: a row would have more than `room` tokens.
        """
        if len(self) + count > self.room:
            raise RangeError(f"tokens: expected at most {self.room} with those in the cache, got {len(self) + count}")
        self._begun = len(self) > 0
        self._make_private(count)
        self._counts = [held + count for held in self._counts]
        self._lengths = torch.tensor(self._counts, dtype=torch.int32, device=device)
        positions = (self._lengths.long() - count)[:, None] + torch.arange(count, device=device)
        if self._is_plain() and min(self._counts) == len(self):
            self._pages_now, self._places_now = slice(len(self._counts)), slice(len(self) - count, len(self))
        else:
            width = max(map(len, self.table))
            padded = [pages + [0] * (width - len(pages)) for pages in self.table]
            self._block_table = torch.tensor(padded, dtype=torch.int32, device=device)
            self._pages_now = self._block_table.long().gather(1, positions // self.page).flatten()
            self._places_now = (positions % self.page).flatten()
        return positions

    def attend(self, attention: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores the k, v [rows, h, count, d] that `extend` made room for; attends to all that the rows have."""
        store = self._stores[layer]
        if store is None:
            shape = (self._pages, k.shape[1], self.page, k.shape[3])
            # Zeros, because torch's attention multiplies what no query sees by 0, and memory may hold a NaN.
            store = self._stores[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        for pages, new in zip(store, (k, v), strict=True):
            tokens = new if isinstance(self._pages_now, slice) else new.transpose(1, 2).flatten(0, 1)
            # A recurrent cell under autocast gives a prompt's states in one dtype and a step's in another.
            pages[self._pages_now, :, self._places_now] = tokens.to(pages.dtype)
        if not self._begun:
            return attention.full(q, k, v, True, None, 0.0)
        if self._is_plain():
            k, v = (pages[: len(self._counts)] for pages in store)
            return attention.cached(q, k, v, self._lengths, None)
        k, v = store
        return attention.cached(q, k, v, self._lengths, self._block_table)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forgets what row r has read beyond its first lengths[r] tokens, as after a batch of unequal prompts."""
        self._counts = list(lengths)
        for pages, held in zip(self.table, lengths, strict=True):
            del pages[-(-held // self.page) :]

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what rows[i] is now. Rows may be left out and may come several times."""
        self.table = [list(self.table[row]) for row in rows]
        self._counts = [self._counts[row] for row in rows]
        full = [held // self.page for held in self._counts]
        shared = {page for pages, count in zip(self.table, full, strict=True) for page in pages[:count]}
        self._grow(len(shared) + sum(self._columns - count for count in full))

    @property
    def _columns(self) -> int:
        return -(-self.room // self.page)

    def _is_plain(self) -> bool:
        """Whether row r is page r, so that the store is the batch and needs no table."""
        return self.page == self.room and all(pages == [row] for row, pages in enumerate(self.table))

    def _make_private(self, count: int) -> None:
        """Gives every row pages of its own for its next `count` tokens, with what they hold already."""
        readers = Counter(page for pages in self.table for page in pages)
        free = (page for page in range(self._pages) if page not in readers)
        sources: dict[int, int] = {}
        for pages, held in zip(self.table, self._counts, strict=True):
            column = held // self.page
            if column < len(pages) and readers[pages[column]] > 1:
                readers[pages[column]] -= 1
                new = next(free)
                sources[new], pages[column] = pages[column], new
            pages.extend(next(free) for _ in range(len(pages), -(-(held + count) // self.page)))
        if sources:
            for store in self._stores:
                for values in store or ():
                    values[list(sources)] = values[list(sources.values())]

    def _grow(self, pages: int) -> None:
        """Room for `pages`: once, when a prompt becomes several beams."""
        if pages <= self._pages:
            return
        self._pages = pages
        used = sorted({page for row in self.table for page in row})
        for layer, store in enumerate(self._stores):
            if store is not None:
                k, v = (old.new_zeros(pages, *old.shape[1:]) for old in store)
                for new, old in zip((k, v), store, strict=True):
                    new[used] = old[used]
                self._stores[layer] = (k, v)
