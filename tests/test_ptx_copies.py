"""Asynchronous copies of the PTX machine and the barriers that tell of them, held against the manual (PTX ISA 9.0).

9.7.9.25 "Data Movement and Conversion Instructions: Asynchronous copy" and 9.7.13.15 "... mbarrier".
"""

import numpy as np
import pytest
from ptx.program import Fault, Landing, Program, Schedule
from ptx.small import kernel, run
from ptx.tensor_map import encode
from ptx.text import PtxError

LANDINGS = list(Landing)
COPY = """
    mul.lo.u32 %r1, %t, {size};
    mov.u32 %r2, dynamic;
    add.u32 %r2, %r2, %r1;
    cvt.u64.u32 %d1, %r1;
    add.s64 %d2, %a0, %d1;
    add.s64 %d3, %a1, %d1;
    cp.async.{kind}.shared.global [%r2], [%d2], {size}{rest};
    {wait}
    ld.shared.v{words}.b32 {{{registers}}}, [%r2];
    st.global.v{words}.b32 [%d3], {{{registers}}};
"""


def copied(size: int, kind: str = "ca", rest: str = "", wait: str = "cp.async.wait_all;", **schedule) -> np.ndarray:
    """What 32 lanes copy of 1, 2, 3, ... to shared memory and then read there; schedule: fields of Schedule."""
    words = size // 4
    registers = ", ".join(f"%r{10 + k}" for k in range(words))
    text = COPY.format(size=size, kind=kind, rest=rest, wait=wait, words=words, registers=registers)
    text = text.replace(".v1.", ".").replace("{%r10},", "%r10,").replace("{%r10};", "%r10;")
    source, out = np.arange(1, 32 * words + 1, dtype=np.uint32), np.zeros(32 * words, np.uint32)
    run(text, source, out, shared=32 * size, schedule=Schedule(**schedule))
    return out


@pytest.mark.parametrize("landing", LANDINGS)
@pytest.mark.parametrize(("size", "kind"), [(4, "ca"), (8, "ca"), (16, "ca"), (16, "cg")])
def test_copy_of_every_size(size, kind, landing):
    """cp.async.ca, cp.async.cg, cp.async.wait_all, cp.async.commit_group, cp.async.wait_group"""
    expected = np.arange(1, 8 * size + 1)
    np.testing.assert_array_equal(copied(size, kind, landing=landing), expected)
    in_group = copied(size, kind, wait="cp.async.commit_group; cp.async.wait_group 0;", landing=landing)
    np.testing.assert_array_equal(in_group, expected)


@pytest.mark.parametrize("landing", LANDINGS)
def test_copy_of_less_fills_with_zeros(landing):
    """src-size: the rest of cp-size is zero; of 0 bytes nothing is read, wherever the address points."""
    full = np.arange(1, 129).reshape(32, 4)
    for given in (0, 4, 8, 12, 16):
        expected = np.where(np.arange(4) * 4 < given, full, 0)
        np.testing.assert_array_equal(copied(16, rest=f", {given}", landing=landing).reshape(32, 4), expected)
    nothing = (
        "mov.u32 %r1, dynamic; setp.eq.u32 %p1, %t, 0; @!%p1 exit; cp.async.cg.shared.global [%r1], [%a0+4096], 16, 0;"
    )
    run(f"{nothing} cp.async.wait_all;", np.zeros(4, np.uint32), shared=16, schedule=Schedule(landing=landing))
    with pytest.raises(Fault, match="source of 20"):
        copied(16, rest=", 20")


@pytest.mark.parametrize("landing", LANDINGS)
@pytest.mark.parametrize(
    "wait",
    [
        "",
        "cp.async.commit_group;",
        "cp.async.commit_group; cp.async.wait_group 1;",
        "cp.async.wait_group 0;",
        "bar.sync 0;",
    ],
)
def test_copy_that_is_not_waited_for_is_a_fault(wait, landing):
    """Also where it has landed already. A group that is not committed is not waited for."""
    with pytest.raises(Fault, match=r"still on its way|not committed"):
        copied(16, wait=wait, landing=landing)


def test_groups_complete_in_order():
    """cp.async.wait_group N: all but the N latest groups are complete."""
    body = """
        mov.u32 %r1, dynamic;
        shl.b32 %r2, %t, 4;
        add.u32 %r1, %r1, %r2;
        cvt.u64.u32 %d1, %r2;
        add.s64 %d2, %a0, %d1;
        cp.async.cg.shared.global [%r1], [%d2], 16;
        cp.async.commit_group;
        cp.async.cg.shared.global [%r1+512], [%d2+512], 16;
        cp.async.commit_group;
        cp.async.wait_group 1;
        ld.shared.b32 %r3, [%r1+{first}];
        cp.async.wait_group 0;
        ld.shared.b32 %r4, [%r1+512];
    """
    source = np.zeros(256, np.uint32)
    run(body.format(first=0), source, shared=1024)
    with pytest.raises(Fault, match="still on its way"):
        run(body.format(first=512), source, shared=1024)


def test_copy_is_its_own_threads_until_a_barrier():
    """What one warp's copies brought, another warp sees after a wait and a barrier."""
    body = """
        mov.u32 %r1, dynamic;
        shl.b32 %r2, %t, 4;
        add.u32 %r3, %r1, %r2;
        cvt.u64.u32 %d1, %r2;
        add.s64 %d2, %a0, %d1;
        cp.async.cg.shared.global [%r3], [%d2], 16;
        cp.async.wait_all;
        {barrier}
        xor.b32 %r2, %r2, 512;
        add.u32 %r3, %r1, %r2;
        ld.shared.b32 %r4, [%r3];
    """
    source = np.zeros(256, np.uint32)
    run(body.format(barrier="bar.sync 0;"), source, threads=64, shared=1024)
    with pytest.raises(Fault, match=r"race|never written|still on its way"):
        run(body.format(barrier=""), source, threads=64, shared=1024)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("cp.async.cg.shared.global [%r1+8], [%a0], 16; cp.async.wait_all;", "misaligned"),
        ("cp.async.cg.shared.global [%r1], [%a0+8], 16; cp.async.wait_all;", "misaligned"),
        ("cp.async.cg.shared.global [%r1], [%a0+1024], 16; cp.async.wait_all;", "out of bounds"),
        ("cp.async.cg.shared.global [%r1+1024], [%a0], 16; cp.async.wait_all;", "out of bounds"),
        ("cp.async.cg.shared.global [%r1], [%a0], 16; st.shared.b32 [%r1], 0;", "on its way"),
    ],
)
def test_copies_used_wrongly_are_faults(body, fault):
    with pytest.raises(Fault, match=fault):
        run(f"mov.u32 %r1, dynamic; setp.eq.u32 %p1, %t, 0; @!%p1 exit; {body}", np.zeros(256, np.uint32), shared=1024)


# mbarrier

PHASES = """
    mov.u32 %r1, dynamic;
    setp.eq.u32 %p1, %t, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r1], {count};
    bar.sync 0;
    setp.lt.u32 %p2, %t, 32;
    @%p2 bra writer;
    {{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r1], {first}; @!done bra again; }}
    ld.shared.b32 %r2, [%r1+16];
    mbarrier.arrive.shared::cta.b64 _, [%r1];
    {{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r1], {second}; @!done bra again; }}
    bra end;
writer:
    @%p1 st.shared.b32 [%r1+16], 5;
    mbarrier.arrive.shared::cta.b64 _, [%r1]{arrivals};
    {{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r1], 0; @!done bra again; }}
    mbarrier.arrive.shared::cta.b64 _, [%r1];
end:
    bar.sync 0;
    @%p1 mbarrier.inval.shared::cta.b64 [%r1];
"""


@pytest.mark.parametrize("seed", range(3))
def test_phases_of_a_barrier(seed):
    """mbarrier.init, arrive, try_wait.parity, inval: a phase ends with the last arrival and orders what came before.

    The first phase ends with two arrivals of each writer, the second with one of each thread.
    """
    body = PHASES.format(count=64, first=0, second=1, arrivals=", 2")
    run(body, threads=64, shared=32, schedule=Schedule(seed=seed))


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"count": 64, "first": 0, "second": 1, "arrivals": ", 1"}, "deadlock"),
        ({"count": 0, "first": 0, "second": 1, "arrivals": ""}, "mbarrier.init with count 0"),
        ({"count": 64, "first": 2, "second": 1, "arrivals": ", 2"}, "parity 2"),
        ({"count": 64, "first": 1, "second": 1, "arrivals": ", 2"}, "race|never written|too many"),
    ],
)
def test_phases_used_wrongly_are_faults(given, fault):
    with pytest.raises(Fault, match=fault):
        run(PHASES.format(**given), threads=64, shared=32)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("mbarrier.arrive.shared::cta.b64 _, [%r1];", "no mbarrier"),
        ("mbarrier.init.shared::cta.b64 [%r1+4], 1;", "misaligned"),
        ("mbarrier.init.shared::cta.b64 [%r1], 1; mbarrier.init.shared::cta.b64 [%r1], 1;", "mbarrier"),
        ("mbarrier.init.shared::cta.b64 [%r1], 1; ld.shared.b32 %r2, [%r1];", "holds an mbarrier"),
        ("mbarrier.init.shared::cta.b64 [%r1], 1; st.shared.b32 [%r1+4], 0;", "holds an mbarrier"),
        ("mbarrier.init.shared::cta.b64 [%r1], 1; mbarrier.arrive.shared::cta.b64 _, [%r1], 2;", "too many"),
        (
            "mbarrier.init.shared::cta.b64 [%r1], 1; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 8; "
            "{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%r1], 0; @!p bra again; }",
            "deadlock",
        ),
        ("mbarrier.init.shared::cta.b64 [%r1], 2; mbarrier.expect_tx.shared::cta.b64 [%r1], 1048576;", "overflow"),
    ],
)
def test_barriers_in_memory_used_wrongly_are_faults(body, fault):
    with pytest.raises(Fault, match=fault):
        run(f"mov.u32 %r1, dynamic; setp.eq.u32 %p1, %t, 0; @!%p1 exit; {body}", shared=16)


# Tensor copies

LOAD = """
    mov.u32 %r1, dynamic;                   // the box; its barrier lies behind
    setp.eq.u32 %p1, %t, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r1+{bytes}], 1;
    {fence}
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+{bytes}], {expected};
    @%p1 cp.async.bulk.tensor.{rank}d.shared::cta.global.mbarrier::complete_tx::bytes
        [%r1], [%m0, {{{at}}}], [%r1+{bytes}];
    {wait}
    mov.u32 %r2, 0;
copy:
    shl.b32 %r3, %t, 2;
    add.u32 %r3, %r3, %r2;
    setp.lt.u32 %p2, %r3, {bytes};
    add.u32 %r4, %r1, %r3;
    cvt.u64.u32 %d1, %r3;
    add.s64 %d1, %d1, %a0;
    @%p2 ld.shared.b32 %r5, [%r4];
    @%p2 st.global.b32 [%d1], %r5;
    add.u32 %r2, %r2, 128;
    setp.lt.u32 %p3, %r2, {bytes};
    @%p3 bra copy;
"""
FENCE = "fence.proxy.async.shared::cta;"
WAIT = "{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%r1+BYTES], 0; @!p bra again; }"


def swizzled(image: np.ndarray, swizzle: int) -> np.ndarray:
    """Bytes as they lie in shared memory: of the address, the bits of 16 bytes are xored with those of 128 bytes.

    9.7.9.25 "Swizzling modes": over 128 bytes three bits take part, over 64 two, over 32 one.
    """
    address = np.arange(len(image))
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
    out = np.zeros_like(image)
    out[address ^ (address >> 7 & mask) << 4] = image
    return out


def box_of(tensor: np.ndarray, at: tuple[int, ...], box: tuple[int, ...]) -> np.ndarray:
    """Of the outermost dimension first, with zeros where the box leaves the tensor."""
    out = np.zeros(box, tensor.dtype)
    for place in np.ndindex(*box):
        index = tuple(a + p for a, p in zip(at, place, strict=True))
        if all(0 <= i < n for i, n in zip(index, tensor.shape, strict=True)):
            out[place] = tensor[index]
    return out


def loaded(tensor: np.ndarray, at: tuple[int, ...], box: tuple[int, ...], swizzle: int = 0, **given) -> np.ndarray:
    """The bytes of shared memory after a load; sizes of the outermost dimension first."""
    bytes_ = int(np.prod(box)) * tensor.itemsize
    strides = [stride // tensor.itemsize for stride in reversed(tensor.strides)]
    base = tensor.ctypes.data
    tensor_map = encode(base, tensor.shape[::-1], strides, box[::-1], tensor.itemsize, swizzle)
    coordinates = ", ".join(str(c) for c in reversed(at))
    schedule = given.pop("schedule", None)
    wait = given.pop("wait", WAIT).replace("BYTES", str(bytes_))
    text = LOAD.format(
        bytes=bytes_, rank=tensor.ndim, at=coordinates, wait=wait, **{"expected": bytes_, "fence": FENCE} | given
    )
    out = np.zeros(bytes_, np.uint8)
    run(text, out, tensor, shared=bytes_ + 8, target="sm_90", schedule=schedule, maps=[tensor_map])
    return out


def image(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1).view(np.uint8)


@pytest.mark.parametrize("landing", LANDINGS)
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_tensor_load_with_swizzle(swizzle, landing):
    """cp.async.bulk.tensor: a box of rows, of whose 16 bytes the swizzle exchanges some."""
    tensor = np.arange(24 * 64, dtype=np.uint16).reshape(24, 64)
    box = (16, (swizzle or 128) // 2)
    found = loaded(tensor, (3, 0), box, swizzle, schedule=Schedule(landing=landing))
    np.testing.assert_array_equal(found, swizzled(image(box_of(tensor, (3, 0), box)), swizzle))


@pytest.mark.parametrize("at", [(0, 0), (-3, 0), (20, 0), (100, 0), (2, -8), (2, 24), (-100, -100), (22, 30)])
def test_tensor_load_beyond_the_tensor_gives_zeros(at):
    """Coordinates are signed; what lies outside is zero and counts as bytes that arrived."""
    tensor = np.arange(1, 24 * 32 + 1, dtype=np.uint16).reshape(24, 32)
    np.testing.assert_array_equal(loaded(tensor, at, (8, 16)), image(box_of(tensor, at, (8, 16))))


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_tensor_load_of_every_rank(rank):
    shape, box, at = (3, 2, 4, 5, 16)[-rank:], (2, 2, 3, 2, 8)[-rank:], (2, -1, 2, 4, 8)[-rank:]
    tensor = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    np.testing.assert_array_equal(loaded(tensor, at, box), image(box_of(tensor, at, box)))


def test_tensor_load_of_a_tensor_with_gaps():
    tensor = np.arange(20 * 64, dtype=np.uint16).reshape(20, 64)[:, :40]
    np.testing.assert_array_equal(loaded(tensor, (4, 32), (8, 16)), image(box_of(tensor, (4, 32), (8, 16))))


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"fence": ""}, "missing proxy fence: use of the mbarrier"),
        ({"wait": ""}, "on its way|never written"),
        ({"wait": WAIT.replace("], 0;", "], 1;")}, "on its way|never written|deadlock"),
        ({"expected": 256 + 16}, "deadlock"),
        ({"expected": 256 - 16}, "on its way|deadlock|mbarrier"),
    ],
    ids=["no fence", "no wait", "wrong parity", "too many bytes", "too few bytes"],
)
@pytest.mark.parametrize("landing", [Landing.EARLY, Landing.LATE])
def test_tensor_load_that_is_not_waited_for_is_a_fault(given, fault, landing):
    tensor = np.zeros((8, 16), np.uint16)
    with pytest.raises(Fault, match=f"{fault}|race"):
        loaded(tensor, (0, 0), (8, 16), schedule=Schedule(landing=landing), **given)


STORE = """
    mov.u32 %r1, dynamic;
    shl.b32 %r2, %t, 4;
    add.u32 %r3, %r1, %r2;
    cvt.u64.u32 %d1, %r2;
    add.s64 %d1, %d1, %a0;
    ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d1];
    st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}};
    {fence}
    bar.sync 0;
    setp.eq.u32 %p1, %t, 0;
    @!%p1 bra end;
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%m0, {{{x}, {y}}}], [%r1];
    {wait}
end:
"""
STORE_WAIT = "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;"


def stored(at: tuple[int, int], fence=FENCE, wait=STORE_WAIT, swizzle=0, landing=Landing.EITHER) -> np.ndarray:
    """A tensor of 20 rows of 32 numbers after a box of 16 rows of 16 numbers 1, 2, 3, ... was stored at a place."""
    values = np.arange(1, 257, dtype=np.uint16)
    tensor = np.zeros((20, 32), np.uint16)
    tensor_map = encode(tensor.ctypes.data, (32, 20), (1, 32), (16, 16), 2, swizzle)
    text = STORE.format(fence=fence, wait=wait, x=at[1], y=at[0])
    source = swizzled(image(values), swizzle)
    run(text, source, tensor, shared=512, target="sm_90", schedule=Schedule(landing=landing), maps=[tensor_map])
    return tensor


@pytest.mark.parametrize("at", [(0, 0), (2, 16), (-5, 0), (10, 24), (3, -8), (30, 0)])
@pytest.mark.parametrize("swizzle", [0, 32])
def test_tensor_store_leaves_what_lies_outside(at, swizzle):
    """cp.async.bulk.tensor to global memory, cp.async.bulk.commit_group, cp.async.bulk.wait_group"""
    expected = np.zeros((20, 32), np.uint16)
    for (row, column), value in np.ndenumerate(np.arange(1, 257, dtype=np.uint16).reshape(16, 16)):
        if 0 <= at[0] + row < 20 and 0 <= at[1] + column < 32:
            expected[at[0] + row, at[1] + column] = value
    np.testing.assert_array_equal(stored(at, swizzle=swizzle), expected)


@pytest.mark.parametrize("landing", [Landing.EARLY, Landing.LATE])
@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"fence": ""}, "missing proxy fence"),
        ({"wait": ""}, "not waited for"),
        ({"wait": "cp.async.bulk.commit_group;"}, "not waited for"),
        ({"wait": "cp.async.bulk.wait_group 0;"}, "not waited for"),
        ({"wait": f"st.shared.b32 [%r1], 9; {STORE_WAIT}"}, "race|TMA|store"),
    ],
    ids=["no fence", "no wait", "no wait for the group", "no commit", "write before the wait"],
)
def test_tensor_store_without_its_order_is_a_fault(given, fault, landing):
    with pytest.raises(Fault, match=fault):
        stored((0, 0), landing=landing, **given)


@pytest.mark.parametrize(
    "change",
    [
        {"strides": (1, 36)},
        {"strides": (2, 32)},
        {"box": (12, 16)},
        {"box": (16, 257)},
        {"shape": (0, 20)},
        {"swizzle": 32, "box": (32, 8)},
        {"address": 8},
    ],
)
def test_tensor_map_keeps_the_drivers_rules(change):
    given = {"address": 64, "shape": (32, 20), "strides": (1, 32), "box": (16, 16), "item": 2} | change
    with pytest.raises(Fault, match="not kept"):
        encode(**given)


@pytest.mark.parametrize(
    "wrong",
    [
        "cp.async.cg.shared.global [%r1], [%a0], 8;",
        "cp.async.ca.shared.global [%r1], [%a0], %r2;",
        "cp.async.ca.shared.global [%r1], [%r2], 4;",
        "cp.async.ca.shared.global.L2::128B [%r1], [%a0], 4;",
        "cp.async.wait_group %r1;",
        "mbarrier.arrive.shared::cta.b64 %d1, [%r1];",
        "mbarrier.test_wait.shared::cta.b64 %p1, [%r1], %d1;",
        "mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%r1], 8;",
        "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%a0, {%r2}], [%r3];",
        "cp.async.bulk.tensor.1d.shared::cta.global.im2col.mbarrier::complete_tx::bytes [%r1], [%a0, {%r2}], [%r3];",
    ],
)
def test_what_is_not_known_is_an_error(wrong):
    with pytest.raises(PtxError, match="line 14"):
        Program(kernel(wrong, 1))
