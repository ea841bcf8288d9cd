"""Blackwell's tensor cores and tensor memory in the PTX machine, by the manual (PTX ISA 9.0, 9.7.16).

9.7.16 "TensorCore 5th Generation Family Instructions". Matrices in shared memory lie as those of a warpgroup do; the
accumulator lies in tensor memory, a row a lane and a column a column.
"""

import numpy as np
import pytest
from ptx.assembler import SHARED_BASE
from ptx.program import USUAL, Check, Fault, Landing, Program, Schedule
from ptx.small import kernel, run
from ptx.text import PtxError
from test_ptx_wgmma import FILL, KINDS, SHARED, Layout, integers, words

BARRIER, ADDRESS = SHARED - 64, SHARED - 32  # in `dynamic`


def descriptor(layout: Layout) -> int:
    """9.7.16.4.1 "Shared memory descriptor": as Hopper's, but for a constant and for the swizzle's name."""
    mode = {0: 0, 128: 2, 64: 4, 32: 6}[layout.swizzle]
    start = SHARED_BASE + layout.start
    return start >> 4 | layout.leading >> 4 << 16 | layout.stride >> 4 << 32 | 1 << 46 | mode << 61


def instruction_descriptor(m: int, n: int, kind: str, transpose_a: bool = False, transpose_b: bool = False) -> int:
    """9.7.16.4.2 "Instruction descriptor", of .kind::f16 with sums of float32."""
    of = {"f16": 0, "bf16": 1}[kind]
    return 1 << 4 | of << 7 | of << 10 | transpose_a << 15 | transpose_b << 16 | n // 8 << 17 | m // 16 << 24


ALLOCATE = f"""
    setp.lt.u32 %p1, %t, 32;
    setp.eq.u32 %p2, %t, 0;
    mov.u32 %r10, dynamic;
    @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r10+{ADDRESS}], 128;
    @%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
    @%p2 mbarrier.init.shared::cta.b64 [%r10+{BARRIER}], 1;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    ld.shared.b32 %r11, [%r10+{ADDRESS}];
    and.b32 %r12, %t, 96; shl.b32 %r12, %r12, 16; add.u32 %r12, %r12, %r11;   // the lanes of this warp
    bar.sync 0;
"""
FREE = "bar.sync 0; @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r11, 128;"
COMMIT = f"@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r10+{BARRIER}];"
WAIT = f"{{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%r10+{BARRIER}], 0; @!p bra again; }}"
AFTER = "tcgen05.fence::after_thread_sync;"
WAIT_LOAD, WAIT_STORE = "tcgen05.wait::ld.sync.aligned;", "tcgen05.wait::st.sync.aligned;"


def registers(first: int, number: int) -> str:
    return ", ".join(f"%r{first + k}" for k in range(number))


def load(number: int, first: int = 100, shape: str = "32x32b", split: str = "") -> str:
    return f"tcgen05.ld.sync.aligned.{shape}.x{number}.b32 {{{registers(first, number)}}}, [%r12]{split};"


def store(number: int, first: int = 100, shape: str = "32x32b", split: str = "") -> str:
    return f"tcgen05.st.sync.aligned.{shape}.x{number}.b32 [%r12]{split}, {{{registers(first, number)}}};"


def run_128(body: str, *arrays: np.ndarray, **schedule) -> None:
    run(body, *arrays, threads=128, target="sm_100a", shared=SHARED, schedule=Schedule(**schedule))


def multiply(
    m: int,
    n: int,
    kind: str,
    swizzle: int,
    mn_major: bool,
    accumulates: int = 1,
    wait: str = f"{WAIT} {AFTER}",
    left_out: str = "",
    **schedule,
) -> tuple[np.ndarray, np.ndarray]:
    """(D of one product whose D was 2 before, as [thread, column], what A · B is)."""
    a, b = integers(m, 16, seed=m + n), integers(n, 16, seed=n)
    memory = np.zeros(SHARED, np.uint8)
    of_a, of_b = Layout(0, mn_major, swizzle, m), Layout(16384, mn_major, swizzle, n)
    of_a.put(memory, words(a, kind))
    of_b.put(memory, words(b, kind))
    description = instruction_descriptor(m, n, kind, mn_major, mn_major)
    fences = ["" if left_out == side else f"tcgen05.fence::{side}_thread_sync;" for side in ("before", "after")]
    fill = " ".join(f"mov.b32 %r{100 + k}, 0f40000000;" for k in range(n))
    product = "@%p2 tcgen05.mma.cta_group::1.kind::f16 [%r11], %d10, %d11, %r20, %p3;"
    body = f"""
        {FILL} fence.proxy.async.shared::cta; bar.sync 0;
        {ALLOCATE}
        {fill} {store(n)} {WAIT_STORE}
        {fences[0]} bar.sync 0; {fences[1]}
        mov.b64 %d10, {descriptor(of_a)}; mov.b64 %d11, {descriptor(of_b)}; mov.b32 %r20, {description};
        setp.eq.u32 %p3, {accumulates}, 1;
        {product} {COMMIT}
        {wait}
        {load(n)} {WAIT_LOAD}
        mad.wide.u32 %d0, %t, {4 * n}, %a1;
        {" ".join(f"st.global.b32 [%d0+{4 * k}], %r{100 + k};" for k in range(n))}
        {FREE}
    """
    out = np.zeros((128, n), np.float32)
    run_128(body, memory, out, **schedule)
    return out, (a @ b.T).numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "n", "swizzle", "mn_major"), [(128, 32, 128, False), (128, 64, 64, True), (64, 16, 128, False)]
)
def test_product(m, n, swizzle, mn_major, kind):
    """9.7.16.10.9.1 tcgen05.mma: D = A · B + D; of 64 rows, each warp's lower half holds 16 (9.7.16.10.5, layout F)."""
    found, product = multiply(m, n, kind, swizzle, mn_major)
    lanes = np.arange(128) if m == 128 else np.arange(64) // 16 * 32 + np.arange(64) % 16
    np.testing.assert_array_equal(found[lanes], product + 2)
    rest = np.setdiff1d(np.arange(128), lanes)
    np.testing.assert_array_equal(found[rest], 2)


def test_product_forgets_what_was():
    """enable-input-d false"""
    found, product = multiply(128, 16, "bf16", 128, False, accumulates=0)
    np.testing.assert_array_equal(found, product)


@pytest.mark.parametrize("landing", [Landing.EARLY, Landing.LATE])
def test_product_that_is_not_waited_for_is_a_fault(landing):
    with pytest.raises(Fault, match=r"race|on its way"):
        multiply(128, 16, "bf16", 128, False, wait="", landing=landing)


@pytest.mark.parametrize("left_out", [WAIT_STORE, WAIT_LOAD])
def test_access_that_is_not_waited_for_is_a_fault(left_out):
    """9.7.16.8.5 tcgen05.wait: a load after a store, and a store after a load, of the same columns."""
    lines = [*(f"mov.b32 %r{100 + k}, 0;" for k in range(4)), store(4), WAIT_STORE, load(4, 110), WAIT_LOAD]
    lines += [store(4), WAIT_STORE]
    run_128(f"{ALLOCATE} {' '.join(lines)} {FREE}")
    lines.remove(left_out)
    with pytest.raises(Fault, match=r"wait::|in flight"):
        run_128(f"{ALLOCATE} {' '.join(lines)} {FREE}")


def test_product_after_a_store_needs_fences_where_they_are_checked():
    """9.7.16.6.4 tcgen05.fence: ::before_thread_sync and ::after_thread_sync around the barrier between the two."""
    checks = USUAL | Check.TENSOR_FENCES
    found, product = multiply(128, 16, "bf16", 128, False, checks=checks)
    np.testing.assert_array_equal(found, product + 2)
    for left_out in ("before", "after"):
        multiply(128, 16, "bf16", 128, False, left_out=left_out)
        with pytest.raises(Fault, match="race"):
            multiply(128, 16, "bf16", 128, False, left_out=left_out, checks=checks)


def test_tensor_memory_is_written_and_read():
    """9.7.16.8 tcgen05.st, tcgen05.ld, .32x32b: a lane of a warp is one of tensor memory, register k column k."""
    out = np.zeros((128, 4), np.uint32)
    values = " ".join(f"mad.lo.u32 %r{100 + k}, %t, 1000, {k};" for k in range(4))
    stores = " ".join(f"st.global.b32 [%d0+{4 * k}], %r{110 + k};" for k in range(4))
    address = "mad.wide.u32 %d0, %t, 16, %a0;"
    run_128(f"{ALLOCATE} {values} {store(4)} {WAIT_STORE} {load(4, 110)} {WAIT_LOAD} {address} {stores} {FREE}", out)
    np.testing.assert_array_equal(out, np.arange(128)[:, None] * 1000 + np.arange(4))


def test_tensor_memory_is_split_between_halves_of_a_warp():
    """.16x32bx2: lanes 16 to 31 take the lower lanes' rows, as many columns further on as the operand says."""
    out = np.zeros((128, 4), np.uint32)
    values = " ".join(f"mad.lo.u32 %r{100 + k}, %t, 1000, {k};" for k in range(4))
    stores = " ".join(f"st.global.b32 [%d0+{4 * k}], %r{110 + k};" for k in range(4))
    address = "mad.wide.u32 %d0, %t, 16, %a0;"
    split = (
        f"{values} {store(2, shape='16x32bx2', split=', 2')} {WAIT_STORE} {load(4, 110)} {WAIT_LOAD} {address} {stores}"
    )
    run_128(f"{ALLOCATE} {split} {FREE}", out)
    for thread in (t for t in range(128) if t % 32 < 16):
        assert out[thread].tolist() == [
            thread * 1000,
            thread * 1000 + 1,
            (thread + 16) * 1000,
            (thread + 16) * 1000 + 1,
        ]


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (f"{ALLOCATE} {load(4)} mov.b32 %r1, %r100; {WAIT_LOAD} {FREE}", "register|in flight|wait::ld"),
        (f"{ALLOCATE}", "tensor memory allocated"),
        (f"{ALLOCATE} @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r11, 64;", "dealloc"),
        (f"{ALLOCATE} mov.b32 %r12, 0; {load(4)} {WAIT_LOAD} {FREE}", "may not use lane"),
        (f"{ALLOCATE} add.u32 %r12, %r12, 126; {load(4)} {WAIT_LOAD} {FREE}", "out of bounds"),
        (ALLOCATE.replace("], 128;", "], 48;"), "alloc of 48"),
    ],
    ids=[
        "register in flight",
        "not freed",
        "freed in part",
        "another warp's lanes",
        "beyond the columns",
        "48 columns",
    ],
)
def test_tensor_memory_used_wrongly_is_a_fault(body, fault):
    with pytest.raises(Fault, match=fault):
        run_128(body)


@pytest.mark.parametrize(
    "wrong",
    [
        "tcgen05.mma.cta_group::2.kind::f16 [%r1], %d10, %d11, %r20, %p3;",
        "tcgen05.mma.cta_group::1.kind::tf32 [%r1], %d10, %d11, %r20, %p3;",
        "tcgen05.ld.sync.aligned.32x32b.x4.b32 {%r1, %r2}, [%r3];",
        "tcgen05.ld.sync.aligned.32x32b.x2.pack::16b.b32 {%r1, %r2}, [%r3];",
        "tcgen05.ld.sync.aligned.16x64b.x1.b32 {%r1}, [%r3];",
        "tcgen05.ld.sync.aligned.16x32bx2.x1.b32 {%r1}, [%r3];",
        "tcgen05.cp.cta_group::1.128x256b [%r1], %d10;",
    ],
)
def test_what_is_not_known_is_an_error(wrong):
    with pytest.raises(PtxError, match="line 14"):
        Program(kernel(wrong, 1))
