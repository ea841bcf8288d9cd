"""Recurrent layers over sequences of any lengths: torch's LSTM, GRU and RNN, or such with layer norm in the cell."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pyattn.check import RangeError, ShapeError
from pyattn.nn.linear import Linear
from pyattn.nn.scores import check_sizes

CELLS = ("lstm", "gru", "rnn")
_LAYERS: dict[str, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
_GATES = {"lstm": 4, "gru": 3, "rnn": 1}
PARTS = {"lstm": 2, "gru": 1, "rnn": 1}


class Recurrent(nn.Module):
    """A stack of recurrent layers.

    Its state is one tensor [parts, layers * directions, b, hidden]: h, and of an LSTM also c; within a layer the
    forward direction comes first, as in torch.

    Args:
        cell: a name out of CELLS: torch.nn.LSTM, torch.nn.GRU or torch.nn.RNN, with their conventions (two biases, the
            reset gate of a GRU behind the product).
        input_size, hidden: of what comes and of each direction's states.
        layers: of the stack.
        dropout: probability, between layers.
        bidirectional: a second direction in each layer, which reads from the end; states stand side by side.
        norm: layer normalization inside the cell (`NormedLayer`), which torch's layers have not.

    Raises:
        RangeError: an unknown cell, or a size below 1.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden: int,
        layers: int = 1,
        *,
        dropout: float = 0.0,
        bidirectional: bool = False,
        norm: bool = False,
    ) -> None:
        check_cell(cell)
        check_sizes(input_size=input_size, hidden=hidden, layers=layers)
        super().__init__()
        self.cell = cell
        self.hidden = hidden
        self.dropout = dropout
        self.directions = 2 if bidirectional else 1
        self.stack = layers * self.directions
        self.normed: nn.ModuleList | None = None
        self.layers: nn.RNNBase | None = None
        if norm:
            sizes = [input_size] + (layers - 1) * [self.directions * hidden]
            self.normed = nn.ModuleList(
                NormedLayer(cell, size, hidden, backward) for size in sizes for backward in range(self.directions)
            )
        else:
            layer: Any = _LAYERS[cell]
            self.layers = layer(
                input_size, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0,
                bidirectional=bidirectional,
            )  # fmt: skip

    def initial(self, rows: int, like: Tensor) -> Tensor:
        """The state before anything is read: zeros, in the dtype and on the device of `like`."""
        return like.new_zeros(PARTS[self.cell], self.stack, rows, self.hidden)

    def forward(self, x: Tensor, state: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reads whole sequences.

        Args:
            x: [b, m, input_size], padded behind.
            state: to go on from; zeros by default.
            lengths: integer [b], how much of each is no padding, in any order; all m by default.
        Returns:
            out [b, m, directions * hidden], 0 in the padding, and the state after each row's last element. A row
            without elements leaves the state as it was.
        """
        b, m, _ = x.shape
        state = self.initial(b, x) if state is None else state
        if m == 0:
            return x.new_zeros(b, 0, self.directions * self.hidden), state
        if self.normed is not None:
            return self._forward_normed(x, state, lengths)
        layers, given = cast(nn.RNNBase, self.layers), _as_torch(state)
        if lengths is None:
            out, after = layers(x, given)
            return out, _from_torch(after)
        held = lengths.cpu().clamp(min=1)  # torch knows no empty rows
        packed = pack_padded_sequence(x, held, batch_first=True, enforce_sorted=False)
        out, after = layers(packed, given)
        out, _ = pad_packed_sequence(out, batch_first=True, total_length=m)
        if bool((lengths == 0).any()):
            some = (lengths > 0)[:, None]
            return out * some[..., None], torch.where(some, _from_torch(after), state)
        return out, _from_torch(after)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Reads one element of each row, x [b, input_size]; returns out [b, hidden] and the state after it.

        Raises:
            ShapeError: the layers are bidirectional, and so need whole sequences.
        """
        if self.directions > 1:
            raise ShapeError("step: expected layers of one direction; two directions read whole sequences")
        after = []
        for layer in range(self.stack):
            if layer > 0 and self.training:
                x = F.dropout(x, self.dropout)
            after.append(self._step_of_layer(layer, x, state[:, layer]))
            x = after[-1][0]
        return x, torch.stack(after, 1)

    def _step_of_layer(self, layer: int, x: Tensor, state: Tensor) -> Tensor:
        """The state [parts, b, hidden] of one layer after x."""
        if self.normed is not None:
            normed = cast(NormedLayer, self.normed[layer])
            return normed.step(normed.inputs(x), state)
        weights = [
            getattr(self.layers, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        if self.cell == "lstm":
            return torch.stack(torch.lstm_cell(x, (state[0], state[1]), *weights))
        cell = torch.gru_cell if self.cell == "gru" else torch.rnn_tanh_cell
        return cell(x, state[0], *weights).unsqueeze(0)

    def _forward_normed(self, x: Tensor, state: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        after = []
        for first in range(0, self.stack, self.directions):
            if first > 0 and self.training:
                x = F.dropout(x, self.dropout)
            found = [
                cast(NormedLayer, cast(nn.ModuleList, self.normed)[i])(x, state[:, i], lengths)
                for i in range(first, first + self.directions)
            ]
            x = torch.cat([out for out, _ in found], -1)
            after += [last for _, last in found]
        return x, torch.stack(after, 1)


class NormedLayer(nn.Module):
    """One direction of a recurrent layer whose cell normalizes over its hidden units, in each step.

    Statistics are those of one step of one row. In batch normalization other rows would have a part in them, every
    step would need its own, and a batch of one would have none.

        rnn   h = tanh(LN(W x + U h) + b)
        lstm  i, f, g, o = LN(W x) + LN(U h) + b
              c = sigmoid(f) c + sigmoid(i) tanh(g);  h = sigmoid(o) tanh(LN(c))
        gru   r, z = LN(W x) + LN(U h) + b
              n = tanh(LN(W_n x) + sigmoid(r) LN(U_n h));  h = (1 - sigmoid(z)) n + sigmoid(z) h

    Each LN has a gain and a bias of its own. Gates stand in torch's order, and z on the state that was, as there; in
    the paper on the new one.

    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450, equation 4 and appendix.
    """

    def __init__(self, cell: str, input_size: int, hidden: int, backward: bool | int = False) -> None:
        super().__init__()
        self.cell = cell
        self.hidden = hidden
        self.backward_direction = bool(backward)
        gates = _GATES[cell] * hidden
        self.weight_x = Linear(input_size, gates, bias=False)
        self.weight_h = Linear(hidden, gates, bias=False)
        self.bias = nn.Parameter(torch.zeros(gates if cell != "gru" else 2 * hidden))
        # Gates are normalized together, those of a GRU apart from what they gate.
        self.norm_x = _norms(cell, hidden)
        self.norm_h = _norms(cell, hidden) if cell != "rnn" else nn.ModuleList()
        self.norm_c = nn.LayerNorm(hidden) if cell == "lstm" else nn.Identity()
        for weight in (self.weight_x.weight, self.weight_h.weight):
            nn.init.uniform_(weight, -(hidden**-0.5), hidden**-0.5)

    def forward(self, x: Tensor, state: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [b, m, input_size] and state [parts, b, hidden], as `Recurrent.forward`."""
        m, inputs = x.shape[1], self.inputs(x)
        out: list[Tensor] = [x] * m
        for i in reversed(range(m)) if self.backward_direction else range(m):
            after = self.step(inputs[:, i], state)
            inside = None if lengths is None else (i < lengths)[:, None]
            state = after if inside is None else torch.where(inside, after, state)
            out[i] = after[0] if inside is None else after[0] * inside
        return torch.stack(out, 1), state

    def inputs(self, x: Tensor) -> Tensor:
        """What a step needs of x, for all steps at once."""
        return self.weight_x(x) if self.cell == "rnn" else self._normalized(self.norm_x, self.weight_x(x))

    def step(self, inputs: Tensor, state: Tensor) -> Tensor:
        """The state [parts, b, hidden] after one step, of `inputs` [b, gates * hidden]."""
        h = state[0]
        recurrent = self.weight_h(h)
        if self.cell == "rnn":
            return torch.tanh(self._normalized(self.norm_x, inputs + recurrent) + self.bias).unsqueeze(0)
        recurrent = self._normalized(self.norm_h, recurrent)
        if self.cell == "lstm":
            i, f, g, o = (inputs + recurrent + self.bias).chunk(4, -1)
            c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
            return torch.stack((torch.sigmoid(o) * torch.tanh(self.norm_c(c)), c))
        gates, both = 2 * self.hidden, torch.sigmoid
        r, z = both(inputs[:, :gates] + recurrent[:, :gates] + self.bias).chunk(2, -1)
        n = torch.tanh(inputs[:, gates:] + r * recurrent[:, gates:])
        return ((1 - z) * n + z * h).unsqueeze(0)

    def _normalized(self, norms: nn.ModuleList, x: Tensor) -> Tensor:
        """x [..., gates * hidden], each norm over its own part."""
        sizes = [cast(nn.LayerNorm, norm).normalized_shape[0] for norm in norms]
        return torch.cat([norm(part) for norm, part in zip(norms, x.split(sizes, -1), strict=True)], -1)


def check_cell(name: str) -> None:
    """Raises RangeError unless `name` is one of CELLS."""
    if name not in CELLS:
        raise RangeError(f"cell: expected one of {', '.join(CELLS)}, got {name}")


def _norms(cell: str, hidden: int) -> nn.ModuleList:
    sizes = {"lstm": [4], "gru": [2, 1], "rnn": [1]}[cell]
    return nn.ModuleList(nn.LayerNorm(size * hidden) for size in sizes)


def _as_torch(state: Tensor) -> tuple[Tensor, Tensor] | Tensor:
    return (state[0].contiguous(), state[1].contiguous()) if len(state) == 2 else state[0].contiguous()


def _from_torch(state: tuple[Tensor, Tensor] | Tensor) -> Tensor:
    return torch.stack(tuple(state)) if isinstance(state, tuple) else state.unsqueeze(0)
