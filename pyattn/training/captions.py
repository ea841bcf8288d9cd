"""Captions of pictures: batches and losses, of scenes that are made as they are needed, or of a user's own folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from pyattn.check import RangeError
from pyattn.models.caption import doubly_stochastic
from pyattn.tokens import encode_all
from pyattn.training import text
from pyattn.training.caption_files import TRAIN, VALIDATION, Described, read_folder
from pyattn.training.hard import Reinforcement
from pyattn.training.images import ImageError, read_bytes, read_image
from pyattn.training.scene_captions import TEMPLATES, captions, longest
from pyattn.training.scenes import Scene, picture, scene
from pyattn.training.task import Task
from pyattn.training.text import Sentences, TextError
from pyattn.training.translation import END, PAD, START, learn_tokenizer

_VALIDATION_SCENES = 512
_UNSEEN = 2**40  # the first number of scenes that no run trains on, the same in all runs
_TOKENIZED_SCENES = 2000  # whose captions have every word many times


class CaptionBatch(NamedTuple):
    """A batch. Rows of tokens are filled up with PAD."""

    images: Tensor  # uint8 [b, 3, size, size]
    tokens_in: Tensor  # int64 [b, m]: START and the caption without its END
    tokens_out: Tensor  # int64 [b, m]: the caption


class CaptionTask(Task):
    """Predicting each token of a caption from the picture and the tokens before it:
    `model(images [b, 3, size, size], tokens [b, m], return_looks=...) -> logits [b, m, vocab]`, with `Looks` beside
    them where hard attention or the doubly stochastic term needs them.

    A loss of captions is the mean over tokens of -log p, and the doubly stochastic term has the same divisor: the two
    are then weighed as in the paper, where both are means over captions of sums.

    Args:
        coverage: lambda of the doubly stochastic term.
        reinforcement: what the choices of a hard model learn by, a part of the captions' term.
    """

    def __init__(
        self, tokenizer: Tokenizer, digest: str, *, coverage: float, reinforcement: Reinforcement | None
    ) -> None:
        self.tokenizer = tokenizer
        self.digest = digest
        self.baselines: dict[str, float] = {}
        self.coverage = coverage
        self.reinforcement = reinforcement

    def collate(self, examples: Sequence[tuple[Tensor, Tensor]]) -> CaptionBatch:
        images, tokens = zip(*examples, strict=True)
        tokens_out = pad_sequence(list(tokens), batch_first=True, padding_value=PAD)
        # Shifted by one; what shifts out is PAD, or an END that no longer has anything to predict.
        tokens_in = F.pad(tokens_out[:, :-1], (1, 0), value=START)
        tokens_in[tokens_in == END] = PAD
        return CaptionBatch(torch.stack(images), tokens_in, tokens_out)

    def size(self, batch: CaptionBatch) -> int:
        return int((batch.tokens_out != PAD).sum())

    def counts(self, batch: CaptionBatch) -> dict[str, int]:
        tokens = self.size(batch)
        return {"caption": tokens} | ({"coverage": tokens} if self.coverage else {})

    def losses(self, model: nn.Module, batch: CaptionBatch, smoothing: float) -> dict[str, Tensor]:
        # What needs no weights is trained without them, by a cheaper call.
        reinforcement = self.reinforcement if torch.is_grad_enabled() else None
        is_watched = reinforcement is not None or self.coverage > 0
        looks: Any = None
        logits = model(batch.images, batch.tokens_in, return_looks=is_watched)
        if is_watched:
            logits, looks = logits
        by_token = F.cross_entropy(
            logits.float().mT, batch.tokens_out, ignore_index=PAD, reduction="none", label_smoothing=smoothing
        )
        losses, is_word = {"caption": by_token.sum()}, batch.tokens_out != PAD
        if reinforcement is not None:
            of_choices = reinforcement.term(-by_token.sum(1), looks.log_prob * is_word, looks.entropy * is_word)
            losses["caption"] = losses["caption"] + of_choices
        if self.coverage:
            losses["coverage"] = self.coverage * doubly_stochastic(looks.weights.float(), is_word).sum()
        return losses

    def carried(self, model: nn.Module) -> dict[str, Tensor]:
        return {} if self.reinforcement is None else self.reinforcement.carried()

    def restore_carried(self, model: nn.Module, carried: dict[str, Tensor]) -> None:
        if self.reinforcement is not None:
            self.reinforcement.restore(carried)

    def examples(self, step: int) -> Sequence[tuple[Tensor, Tensor]]:
        if self.reinforcement is not None:
            self.reinforcement.end_step()
        return self._examples(step)

    def _examples(self, step: int) -> Sequence[tuple[Tensor, Tensor]]:
        """What `examples` gives."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class CaptionCorpus:
    """Pictures with captions, of which each is of one picture and a picture may have several."""

    images: Tensor  # uint8 [pictures, 3, size, size]
    captions: Sentences  # each ending in END
    pictures: Tensor  # int64 [captions]: the picture of each
    train: list[int]  # which captions
    validation: list[int]
    tokenizer: Tokenizer
    digest: str  # of pictures, captions and what was asked for

    def example(self, row: int) -> tuple[Tensor, Tensor]:
        return self.images[self.pictures[row]], self.captions[row]


class PictureTask(CaptionTask):
    """Pictures of a user's own: an epoch has every caption once, in random order, `batch` in a step and the rest in the
    last one. Which ones a step has depends on (seed, step) alone."""

    def __init__(self, corpus: CaptionCorpus, *, batch: int, seed: int, **beside: Any) -> None:
        super().__init__(corpus.tokenizer, corpus.digest, **beside)
        self.corpus = corpus
        self.batch = batch
        self.seed = seed

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.corpus.train) // self.batch)

    def _examples(self, step: int) -> Sequence[tuple[Tensor, Tensor]]:
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        order = numpy.random.default_rng((self.seed, epoch)).permutation(self.corpus.train)
        return [self.corpus.example(row) for row in order[place * self.batch : (place + 1) * self.batch].tolist()]

    def validation(self) -> list[CaptionBatch]:
        rows = self.corpus.validation
        parts = [rows[low : low + self.batch] for low in range(0, len(rows), self.batch)]
        return [self.collate([self.corpus.example(row) for row in part]) for part in parts]

    def describe(self) -> str:
        return (
            f"{len(self.corpus.images):,} pictures with {len(self.corpus.train):,} captions and "
            f"{len(self.corpus.validation):,} for validation, {self.tokenizer.get_vocab_size():,} tokens in the "
            f"vocabulary, {self.steps_per_epoch:,} steps per epoch"
        )


class SceneTask(CaptionTask):
    """Scenes of `pyattn.training.scenes`, of which each step has `batch` new ones, each with one of its captions.

    Raises:
        RangeError: a caption may have more tokens of such a vocabulary than the context has.
    """

    def __init__(self, *, vocab: int, context: int, batch: int, seed: int, **beside: Any) -> None:
        # The words, and so the vocabulary, are those of any so many scenes.
        sentences = [line for number in range(_TOKENIZED_SCENES) for line in captions(scene(0, _UNSEEN + number))]
        tokenizer = learn_tokenizer(sentences, vocab)
        most = 1 + longest(lambda words: len(tokenizer.encode(words, add_special_tokens=False)))
        if most > context:
            raise RangeError(f"context: expected at least {most}, the tokens that a caption of a scene may have with "
                             f"--vocab {vocab}, got {context}")  # fmt: skip
        super().__init__(tokenizer, text.digest(sentences, vocab), **beside)
        self.batch = batch
        self.seed = seed

    def _examples(self, step: int) -> Sequence[tuple[Tensor, Tensor]]:
        first = (step - 1) * self.batch
        return self._told([scene(self.seed, number) for number in range(first, first + self.batch)])

    def validation(self) -> list[CaptionBatch]:
        scenes = [scene(0, _UNSEEN + number) for number in range(_VALIDATION_SCENES)]
        examples = self._told(scenes)
        return [self.collate(examples[low : low + self.batch]) for low in range(0, len(examples), self.batch)]

    def describe(self) -> str:
        return (
            f"scenes of shapes, {self.batch} new ones in each step and {_VALIDATION_SCENES} for validation, "
            f"{self.tokenizer.get_vocab_size():,} tokens in the vocabulary"
        )

    def _told(self, scenes: Sequence[Scene]) -> list[tuple[Tensor, Tensor]]:
        """Pictures with a caption each, the templates in turn."""
        lines = [captions(each)[place % TEMPLATES] for place, each in enumerate(scenes)]
        images = [torch.from_numpy(picture(each)) for each in scenes]
        return list(zip(images, map(torch.tensor, encode_all(self.tokenizer, lines)), strict=True))


def load_pictures(folder: Path, *, vocab: int, context: int, size: int, cache: Path) -> CaptionCorpus:
    """Reads pictures and captions, scales the pictures, tokenizes the captions, and holds some pictures out.

    All pictures are decoded before the first step, so that a damaged one ends no run, and kept in memory and in the
    cache as they are scaled: 12 kB each at 64 pixels.

    Args:
        folder: of one of the forms of `read_folder`. Where it names no part for validation, some pictures are held out.
        vocab: size of the byte-level BPE vocabulary to learn, of the training captions.
        context: positions of the model; a caption with its mark must fit them.
        size: pixels of the scaled pictures, on either side.
    Raises:
        TextError: as `read_folder`; a caption is too long; there is one picture alone, or none for training.
        ImageError: a picture cannot be read.
    """
    described = read_folder(folder)
    parts = _parts(described, folder)
    lines = [line for each in described for line in each.lines]
    pictures = torch.tensor([i for i, each in enumerate(described) for _ in each.lines])
    train, validation = (
        [row for row, i in enumerate(pictures.tolist()) if parts[i] == part] for part in (TRAIN, VALIDATION)
    )
    digest = _digest(described, vocab, size)

    def make() -> tuple[Tokenizer, dict[str, Tensor]]:
        tokenizer = learn_tokenizer([lines[row].caption for row in train], vocab)
        captions = Sentences.of(encode_all(tokenizer, (line.caption for line in lines)))
        images = torch.stack([read_image(each.path, size) for each in described])
        return tokenizer, {"images": images, "tokens": captions.tokens, "ends": captions.ends}

    tokenizer, stored = text.cached(cache / f"{digest}.safetensors", make)
    captions = Sentences(stored["tokens"], stored["ends"])
    if (longest := int(captions.lengths.max())) > context:
        where = lines[int(captions.lengths.argmax())].where
        raise TextError(f"images: {where} has {longest} tokens with its end mark, more than the {context} positions of "
                        "--context")  # fmt: skip
    return CaptionCorpus(stored["images"], captions, pictures, train, validation, tokenizer, digest)


def _parts(described: Sequence[Described], folder: Path) -> list[str]:
    """TRAIN or VALIDATION for each picture."""
    if any(each.part == VALIDATION for each in described):
        parts = [each.part or TRAIN for each in described]
    elif len(described) < 2:
        raise TextError(f"images: expected at least 2 pictures, one for validation, got 1 in {folder}")
    else:
        held_out = set(text.held_out(len(described))[1])
        parts = [VALIDATION if i in held_out else TRAIN for i in range(len(described))]
    if TRAIN not in parts:
        raise TextError(f"images: expected pictures for training, those of {folder} are all for validation")
    return parts


def _digest(described: Sequence[Described], *choices: object) -> str:
    """Names the captions and the bytes of the pictures."""
    try:
        contents = (hashlib.sha256(read_bytes(each.path)).hexdigest() for each in described)
        told = (repr([line.caption for line in each.lines]) for each in described)
        parts = (str(each.part) for each in described)
        return text.digest(chain.from_iterable(zip(contents, told, parts, strict=True)), *choices)
    except OSError as error:
        raise ImageError(f"image: cannot read {error.filename}: {error.strerror}") from error
