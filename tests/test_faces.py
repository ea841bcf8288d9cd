"""Every face inside a model, under what people train and ship models with: compile, export, torch.func, autocast,
checkpointing and DistributedDataParallel, each held against torch's own attention in the same model."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import pyattn
from pyattn.compat import flash_attn, xformers
from pyattn.compat.transformers import pyattn_attention_forward

HEADS, WIDTH = 2, 16


def _by_heads(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For an attention over [b, heads, length, size]."""
    return lambda q, k, v: attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


FACES: dict[str, Callable[..., Tensor]] = {
    "attention": _by_heads(lambda q, k, v: pyattn.attention(q, k, v, causal=True)),
    "sdpa": _by_heads(lambda q, k, v: pyattn.scaled_dot_product_attention(q, k, v, is_causal=True)),
    "flash_attn": lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=True),
    "xformers": lambda q, k, v: xformers.memory_efficient_attention(q, k, v, xformers.LowerTriangularMask()),
    "transformers": lambda q, k, v: pyattn_attention_forward(
        nn.Module(), *(t.transpose(1, 2) for t in (q, k, v)), None, is_causal=True
    )[0],
    "patched sdpa": _by_heads(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
}
# By a name that no patch reaches.
TORCH = _by_heads(lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v, is_causal=True))


class Block(nn.Module):
    """Causal self-attention with projections."""

    def __init__(self, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = attention
        self.project_in, self.project_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project_in(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        return self.project_out(self.attention(q, k, v).flatten(2))


class MultiheadBlock(nn.Module):
    """The same by a module of the interface of `torch.nn.MultiheadAttention`."""

    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        block = Block(TORCH)
        self.attention = attention(WIDTH, HEADS, batch_first=True)
        self.attention.in_proj_weight, self.attention.in_proj_bias = block.project_in.weight, block.project_in.bias
        self.attention.out_proj = block.project_out

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


MULTIHEAD = {"multihead": pyattn.MultiheadAttention, "patched multihead": nn.MultiheadAttention}


@pytest.fixture(params=[*FACES, *MULTIHEAD])
def ours(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    """Patched where its name says so, and then a call that pyattn does not compute raises."""
    name = request.param
    model = MultiheadBlock(MULTIHEAD[name]) if name in MULTIHEAD else Block(FACES[name])
    torch._dynamo.reset()
    with pyattn.patch(strict=True) if name.startswith("patched") else contextlib.nullcontext():
        yield model
    torch._dynamo.reset()


def inputs(length: int = 5) -> Tensor:
    return torch.randn(3, length, WIDTH, generator=torch.Generator().manual_seed(length))


def assert_same(found: Tensor, expected: Tensor, ours: nn.Module, theirs: nn.Module, **tolerance: float) -> None:
    """Outputs and the gradients of all parameters, which have the same order of sizes in both."""
    torch.testing.assert_close(found, expected, **tolerance)
    grads = []
    for out, model in ((found, ours), (expected, theirs)):
        model.zero_grad()
        out.float().square().sum().backward()
        grads.append(sorted((p.grad for p in model.parameters()), key=lambda g: (g.dim(), len(g))))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


def test_face_compiles_whole_for_every_length(ours: nn.Module) -> None:
    compiled, theirs = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True), Block(TORCH)
    assert_same(compiled(inputs()), theirs(inputs()), ours, theirs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(compiled(inputs(9)), theirs(inputs(9)), ours, theirs)


def test_face_exports_for_every_length(ours: nn.Module) -> None:
    shapes = {"x": {1: torch.export.Dim("length", min=2)}}
    exported = torch.export.export(ours, (inputs(),), dynamic_shapes=shapes).module()
    torch.testing.assert_close(exported(inputs(9)), Block(TORCH)(inputs(9)))


def test_face_gives_per_sample_gradients(ours: nn.Module) -> None:
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(ours, parameters, (x[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, inputs())
    theirs = Block(TORCH)
    theirs(inputs()).square().sum().backward()
    want = sorted((p.grad for p in theirs.parameters()), key=lambda g: (g.dim(), len(g)))
    for got, expected in zip(
        sorted((g.sum(0) for g in found.values()), key=lambda g: (g.dim(), len(g))), want, strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_face_gives_jacobians_and_batched_gradients(ours: nn.Module) -> None:
    x, theirs = inputs(2)[:1], Block(TORCH)
    expected = torch.autograd.functional.jacobian(theirs, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(ours, x, vectorize=True), expected)
    assert torch.autograd.gradcheck(ours.double(), x.double().requires_grad_(), check_batched_grad=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_face_under_autocast_keeps_master_weights(ours: nn.Module, dtype: torch.dtype) -> None:
    theirs = Block(TORCH)
    with torch.autocast("cpu", dtype=dtype):
        found, expected = ours(inputs()), theirs(inputs())
    assert found.dtype is dtype
    assert_same(found, expected, ours, theirs, rtol=0.05, atol=0.05)
    assert all(p.grad.dtype is torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_face_inside_a_checkpoint(ours: nn.Module, reentrant: bool) -> None:
    theirs, x = Block(TORCH), inputs().requires_grad_()
    assert_same(checkpoint(ours, x, use_reentrant=reentrant), theirs(x), ours, theirs)


def test_face_inside_distributed_data_parallel(ours: nn.Module, tmp_path: Path) -> None:
    """Its reducer hangs on hooks of the parameters, which must fire once each."""
    fired: list[str] = []
    for name, p in ours.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        theirs = Block(TORCH)
        assert_same(DistributedDataParallel(ours)(inputs()), theirs(inputs()), ours, theirs)
    finally:
        dist.destroy_process_group()
    assert sorted(fired) == sorted(name for name, _ in ours.named_parameters())
