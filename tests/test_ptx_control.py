"""Control flow, barriers and instructions of a whole warp in the PTX machine, held against the manual (PTX ISA 9.0)."""

import numpy as np
import pytest
from ptx.program import Fault, Program, Schedule
from ptx.small import kernel, run
from ptx.text import PtxError


def by_thread(body: str, threads: int = 32, **options) -> list[int]:
    """What every thread leaves in %r0."""
    out = np.zeros(threads, np.int32)
    run(f"{body}\nmad.wide.u32 %d0, %t, 4, %a0; st.global.b32 [%d0], %r0;", out, threads=threads, **options)
    return out.tolist()


def test_lanes_go_their_own_ways():
    """9.7.12 bra, 9.3 "Predicated Execution": a loop whose length each lane has for itself, left by some early."""
    body = """
        mov.u32 %r0, 0;
        mov.u32 %r1, 0;
    loop:
        setp.ge.u32 %p1, %r1, %t;
        @%p1 bra done;
        add.u32 %r0, %r0, %r1;
        add.u32 %r1, %r1, 1;
        setp.eq.u32 %p2, %r0, 45;
        @!%p2 bra.uni loop;
        neg.s32 %r0, %r0;
    done:
    """
    sums = [sum(range(t)) for t in range(32)]
    assert by_thread(body) == [s if s < 45 else -45 for s in sums]


def test_branch_by_index():
    """9.7.12 brx.idx, 11.3.1 .branchtargets"""
    body = """
        and.b32 %r1, %t, 3;
        table: .branchtargets first,
            second, third, first;
        brx.idx %r1, table;
    first:  mov.u32 %r0, 10; bra end;
    second: mov.u32 %r0, 20; bra end;
    third:  mov.u32 %r0, 30;
    end:
    """
    assert by_thread(body) == [[10, 20, 30, 10][t & 3] for t in range(32)]
    with pytest.raises(Fault, match="beyond its table"):
        by_thread(body.replace("and.b32 %r1, %t, 3", "and.b32 %r1, %t, 7"))


def test_names_belong_to_their_braces():
    """9.7.12 {}: registers and labels of a scope hide those outside and end with it."""
    body = """
        mov.u32 %r0, 0;
        { .reg .b32 x; mov.u32 x, 1; { .reg .b32 x; mov.u32 x, 10; add.u32 %r0, %r0, x; } add.u32 %r0, %r0, x; }
        { .reg .pred done; again: add.u32 %r0, %r0, 100; setp.gt.u32 done, %r0, 300; @!done bra again; }
        { .reg .pred done; again: add.u32 %r0, %r0, 1000; setp.gt.u32 done, %r0, 3000; @!done bra again; }
    """
    assert by_thread(body) == [3311] * 32
    for wrong in ("{ .reg .b32 x; } mov.u32 x, 1;", "{ inner: mov.u32 %r0, 0; } bra inner;"):
        with pytest.raises(PtxError):
            Program(kernel(wrong, 1))


def test_special_registers():
    """Chapter 10 "Special Registers"."""
    out = np.zeros((2, 2, 2, 64, 3), np.int32)
    run(
        """
        mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z;
        mov.u32 %r4, %nctaid.x; mov.u32 %r5, %nctaid.y; mov.u32 %r6, %ntid.x;
        mad.lo.u32 %r7, %r3, %r5, %r2; mad.lo.u32 %r7, %r7, %r4, %r1; mad.lo.u32 %r7, %r7, %r6, %t;
        mad.wide.u32 %d0, %r7, 12, %a0;
        mov.u32 %r8, %laneid; mov.u32 %r9, %warpid; mov.u32 %r10, %nctaid.z; mov.u32 %r11, %tid.y;
        add.u32 %r10, %r10, %r11;
        st.global.b32 [%d0], %r8; st.global.b32 [%d0+4], %r9; st.global.b32 [%d0+8], %r10;
        """,
        out,
        threads=64,
        grid=(2, 2, 2),
    )
    lanes = np.arange(64)
    assert (out == np.stack([lanes % 32, lanes // 32, np.full(64, 2)], -1)).all()


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """(lane that is read, predicate), by the manual's text of shfl.sync."""
    bound, segment = c & 31, c >> 8 & 31
    most, least = (lane & segment) | (bound & ~segment), lane & segment
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": least | (b & ~segment)}[mode]
    inside = source >= most if mode == "up" else source <= most
    return (source if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffle(mode):
    """9.7.9 shfl.sync: segments and bounds, and the predicate that says whether the lane read lies within them."""
    for b in (0, 1, 5, 16, 31):
        for c in (0, 7, 0x1F, 0x1800, 0x181F, 0x1C03, 0x0F1F):
            expected = [shuffled(mode, lane, b, c) for lane in range(32)]
            body = f"""
                mul.lo.u32 %r1, %t, 3;
                shfl.sync.{mode}.b32 %r2|%p1, %r1, {b}, {c}, -1;
                selp.b32 %r3, 1000, 0, %p1;
                add.u32 %r0, %r2, %r3;
            """
            assert by_thread(body) == [3 * lane + 1000 * inside for lane, inside in expected], (mode, b, c)


def test_shuffle_of_absent_lanes_is_a_fault():
    """The members must all take part, and the lane read must be one of them."""
    for wrong in (
        "setp.lt.u32 %p1, %t, 16; @%p1 shfl.sync.bfly.b32 %r0, %t, 1, 31, -1;",
        "setp.lt.u32 %p1, %t, 16; @%p1 shfl.sync.bfly.b32 %r0, %t, 16, 31, 0xFFFF;",
        "setp.lt.u32 %p1, %t, 16; @%p1 shfl.sync.bfly.b32 %r0, %t, 1, 31, 0xFF;",
    ):
        with pytest.raises(Fault, match=r"shfl\.sync"):
            by_thread(wrong)
    assert by_thread("mov.u32 %r0, 0; setp.lt.u32 %p1, %t, 16; @%p1 shfl.sync.bfly.b32 %r0, %t, 1, 31, 0xFFFF;") == [
        t ^ 1 if t < 16 else 0 for t in range(32)
    ]


VALUES = [(7 * t * t - 40 * t - 11) * 0x1234567 % (1 << 32) for t in range(32)]
SIGNED = [v - (1 << 32) if v >> 31 else v for v in VALUES]
REDUCTIONS = {
    "add.s32": sum(VALUES) % (1 << 32),
    "add.u32": sum(VALUES) % (1 << 32),
    "min.s32": min(SIGNED) % (1 << 32),
    "max.s32": max(SIGNED) % (1 << 32),
    "min.u32": min(VALUES),
    "max.u32": max(VALUES),
    "and.b32": int(np.bitwise_and.reduce(np.array(VALUES[:2], np.uint32))),
    "or.b32": int(np.bitwise_or.reduce(np.array(VALUES, np.uint32))),
    "xor.b32": int(np.bitwise_xor.reduce(np.array(VALUES, np.uint32))),
}


@pytest.mark.parametrize("operation", REDUCTIONS)
def test_reduction(operation):
    """9.7.13 redux.sync"""
    members = 3 if operation == "and.b32" else 0xFFFFFFFF  # of all lanes, and would be 0
    body = f"""
        mad.lo.s32 %r1, %t, 7, -40; mad.lo.s32 %r1, %r1, %t, -11; mul.lo.u32 %r1, %r1, 0x1234567;
        mov.u32 %r0, 0;
        shr.u32 %r2, {members}, %t; and.b32 %r2, %r2, 1; setp.eq.u32 %p1, %r2, 1;
        @%p1 redux.sync.{operation} %r0, %r1, {members};
    """
    found = np.array(by_thread(body), np.int32).view(np.uint32)
    assert found.tolist() == [REDUCTIONS[operation] if members >> t & 1 else 0 for t in range(32)]


@pytest.mark.parametrize("operation", ["max", "min"])
def test_reduction_of_floats(operation):
    """9.7.13 redux.sync of .f32: NaN counts only where there is nothing else."""
    values = np.array([np.nan, *range(-10, 21)], np.float32)
    out = np.zeros(32, np.float32)
    body = f"""
        mad.wide.u32 %d0, %t, 4, %a0; ld.global.b32 %r1, [%d0];
        redux.sync.{operation}.f32 %r2, %r1, -1;
        mad.wide.u32 %d0, %t, 4, %a1; st.global.b32 [%d0], %r2;
    """
    run(body, values, out, target="sm_100")
    assert out.tolist() == [{"max": 20, "min": -10}[operation]] * 32
    run(body, np.full(32, np.nan, np.float32), out, target="sm_100")
    assert np.isnan(out).all()


def test_reduction_over_other_lanes_is_a_fault():
    with pytest.raises(Fault, match=r"redux\.sync"):
        by_thread("setp.lt.u32 %p1, %t, 16; @%p1 redux.sync.add.s32 %r0, %t, -1;")


def test_election():
    """9.7.13 elect.sync: one lane of the members, the same each time; its number in all of them."""
    body = """
        mov.u32 %r0, 0;
        elect.sync %r1|%p1, -1;
        @%p1 add.u32 %r0, %r0, 100;
        elect.sync _|%p2, -1;
        @%p2 add.u32 %r0, %r0, 1000;
        setp.eq.u32 %p3, %r1, %t;
        @%p3 add.u32 %r0, %r0, 1;
    """
    found = by_thread(body, target="sm_90")
    assert sorted(found) == [0] * 31 + [1101]


def test_vote():
    """9.7.13 vote.sync: of the members alone; of a negated predicate, too."""
    body = """
        setp.lt.u32 %p1, %t, 5;
        vote.sync.ballot.b32 %r0, %p1, -1;
        vote.sync.any.pred %p2, %p1, -1;        @%p2 add.u32 %r0, %r0, 0x100;
        vote.sync.all.pred %p3, %p1, -1;        @%p3 add.u32 %r0, %r0, 0x200;
        vote.sync.uni.pred %p4, %p1, -1;        @%p4 add.u32 %r0, %r0, 0x400;
        vote.sync.ballot.b32 %r1, !%p1, -1;     shr.u32 %r1, %r1, 5;  setp.eq.u32 %p5, %r1, 0x7FFFFFF;
        @%p5 add.u32 %r0, %r0, 0x800;
        @!%p1 bra end;
        vote.sync.all.pred %p6, %p1, 31;        @%p6 add.u32 %r0, %r0, 0x1000;
        activemask.b32 %r2;                     add.u32 %r0, %r0, %r2;
    end:
    """
    assert by_thread(body) == [31 + 0x100 + 0x800 + (0x1000 + 31 if t < 5 else 0) for t in range(32)]
    with pytest.raises(Fault, match=r"vote\.sync"):
        by_thread("setp.lt.u32 %p1, %t, 5; @%p1 vote.sync.any.pred %p2, %p1, -1; mov.u32 %r0, 0;")


def test_warp_barrier_names_its_members():
    """9.7.13 bar.warp.sync"""
    half = "setp.lt.u32 %p1, %t, 16; @%p1 bar.warp.sync {members}; mov.u32 %r0, 0;"
    assert by_thread(half.format(members="0xFFFF")) == [0] * 32
    with pytest.raises(Fault, match=r"bar\.warp\.sync"):
        by_thread(half.format(members="-1"))


# Barriers

HANDOVER = """
    setp.ge.u32 %p2, %t, 64;
    @%p2 bra end;
    setp.ge.u32 %p1, %t, 32;
    @%p1 bra reader;
    mov.u32 %r1, dynamic;
    st.shared.b32 [%r1], 77;
    bar.arrive 3, {arrivals};
    bra end;
reader:
    bar.sync 3, {waits};
    ld.shared.b32 %r0, [dynamic];
end:
"""


@pytest.mark.parametrize("seed", range(3))
def test_named_barrier_orders_those_that_arrive_before_those_that_wait(seed):
    """9.7.13.1 bar.arrive, bar.sync"""
    found = by_thread(HANDOVER.format(arrivals=64, waits=64), 64, shared=4, schedule=Schedule(seed=seed))
    assert found[32:] == [77] * 32


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (HANDOVER.format(arrivals=64, waits=96), "others said"),
        (HANDOVER.format(arrivals=96, waits=96), "deadlock"),
        (HANDOVER.format(arrivals=32, waits=32), "race|never written"),
        ("bar.sync 0, 48;", "barrier 0 for 48 threads"),
        ("bar.sync 0, 256;", "barrier 0 for 256 threads"),
        ("bar.sync 16;", "barrier 16"),
        ("setp.lt.u32 %p1, %t, 16; @%p1 bar.sync 0;", "not converged"),
        ("setp.lt.u32 %p1, %t, 32; @%p1 bar.sync 0;", "deadlock"),
        ("setp.lt.u32 %p1, %t, 32; @%p1 bar.arrive 1, 64;", "half way"),
        ("again: bra again;", "instructions"),
    ],
)
def test_barriers_used_wrongly_are_faults(body, fault):
    schedule = Schedule(limit=10_000)
    with pytest.raises(Fault, match=fault):
        by_thread(body, 96 if "96;" in body else 64, shared=4, schedule=schedule)


def test_registers_are_handed_from_warp_to_warp():
    """9.7.19.5 setmaxnreg: more than the pool holds is waited for, until others give theirs back."""
    text = kernel(
        """
        setp.lt.u32 %p1, %t, 128;
        @%p1 bra give;
        setmaxnreg.inc.sync.aligned.u32 {wanted};
        bra end;
    give:
        setmaxnreg.dec.sync.aligned.u32 40;
    end:
        bar.sync 0;
        """,
        0,
        256,
        "sm_90a",
    ).replace("{\n.reg .pred", ".maxnreg 128\n{\n.reg .pred")
    for wanted, fault in ((216, None), (224, "deadlock"), (120, "setmaxnreg.inc to 120"), (213, "setmaxnreg 213")):
        program = Program(text.replace("{wanted}", str(wanted)))
        if fault is None:
            program.run((1, 1, 1), b"")
        else:
            with pytest.raises(Fault, match=fault):
                program.run((1, 1, 1), b"")


@pytest.mark.parametrize(
    "wrong",
    [
        "bra nowhere;",
        "brx.idx %r1, nowhere;",
        "bar.arrive 1;",
        "bar.red.popc.u32 %r1, 0, %p1;",
        "shfl.bfly.b32 %r0, %t, 1, 31;",
        "redux.sync.min.b32 %r0, %t, -1;",
        "elect.sync %r0, -1;",
        "setmaxnreg.inc.sync.aligned.u32 %r1;",
        "fence.proxy.async.global;",
        "call nothing;",
    ],
)
def test_what_is_not_known_is_an_error(wrong):
    with pytest.raises(PtxError, match="line 14"):
        Program(kernel(wrong, 1))


def test_kernel_must_not_run_past_its_end():
    with pytest.raises(PtxError, match="past its end"):
        Program(kernel("", 1).replace("ret;", ""))
