"""Loads and stores of the PTX machine, and the faults of memory that it finds (PTX ISA 9.0)."""

import numpy as np
import pytest
from ptx.program import USUAL, Buffer, Check, Fault, Program, Schedule
from ptx.small import run


def test_every_width_is_loaded_and_stored():
    """9.7.9 ld, st: of 8 to 64 bits; into a wider register zeros, or the sign of .s8 and .s16, fill it."""
    source = np.array([0x8182838485868788, 0x0102030405060708], np.uint64)
    out = np.zeros(10, np.uint64)
    run(
        """
        ld.global.u8 %h1, [%a0];        cvt.u64.u16 %d1, %h1;   st.global.u64 [%a1], %d1;
        ld.global.u16 %h2, [%a0+2];     cvt.u64.u16 %d1, %h2;   st.global.u64 [%a1+8], %d1;
        ld.global.b32 %r1, [%a0+4];     cvt.u64.u32 %d1, %r1;   st.global.u64 [%a1+16], %d1;
        ld.global.u8 %d2, [%a0+1];      st.global.b64 [%a1+24], %d2;
        ld.global.u32 %d2, [%a0+12];    st.global.b64 [%a1+32], %d2;
        ld.global.s8 %r1, [%a0];        st.global.b32 [%a1+40], %r1;
        ld.global.s16 %r1, [%a0];       st.global.b32 [%a1+48], %r1;
        ld.global.s8 %h1, [%a0];        cvt.u32.u16 %r1, %h1;   st.global.b32 [%a1+56], %r1;
        st.global.b8 [%a1+64], %r1;     st.global.b16 [%a1+66], %r1;
        ld.global.f32 %r2, [%a0];       st.global.f32 [%a1+72], %r2;
        """,
        source,
        out,
    )
    assert out.tolist() == [
        0x88,
        0x8586,
        0x81828384,
        0x87,
        0x01020304,
        0xFFFFFF88,
        0xFFFF8788,
        0xFF88,
        0xFF880088,
        0x85868788,
    ]


def test_vectors_are_loaded_and_stored():
    """9.7.9 ld.v2, ld.v4, st.v2, st.v4: elements lie one behind the other; "_" takes what is not wanted."""
    source, out = np.arange(8, dtype=np.uint32), np.zeros(8, np.uint32)
    run(
        """
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%a0];
        ld.global.v2.b64 {%d1, %d2}, [%a0+16];
        st.global.v4.b32 [%a1], {%r4, %r3, %r2, %r1};
        st.global.v2.b64 [%a1+16], {%d2, %d1};
        ld.global.v2.b32 {_, %r5}, [%a0+24];
        st.global.v2.b32 [%a1+24], {%r5, 9};
        """,
        source,
        out,
    )
    assert out.tolist() == [3, 2, 1, 0, 6, 7, 7, 9]


def test_shared_memory_of_the_text_lies_before_that_of_the_launch():
    """5.1.7 "Shared State Space", 5.4.5 "Alignment", 6.4.1 "Addresses as Operands"."""
    out = np.zeros(3, np.uint32)
    run(
        """
        .shared .align 4 .b8 bytes[6];
        .shared .align 16 .b32 words[4];
        st.shared.u8 [bytes+5], 7;
        mov.u32 %r1, words;
        st.shared.b32 [%r1+4], 8;
        mov.u32 %r2, dynamic;
        st.shared::cta.b32 [%r2], 9;
        bar.sync 0;
        ld.shared.u8 %r3, [bytes+5];
        ld.shared.b32 %r4, [words+4];
        sub.u32 %r5, %r2, %r1;
        st.global.u32 [%a0], %r3;
        st.global.u32 [%a0+4], %r4;
        st.global.u32 [%a0+8], %r5;
        """,
        out,
        shared=4,
    )
    assert out.tolist() == [7, 8, 128 - 16]


def test_parameters_lie_aligned_to_their_types():
    """5.1.6 "Parameter State Space"."""
    text = """.version 8.7
    .target sm_80
    .address_size 64
    .visible .entry k(.param .u8 k_0, .param .u32 k_1, .param .f32 k_2, .param .u64 .ptr .global .align 1 k_3)
    .reqntid 32
    {
    .reg .b32 %r<4>;
    .reg .b64 %d<2>;
    ld.param.u8 %r0, [k_0];
    ld.param.b32 %r1, [k_1];
    ld.param.b32 %r2, [k_2];
    ld.param.b64 %d1, [k_3];
    st.global.b32 [%d1], %r0;
    st.global.b32 [%d1+4], %r1;
    st.global.b32 [%d1+8], %r2;
    ret;
    }
    """
    program = Program(text)
    assert [p.offset for p in program.parameters] == [0, 4, 8, 16]
    out = np.zeros(3, np.int32)
    begin = out.ctypes.data
    program.run((1, 1, 1), program.pack([200, -5, 1.5, begin]), [Buffer(begin, begin + out.nbytes)])
    assert out.tolist() == [200, -5, np.float32(1.5).view(np.int32)]


def test_local_memory_is_each_threads_own():
    """5.1.5 "Local State Space"."""
    out = np.zeros(32, np.uint32)
    body = """
        .local .align 8 .b8 first[12];
        .local .align 16 .b8 second[32];
        mov.u32 %r1, 0;
        st.local.u32 [first+8], %t;
        shl.b32 %r2, %t, 2; and.b32 %r2, %r2, 28;
        st.local.u32 [second+12], 1000;
        ld.local.u32 %r3, [first+8];
        ld.local.u32 %r4, [second+12];
        add.u32 %r3, %r3, %r4;
        mad.wide.u32 %d0, %t, 4, %a0;
        st.global.u32 [%d0], %r3;
    """
    run(body, out)
    assert out.tolist() == [1000 + t for t in range(32)]
    with pytest.raises(Fault, match="local memory"):
        run(body.replace("[first+8], %t", "[first+48], %t"), out)


# Faults


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("ld.global.b32 %r1, [%a0+64];", "out of bounds.*past the end"),
        ("ld.global.b32 %r1, [%a0+-4];", "out of bounds.*below"),
        ("st.global.v4.b32 [%a0+56], {%r1, %r1, %r1, %r1};", "out of bounds"),
        ("ld.global.b32 %r1, [%a0+2];", "misaligned"),
        ("ld.global.v2.b32 {%r1, %r2}, [%a0+4];", "misaligned"),
        ("ld.shared.b32 %r1, [dynamic+256];", "shared memory out of bounds"),
        ("st.shared.b32 [dynamic+254], 0;", "shared memory out of bounds"),
        ("st.shared.b32 [dynamic+2], 0;", "misaligned"),
        ("st.shared.b64 [0], %d1;", "shared memory out of bounds"),
        ("ld.shared.b32 %r1, [dynamic+8];", "never written"),
        ("trap;", "trap"),
    ],
)
def test_wrong_addresses_are_faults(body, fault):
    with pytest.raises(Fault, match=fault):
        run(body, np.zeros(16, np.uint32), shared=256)


def test_fault_names_instruction_and_source_line():
    with pytest.raises(Fault, match=r"line \d+ \[kernel.py:7:3\] `st.global.b32 \[%a0\+64\], 0`"):
        run(".loc 1 7 3 // kernel.py:7:3\nst.global.b32 [%a0+64], 0;", np.zeros(16, np.uint32))


NEIGHBOUR = """
    shl.b32 %r1, %t, 2;
    mov.u32 %r2, dynamic;
    add.u32 %r3, %r2, %r1;          // its own word
    xor.b32 %r4, %r1, 128;
    add.u32 %r4, %r2, %r4;          // that of the same lane of the other warp
    st.shared.b32 [%r3], %t;
    {barrier}
    ld.shared.b32 %r5, [%r4];
    {again}
    mad.wide.u32 %d1, %t, 4, %a0;
    st.global.b32 [%d1], %r5;
"""


@pytest.mark.parametrize("seed", range(4))
def test_race_in_shared_memory_is_a_fault_under_every_schedule(seed):
    """8.7.1 "Conflict and Data-races": the order is what barriers give, not what happened."""
    out = np.zeros(64, np.uint32)
    schedule = Schedule(seed=seed)
    run(NEIGHBOUR.format(barrier="bar.sync 0;", again=""), out, threads=64, shared=256, schedule=schedule)
    assert out.tolist() == [t ^ 32 for t in range(64)]
    with pytest.raises(Fault, match=r"race|never written"):
        run(NEIGHBOUR.format(barrier="", again=""), out, threads=64, shared=256, schedule=schedule)
    with pytest.raises(Fault, match="race"):  # what the other warp may still read is overwritten
        body = NEIGHBOUR.format(barrier="bar.sync 0;", again="st.shared.b32 [%r3], 0;")
        run(body, out, threads=64, shared=256, schedule=schedule)
    body = NEIGHBOUR.format(barrier="bar.sync 0;", again="bar.sync 0; st.shared.b32 [%r3], 0;")
    run(body, out, threads=64, shared=256, schedule=schedule)


def test_checks_can_be_left_out():
    out = np.zeros(64, np.uint32)
    body = NEIGHBOUR.format(barrier="bar.sync 0;", again="st.shared.b32 [%r3], 0;")
    run(body, out, threads=64, shared=256, schedule=Schedule(checks=USUAL & ~Check.RACE))
    run("ld.shared.b32 %r1, [dynamic];", shared=256, schedule=Schedule(checks=USUAL & ~Check.INIT))


@pytest.mark.parametrize(
    ("body", "races"),
    [
        ("mad.wide.u32 %d1, %r1, 4, %a0; st.global.b32 [%d1], %r1;", False),
        ("ld.global.b32 %r2, [%a0];", False),
        ("st.global.b32 [%a0], 5;", True),
        ("setp.eq.u32 %p1, %r1, 0; @%p1 st.global.b32 [%a0], 5; @!%p1 ld.global.b32 %r2, [%a0];", True),
    ],
    ids=["own words", "reads", "writes of one word", "write and read"],
)
def test_race_between_ctas_is_a_fault(body, races):
    for seed in range(3):
        out = np.zeros(4, np.uint32)
        given = {"grid": (4, 1, 1), "schedule": Schedule(seed=seed)}
        if races:
            with pytest.raises(Fault, match="race between CTAs"):
                run(f"mov.u32 %r1, %ctaid.x;\n{body}", out, **given)
        else:
            run(f"mov.u32 %r1, %ctaid.x;\n{body}", out, **given)
