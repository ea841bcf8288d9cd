"""What only a GPU can show: CUDA graphs, and that a new length compiles nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pyattn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OPTIONS = {
    "causal": {"causal": True},
    "dropout": {"causal": True, "dropout_p": 0.3, "seed": 5},
    "window": {"window": (100, 0)},
    "segments": {"segment_ids": "ids"},
    "sinks": {"sinks": "sinks"},
}


def qkv(m: int = 200, requires_grad: bool = True) -> list[Tensor]:
    return [
        torch.randn(2, 4, m, 64, device="cuda", dtype=torch.bfloat16, requires_grad=requires_grad) for _ in range(3)
    ]


def with_tensors(options: dict) -> dict:
    ids = torch.arange(200, device="cuda").expand(2, -1) // 70
    tensors = {"ids": (ids, ids), "sinks": torch.ones(4, device="cuda")}
    return {name: tensors[value] if isinstance(value, str) else value for name, value in options.items()}


def warmed_up_graph(run) -> torch.cuda.CUDAGraph:
    """`run` captured, after the runs on a stream of its own that capturing asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.fixture(params=["triton", "hopper", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    if (reason := pyattn.list_backends()[request.param]) != "ready":
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gpu_graph_of_forward_and_backward_replays_on_new_values(backend, options):
    if backend == "hopper" and not options.keys() <= {"causal", "window"}:
        pytest.skip("the Hopper kernels do not do this")
    options = with_tensors(options) | {"backend": backend}
    leaves, d_out = qkv(), torch.randn(2, 4, 200, 64, device="cuda", dtype=torch.bfloat16)
    found = {}

    def run() -> None:
        out = pyattn.attention(*leaves, **options)
        found["results"] = [out, *torch.autograd.grad(out, leaves, d_out)]

    graph = warmed_up_graph(run)
    replayed = found["results"]
    with torch.no_grad():
        for t in leaves:
            t.normal_()
    graph.replay()
    torch.cuda.synchronize()
    replayed = [t.detach().clone() for t in replayed]
    run()
    for got, want in zip(replayed, found["results"], strict=True):
        assert torch.equal(got, want)


def test_gpu_graph_of_a_decoding_step_follows_the_lengths():
    q = torch.randn(2, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(64, 2, 16, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    table = torch.randperm(64, device="cuda").view(2, 32)
    lengths = torch.tensor([3, 40], device="cuda", dtype=torch.int32)
    found = {}

    def run() -> None:
        found["out"] = pyattn.attention_kvcache(q, k, v, lengths, block_table=table)

    graph = warmed_up_graph(run)
    replayed = found["out"]
    lengths += 300
    graph.replay()
    torch.cuda.synchronize()
    replayed = replayed.clone()
    run()
    assert torch.equal(replayed, found["out"])


def test_gpu_graph_draws_another_dropout_mask_at_every_replay():
    leaves = qkv(requires_grad=False)
    found = {}

    def run() -> None:
        found["out"] = pyattn.attention(*leaves, dropout_p=0.5)

    graph = warmed_up_graph(run)
    graph.replay()
    first = found["out"].clone()
    graph.replay()
    assert not torch.equal(first, found["out"])


def test_gpu_new_lengths_compile_nothing(backend):
    from pyattn.backends import nvrtc
    from pyattn.triton_kernels import flash_bwd, flash_fwd, hopper_bwd, hopper_fwd

    modules = (hopper_fwd, hopper_bwd) if backend == "hopper" else (flash_fwd, flash_bwd)
    kernels = [f for module in modules for name, f in vars(module).items() if name.endswith("_kernel")]

    def compiled() -> int:
        if backend == "cuda":
            return len(nvrtc._loaded)
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    def run(m: int) -> None:
        leaves = qkv(m)
        torch.autograd.grad(pyattn.attention(*leaves, causal=True, backend=backend).sum(), leaves)

    run(200)
    before = compiled()
    for m in (1, 16, 37, 256, 1000):
        run(m)
    assert compiled() == before > 0


def test_gpu_bits_are_the_same_a_thousand_times(backend):
    leaves, d_out = qkv(500), torch.randn(2, 4, 500, 64, device="cuda", dtype=torch.bfloat16)
    first: list[Tensor] = []
    for _ in range(1000):
        out = pyattn.attention(*leaves, causal=True, backend=backend)
        found = [out, *torch.autograd.grad(out, leaves, d_out)]
        first = first or found
        assert all(map(torch.equal, found, first))


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_gpu_weights_dropped_are_those_the_cpu_drops(name):
    """With v the identity out holds the weights themselves: a dropped one is exactly 0."""
    q, k = (torch.zeros(2, 3, 130, 16) for _ in range(2))
    given = (q, k, torch.eye(130).expand(2, 3, 130, 130))
    cpu = pyattn.attention(*given, dropout_p=0.4, seed=7, backend="cpu")
    gpu = pyattn.attention(*(t.cuda() for t in given), dropout_p=0.4, seed=7, backend=name)
    assert torch.equal(cpu == 0, gpu.cpu() == 0)
