"""What `pyattn train` trains: for each model its settings, its data, and how both are made; here Transformers.

Models and data are imported where they are used: the command line reads the settings for its help alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from pyattn.check import RangeError
from pyattn.training.settings import PROBABILITY, SIZE, Settings, at_least, between, one_of, option, shared

if TYPE_CHECKING:
    from pyattn.models.bert import BertConfig
    from pyattn.models.gpt import GPTConfig
    from pyattn.models.transformer import TransformerConfig
    from pyattn.models.transformer_xl import TransformerXLConfig
    from pyattn.models.xlnet import XLNetConfig
    from pyattn.training.language import Corpus, LanguageTask
    from pyattn.training.masked import MaskedTask
    from pyattn.training.permutation import PermutationTask
    from pyattn.training.streams import MemoryTask
    from pyattn.training.task import Task
    from pyattn.training.translation import Files, ParallelCorpus, TranslationTask


class OfText:
    """What settings with these fields make of a text."""

    text: str | None
    tokens: str
    vocab: int
    context: int
    batch: int
    validation_tokens: int

    @property
    def end(self) -> int | None:
        """The token that ends a text."""
        return 0 if self.tokens == "bpe" else None  # language.END_OF_TEXT, which the vocabulary begins with

    @property
    def sizes(self) -> dict[str, int]:
        """What the task reads at once."""
        return {"batch": self.batch, "context": self.context, "validation_tokens": self.validation_tokens}

    def corpus(self, cache: Path) -> Corpus:
        from pyattn.training.language import load_corpus

        return load_corpus(
            None if self.text is None else Path(self.text),
            tokens=self.tokens,
            vocab=self.vocab,
            context=self.context,
            batch=self.batch,
            cache=cache,
        )


@dataclass(frozen=True, kw_only=True)
class WritingSettings(OfText, Settings):
    """What Transformers share that learn to continue a text."""

    text: str | None = option(
        None, "UTF-8 file, or folder of such files.", shown="Python's standard library", path=True
    )
    tokens: str = option(
        "bpe", "bpe: bytes joined to --vocab tokens; characters: one token for each.", one_of("bpe", "characters")
    )
    heads: int = option(2, "Attention heads per block.", SIZE)
    batch: int = option(2, "Windows of context tokens in a step.", between(1, 2**24))
    validation_tokens: int = option(8192, "Most tokens that an evaluation looks at.", at_least(1))


@dataclass(frozen=True, kw_only=True)
class GPTSettings(WritingSettings):
    """A GPT-2 that learns to continue a text."""

    kind: ClassVar[str] = "gpt"

    def config(self, vocab: int) -> GPTConfig:
        from pyattn.models.gpt import GPTConfig

        return GPTConfig(
            vocab=vocab,
            context=self.context,
            layers=self.layers,
            heads=self.heads,
            width=self.width,
            dropout=self.dropout,
            attention=self.attention,
            end=self.end,
        )

    def model(self, task: Task) -> nn.Module:
        from pyattn.models.gpt import GPT

        return GPT(self.config(task.tokenizer.get_vocab_size()))

    def task(self, cache: Path) -> LanguageTask:
        from pyattn.training.language import LanguageTask

        return LanguageTask(self.corpus(cache), **self.sizes, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class TransformerXLSettings(WritingSettings):
    """A Transformer-XL that learns to continue a text, and remembers what it has read in the steps before."""

    kind: ClassVar[str] = "transformer-xl"

    head_size: int | None = option(None, "Size of a head's queries, keys and values.", SIZE, shown="width / heads")
    hidden: int = option(512, "Size of the layer between a block's two linear maps.", SIZE)
    memory: int = option(128, "Positions before the step's tokens that these see at most.", between(0, 2**24))
    clamp: int | None = option(
        None, "Distances beyond this count as this one.", between(1, 2**24), shown="all are told apart"
    )
    same_length: bool = option(False, "Every token sees --memory positions, itself among them, wherever a step begins.")
    norm: str = option("post", "LayerNorm before or after each part: pre, post.", one_of("pre", "post"))
    tie_biases: bool = option(False, "All layers share the biases of content and of distance.")
    attention_dropout: float = option(0.0, "Probability of dropout, of attention weights.", PROBABILITY)
    batch: int = option(8, "Streams of text in a step.", between(1, 2**24))

    context: int = option(128, "Tokens of each stream in a step.", between(1, 2**24))

    def config(self, vocab: int) -> TransformerXLConfig:
        from pyattn.models.transformer_xl import TransformerXLConfig

        if self.head_size is None and self.width % self.heads:
            raise RangeError(f"heads: expected a divisor of width={self.width} without head_size, got {self.heads}")
        return TransformerXLConfig(
            vocab=vocab,
            layers=self.layers,
            heads=self.heads,
            width=self.width,
            head_size=self.head_size or self.width // self.heads,
            hidden=self.hidden,
            memory=self.memory,
            clamp=self.clamp,
            same_length=self.same_length,
            norm=self.norm,
            tie_biases=self.tie_biases,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            attention=self.attention,
            end=self.end,
        )

    def model(self, task: Task) -> nn.Module:
        from pyattn.models.transformer_xl import TransformerXL

        return TransformerXL(self.config(task.tokenizer.get_vocab_size()))

    def task(self, cache: Path) -> MemoryTask:
        from pyattn.training.streams import MemoryTask

        return MemoryTask(self.corpus(cache), **self.sizes)


@dataclass(frozen=True, kw_only=True)
class XLNetSettings(WritingSettings):
    """An XLNet that learns to predict tokens in permuted orders, and remembers what it has read in the steps before."""

    kind: ClassVar[str] = "xlnet"

    hidden: int = option(512, "Size of the layer between a block's two linear maps.", SIZE)
    memory: int = option(128, "Positions before the step's tokens that these see at most.", between(1, 2**24))
    clamp: int | None = option(
        None, "Distances beyond this count as this one.", between(1, 2**24), shown="all are told apart"
    )
    predict: int | None = option(
        None, "Tokens of each stream to predict in a step.", between(1, 2**24), shown="a sixth of context"
    )
    batch: int = option(8, "Streams of text in a step.", between(1, 2**24))
    attention: str = option("pyattn", "pyattn, which has relative scores.", one_of("pyattn"))
    context: int = option(
        128, "Tokens of each stream in a step. It goes on by half of them, which enter the memory.", between(9, 2**24)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # Half of them at most in the second part, which has three marks.
        most = 2 * (self.context - self.context // 2 - 3) + 1
        if self.predicted > most:
            raise RangeError(f"predict: expected at most {most} of context={self.context}, got {self.predict}")

    @property
    def predicted(self) -> int:
        """Targets of a row: by default a sixth, the authors' 85 of 512."""
        return self.predict or self.context // 6

    def config(self, vocab: int) -> XLNetConfig:
        from pyattn.models.xlnet import XLNetConfig

        return XLNetConfig(
            vocab=vocab,
            layers=self.layers,
            heads=self.heads,
            width=self.width,
            hidden=self.hidden,
            dropout=self.dropout,
            attention=self.attention,
            clamp=self.clamp,
            memory=self.memory,
            reuse=self.context // 2,
            pad=None,
            end=self.end,
        )

    def model(self, task: Task) -> nn.Module:
        from pyattn.models.xlnet import XLNetLMHead

        return XLNetLMHead(self.config(task.tokenizer.get_vocab_size()))

    def task(self, cache: Path) -> PermutationTask:
        from pyattn.training.permutation import PermutationTask

        return PermutationTask(self.corpus(cache), **self.sizes, predicted=self.predicted, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class TranslationSettings(Settings):
    """What models share that learn to translate. The defaults suit some ten thousand pairs of short sentences."""

    source: str | None = option(None, "Sentences, one per line, UTF-8 or .gz.", shown="required", path=True)
    target: str | None = option(None, "Their translations, line by line.", shown="required", path=True)
    validation_source: str | None = option(None, "Other sentences.", shown="some held out", path=True)
    validation_target: str | None = option(None, "Their translations.", shown="some held out", path=True)
    max_tokens: int = option(2048, "Tokens in a step on either side, filled up to equal length.", at_least(1))

    context: int = shared("context", 256)
    vocab: int = shared("vocab", 8000)
    steps: int = shared("steps", 3000)
    warmup: int | None = shared("warmup", 300)
    min_lr_rate: float = shared("min_lr_rate", 0.02)
    weight_decay: float = shared("weight_decay", 1e-4)
    beta2: float = shared("beta2", 0.98)
    label_smoothing: float = shared("label_smoothing", 0.1)

    def task(self, cache: Path) -> TranslationTask:
        from pyattn.training.translation import load_parallel

        training = self._files("source", "target")
        if training is None:
            raise RangeError("source: expected two files of sentences; give --source and --target")
        corpus = load_parallel(
            training,
            self._files("validation_source", "validation_target"),
            vocab=self.vocab,
            context=self.context,
            max_tokens=self.max_tokens,
            cache=cache,
        )
        return self.task_of(corpus)

    def task_of(self, corpus: ParallelCorpus) -> TranslationTask:
        """How the model learns from the pairs."""
        from pyattn.training.translation import TranslationTask

        return TranslationTask(corpus, max_tokens=self.max_tokens, seed=self.seed)

    def _files(self, source: str, target: str) -> Files | None:
        from pyattn.training.translation import Files

        paths = {name: getattr(self, name) for name in (source, target)}
        missing = [name for name, path in paths.items() if path is None]
        if len(missing) == 1:
            raise RangeError(f"{missing[0]}: expected a file, because {source} and {target} go together")
        return None if missing else Files(Path(paths[source]), Path(paths[target]))


@dataclass(frozen=True, kw_only=True)
class TransformerSettings(TranslationSettings):
    """The encoder-decoder Transformer that learns to translate."""

    kind: ClassVar[str] = "transformer"

    heads: int = option(4, "Attention heads per block.", SIZE)
    hidden: int = option(512, "Size of the layer between a block's two linear maps.", SIZE)
    norm: str = option("pre", "LayerNorm before or after each part: pre, post.", one_of("pre", "post"))
    positions: str = option("sinusoidal", "sinusoidal or learned.", one_of("sinusoidal", "learned"))

    layers: int = shared("layers", 3)
    width: int = shared("width", 256)
    dropout: float = shared("dropout", 0.2)
    lr: float = shared("lr", 1.5e-3)

    def config(self, vocab: int) -> TransformerConfig:
        from pyattn.models.transformer import TransformerConfig

        return TransformerConfig(
            vocab=vocab,
            context=self.context,
            layers=self.layers,
            heads=self.heads,
            width=self.width,
            hidden=self.hidden,
            dropout=self.dropout,
            norm=self.norm,
            positions=self.positions,
            attention=self.attention,
            pad=0,
            start=1,
            end=2,
        )

    def model(self, task: Task) -> nn.Module:
        from pyattn.models.transformer import Transformer

        return Transformer(self.config(task.tokenizer.get_vocab_size()))


@dataclass(frozen=True, kw_only=True)
class BertSettings(Settings):
    """A BERT that learns to guess masked tokens, and whether one passage follows another."""

    kind: ClassVar[str] = "bert"

    text: str | None = option(
        None,
        "UTF-8 file, or folder of such files: a sentence per line, an empty line between documents.",
        shown="required",
        path=True,
    )
    batch: int = option(32, "Pairs of passages in a step.", between(1, 2**24))
    cased: bool = option(False, "Keep capital letters and accents.")
    heads: int = option(4, "Attention heads per block.", SIZE)
    hidden: int = option(1024, "Size of the layer between a block's two linear maps.", SIZE)
    validation_tokens: int = option(32768, "Most tokens that an evaluation looks at.", at_least(1))

    layers: int = shared("layers", 4)
    width: int = shared("width", 256)
    context: int = shared("context", 128)
    vocab: int = shared("vocab", 8000)
    dropout: float = shared("dropout", 0.1)
    steps: int = shared("steps", 3000)
    lr: float = shared("lr", 5e-4)
    weight_decay: float = shared("weight_decay", 0.01)
    beta2: float = shared("beta2", 0.98)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context < 8:
            raise RangeError(f"context: expected at least 8 for two passages and their marks, got {self.context}")

    def config(self, vocab: int) -> BertConfig:
        from pyattn.models.bert import BertConfig

        return BertConfig(
            vocab=vocab,
            context=self.context,
            layers=self.layers,
            heads=self.heads,
            width=self.width,
            hidden=self.hidden,
            dropout=self.dropout,
            attention=self.attention,
            pad=0,
        )

    def model(self, task: Task) -> nn.Module:
        from pyattn.models.bert import BertForPreTraining

        return BertForPreTraining(self.config(task.tokenizer.get_vocab_size()))

    def task(self, cache: Path) -> MaskedTask:
        from pyattn.training.masked import MaskedTask, load_documents

        if self.text is None:
            raise RangeError("text: expected a file of sentences; give --text")
        return MaskedTask(
            load_documents(Path(self.text), vocab=self.vocab, cased=self.cased, cache=cache),
            batch=self.batch,
            context=self.context,
            validation_tokens=self.validation_tokens,
            seed=self.seed,
        )
