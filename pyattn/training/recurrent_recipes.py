"""What `pyattn train` trains of recurrent networks, as `pyattn.training.recipes` for Transformers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from pyattn.check import RangeError
from pyattn.models.seq2seq_config import BRIDGES, ORDERS, READOUTS, SCORES, WINDOWS, Seq2SeqConfig
from pyattn.nn.recurrent import CELLS
from pyattn.training.recipes import OfText, TranslationSettings
from pyattn.training.scenes import SEEDS, SIDE
from pyattn.training.settings import (
    NOT_NEGATIVE,
    POSITIVE,
    SIZE,
    Settings,
    at_least,
    between,
    one_of,
    option,
    shared,
)

if TYPE_CHECKING:
    from pyattn.models.caption import CaptionConfig
    from pyattn.models.rnn import RNNConfig
    from pyattn.training.hard import Reinforcement
    from pyattn.training.task import Task
    from pyattn.training.translation import ParallelCorpus, TranslationTask


@dataclass(frozen=True, kw_only=True)
class RNNSettings(OfText, Settings):
    """A recurrent network that learns to continue a text, to tag words, or to label texts."""

    kind: ClassVar[str] = "rnn"

    text: str | None = option(
        None, "To continue: UTF-8 file, or folder of such files.", shown="Python's standard library", path=True
    )
    tagged: str | None = option(
        None,
        "To tag words: a word, a tab and its tag per line, an empty line between sentences.",
        shown="none",
        path=True,
    )
    labelled: str | None = option(None, "To label texts: a label, a tab and a text per line.", shown="none", path=True)
    cell: str = option("lstm", "lstm, gru or rnn (a plain one with tanh).", one_of(*CELLS))
    hidden: int = option(512, "Size of a layer's state, in each direction.", SIZE)
    norm: bool = option(False, "Layer normalization inside the cells.")
    batch: int = option(32, "Streams, windows, sentences or texts in a step.", between(1, 2**24))
    tokens: str = option(
        "bpe",
        "Of --text. bpe: bytes joined to --vocab tokens; characters: one token for each.",
        one_of("bpe", "characters"),
    )
    stateful: bool = option(True, "With --text, go on from the state behind the step before, else from zeros.")
    tied: bool = option(False, "With --text, the last matrix is the embedding, transposed.")
    self_attention: bool = option(False, "With --text, states attend to those before them in the step.")
    validation_tokens: int = option(8192, "Most tokens of --text that an evaluation looks at.", at_least(1))

    layers: int = shared("layers", 2)
    width: int = shared("width", 256)
    context: int = option(128, "Tokens of each stream or window in a step, with --text.", between(1, 2**24))
    lr: float = shared("lr", 2e-3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(given := [name for name in ("text", "tagged", "labelled") if getattr(self, name) is not None]) > 1:
            raise RangeError(f"{given[1]}: expected one source of data, got --{' and --'.join(given)}")
        if given and given[0] != "text":
            of_text = {"tied": False, "self_attention": False, "stateful": True, "tokens": "bpe"}
            for name, default in of_text.items():
                if (value := getattr(self, name)) != default:
                    raise RangeError(f"{name}: expected {default} with --{given[0]}, got {value}")

    @property
    def attends(self) -> bool:
        return self.self_attention

    def config(self, vocab: int, labels: tuple[str, ...] = ()) -> RNNConfig:
        """With labels, of a classifier."""
        from pyattn.models.rnn import RNNConfig

        return RNNConfig(
            vocab=vocab,
            width=self.width,
            hidden=self.hidden,
            layers=self.layers,
            cell=self.cell,
            dropout=self.dropout,
            norm=self.norm,
            bidirectional=bool(labels),
            tied=self.tied,
            self_attention=self.self_attention,
            attention=self.attention,
            end=None if labels else self.end,
            labels=len(labels) or 2,
            label_names=labels or None,
        )

    def model(self, task: Task) -> nn.Module:
        from pyattn.models.rnn import RNNLM, RNNForSequenceClassification, RNNForTokenClassification
        from pyattn.training.labelled import LabelTask

        vocab = task.tokenizer.get_vocab_size()
        if not isinstance(task, LabelTask):
            return RNNLM(self.config(vocab))
        model = RNNForTokenClassification if task.corpus.by_word else RNNForSequenceClassification
        return model(self.config(vocab, task.corpus.labels))

    def task(self, cache: Path) -> Task:
        source = self.tagged or self.labelled
        return self._language_task(cache) if source is None else self._label_task(Path(source), cache)

    def _label_task(self, source: Path, cache: Path) -> Task:
        from pyattn.training.labelled import LabelTask, load_labelled

        corpus = load_labelled(source, by_word=self.tagged is not None, vocab=self.vocab, cache=cache)
        return LabelTask(corpus, batch=self.batch, seed=self.seed)

    def _language_task(self, cache: Path) -> Task:
        from pyattn.training.language import LanguageTask
        from pyattn.training.streams import StreamTask

        corpus = self.corpus(cache)
        return StreamTask(corpus, **self.sizes) if self.stateful else LanguageTask(corpus, **self.sizes, seed=self.seed)


# What the paper of an order has, where the user does not say.
_OF_ORDER = {
    "luong": {"score": "general", "readout": "tanh", "bridge": "copy"},
    "bahdanau": {"score": "additive", "readout": "maxout", "bridge": "backward"},
}
_REINFORCE, _ENTROPY = 0.1, 0.001  # weights where the user names none; the paper has none, either


_hard = partial(option, False, "A step looks at one place, drawn in training; it learns by REINFORCE.")
_temperature = partial(
    option, None, "With --hard: of a straight-through Gumbel-softmax.", POSITIVE, shown="none, REINFORCE"
)
_reinforce = partial(
    option, None, "With --hard: weight of REINFORCE beside the likelihood.", NOT_NEGATIVE, shown=str(_REINFORCE)
)
_entropy = partial(
    option, None, "With --hard: weight of the entropy of what is drawn.", NOT_NEGATIVE, shown=str(_ENTROPY)
)


class OfChoices:
    """What settings with these fields make of hard attention."""

    hard: bool
    temperature: float | None
    reinforce: float | None
    entropy: float | None

    def check_choices(self) -> None:
        for name in ("reinforce", "entropy"):
            if (weight := getattr(self, name)) is not None and not self._is_reinforced:
                raise RangeError(f"{name}: expected --hard beside it, without --temperature, got {weight} alone")

    @property
    def _is_reinforced(self) -> bool:
        return self.hard and self.temperature is None

    def reinforcement(self) -> Reinforcement | None:
        """What choices learn by, where it is not the loss itself."""
        from pyattn.training.hard import Reinforcement

        if not self._is_reinforced:
            return None
        return Reinforcement(
            weight=_REINFORCE if self.reinforce is None else self.reinforce,
            entropy_weight=_ENTROPY if self.entropy is None else self.entropy,
        )


@dataclass(frozen=True, kw_only=True)
class Seq2SeqSettings(OfChoices, TranslationSettings):
    """A recurrent encoder and decoder that learn to translate, with attention or without."""

    kind: ClassVar[str] = "seq2seq"

    order: str = option("luong", "Which state asks: luong, that of this step; bahdanau, the one before.",
                        one_of(*ORDERS))  # fmt: skip
    score: str | None = option(
        None, "dot, scaled, general, low-rank, additive, cosine or location.",
        one_of(*SCORES),
        shown="general, or additive in Bahdanau's order",
    )  # fmt: skip
    no_attention: bool = option(False, "All of a sentence goes through one state.")
    uses: str | None = option(
        None, "Where the context goes: some of input, layer, readout, with commas.", shown="as in the order's paper"
    )
    window: str | None = option(
        None,
        "Attend around a place of the source: monotonic (that of the step), predictive (one that the state says), "
        "renormalized (the same, with weights that sum to 1).",
        one_of(*WINDOWS),
        shown="attend to all of it",
    )
    window_size: int | None = option(
        None, "Tokens of a window on either side of its middle.", SIZE, shown="10 with --window"
    )
    hard: bool = _hard()
    temperature: float | None = _temperature()
    reinforce: float | None = _reinforce()
    entropy: float | None = _entropy()
    readout: str | None = option(
        None, "linear, tanh (Luong's) or maxout (Bahdanau's).", one_of(*READOUTS), shown="the order's"
    )
    bridge: str | None = option(
        None, "How the decoder begins: copy, linear, or backward (Bahdanau's).", one_of(*BRIDGES),
        shown="copy; backward in Bahdanau's order",
    )  # fmt: skip
    feed: bool = option(False, "A step reads what was read out before it (Luong's input feeding).")
    self_attention: bool = option(False, "States that ask also attend to those that asked before them.")
    cell: str = option("lstm", "lstm, gru or rnn (a plain one with tanh).", one_of(*CELLS))
    norm: bool = option(False, "Layer normalization inside the cells.")
    hidden: int = option(512, "Size of the states; of the encoder's, both directions together.", SIZE)
    encoder_hidden: int | None = option(
        None, "Size of the encoder's states in each direction.", SIZE, shown="what makes it hidden together"
    )
    score_size: int | None = option(None, "Hidden layer of the additive score, rank of low-rank.", SIZE, shown="hidden")
    value_size: int | None = option(None, "Learned values of this size.", SIZE, shown="the states themselves")
    bidirectional: bool = option(True, "The encoder also reads from the end.")
    reverse: bool = option(False, "An encoder of one direction reads from the end.")
    tied: bool = option(True, "One matrix embeds both languages and gives the logits; hidden is then width.")

    layers: int = shared("layers", 1)
    width: int = shared("width", 512)
    dropout: float = shared("dropout", 0.3)
    lr: float = shared("lr", 1e-3)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices()

    @property
    def attends(self) -> bool:
        return not self.no_attention or self.self_attention

    def config(self, vocab: int) -> Seq2SeqConfig:
        if self.no_attention and self.score is not None:
            raise RangeError(f"score: expected none with --no-attention, got {self.score}")
        of_order = _OF_ORDER[self.order]
        bridge = of_order["bridge"] if self.bidirectional else "copy"
        return Seq2SeqConfig(
            vocab=vocab,
            context=self.context,
            layers=self.layers,
            width=self.width,
            hidden=self.hidden,
            encoder_hidden=self.encoder_hidden,
            cell=self.cell,
            norm=self.norm,
            dropout=self.dropout,
            bidirectional=self.bidirectional,
            reverse=self.reverse,
            bridge=self.bridge or bridge,
            score=None if self.no_attention else self.score or of_order["score"],
            score_size=self.score_size,
            value_size=self.value_size,
            order=self.order,
            uses=None if self.uses is None else tuple(self.uses.split(",")),
            window=self.window,
            window_size=self.window_size,
            hard=self.hard,
            temperature=self.temperature,
            readout=self.readout or of_order["readout"],
            feed=self.feed,
            self_attention=self.self_attention,
            tied=self.tied,
            attention=self.attention,
            pad=0,
            start=1,
            end=2,
        )

    def model(self, task: Task) -> nn.Module:
        from pyattn.models.seq2seq import Seq2Seq

        return Seq2Seq(self.config(task.tokenizer.get_vocab_size()))

    def task_of(self, corpus: ParallelCorpus) -> TranslationTask:
        if (reinforcement := self.reinforcement()) is None:
            return super().task_of(corpus)
        from pyattn.training.hard import HardTranslationTask

        return HardTranslationTask(corpus, max_tokens=self.max_tokens, seed=self.seed, reinforcement=reinforcement)


@dataclass(frozen=True, kw_only=True)
class CaptionSettings(OfChoices, Settings):
    """Show, Attend and Tell: a network that learns to describe pictures, and looks where it needs to."""

    kind: ClassVar[str] = "caption"

    images: str | None = option(
        None,
        "Folder of pictures and captions: Flickr8k, COCO, Karpathy's JSON, or metadata.csv with file_name, caption.",
        shown="scenes of shapes, made as needed",
        path=True,
    )
    hard: bool = _hard()
    temperature: float | None = _temperature()
    reinforce: float | None = _reinforce()
    entropy: float | None = _entropy()
    coverage: float = option(
        0.0, "How much of the doubly stochastic term, by which all of a picture is looked at.", NOT_NEGATIVE
    )
    gate: bool = option(True, "Each word also decides how much of what it sees it takes in.")
    image_size: int = option(64, "Pixels of a picture on either side; others are cut and scaled.", between(2, 4096))
    layers: int = option(3, "Of the encoder, each of which halves the sides of the picture.", between(1, 12))
    grid_size: int = option(64, "Size of the vectors that the encoder makes of a picture.", SIZE)
    hidden: int = option(128, "Size of the LSTM's states.", SIZE)
    score_size: int = option(64, "Hidden layer of the additive score.", SIZE)
    batch: int = option(64, "Captions in a step.", between(1, 2**24))

    context: int = option(64, "The most tokens of a caption.", between(1, 2**24))
    steps: int = shared("steps", 5000)
    lr: float = shared("lr", 3e-3)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices()
        if self.images is None and self.image_size != SIDE:
            raise RangeError(f"image_size: expected {SIDE} without --images, as scenes have, got {self.image_size}")
        if self.images is None and self.seed >= SEEDS:
            raise RangeError(f"seed: expected a number below 2^32 without --images, as scenes have, got {self.seed}")

    def config(self, vocab: int) -> CaptionConfig:
        from pyattn.models.caption import CaptionConfig

        return CaptionConfig(
            vocab=vocab,
            context=self.context,
            grid_size=self.grid_size,
            width=self.width,
            hidden=self.hidden,
            score_size=self.score_size,
            image_size=self.image_size,
            layers=self.layers,
            hard=self.hard,
            temperature=self.temperature,
            gate=self.gate,
            dropout=self.dropout,
            attention=self.attention,
            pad=0,
            start=1,
            end=2,
        )

    def model(self, task: Task) -> nn.Module:
        from pyattn.models.caption import ShowAttendTell

        return ShowAttendTell(self.config(task.tokenizer.get_vocab_size()))

    def task(self, cache: Path) -> Task:
        from pyattn.training.captions import PictureTask, SceneTask, load_pictures

        beside: dict[str, Any] = {"coverage": self.coverage, "reinforcement": self.reinforcement()}
        if self.images is None:
            return SceneTask(vocab=self.vocab, context=self.context, batch=self.batch, seed=self.seed, **beside)
        corpus = load_pictures(
            Path(self.images), vocab=self.vocab, context=self.context, size=self.image_size, cache=cache
        )
        return PictureTask(corpus, batch=self.batch, seed=self.seed, **beside)
