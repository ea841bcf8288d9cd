"""The order that accesses need in the PTX machine, where it is finer than barriers: between the lanes of a warp, of the
registers of a wgmma, of one tensor copy beside others, and of tensor memory (PTX ISA 9.0)."""

import numpy as np
import pytest
from ptx.program import USUAL, Check, Fault, Landing, Schedule
from ptx.small import run
from ptx.tensor_map import encode

# 8.9.5 "Causality Order": lanes of a warp are threads like others.

LANES = """
    mov.u32 %r0, dynamic;
    shl.b32 %r1, %t, 2; add.u32 %r1, %r1, %r0;                      // the lane's own word
    xor.b32 %r2, %t, 1; shl.b32 %r2, %r2, 2; add.u32 %r2, %r2, %r0; // its neighbour's
"""
WRITE, READ, READ_OWN = "st.shared.u32 [%r1], %t;", "ld.shared.u32 %r3, [%r2];", "ld.shared.u32 %r3, [%r1];"
SYNC, BARRIER = "bar.warp.sync -1;", "bar.sync 0;"
SHUFFLE = "shfl.sync.idx.b32 %r9, %t, 0, 31, -1;"
BETWEEN_LANES = {
    "own word": (f"{WRITE} {READ_OWN}", None),
    "own word, overwritten": (f"{WRITE} {READ_OWN} {WRITE}", None),
    "neighbour": (f"{WRITE} {READ}", "without bar.warp.sync"),
    "neighbour, synchronized": (f"{WRITE} {SYNC} {READ}", None),
    "neighbour, barrier": (f"{WRITE} {BARRIER} {READ}", None),
    "neighbour, written again": (f"{WRITE} {BARRIER} {WRITE} {READ}", "without bar.warp.sync"),
    "neighbour, after a shuffle, which orders no memory": (f"{WRITE} {SHUFFLE} {READ}", "without bar.warp.sync"),
    "what a neighbour reads, overwritten": (f"{WRITE} {SYNC} {READ} {WRITE}", "may still be reading"),
    "the same, synchronized": (f"{WRITE} {SYNC} {READ} {SYNC} {WRITE}", None),
    "one word, different values": ("st.shared.u32 [%r0], %t;", "without bar.warp.sync"),
    "one word, one value": ("st.shared.u32 [%r0], 5;", None),
}


@pytest.mark.parametrize("name", BETWEEN_LANES)
def test_order_between_lanes_of_a_warp(name: str) -> None:
    body, fault = BETWEEN_LANES[name]
    if fault is None:
        run(LANES + body, shared=128)
    else:
        with pytest.raises(Fault, match=fault):
            run(LANES + body, shared=128)
        run(LANES + body, shared=128, schedule=Schedule(checks=USUAL & ~Check.LANES))


# 9.7.15.7.1 wgmma.fence: where it is needed among products. Operands are zeros, without a swizzle.

PRODUCTS = """
    mov.u32 %r0, dynamic; shl.b32 %r1, %t, 5; add.u32 %r0, %r0, %r1; mov.u32 %r2, 0;
    st.shared.v4.b32 [%r0], {%r2, %r2, %r2, %r2}; st.shared.v4.b32 [%r0+16], {%r2, %r2, %r2, %r2};
    mov.u32 %r10, 0; mov.u32 %r11, 0; mov.u32 %r12, 0; mov.u32 %r13, 0;
    mov.u32 %r14, 0; mov.u32 %r15, 0; mov.u32 %r16, 0; mov.u32 %r17, 0;
    fence.proxy.async; bar.sync 0;
    mov.b64 %d0, 0x0000001000080040; mov.b64 %d1, 0x00000010000800c0;
"""
NARROW = """wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
    {%r10, %r11, %r12, %r13}, %d0, %d1, 1, 1, 1, 0, 0;"""
WIDE = """wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16
    {%r10, %r11, %r12, %r13, %r14, %r15, %r16, %r17}, %d0, %d1, 1, 1, 1, 0, 0;"""
FENCE = "wgmma.fence.sync.aligned;"
DONE = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
TAKE, PUT = "add.f32 %r20, %r10, %r11;", "mov.u32 %r10, 0;"
AMONG_PRODUCTS = {
    "one": (f"{FENCE} {NARROW} {DONE}", None),
    "two of one shape": (f"{FENCE} {NARROW} {NARROW} {DONE}", None),
    "none": (f"{NARROW} {DONE}", "before the first"),
    "read between two": (f"{FENCE} {NARROW} {DONE} {TAKE} {NARROW} {DONE}", "after the read"),
    "read between two, fenced": (f"{FENCE} {NARROW} {DONE} {TAKE} {FENCE} {NARROW} {DONE}", None),
    "written between two": (f"{FENCE} {NARROW} {DONE} {PUT} {NARROW} {DONE}", "after the write"),
    "read in flight": (f"{FENCE} {NARROW} {TAKE} {DONE}", "in flight writes"),
    "another shape": (f"{FENCE} {NARROW} {WIDE} {DONE}", "another shape"),
    "another shape, fenced": (f"{FENCE} {NARROW} {FENCE} {WIDE} {DONE}", None),
}


@pytest.mark.parametrize("name", AMONG_PRODUCTS)
def test_order_of_registers_among_products(name: str) -> None:
    body, fault = AMONG_PRODUCTS[name]
    given = {"threads": 128, "shared": 4096, "target": "sm_90a"}
    if fault is None:
        run(PRODUCTS + body, **given)
    else:
        with pytest.raises(Fault, match=fault):
            run(PRODUCTS + body, **given)


# Tensor copies: who waited for one knows nothing of another.

COPY = """cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"""
COPIES = f"""
    setp.eq.u32 %p1, %t, 0; mov.u32 %r0, dynamic; add.u32 %r1, %r0, 512; add.u32 %r2, %r0, 520;
    mov.u32 %r3, 0; mov.u32 %r4, 1;
    @%p1 mbarrier.init.shared::cta.b64 [%r1], 1; @%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
    @%p1 fence.proxy.async.shared::cta; bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 128;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 128;
    @%p1 {COPY} [%r0], [%m0, {{%r3, %r3}}], [%r1];
    @%p1 {COPY} [%r0+128], [%m0, {{%r3, %r4}}], [%r2];
"""


def wait(barrier: str) -> str:
    waiting = f"again: mbarrier.try_wait.parity.shared::cta.b64 p, [{barrier}], 0; @!p bra again;"
    return f"{{ .reg .pred p; {waiting} }}"


FIRST, SECOND = "ld.shared.b32 %r9, [%r0];", "ld.shared.b32 %r9, [%r0+128];"
STORE = """bar.sync 0; fence.proxy.async.shared::cta; bar.sync 0;
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%m1, {%r3, %r3}], [%r0];
    @%p1 cp.async.bulk.commit_group;"""
STORED = "@%p1 cp.async.bulk.wait_group.read 0;"
OVERWRITE = "@%p1 st.shared.b32 [%r0], 1; @%p1 fence.proxy.async.shared::cta;"
ANEW = f"""bar.sync 0; @%p1 mbarrier.inval.shared::cta.b64 [%r1]; @%p1 mbarrier.init.shared::cta.b64 [%r1], 1;
    @%p1 fence.proxy.async.shared::cta; bar.sync 0; @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 128;
    @%p1 {COPY} [%r0], [%m0, {{%r3, %r3}}], [%r1];"""
OF_COPIES = {
    "each waited for": (f"{wait('%r1')} {FIRST} {wait('%r2')} {SECOND}", None),
    "the other one waited for": (f"{wait('%r2')} {FIRST} {wait('%r1')}", "shared offset 0"),
    "a barrier made anew": (f"{wait('%r1')} {wait('%r2')} {ANEW} {wait('%r1')} {FIRST}", None),
    "stored": (f"{wait('%r1')} {wait('%r2')} {STORE} {STORED}", None),
    "overwritten in flight": (
        f"{wait('%r1')} {wait('%r2')} {STORE} {OVERWRITE} {STORED}",
        "TMA store that was not waited",
    ),
    "stored and not waited for": (f"{wait('%r1')} {wait('%r2')} {STORE}", "not waited for"),
}


@pytest.mark.parametrize("landing", list(Landing))
@pytest.mark.parametrize("name", OF_COPIES)
def test_order_of_tensor_copies(name: str, landing: Landing) -> None:
    body, fault = OF_COPIES[name]
    source, result = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    maps = [encode(array.ctypes.data, [32, 2], [1, 32], [32, 1], 4) for array in (source, result)]
    given = {"shared": 1024, "target": "sm_90a", "maps": maps, "schedule": Schedule(landing=landing)}
    if fault is None:
        run(COPIES + body, source, result, **given)
    else:
        with pytest.raises(Fault, match=fault):
            run(COPIES + body, source, result, **given)


# 9.7.16.6 "Memory Consistency Model for 5th generation of TensorCore operations". D is at column 0, A at column 64; the
# matrices in shared memory are zeros, without a swizzle.


def descriptor(at: int) -> int:
    return at >> 4 | 128 >> 4 << 16 | 256 >> 4 << 32 | 1 << 46


ZEROS = " ".join(f"st.shared.v4.b32 [%r1+{16 * k}], {{%r2, %r2, %r2, %r2}};" for k in range(4))
TENSOR = f"""
    setp.eq.u32 %p1, %t, 0; setp.lt.u32 %p3, %t, 32; shr.u32 %r5, %t, 5; shl.b32 %r5, %r5, 21;
    mov.u32 %r0, dynamic; shl.b32 %r1, %t, 6; add.u32 %r1, %r1, %r0; mov.u32 %r2, 0; {ZEROS}
    add.u32 %r3, %r0, 8192; add.u32 %r4, %r0, 8200;
    @%p1 mbarrier.init.shared::cta.b64 [%r4], 1; fence.proxy.async.shared::cta; bar.sync 0;
    @%p3 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r3], 128; bar.sync 0;
    mov.b64 %d0, {descriptor(1024)}; mov.b64 %d1, {descriptor(1024 + 4096)}; mov.u32 %r7, 64;
    mov.u32 %r6, {1 << 4 | 1 << 7 | 1 << 10 | 64 // 8 << 17 | 128 // 16 << 24};
    setp.ne.u32 %p4, %r2, 0;
"""
MULTIPLY = "@%p1 tcgen05.mma.cta_group::1.kind::f16 [%r2], %d0, %d1, %r6, %p4;"
MULTIPLY_STORED = "@%p1 tcgen05.mma.cta_group::1.kind::f16 [%r2], [%r7], %d1, %r6, %p4;"
COMMIT = "@%p1 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r4];"
COME, COME_AGAIN = wait("%r4"), wait("%r4").replace("], 0", "], 1")
LOAD, LOADED = "tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r20, %r21}, [%r5];", "tcgen05.wait::ld.sync.aligned;"
PUT_A, PUT_DONE = (
    "tcgen05.st.sync.aligned.32x32b.x8.b32 [%r5+64], {%r2, %r2, %r2, %r2, %r2, %r2, %r2, %r2};",
    "tcgen05.wait::st.sync.aligned;",
)
BEFORE, AFTER = "tcgen05.fence::before_thread_sync;", "tcgen05.fence::after_thread_sync;"
END = "bar.sync 0; @%p3 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, 128;"
OF_TENSOR_MEMORY = {
    "product, loaded": ([MULTIPLY, COMMIT, COME, LOAD, LOADED], None),
    "loaded without its mbarrier": ([MULTIPLY, COMMIT, BARRIER, LOAD, LOADED, COME], "tcgen05.mma"),
    "load in flight, next product": (
        [MULTIPLY, COMMIT, COME, LOAD, BARRIER, MULTIPLY, COMMIT, LOADED, COME_AGAIN],
        "no wait::ld",
    ),
    "loaded, next product without a barrier": (
        [MULTIPLY, COMMIT, COME, LOAD, LOADED, MULTIPLY, COMMIT, COME_AGAIN],
        "race",
    ),
    "stored, product": ([PUT_A, PUT_DONE, BARRIER, MULTIPLY_STORED, COMMIT, COME], None),
    "store in flight, product": ([PUT_A, BARRIER, MULTIPLY_STORED, COMMIT, COME, PUT_DONE], "no wait::st"),
    "stored, product without a barrier": ([PUT_A, PUT_DONE, MULTIPLY_STORED, COMMIT, COME], "race"),
    "stored over what a product reads": (
        [PUT_A, PUT_DONE, BARRIER, MULTIPLY_STORED, COMMIT, BARRIER, PUT_A, PUT_DONE, COME],
        "tcgen05.mma",
    ),
    "shared memory written in flight": (
        [MULTIPLY, COMMIT, "@%p1 st.shared.b32 [%r0], 1;", COME],
        "tcgen05.mma",
    ),
}


@pytest.mark.parametrize("name", OF_TENSOR_MEMORY)
def test_order_of_tensor_memory(name: str) -> None:
    lines, fault = OF_TENSOR_MEMORY[name]
    body = " ".join([TENSOR, *lines, END])
    given = {"threads": 128, "shared": 16384, "target": "sm_100a", "schedule": Schedule(landing=Landing.LATE)}
    if fault is None:
        run(body, **given)
    else:
        with pytest.raises(Fault, match=fault):
            run(body, **given)


@pytest.mark.parametrize("left_out", [None, 2, 4, 8])
def test_fences_of_tensor_memory_are_asked_for_where_they_are_checked(left_out: int | None) -> None:
    """9.7.16.6.4 tcgen05.fence around each barrier and mbarrier between two threads' accesses."""
    lines = [PUT_A, PUT_DONE, BEFORE, BARRIER, AFTER, MULTIPLY_STORED, COMMIT, COME, AFTER, LOAD, LOADED]
    schedule = Schedule(checks=USUAL | Check.TENSOR_FENCES)
    given = {"threads": 128, "shared": 16384, "target": "sm_100a", "schedule": schedule}
    if left_out is None:
        run(" ".join([TENSOR, *lines, END]), **given)
    else:
        del lines[left_out]
        with pytest.raises(Fault, match="race"):
            run(" ".join([TENSOR, *lines, END]), **given)
