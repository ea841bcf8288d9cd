"""What torch's FlopCounterMode counts for attention, held against what it counts for torch's own."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

import pyattn
from pyattn.nn.linear import FEW, MANY, linear

B, H, M, N, D, DV = 2, 4, 6, 9, 16, 24


def tensors(*sizes: tuple[int, ...], requires_grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(size, requires_grad=requires_grad) for size in sizes]


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("hk", [H, 2], ids=["heads", "grouped-heads"])
def test_flops_are_those_of_the_products(hk):
    q, k, v = tensors((B, H, M, D), (B, hk, N, D), (B, hk, N, DV), requires_grad=True)
    assert counted(lambda: pyattn.attention(q, k, v, causal=True)) == 2 * B * H * M * N * (D + DV)
    out = pyattn.attention(q, k, v)
    assert counted(out.sum().backward) == 2 * B * H * M * N * (3 * D + 2 * DV)


def test_flops_are_what_torch_counts_for_its_own():
    q, k, v = tensors((B, H, M, D), (B, H, N, D), (B, H, N, D), requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        forward = counted(lambda: scaled_dot_product_attention(q, k, v))
    assert counted(lambda: pyattn.attention(q, k, v)) == forward
    assert counted(lambda: pyattn.attention(q, k, v, backend="reference")) == forward
    backward = sdpa_backward_flop_count(q.shape, q.shape, k.shape, v.shape)
    assert counted(pyattn.attention(q, k, v).sum().backward) == backward


def test_flops_of_a_call_past_the_dispatcher_are_counted():
    q, k, v = tensors((B, H, M, D), (B, H, N, D), (B, H, N, DV))
    with torch.no_grad():
        assert counted(lambda: pyattn.attention(q, k, v)) == 2 * B * H * M * N * (D + DV)


def test_flops_are_counted_by_module():
    module = pyattn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(B, M, 16)
    with FlopCounterMode(display=False) as counter:
        module(x, x, x, need_weights=False)
    counts = counter.get_flop_counts()["MultiheadAttention"]
    assert counts[torch.ops.pyattn.attention] == 2 * B * 16 * M * M * 2


def test_flops_of_packed_sequences_are_those_of_each():
    lengths = torch.tensor([[3, 5], [0, 2], [4, 1]])
    cu_q, cu_k = (torch.cat([torch.zeros(1, dtype=torch.int32), t.cumsum(0).int()]) for t in lengths.T)
    q, k, v = tensors((7, H, D), (8, 2, D), (8, 2, DV), requires_grad=True)
    pairs = int((lengths[:, 0] * lengths[:, 1]).sum())
    assert counted(lambda: pyattn.attention_varlen(q, k, v, cu_q, cu_k)) == 2 * H * pairs * (D + DV)
    out = pyattn.attention_varlen(q, k, v, cu_q, cu_k)
    assert counted(out.sum().backward) == 2 * H * pairs * (3 * D + 2 * DV)
    with FakeTensorMode() as mode:  # without values: at most so many
        fake = [mode.from_tensor(t) for t in (q, k, v, cu_q, cu_k)]
        assert counted(lambda: pyattn.attention_varlen(*fake)) == 2 * H * 7 * 8 * (D + DV)


def test_flops_of_a_paged_cache_count_its_room():
    q, k, v = tensors((B, H, 1, D), (5, 2, 4, D), (5, 2, 4, DV))
    table, lengths = torch.tensor([[0, 1, 2], [3, 4, 0]]), torch.tensor([9, 5])
    count = counted(lambda: pyattn.attention_kvcache(q, k, v, lengths, block_table=table))
    assert count == 2 * B * H * 12 * (D + DV)


def test_flops_of_additive_scores_count_a_multiply_add_for_every_column():
    with FakeTensorMode():
        q, k, v, weight = tensors((B, H, M, D), (B, 2, N, D), (B, 2, N, DV), (H, D), requires_grad=True)
        assert counted(lambda: pyattn.additive_attention(q, k, v, weight)) == 2 * B * H * M * N * (D + DV)
        out = pyattn.additive_attention(q, k, v, weight)
        assert counted(out.sum().backward) == 2 * B * H * M * N * (4 * D + 2 * DV)


def test_flops_of_linear_for_few_rows_are_counted():
    rows, width = FEW[torch.float32], 64
    x, weight = tensors((rows, width), (MANY // width, width))
    with torch.no_grad():
        assert counted(lambda: linear(x, weight)) == 2 * rows * MANY


@pytest.mark.parametrize("imports", ["pyattn, torch.utils.flop_counter", "torch.utils.flop_counter, pyattn"])
def test_flops_are_registered_whichever_is_imported_first(imports):
    code = (
        f"import {imports}; from torch.utils.flop_counter import flop_registry; import torch;"
        "print(sum(op in flop_registry for op in (torch.ops.pyattn.attention, torch.ops.pyattn.attention_backward)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "2"
