"""Show, Attend and Tell (Xu et al. 2015, arXiv:1502.03044): captions of pictures, by soft or hard attention.

    a_1 .. a_L = encoder(image)                          a grid of vectors; or any grid that is given
    h_0, c_0   = two perceptrons of mean(a)              section 3.1.2
    alpha_t    = softmax_i(w . tanh(W h_{t-1} + U a_i))  the state before the step asks
    soft       z_t = beta_t sum_i alpha_ti a_i           beta_t = sigmoid(f(h_{t-1})), section 4.2.1
    hard       z_t = beta_t a_s, s drawn by alpha_t      section 4.1
    h_t, c_t   = LSTM([E y_{t-1}; z_t], h_{t-1}, c_{t-1})
    logits     = L_o (E y_{t-1} + L_h h_t + L_z z_t)     equation 7

The encoder is a small convolutional network, trained along: the paper's is a VGG net that others have trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyattn.check import DtypeError, RangeError, ShapeError
from pyattn.decoding.protocol import check_prompt
from pyattn.models.pretrained import Fields, Pretrained
from pyattn.nn.attend import check_attention
from pyattn.nn.embedding import check_tokens, embed
from pyattn.nn.hard import check_temperature, half, hard_attention_of_scores
from pyattn.nn.linear import Linear
from pyattn.nn.memory import Memory
from pyattn.nn.recurrent import Recurrent
from pyattn.nn.scores import AdditiveScore
from pyattn.nn.weights import weights_of
from pyattn.spec import dtype_name

OWN_TYPE = "pyattn-caption"  # in config.json
_LEAST_CHANNELS = 32  # of an encoder's layer; each has half of the next one's, and no fewer than these


@dataclass(frozen=True, slots=True)
class CaptionConfig:
    """Sizes and form of one model. The defaults are for pictures of 64 x 64 pixels.

    Args:
        vocab: tokens.
        context: the most tokens of a caption, with the start token.
        grid_size: of the grid's vectors.
        width, hidden: size of a token's vector and of the LSTM's states.
        score_size: hidden layer of the additive score.
        image_size: pixels of the encoder's images on either side; None for a model without an encoder, of grids alone.
        layers: of the encoder, each of which halves the sides: the grid is of image_size / 2^layers squared.
        hard: whether a step looks at one position (`pyattn.nn.hard`): a drawn one in training, where half of the images
            are seen softly, and else the most probable one.
        temperature: of the straight-through Gumbel-softmax, by which hard attention then learns, all of it hard;
            otherwise it is `pyattn.nn.reinforcement` that it learns by, and the loss is the caller's.
        gate: whether beta_t scales what is seen. Without one it is 1.
        dropout: probability, of embeddings and of what L_o multiplies.
        attention: "pyattn", or "torch": scores, softmax and sum one after the other.
        pad, start, end: the tokens that fill batches, that every caption begins with, and that ends one.

    Raises:
        RangeError: a size below 1, dropout outside [0, 1), a token outside the vocabulary, layers that do not divide
            the image, an unknown attention, a temperature that is not positive or has no hard attention.
    """

    vocab: int = 2048
    context: int = 64
    grid_size: int = 128
    width: int = 128
    hidden: int = 256
    score_size: int = 128
    image_size: int | None = 64
    layers: int = 3
    hard: bool = False
    temperature: float | None = None
    gate: bool = True
    dropout: float = 0.0
    attention: str = "pyattn"
    pad: int = 0
    start: int = 1
    end: int = 2

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "grid_size", "width", "hidden", "score_size", "image_size", "layers"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise RangeError(f"{name}: expected at least 1, got {size}")
        if not 0 <= self.dropout < 1:
            raise RangeError(f"dropout: expected a probability in [0, 1), got {self.dropout}")
        for name in ("pad", "start", "end"):
            if not 0 <= (token := getattr(self, name)) < self.vocab:
                raise RangeError(f"{name}: expected a token in [0, vocab={self.vocab}), got {token}")
        check_attention(self.attention)
        check_temperature(self.hard, self.temperature)
        if self.image_size is not None and (self.layers > 20 or self.image_size % 2**self.layers):
            raise RangeError(f"image_size: expected a multiple of 2^layers = 2^{self.layers}, got {self.image_size}")

    @property
    def side(self) -> int | None:
        """Of the encoder's grid."""
        return None if self.image_size is None else self.image_size // 2**self.layers


# The paper's model of 14 x 14 vectors of a VGG net, with the sizes of its published code for Flickr30k and COCO.
PUBLISHED = {
    "xu": CaptionConfig(vocab=10000, grid_size=512, width=512, hidden=1000, score_size=512, image_size=None),
}


class Looks(NamedTuple):
    """Where the steps of captions looked."""

    weights: Tensor  # [b, m, L], alpha
    positions: Tensor | None = None  # int64 [b, m], of a hard model what was looked at; -1 for who saw the weighted sum
    log_prob: Tensor | None = None  # [b, m], of these positions: `pyattn.nn.hard.Chosen`
    entropy: Tensor | None = None  # [b, m], of the weights


class Telling:
    """Captions as far as they are told: what each row has read, the grids it looks at, its LSTM's state."""

    def __init__(self, read: list[list[int]], memory: Memory, state: Tensor) -> None:
        self.read = read
        self.memory = memory  # the keys, the grid, and of a hard model in training which images are read softly
        self.state = state  # [2, 1, rows, hidden]
        self.looks: list[Looks] | None = None  # of each step, m = 1; None where nobody asks

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what rows[i] is now. Grids are not copied for rows that share one."""
        self.read = [self.read[row] for row in rows]
        self.memory.reorder(rows)
        self.state = self.state[:, :, list(rows)]


class ConvEncoder(nn.Module):
    """Images as a grid of vectors: `layers` of a 5 x 5 convolution that halves the sides, layer norm and ReLU.

    A vector sees 2^(layers + 2) - 3 pixels of either side, and nothing else of the image, so that attention has
    something to find: with 3 layers 29, in which an object of 20 fits wherever it stands. Layer norm is over the
    channels of one position, for the same reason, and does not join images as batch norm would. Where a vector stands
    is told by a learned one, which is added.
    """

    def __init__(self, config: CaptionConfig) -> None:
        super().__init__()
        c = config
        halvings = range(c.layers - 1, 0, -1)
        sizes = [*(max(_LEAST_CHANNELS, c.grid_size >> times) for times in halvings), c.grid_size]
        before = [3, *sizes[:-1]]
        self.layers = nn.ModuleList(
            nn.Conv2d(*pair, 5, stride=2, padding=2) for pair in zip(before, sizes, strict=True)
        )
        self.norms = nn.ModuleList(map(nn.LayerNorm, sizes))
        self.positions = nn.Parameter(torch.randn(cast(int, c.side) ** 2, c.grid_size) * 0.1)

    def forward(self, images: Tensor) -> Tensor:
        """images [b, 3, H, H], uint8 or floating in [0, 1]; returns [b, L, grid_size], row by row."""
        x = images.to(self.positions.dtype)
        x = 2 * (x / 255 if images.dtype is torch.uint8 else x) - 1
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(norm(layer(x).movedim(1, -1))).movedim(-1, 1)
        return x.flatten(2).mT + self.positions


class ShowAttendTell(Pretrained):
    """The model. Attention runs on `pyattn.additive_attention`, one query for each caption and step.

    Where the weights are wanted (pictures, hard attention, the doubly stochastic term), they are attention over the
    identity, with the gradient that values have. A step has one query, and a caption is short: all of them together are
    [b, m, L].
    """

    config: CaptionConfig

    def __init__(self, config: CaptionConfig) -> None:
        super().__init__()
        c = self.config = config
        self.encoder = None if c.image_size is None else ConvEncoder(c)
        self.embedding = nn.Embedding(c.vocab, c.width)
        self.initial_h, self.initial_c = (
            nn.Sequential(Linear(c.grid_size, c.hidden), nn.Tanh(), Linear(c.hidden, c.hidden), nn.Tanh())
            for _ in range(2)
        )
        self.score = AdditiveScore(c.hidden, c.grid_size, c.score_size, bias=True)
        self.gate = Linear(c.hidden, 1) if c.gate else None
        self.cell = Recurrent("lstm", c.width + c.grid_size, c.hidden)
        self.output_h = Linear(c.hidden, c.width, bias=False)
        self.output_z = Linear(c.grid_size, c.width, bias=False)
        self.output = Linear(c.width, c.vocab)
        nn.init.normal_(self.embedding.weight, std=c.width**-0.5)
        nn.init.zeros_(self.output.bias)

    def forward(self, images: Tensor, tokens: Tensor, *, return_looks: bool = False) -> Tensor | tuple[Tensor, Looks]:
        """Logits of the token behind each token of the captions.

        Args:
            images: [b, 3, image_size, image_size], uint8 or floating in [0, 1]; or a grid [b, L, grid_size].
            tokens: [b, m] integer, beginning with the start token. Padding behind a caption changes nothing before it.
                Of [t * b, m], rows i * t to i * t + t - 1 are captions of image i, which is encoded once.
            return_looks: also return where each step looked.
        Returns:
            [b, m, vocab]; with return_looks also `Looks`, row i of which is that of the token behind token i.
        Raises:
            RangeError: more tokens than the context; images for a model without an encoder; on the CPU also tokens
                outside the vocabulary.
            ShapeError: images or grids of other sizes than the model's, or captions that do not fit them in number.
            DtypeError: images that are neither uint8 nor floating.
        """
        check_tokens("tokens", tokens)
        self._check_length("tokens", tokens.shape[1])
        telling = self._begin(images, [[] for _ in tokens])
        telling.looks = [] if return_looks else None
        embedded = self._embedded("tokens", tokens)
        states, seen = [], []
        for x in embedded.unbind(1):
            seen.append(self._advance(x, telling))
            states.append(telling.state[0, 0])
        if seen:
            logits = self._logits(embedded, torch.stack(states, 1), torch.stack(seen, 1))
        else:
            logits = self.output(embedded)
        return logits if telling.looks is None else (logits, self._joined(telling.looks, telling))

    def decoder(self, images: Tensor) -> CaptionDecoder:
        """What `pyattn.decoding` tells captions of these images by, as `forward` takes them."""
        return CaptionDecoder(self, images)

    def read(self, images: Tensor, prompt: Tensor, lengths: Tensor | None) -> tuple[Tensor, Telling]:
        """Reads the beginning of a caption of each image (`CaptionDecoder.prefill`): logits [b, vocab] and the rest."""
        held = [prompt.shape[1]] * len(prompt) if lengths is None else lengths.tolist()
        texts = [row[:length] for row, length in zip(prompt.tolist(), held, strict=True)]
        telling = self._begin(images, texts)
        logits = prompt.new_zeros(len(prompt), self.config.vocab, dtype=telling.state.dtype)
        for place in range(prompt.shape[1]):
            before = telling.state
            of_step = self.step(prompt[:, place], telling)
            is_inside = torch.tensor([place < length for length in held], device=prompt.device)[:, None]
            logits = torch.where(is_inside, of_step, logits)
            telling.state = torch.where(is_inside, telling.state, before)
        return logits, telling

    def step(self, tokens: Tensor, telling: Telling) -> Tensor:
        """Reads one more token of each row, tokens [b]. Returns the logits [b, vocab] of the one after it."""
        embedded = self._embedded("tokens", tokens)
        seen = self._advance(embedded, telling)
        return self._logits(embedded, telling.state[0, 0], seen)

    def _begin(self, images: Tensor, texts: list[list[int]]) -> Telling:
        """Encodes the images, prepares their keys, and starts a row for each text, as many for each image."""
        c, rows = self.config, len(texts)
        grid = self._grid(images)
        b = len(grid)
        if rows % b if b else rows:
            raise ShapeError(f"tokens: expected captions for a multiple of the {b} images, got {rows}")
        mean = grid.mean(1)
        state = torch.stack([self.initial_h(mean), self.initial_c(mean)]).unsqueeze(1)
        is_soft = half(b, grid.device) if c.hard and c.temperature is None and self.training else None
        memory = Memory([(self.score.keys(grid), grid, is_soft)], b, None, grid.device)
        if rows != b:
            memory.reorder([i for i in range(b) for _ in range(rows // b)])
            state = state.repeat_interleave(rows // b, 2)
        return Telling(texts, memory, state)

    def _grid(self, images: Tensor) -> Tensor:
        """images, if they are none yet, as a grid [b, L, grid_size]."""
        c, given = self.config, list(images.shape)
        if not (images.is_floating_point() or (images.dtype is torch.uint8 and images.ndim == 4)):
            raise DtypeError(f"images: expected uint8, or floating numbers, got {dtype_name(images.dtype)}")
        if images.ndim == 3:
            if given[1] == 0 or given[2] != c.grid_size:
                raise ShapeError(f"images: expected a grid [b, L >= 1, grid_size={c.grid_size}], got {given}")
            return images
        if self.encoder is None:
            raise RangeError(f"images: expected a grid [b, L, grid_size={c.grid_size}], got {given}: the model has no "
                             "encoder")  # fmt: skip
        if images.ndim != 4 or given[1:] != [3, c.image_size, c.image_size]:
            raise ShapeError(f"images: expected [b, 3, {c.image_size}, {c.image_size}] or a grid [b, L, "
                             f"grid_size={c.grid_size}], got {given}")  # fmt: skip
        return self.encoder(images)

    def _advance(self, embedded: Tensor, telling: Telling) -> Tensor:
        """One step of each row, embedded [rows, width]: looks, steps, and returns what was seen, [rows, grid_size]."""
        h = telling.state[0, 0]
        seen = self._look(h, telling)
        if self.gate is not None:
            seen = torch.sigmoid(self.gate(h)) * seen
        _, telling.state = self.cell.step(torch.cat([embedded, seen], -1), telling.state)
        return seen

    def _look(self, h: Tensor, telling: Telling) -> Tensor:
        """z of each row without its gate, [rows, grid_size], of states h [rows, hidden]."""
        memory, is_watched = telling.memory, telling.looks is not None
        attend = self.score.attend if self.config.attention == "pyattn" else self.score.attend_unfused
        query, (keys, grid, is_soft) = memory.by_source(h.unsqueeze(1)), memory.layers[0]
        if self.config.hard:
            weights = weights_of(lambda v: cast(Tensor, attend(query, keys, v[:, 0])).unsqueeze(1), grid.unsqueeze(1))
            context, looks = self._choose(weights, grid, is_soft, memory)
        elif is_watched:
            context, weights = attend(query, keys, grid, return_weights=True)
            looks = Looks(memory.by_row(weights, 1))
        else:
            context = cast(Tensor, attend(query, keys, grid))
        if telling.looks is not None:
            telling.looks.append(looks)
        return memory.by_row(context, 1).squeeze(1)

    def _choose(self, weights: Tensor, grid: Tensor, is_soft: Tensor | None, memory: Memory) -> tuple[Tensor, Looks]:
        """The contexts of hard attention by weights [images, 1, rows of one, L], and where each row looked."""
        # The logarithm of a weight is its score, but for a number that all scores of a step have in common.
        scores = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
        chosen = hard_attention_of_scores(
            scores, grid.unsqueeze(1), greedy=not self.training, temperature=self.config.temperature, soft=is_soft
        )
        of_choice = (memory.by_row(t.transpose(1, 2), 1).squeeze(2) for t in chosen[1:])
        return chosen.out.squeeze(1), Looks(memory.by_row(weights.squeeze(1), 1), *of_choice)

    def _joined(self, looks: Sequence[Looks], telling: Telling) -> Looks:
        """Those of all steps together."""
        if looks:
            by_part: Any = zip(*looks, strict=True)
            return Looks._make(None if parts[0] is None else torch.cat(parts, 1) for parts in by_part)
        none = telling.state.new_zeros(len(telling.read), 0)
        of_choice = (none.long(), none, none) if self.config.hard else ()
        return Looks(none.unsqueeze(2).expand(-1, -1, telling.memory.layers[0][1].shape[1]), *of_choice)

    def _logits(self, embedded: Tensor, states: Tensor, seen: Tensor) -> Tensor:
        """Of [..., width], [..., hidden] and [..., grid_size]: [..., vocab]."""
        read = embedded + self.output_h(states) + self.output_z(seen)
        return self.output(F.dropout(read, self.config.dropout, self.training))

    def _embedded(self, name: str, tokens: Tensor) -> Tensor:
        return F.dropout(embed(name, tokens, self.embedding.weight), self.config.dropout, self.training)

    def _check_length(self, name: str, length: int) -> None:
        if length > self.config.context:
            raise RangeError(f"{name}: expected at most context={self.config.context}, got {length}")

    @classmethod
    def config_from(cls, fields: Fields) -> CaptionConfig:
        fields.expect(model_type=OWN_TYPE)
        return fields.all_of(CaptionConfig)

    def config_fields(self) -> dict[str, Any]:
        return {"model_type": OWN_TYPE, "architectures": ["ShowAttendTell"], **asdict(self.config)}

    def stored(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())


class CaptionDecoder:
    """A model and the images that it tells of, for `pyattn.decoding`: prompt i is the beginning of a caption of image
    i, at least the start token. Rows of one image, such as beams, share its grid.

        decoder = model.decoder(images)
        beam_search(decoder, decoder.start, 20, beams=4, end=model.config.end)
    """

    continues_prompt: ClassVar[bool] = False  # a caption cannot go on without its beginning

    def __init__(self, model: ShowAttendTell, images: Tensor) -> None:
        self.model = model
        self.config = model.config
        self.images = images

    @property
    def start(self) -> Tensor:
        """The prompts of captions of which nothing is given, int64 [b, 1]."""
        return torch.full((len(self.images), 1), self.config.start, device=self.images.device)

    def prefill(
        self,
        prompt: Tensor,
        lengths: Tensor | None = None,
        *,
        count: int | Sequence[int],
        page: int | None = None,
    ) -> tuple[Tensor, Telling]:
        """Encodes the images and reads the beginnings (`pyattn.decoding.protocol`).

        Args:
            prompt: [b, m] integer, padded behind; the first token of each is the start token.
            lengths: [b] integer, tokens of each; all m by default.
            count: how many tokens `step` may be given afterwards; one number, or one for each prompt.
            page: of no use here, where a state has one size.
        Returns:
            logits [b, vocab] of the next tokens, and what `step` goes on with.
        Raises:
            RangeError: a prompt and its count exceed the context.
            ShapeError: prompts are not as many as the images.
        """
        check_prompt(prompt, lengths)
        if len(prompt) != len(self.images):
            raise ShapeError(f"prompt: expected one for each of the {len(self.images)} images, got {len(prompt)}")
        if not isinstance(count, int) and len(count) != len(prompt):
            raise RangeError(f"count: expected one number, or {len(prompt)}, got {len(count)}")
        counts = [count] * len(prompt) if isinstance(count, int) else list(count)
        held = [prompt.shape[1]] * len(prompt) if lengths is None else lengths.tolist()
        longest = max((have + more for have, more in zip(held, counts, strict=True)), default=0)
        if longest > self.config.context:
            raise RangeError(
                f"count: expected a caption of at most context={self.config.context} tokens, got {longest}"
            )
        return self.model.read(self.images, prompt, lengths)

    def step(self, tokens: Tensor, state: Telling) -> Tensor:
        return self.model.step(tokens, state)


def doubly_stochastic(weights: Tensor, is_word: Tensor) -> Tensor:
    """sum_i (1 - sum_t alpha_ti)^2: how far positions are from being looked at once, all words of a caption together.

    Args:
        weights: [b, m, L].
        is_word: bool [b, m]; the steps of padding do not look.
    Returns:
        [b]
    Source: Xu et al. 2015, equation 14.
    """
    looked = (weights * is_word[..., None]).sum(1)
    return (1 - looked).square().sum(-1)
