"""Recurrent layers over sequences of any lengths: torch's LSTM, GRU and RNN, or such with layer norm in the cell."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pyattn.check import DtypeError, RangeError, ShapeError, autocast_dtype
from pyattn.nn.linear import Linear
from pyattn.nn.scores import check_sizes
from pyattn.spec import dtype_name

CELLS = ("lstm", "gru", "rnn")
PARTS = {"lstm": 2, "gru": 1, "rnn": 1}
_LAYERS: dict[str, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
# Gates that are normalized together: those of a GRU apart from what they gate.
_GATES = {"lstm": (4,), "gru": (2, 1), "rnn": (1,)}


class Recurrent(nn.Module):
    """A stack of recurrent layers.

    Its state is one tensor [parts, layers * directions, b, hidden]: h, and of an LSTM also c; within a layer the
    forward direction comes first, as in torch.

    Parameters start uniform in +-1 / sqrt(hidden), as torch's do, but biases of an LSTM's forget gates sum to 1, so
    that a new cell holds what it has (Jozefowicz, Zaremba and Sutskever 2015, "An Empirical Exploration of Recurrent
    Network Architectures").

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
        self.input_size = input_size
        self.hidden = hidden
        if not 0 <= dropout < 1:
            raise RangeError(f"dropout: expected a probability in [0, 1), got {dropout}")
        self.dropout = dropout
        self.directions = 2 if bidirectional else 1
        self.stack = layers * self.directions
        self.normed: nn.ModuleList | None = None
        self.layers: nn.RNNBase | None = None
        if norm:
            sizes = [input_size] + (layers - 1) * [self.directions * hidden]
            directions = [False, True][: self.directions]
            self.normed = nn.ModuleList(NormedLayer(cell, size, hidden, back) for size in sizes for back in directions)
        else:
            layer: Any = _LAYERS[cell]
            self.layers = layer(
                input_size, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0,
                bidirectional=bidirectional,
            )  # fmt: skip
            if cell == "lstm":
                _open_forget_gates(self.layers)

    def initial(self, rows: int, like: Tensor) -> Tensor:
        """The state before anything is read: zeros, in the dtype and on the device of `like`."""
        return like.new_zeros(PARTS[self.cell], self.stack, rows, self.hidden)

    def forward(self, x: Tensor, state: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reads whole sequences.

        Args:
            x: [b, m, input_size], padded behind with anything.
            state: to go on from; zeros by default.
            lengths: integer [b], how much of each is no padding, in any order; all m by default. On a GPU torch waits
                for them, unless they are on the CPU.
        Returns:
            out [b, m, directions * hidden], 0 in the padding, and the state after each row's last element, in the dtype
            of the given one. A row without elements leaves the state as it was.
        Raises:
            ShapeError, DtypeError: x, state or lengths of another shape; lengths that are no integers.
            RangeError: lengths outside [0, m].
        """
        if x.ndim != 3 or x.shape[2] != self.input_size:
            raise ShapeError(f"x: expected [b, m, input_size={self.input_size}], got {list(x.shape)}")
        b, m, _ = x.shape
        state = self.initial(b, x) if state is None else self._checked_state(state, b)
        held = None if lengths is None else _checked_lengths(lengths, b, m)
        if x.numel() == 0:
            return x.new_zeros(b, m, self.directions * self.hidden), state
        x = x.to(autocast_dtype(x))  # torch's LSTM takes none but these on a CPU without bfloat16 instructions
        inside = None
        if held is not None:
            inside = torch.arange(m, device=x.device) < held.to(x.device)[:, None]
            x = x.masked_fill(~inside[..., None], 0.0)  # a NaN there would reach the weights' gradients as 0 * NaN
        if self.normed is None:
            out, after = self._read(x, state, held)
        else:
            out, after = self._read_normed(self.normed, x, state, inside)
        return out, after.to(state.dtype)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Reads one element of each row, x [b, input_size]; returns out [b, hidden] and the state after it.

        Raises:
            ShapeError: the layers are bidirectional, and so need whole sequences; x or state is of another shape.
        """
        if self.directions > 1:
            raise ShapeError("step: expected layers of one direction; two directions read whole sequences")
        if x.ndim != 2 or x.shape[1] != self.input_size:
            raise ShapeError(f"x: expected [b, input_size={self.input_size}], got {list(x.shape)}")
        self._checked_state(state, len(x))
        after = []
        for layer in range(self.stack):
            if layer > 0:
                x = F.dropout(x, self.dropout, self.training)
            after.append(self._step_of_layer(layer, x, state[:, layer]))
            x = after[-1][0]
        return x, torch.stack(after, 1).to(state.dtype)

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

    def _read(self, x: Tensor, state: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        layers, given = cast(nn.RNNBase, self.layers), _as_torch(state)
        if lengths is None:
            out, after = layers(x, given)
            return out, _from_torch(after)
        held = lengths.clamp(min=1)  # torch knows no empty rows
        out, after = layers(pack_padded_sequence(x, held, batch_first=True, enforce_sorted=False), given)
        out, _ = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
        some = (lengths > 0).to(x.device)[:, None]
        return out * some[..., None], torch.where(some, _from_torch(after), state)

    def _read_normed(
        self, layers: nn.ModuleList, x: Tensor, state: Tensor, inside: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        after = []
        for first in range(0, self.stack, self.directions):
            if first > 0:
                x = F.dropout(x, self.dropout, self.training)
            found = [layers[i](x, state[:, i], inside) for i in range(first, first + self.directions)]
            x = torch.cat([out for out, _ in found], -1)
            after += [last for _, last in found]
        return x, torch.stack(after, 1)

    def _checked_state(self, state: Tensor, b: int) -> Tensor:
        shape = (PARTS[self.cell], self.stack, b, self.hidden)
        if state.shape != shape:
            names = "[parts, layers * directions, b, hidden]"
            raise ShapeError(f"state: expected {names} = {list(shape)}, got {list(state.shape)}")
        return state


class NormedLayer(nn.Module):
    """One direction of a recurrent layer whose cell normalizes over its hidden units, in each step.

    Statistics are those of one step of one row. In batch normalization other rows would have a part in them, every
    step would need its own, and a batch of one would have none.

        rnn   h = tanh(LN(W x + U h))
        lstm  i, f, g, o = LN(W x) + LN(U h) + b
              c = sigmoid(f) c + sigmoid(i) tanh(g);  h = sigmoid(o) tanh(LN(c))
        gru   r, z = LN(W x) + LN(U h)
              n = tanh(LN(W_n x) + sigmoid(r) LN(U_n h));  h = (1 - sigmoid(z)) n + sigmoid(z) h

    Each LN has a gain and a bias of its own. Gates stand in torch's order, and z on the state that was, as there; in
    the paper on the new one.

    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450, equation 4 and appendix.
    """

    def __init__(self, cell: str, input_size: int, hidden: int, backward: bool = False) -> None:
        super().__init__()
        self.cell = cell
        self.reads_backward = backward
        self.sizes = [count * hidden for count in _GATES[cell]]  # the parts of the gates, each normalized by itself
        self.weight_x = Linear(input_size, sum(self.sizes), bias=False)
        self.weight_h = Linear(hidden, sum(self.sizes), bias=False)
        self.norm_x = nn.ModuleList(map(nn.LayerNorm, self.sizes))
        if cell != "rnn":
            self.norm_h = nn.ModuleList(map(nn.LayerNorm, self.sizes))
        if cell == "lstm":
            self.norm_c = nn.LayerNorm(hidden)
            self.bias = nn.Parameter(torch.zeros(4 * hidden))
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)
        if cell == "lstm":
            _open_forget_gates(self)

    def forward(self, x: Tensor, state: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `Recurrent.forward`, for x [b, m, input_size], state [parts, b, hidden] and what of x is no padding.

        inside: boolean [b, m]; all of x where None.
        """
        inputs, outs = self.inputs(x), []
        steps = range(x.shape[1])
        for i in reversed(steps) if self.reads_backward else steps:
            after = self.step(inputs[:, i], state)
            state = after if inside is None else torch.where(inside[:, i, None], after, state)
            outs.append(after[0])
        out = torch.stack(outs[::-1] if self.reads_backward else outs, 1)
        return out if inside is None else out * inside[..., None], state

    def inputs(self, x: Tensor) -> Tensor:
        """What a step needs of x, for all steps at once."""
        return self.weight_x(x) if self.cell == "rnn" else self._normalized(self.norm_x, self.weight_x(x))

    def step(self, inputs: Tensor, state: Tensor) -> Tensor:
        """The state [parts, b, hidden] after one step, of `inputs` [b, gates * hidden]."""
        h = state[0]
        recurrent = self.weight_h(h)
        if self.cell == "rnn":
            return torch.tanh(self._normalized(self.norm_x, inputs + recurrent)).unsqueeze(0)
        recurrent = self._normalized(self.norm_h, recurrent)
        if self.cell == "lstm":
            i, f, g, o = (inputs + recurrent + self.bias).chunk(4, -1)
            c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
            return torch.stack((torch.sigmoid(o) * torch.tanh(self.norm_c(c)), c))
        (gates_x, new_x), (gates_h, new_h) = (part.split(self.sizes, -1) for part in (inputs, recurrent))
        r, z = torch.sigmoid(gates_x + gates_h).chunk(2, -1)
        return ((1 - z) * torch.tanh(new_x + r * new_h) + z * h).unsqueeze(0)

    def _normalized(self, norms: nn.ModuleList, x: Tensor) -> Tensor:
        """x [..., gates * hidden], each norm over its own part."""
        return torch.cat([norm(part) for norm, part in zip(norms, x.split(self.sizes, -1), strict=True)], -1)


def check_cell(name: str) -> None:
    """Raises RangeError unless `name` is one of CELLS."""
    if name not in CELLS:
        raise RangeError(f"cell: expected one of {', '.join(CELLS)}, got {name}")


def _checked_lengths(lengths: Tensor, b: int, m: int) -> Tensor:
    """lengths as int64 on the CPU, where torch wants them; an error unless they are integers [b] in [0, m]."""
    if lengths.dtype not in (torch.int64, torch.int32):
        raise DtypeError(f"lengths: expected int64 or int32, got {dtype_name(lengths.dtype)}")
    if lengths.shape != (b,):
        raise ShapeError(f"lengths: expected [b={b}], got {list(lengths.shape)}")
    held = lengths.to("cpu", torch.int64)
    if b and not 0 <= int(held.min()) <= int(held.max()) <= m:
        raise RangeError(f"lengths: expected values in [0, m={m}], got {int(held.min())} to {int(held.max())}")
    return held


@torch.no_grad()
def _open_forget_gates(layer: nn.Module) -> None:
    """The biases of the forget gates, in torch's order the second: 1 together, where there are two."""
    for name, bias in layer.named_parameters():
        if name.startswith("bias"):
            bias.view(4, -1)[1] = 0.0 if name.startswith("bias_hh") else 1.0


def _as_torch(state: Tensor) -> tuple[Tensor, Tensor] | Tensor:
    return (state[0].contiguous(), state[1].contiguous()) if len(state) == 2 else state[0].contiguous()


def _from_torch(state: tuple[Tensor, Tensor] | Tensor) -> Tensor:
    return torch.stack(tuple(state)) if isinstance(state, tuple) else state.unsqueeze(0)
