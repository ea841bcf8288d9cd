"""Recurrent layers held against torch's, those with layer norm against a loop over the paper's formulas, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

import pyattn
from pyattn.nn.recurrent import CELLS, PARTS, NormedLayer, Recurrent

TORCH = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
B, M, INPUT, HIDDEN = 4, 6, 3, 5
LENGTHS = torch.tensor([2, 6, 0, 4])

pytestmark = pytest.mark.usefixtures("one_thread")


def _inputs(layers: Recurrent, m: int = M) -> tuple[Tensor, Tensor]:
    """x and a state for it, of float64 and with gradients."""
    x = torch.randn(B, m, INPUT, dtype=torch.float64, requires_grad=True)
    return x, torch.randn_like(layers.initial(B, x)).requires_grad_()


def _recurrent(cell: str, layers: int = 2, *, seed: int = 0, **options: object) -> Recurrent:
    torch.manual_seed(seed)
    recurrent = Recurrent(cell, INPUT, HIDDEN, layers, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in recurrent.parameters():  # so that no gain is 1 and no bias 0
            parameter.add_(0.3 * torch.randn_like(parameter))
    return recurrent


def _gradients(out: Tensor, state: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a sum that weighs every element of out and state in its own way."""
    total = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    return torch.autograd.grad(total + state.sin().sum(), wanted)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_equals_torch(cell: str, layers: int, packed: bool, bidirectional: bool) -> None:
    ours = _recurrent(cell, layers, bidirectional=bidirectional)
    theirs = TORCH[cell](INPUT, HIDDEN, layers, batch_first=True, bidirectional=bidirectional).double()
    theirs.load_state_dict(ours.layers.state_dict())
    x, state = _inputs(ours)
    lengths = torch.tensor([2, 6, 1, 4]) if packed else None
    out, after = ours(x, state, lengths)
    given = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False) if packed else x
    expected, last = theirs(given, tuple(state) if cell == "lstm" else state[0])
    if packed:
        expected, _ = pad_packed_sequence(expected, batch_first=True)
    last = torch.stack(tuple(last)) if cell == "lstm" else last[None]
    assert_close((out, after), (expected, last), atol=1e-14, rtol=0)
    found = _gradients(out, after, [x, state, *ours.parameters()])
    assert_close(found, _gradients(expected, last, [x, state, *theirs.parameters()]), atol=1e-12, rtol=0)


def _normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    mean = sum(x) / len(x)
    sigma = (sum((x - mean) ** 2) / len(x) + norm.eps).sqrt()
    return norm.weight * (x - mean) / sigma + norm.bias


def _step_of_paper(layer: NormedLayer, x: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One step of one row: equation 4, and the appendix for LSTM (20 to 22) and GRU (with z on the old state)."""
    wx, uh = layer.weight_x.weight @ x, layer.weight_h.weight @ h
    sigmoid = torch.sigmoid
    if layer.cell == "rnn":
        return torch.tanh(_normed(wx + uh, layer.norm_x[0])), None
    if layer.cell == "lstm":
        gates = _normed(wx, layer.norm_x[0]) + _normed(uh, layer.norm_h[0]) + layer.bias
        i, f, g, o = (gates[k * HIDDEN : (k + 1) * HIDDEN] for k in range(4))
        c = sigmoid(f) * c + sigmoid(i) * torch.tanh(g)
        return sigmoid(o) * torch.tanh(_normed(c, layer.norm_c)), c
    both, new = slice(2 * HIDDEN), slice(2 * HIDDEN, None)
    gates = _normed(wx[both], layer.norm_x[0]) + _normed(uh[both], layer.norm_h[0])
    r, z = sigmoid(gates[:HIDDEN]), sigmoid(gates[HIDDEN:])
    n = torch.tanh(_normed(wx[new], layer.norm_x[1]) + r * _normed(uh[new], layer.norm_h[1]))
    return (1 - z) * n + z * h, None


def _loop(recurrent: Recurrent, x: Tensor, state: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """What `Recurrent` with norm computes, row by row and element by element."""
    after = state.clone()
    out = x.new_zeros(*x.shape[:2], HIDDEN * recurrent.directions)
    for row, length in enumerate(lengths):
        values = list(x[row, :length])
        for first in range(0, recurrent.stack, recurrent.directions):
            read = []
            for i in range(first, first + recurrent.directions):
                h, c = state[0, i, row], state[1, i, row] if recurrent.cell == "lstm" else None
                order = range(length) if i == first else range(length - 1, -1, -1)
                states = {}
                for at in order:
                    h, c = _step_of_paper(recurrent.normed[i], values[at], h, c)
                    states[at] = h
                after[0, i, row] = h
                if c is not None:
                    after[1, i, row] = c
                read.append(states)
            values = [torch.cat([states[at] for states in read]) for at in range(length)]
        for at, value in enumerate(values):
            out[row, at] = value
    return out, after


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_with_norm_equals_a_loop_over_the_formulas(
    cell: str, bidirectional: bool, lengths: Tensor | None
) -> None:
    recurrent = _recurrent(cell, bidirectional=bidirectional, norm=True)
    x, state = _inputs(recurrent)
    out, after = recurrent(x, state, lengths)
    expected, last = _loop(recurrent, x, state, [M] * B if lengths is None else lengths.tolist())
    assert_close((out, after), (expected, last), atol=1e-13, rtol=0)
    wanted = [x, state, *recurrent.parameters()]
    assert_close(_gradients(out, after, wanted), _gradients(expected, last, wanted), atol=1e-11, rtol=0)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_step_equals_forward(cell: str, norm: bool) -> None:
    recurrent = _recurrent(cell, 3, norm=norm, dropout=0.5).eval()
    x, state = _inputs(recurrent)
    out, last = recurrent(x, state)
    for i in range(M):
        found, state = recurrent.step(x[:, i], state)
        assert_close(found, out[:, i], atol=1e-14, rtol=0)
    assert_close(state, last, atol=1e-14, rtol=0)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_segments_equal_the_whole(cell: str, norm: bool) -> None:
    recurrent = _recurrent(cell, norm=norm)
    x, state = _inputs(recurrent)
    first, middle = recurrent(x[:, :2], state)
    second, last = recurrent(x[:, 2:], middle)
    assert_close((torch.cat([first, second], 1), last), recurrent(x, state), atol=1e-14, rtol=0)


@pytest.mark.parametrize("read", ["forward", "step"])
@pytest.mark.parametrize("norm", [False, True])
def test_recurrent_dropout_is_between_layers_and_in_training_only(norm: bool, read: str) -> None:
    """Which units the second layer gets is seen in the gradients of its input's weights: none for a dropped unit."""
    recurrent = _recurrent("rnn", 2, norm=norm, dropout=0.5)
    x, state = _inputs(recurrent, 1)

    def run() -> tuple[Tensor, Tensor]:
        out, after = recurrent(x, state) if read == "forward" else recurrent.step(x[:, 0], state)
        return out.view(B, HIDDEN), after

    weight = recurrent.normed[1].weight_x.weight if norm else recurrent.layers.weight_ih_l1
    whole, dropped = run()[1], 0
    for _ in range(20):
        out, after = run()
        assert torch.equal(after[0, 0], whole[0, 0]), "nothing before the first layer"
        assert torch.equal(out, after[0, 1]), "nothing behind the last layer"
        (gradient,) = torch.autograd.grad(out[0, 0], weight)
        dropped += int((gradient == 0).all(0).sum())
    assert 30 <= dropped <= 70  # of 100 units; outside once in 30000 runs
    recurrent.eval()
    assert torch.equal(run()[0], run()[0])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_padding_changes_nothing_whatever_it_holds(cell: str, bidirectional: bool, norm: bool) -> None:
    recurrent = _recurrent(cell, bidirectional=bidirectional, norm=norm)
    x, state = _inputs(recurrent)
    padding = torch.arange(M) >= LENGTHS[:, None]
    poisoned = x.detach().masked_fill(padding[..., None], torch.nan).requires_grad_()
    results = [recurrent(given, state, LENGTHS) for given in (x, poisoned)]
    assert_close(*results, atol=0, rtol=0)
    out, after = results[1]
    assert out[padding].eq(0).all()
    assert torch.equal(after[:, :, 2], state[:, :, 2]), "a row without elements leaves the state as it was"
    found = _gradients(out, after, [poisoned, state, *recurrent.parameters()])
    assert_close(found, _gradients(*results[0], [x, state, *recurrent.parameters()]), atol=0, rtol=0)
    assert found[0][padding].eq(0).all()
    for row in (0, 1, 3):
        alone = recurrent(x[row : row + 1, : LENGTHS[row]], state[:, :, row : row + 1])
        assert_close(out[row : row + 1, : LENGTHS[row]], alone[0], atol=1e-14, rtol=0)
        assert_close(after[:, :, row : row + 1], alone[1], atol=1e-14, rtol=0)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("b", "m"), [(0, 3), (2, 0), (0, 0)])
def test_recurrent_of_nothing(b: int, m: int, cell: str, norm: bool) -> None:
    recurrent = _recurrent(cell, bidirectional=True, norm=norm)
    x = torch.randn(b, m, INPUT, dtype=torch.float64)
    state = torch.randn_like(recurrent.initial(b, x))
    for lengths in (None, torch.zeros(b, dtype=torch.long)):
        out, after = recurrent(x, state, lengths)
        assert out.shape == (b, m, 2 * HIDDEN) and torch.equal(after, state)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_only_empty_rows(cell: str, norm: bool) -> None:
    recurrent = _recurrent(cell, norm=norm)
    x, state = _inputs(recurrent)
    out, after = recurrent(x, state, torch.zeros(B, dtype=torch.int32))
    assert out.eq(0).all() and torch.equal(after, state)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_runs_under_autocast(cell: str, norm: bool) -> None:
    """With lengths and without, and step by step; states stay in the dtype that they have."""
    torch.manual_seed(0)
    recurrent = Recurrent(cell, INPUT, 32, 2, norm=norm)  # norms over few units could make much of a small error
    x = torch.randn(B, M, INPUT)
    expected, last = recurrent(x)
    with torch.autocast("cpu", torch.bfloat16):
        results = [recurrent(x), recurrent(x, None, torch.full((B,), M))]
        state = recurrent.initial(B, x)
        steps = []
        for i in range(M):
            out, state = recurrent.step(x[:, i], state)
            steps.append(out)
    for out, after in (*results, (torch.stack(steps, 1), state)):
        assert after.dtype is torch.float32
        # A bfloat16 is off by up to 2^-9 of itself, in each of six steps of two layers; 0.07 in the worst of 30 seeds.
        assert_close(out.float(), expected, atol=0.1, rtol=0)
        assert_close(after, last, atol=0.1, rtol=0)
        torch.autograd.grad(out.float().sum(), list(recurrent.parameters()))


def test_recurrent_new_lstm_has_forget_gates_of_bias_one() -> None:
    layers = Recurrent("lstm", INPUT, HIDDEN, 2, bidirectional=True).layers
    for name in ("l0", "l0_reverse", "l1", "l1_reverse"):
        bias = getattr(layers, f"bias_ih_{name}") + getattr(layers, f"bias_hh_{name}")
        assert torch.equal(bias.view(4, HIDDEN)[1], torch.ones(HIDDEN))
    for layer in Recurrent("lstm", INPUT, HIDDEN, 2, bidirectional=True, norm=True).normed:
        assert torch.equal(layer.bias.view(4, HIDDEN), torch.tensor([0.0, 1.0, 0.0, 0.0])[:, None].expand(4, HIDDEN))


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_starts_as_torch_does_but_for_forget_gates(cell: str) -> None:
    torch.manual_seed(3)
    ours = Recurrent(cell, INPUT, HIDDEN, 2)
    torch.manual_seed(3)
    theirs = TORCH[cell](INPUT, HIDDEN, 2).state_dict()
    for name, parameter in ours.layers.named_parameters():
        same = parameter == theirs[name]
        if cell == "lstm" and name.startswith("bias"):
            same = same.view(4, HIDDEN)[[0, 2, 3]]
        assert same.all(), name


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_with_norm_starts_uniform_in_the_range_of_torchs(cell: str) -> None:
    torch.manual_seed(0)
    for layer in Recurrent(cell, INPUT, 50, norm=True).normed:
        for weight in (layer.weight_x.weight, layer.weight_h.weight):
            assert 0.98 * 50**-0.5 < weight.abs().max() <= 50**-0.5
            assert weight.std().item() == pytest.approx(150**-0.5, rel=0.1)


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_without_a_state_starts_from_zeros(cell: str) -> None:
    recurrent = _recurrent(cell, 3, bidirectional=True)
    x, _ = _inputs(recurrent)
    state = recurrent.initial(B, x)
    assert torch.equal(state, x.new_zeros(PARTS[cell], 6, B, HIDDEN)) and state.dtype is x.dtype
    assert_close(recurrent(x), recurrent(x, state), atol=0, rtol=0)


@pytest.mark.parametrize("norm", [False, True])
def test_recurrent_bad_input_is_named(norm: bool) -> None:
    recurrent = Recurrent("gru", INPUT, HIDDEN, 2, norm=norm)
    x, state = torch.randn(B, M, INPUT), torch.zeros(1, 2, B, HIDDEN)
    for shape in ((B, M, INPUT + 1), (M, INPUT)):
        with pytest.raises(pyattn.ShapeError, match=r"x: expected \[b, m, input_size=3\], got"):
            recurrent(torch.randn(shape))
    for shape in ((2, 2, B, HIDDEN), (1, 1, B, HIDDEN), (1, 2, 1, HIDDEN), (1, 2, B, 1)):
        with pytest.raises(pyattn.ShapeError, match=r"state: expected .* = \[1, 2, 4, 5\], got"):
            recurrent(x, torch.zeros(shape))
        with pytest.raises(pyattn.ShapeError, match=r"state: expected .* = \[1, 2, 4, 5\], got"):
            recurrent.step(x[:, 0], torch.zeros(shape))
    with pytest.raises(pyattn.ShapeError, match=r"x: expected \[b, input_size=3\], got \[4, 6, 3\]"):
        recurrent.step(x, state)
    for lengths in (torch.tensor([1, 2, 3]), torch.ones(B, 1, dtype=torch.long)):
        with pytest.raises(pyattn.ShapeError, match=r"lengths: expected \[b=4\], got"):
            recurrent(x, state, lengths)
    for value in (-1, M + 1):
        with pytest.raises(pyattn.RangeError, match=r"lengths: expected values in \[0, m=6\], got .*" + str(value)):
            recurrent(x, state, torch.tensor([1, value, 2, 2]))
    with pytest.raises(pyattn.DtypeError, match="lengths: expected int64 or int32, got float32"):
        recurrent(x, state, torch.ones(B))
    with pytest.raises(pyattn.ShapeError, match="step: expected layers of one direction"):
        Recurrent("gru", INPUT, HIDDEN, bidirectional=True, norm=norm).step(x[:, 0], state)


@pytest.mark.parametrize(
    ("given", "name"),
    [(("elman", 3, 5), "cell"), (("gru", 0, 5), "input_size"), (("gru", 3, 0), "hidden"), (("gru", 3, 5, 0), "layers")],
)
def test_recurrent_bad_configuration_is_named(given: tuple, name: str) -> None:
    with pytest.raises(pyattn.RangeError, match=f"{name}: expected"):
        Recurrent(*given)
