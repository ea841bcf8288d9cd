"""Products of a warpgroup in the PTX machine, by the manual's layouts (PTX ISA 9.0, 9.7.15).

9.7.15 "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions"; layouts of shared memory are those of
9.7.15.5.1.2 "Shared Memory Matrix Layout", in which one element has 2 bytes and 8 of them are 16 bytes.
"""

import numpy as np
import pytest
import torch
from ptx.assembler import SHARED_BASE
from ptx.program import USUAL, Check, Fault, Landing, Program, Schedule
from ptx.small import kernel, run
from ptx.text import PtxError

KINDS = {"bf16": torch.bfloat16, "f16": torch.float16}
SWIZZLES = (0, 32, 64, 128)
SHARED = 64 * 1024


class Layout:
    """How a matrix of rows (mn) and 16 columns (k) lies in shared memory, from `start` on, and its descriptor."""

    def __init__(self, start: int, mn_major: bool, swizzle: int, rows: int) -> None:
        self.start, self.mn_major, self.swizzle = start, mn_major, swizzle
        width = swizzle or 16  # bytes of a row of a block that repeats
        # In bytes: from one block to the next in the leading and in the strided dimension.
        if not mn_major:
            self.leading, self.stride = (8 * rows // 8 * 16 + 256, 128) if swizzle == 0 else (16, 8 * width)
        elif swizzle == 0:
            self.leading, self.stride = 128 * (rows // 8) + 128, 128
        else:
            self.leading, self.stride = 2 * 8 * width, 8 * width

    def offset(self, mn: int, k: int) -> int:
        """Of an element's first byte, from the start on: the canonical layouts of both majornesses."""
        width = self.swizzle or 16
        if not self.mn_major:
            row = mn % 8 * width + mn // 8 * self.stride
            offset = row + (k % 8 * 2 + k // 8 * self.leading if self.swizzle == 0 else 2 * k)
        elif self.swizzle == 0:
            offset = mn % 8 * 2 + mn // 8 * self.stride + k % 8 * 16 + k // 8 * self.leading
        else:
            across = width // 2
            offset = mn % across * 2 + mn // across * self.leading + k % 8 * width + k // 8 * self.stride
        return offset ^ (offset >> 7 & {0: 0, 32: 1, 64: 3, 128: 7}[self.swizzle]) << 4

    def put(self, memory: np.ndarray, matrix: np.ndarray) -> None:
        """matrix: [mn, k] of 16-bit words."""
        words = memory.view(np.uint16)
        for (mn, k), value in np.ndenumerate(matrix):
            words[(self.start + self.offset(mn, k)) // 2] = value

    @property
    def descriptor(self) -> int:
        """9.7.15.5.1.2.2 "Matrix Descriptor Format": addresses and offsets in units of 16 bytes."""
        mode = {0: 0, 128: 1, 64: 2, 32: 3}[self.swizzle]
        start = SHARED_BASE + self.start
        return start >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32 | mode << 62


FILL = """
    mov.u32 %r0, dynamic;
    mov.u32 %r1, 0;
fill:
    shl.b32 %r2, %t, 4;
    add.u32 %r2, %r2, %r1;
    cvt.u64.u32 %d0, %r2;
    add.s64 %d0, %d0, %a0;
    ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%d0];
    add.u32 %r2, %r2, %r0;
    st.shared.v4.b32 [%r2], {%r3, %r4, %r5, %r6};
    add.u32 %r1, %r1, 2048;
    setp.lt.u32 %p1, %r1, 65536;
    @%p1 bra fill;
"""
PROXY_FENCE = "fence.proxy.async.shared::cta;"
FENCE, COMMIT, WAIT = (
    "wgmma.fence.sync.aligned;",
    "wgmma.commit_group.sync.aligned;",
    "wgmma.wait_group.sync.aligned 0;",
)


def d_registers(n: int) -> str:
    return ", ".join(f"%r{100 + i}" for i in range(n // 2))


def d_of(registers: np.ndarray) -> np.ndarray:
    """The matrix D, 64 x n, that the registers [thread, i] hold: 9.7.15.5.1.1 "Register Fragments"."""
    n = 2 * registers.shape[1]
    d = np.zeros((64, n), registers.dtype)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(n // 2):
            d[16 * warp + lane // 4 + i // 2 % 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2] = registers[thread, i]
    return d


def a_registers(a: np.ndarray) -> np.ndarray:
    """Four registers of a thread, [thread, 4] of 32 bits, that hold A, 64 x 16 of 16-bit words."""
    held = np.zeros((128, 8), np.uint16)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(8):
            held[thread, i] = a[16 * warp + lane // 4 + i // 2 % 2 * 8, lane % 4 * 2 + i % 2 + i // 4 * 8]
    return held.view(np.uint32)


def integers(*shape: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-8, 9, shape)).float()


def words(matrix: torch.Tensor, kind: str) -> np.ndarray:
    return matrix.to(KINDS[kind]).view(torch.int16).numpy().view(np.uint16)


def multiply(
    n: int,
    a: str,
    b: str,
    memory: np.ndarray,
    kind: str = "bf16",
    signs: str = "1, 1",
    transposes: str = ", 0, 0",
    scale_d: str = "1",
    before: str = f"{PROXY_FENCE} bar.sync 0;",
    after: str = f"{COMMIT} {WAIT}",
    a_words: np.ndarray | None = None,
    schedule: Schedule | None = None,
) -> np.ndarray:
    """D of one product whose D was 1 before. a, b: the text of the operands."""
    lines = [FILL, before, "mad.wide.u32 %d1, %t, 16, %a1; ld.global.v4.b32 {%r50, %r51, %r52, %r53}, [%d1];"]
    lines += [f"mov.b32 %r{100 + i}, 0f3F800000;" for i in range(n // 2)]
    opcode = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind}"
    lines += [FENCE, f"{opcode} {{{d_registers(n)}}}, {a}, {b}, {scale_d}, {signs}{transposes};", after]
    lines += [f"mad.wide.u32 %d2, %t, {2 * n}, %a2;"]
    lines += [f"st.global.b32 [%d2+{4 * i}], %r{100 + i};" for i in range(n // 2)]
    out = np.zeros((128, n // 2), np.float32)
    held = np.zeros((128, 4), np.uint32) if a_words is None else a_words
    run("\n".join(lines), memory, held, out, threads=128, target="sm_90a", shared=SHARED, schedule=schedule)
    return d_of(out)


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("a_mn_major", [False, True])
@pytest.mark.parametrize("b_mn_major", [False, True])
def test_product_of_every_layout(a_mn_major, b_mn_major, swizzle):
    """9.7.15.5.2 wgmma.mma_async: both majornesses of A and B under every swizzle; D = A · B + D."""
    n = 64
    a, b = integers(64, 16, seed=0), integers(n, 16, seed=1)
    memory = np.zeros(SHARED, np.uint8)
    of_a, of_b = Layout(0, a_mn_major, swizzle, 64), Layout(16384, b_mn_major, swizzle, n)
    of_a.put(memory, words(a, "bf16"))
    of_b.put(memory, words(b, "bf16"))
    transposes = f", {int(a_mn_major)}, {int(b_mn_major)}"
    schedule = Schedule(seed=swizzle)
    texts = [f"%d{k}" for k in (10, 11)]
    before = f"{PROXY_FENCE} bar.sync 0; mov.b64 %d10, {of_a.descriptor}; mov.b64 %d11, {of_b.descriptor};"
    found = multiply(n, *texts, memory, transposes=transposes, before=before, schedule=schedule)
    np.testing.assert_array_equal(found, (a @ b.T + 1).numpy())


def operands(
    n: int, kind: str = "bf16", swizzle: int = 128
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, str, str, str]:
    """a, b, shared memory, the text of A's and B's operands, and what sets them."""
    a, b = integers(64, 16, seed=2), integers(n, 16, seed=3)
    memory = np.zeros(SHARED, np.uint8)
    of_a, of_b = Layout(0, False, swizzle, 64), Layout(16384, False, swizzle, n)
    of_a.put(memory, words(a, kind))
    of_b.put(memory, words(b, kind))
    setting = f"mov.b64 %d10, {of_a.descriptor}; mov.b64 %d11, {of_b.descriptor};"
    return a, b, memory, "%d10", "%d11", setting


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [8, 24, 128, 256])
def test_product_of_every_width(n, kind):
    a, b, memory, *texts, setting = operands(n, kind)
    found = multiply(n, *texts, memory, kind, before=f"{PROXY_FENCE} bar.sync 0; {setting}")
    np.testing.assert_array_equal(found, (a @ b.T + 1).numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_product_of_registers(kind):
    """A in registers, 9.7.15.5.1.1; its descriptor and transpose are left out."""
    a, b, memory, _, of_b, setting = operands(32, kind)
    given = {"before": f"{PROXY_FENCE} bar.sync 0; {setting}", "transposes": ", 0"}
    held = a_registers(words(a, kind))
    found = multiply(32, "{%r50, %r51, %r52, %r53}", of_b, memory, kind, a_words=held, **given)
    np.testing.assert_array_equal(found, (a @ b.T + 1).numpy())


def test_scales():
    """scale-d false forgets D; imm-scale-a and imm-scale-b of -1 negate."""
    a, b, memory, *texts, setting = operands(16)
    before = f"{PROXY_FENCE} bar.sync 0; {setting}"
    product = (a @ b.T).numpy()
    np.testing.assert_array_equal(multiply(16, *texts, memory, before=before, scale_d="0"), product)
    for signs, sign in (("-1, 1", -1), ("1, -1", -1), ("-1, -1", 1)):
        found = multiply(16, *texts, memory, before=before, signs=signs)
        np.testing.assert_array_equal(found, sign * product + 1)


def test_descriptor_advances_within_a_swizzled_row():
    """A row of 128 bytes holds 64 columns; 32 bytes further on lie the next 16."""
    a, b = integers(64, 64, seed=4), integers(16, 64, seed=5)
    memory = np.zeros(SHARED, np.uint8)
    layouts = Layout(0, False, 128, 64), Layout(16384, False, 128, 16)
    for layout, matrix in zip(layouts, (a, b), strict=True):
        layout.put(memory, words(matrix, "bf16"))
    for step in range(4):
        setting = " ".join(f"mov.b64 %d{10 + k}, {layouts[k].descriptor + 2 * step};" for k in (0, 1))
        found = multiply(16, "%d10", "%d11", memory, before=f"{PROXY_FENCE} bar.sync 0; {setting}")
        part = slice(16 * step, 16 * step + 16)
        np.testing.assert_array_equal(found, (a[:, part] @ b[:, part].T + 1).numpy())


def test_copies_need_a_proxy_fence_where_it_is_checked():
    """9.7.9.25.2 "Async proxy": cp.async is no part of it. Triton and CUTLASS leave the fence out all the same."""
    _, _, memory, *_, setting = operands(16)
    fill = FILL.replace("ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%d0];", "")
    fill = fill.replace("st.shared.v4.b32 [%r2], {%r3, %r4, %r5, %r6};", "cp.async.cg.shared.global [%r2], [%d0], 16;")
    zeros = " ".join(f"mov.b32 %r{k}, 0;" for k in range(100, 108))
    product = f"wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {{{d_registers(16)}}}, %d10, %d11, 1, 1, 1, 0, 0;"
    text = f"{fill} cp.async.wait_all; {{fence}} bar.sync 0; {setting} {zeros} {FENCE} {product} {COMMIT} {WAIT}"
    given = {"threads": 128, "target": "sm_90a", "shared": SHARED}
    run(text.replace("{fence}", ""), memory, **given)
    given["schedule"] = Schedule(checks=USUAL | Check.CP_ASYNC_PROXY)
    run(text.replace("{fence}", PROXY_FENCE), memory, **given)
    with pytest.raises(Fault, match="missing proxy fence"):
        run(text.replace("{fence}", ""), memory, **given)


@pytest.mark.parametrize("landing", [Landing.EARLY, Landing.LATE])
@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"before": "bar.sync 0;"}, "missing proxy fence"),
        ({"before": PROXY_FENCE}, "race|missing proxy fence|never written"),
        ({"after": COMMIT}, "in flight|not waited for"),
        ({"after": WAIT}, "in flight|not waited for"),
        ({"after": f"{COMMIT} wgmma.wait_group.sync.aligned 1;"}, "in flight|not waited for"),
        ({"after": f"add.f32 %r100, %r100, %r100; {COMMIT} {WAIT}"}, "in flight writes"),
        ({"after": f"mov.b32 %r20, %r101; {COMMIT} {WAIT}"}, "in flight writes"),
        ({"after": f"{COMMIT} bar.sync 0; st.shared.b32 [dynamic], 0; {WAIT}"}, "race"),
    ],
    ids=["no proxy fence", "no barrier", "no wait", "no commit", "weak wait", "write", "read", "overwritten"],
)
def test_product_without_its_order_is_a_fault(given, fault, landing):
    _, _, memory, *texts, setting = operands(16)
    given = {"before": f"{PROXY_FENCE} bar.sync 0;"} | given
    given["before"] += setting
    with pytest.raises(Fault, match=fault):
        multiply(16, *texts, memory, schedule=Schedule(landing=landing), **given)


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("mov.b32 %r100, 0; {product} {end}", "no wgmma.fence"),
        ("{fence} mov.b32 %r100, 0; {product} {end}", "no wgmma.fence"),
        ("mov.b32 %r100, 0; {fence} {product} {end}", None),
        ("mov.b32 %r100, 0; {fence} {product} {product} {end}", None),
        ("mov.b32 %r100, 0; {fence} {product} {end} mov.b32 %r100, 0; {product} {end}", "no wgmma.fence"),
        ("mov.b32 %r100, 0; {fence} {product} {end} mov.b32 %r100, 0; {fence} {product} {end}", None),
        ("{fence} setp.lt.u32 %p3, %t, 16; @%p3 {product} {end}", "not converged"),
    ],
)
def test_registers_are_fenced_before_they_are_summed_into(lines, fault):
    """9.7.15.7.1 wgmma.fence: before the first product, and after other writes of its registers."""
    _, _, memory, *_, setting = operands(16)
    product = f"wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {{{d_registers(16)}}}, %d10, %d11, 1, 1, 1, 0, 0;"
    body = lines.format(fence=FENCE, product=product, end=f"{COMMIT} {WAIT}")
    text = f"{FILL} {PROXY_FENCE} bar.sync 0; {setting} {body}"
    if fault is None:
        run(text, memory, threads=128, target="sm_90a", shared=SHARED)
    else:
        with pytest.raises(Fault, match=fault):
            run(text, memory, threads=128, target="sm_90a", shared=SHARED)


@pytest.mark.parametrize(
    ("lines", "checks", "fault"),
    [
        ("{fence} mov.b32 %r50, 0; {product} {end}", USUAL | Check.WGMMA_A, "no wgmma.fence"),
        ("{fence} mov.b32 %r50, 0; {product} {end}", USUAL, None),
        ("{fence} {product} mov.b32 %r50, 0; {end}", USUAL, "in flight reads"),
        ("{fence} {product} mov.b32 %r40, %r50; {end}", USUAL, None),
    ],
    ids=["write behind the fence", "the same unchecked", "write in flight", "read in flight"],
)
def test_registers_that_are_multiplied(lines, checks, fault):
    """A in registers may be read while the product is in flight, but not written."""
    _, _, memory, *_, setting = operands(16)
    a = "{%r50, %r51, %r52, %r53}"
    product = f"wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {{{d_registers(16)}}}, {a}, %d11, 1, 1, 1, 0;"
    zeros = " ".join(f"mov.b32 %r{k}, 0;" for k in (*range(50, 54), *range(100, 108)))
    body = lines.format(fence=FENCE, product=product, end=f"{COMMIT} {WAIT}")
    text = f"{FILL} {PROXY_FENCE} bar.sync 0; {setting} {zeros} {body}"
    given = {"threads": 128, "target": "sm_90a", "shared": SHARED, "schedule": Schedule(checks=checks)}
    if fault is None:
        run(text, memory, **given)
    else:
        with pytest.raises(Fault, match=fault):
            run(text, memory, **given)


D16 = ", ".join(f"%r{k}" for k in range(8))


@pytest.mark.parametrize(
    "wrong",
    [
        f"wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.f16 {{{D16}}}, %d10, %d11, 1, 1, 1, 0, 0;",
        f"wgmma.mma_async.sync.aligned.m64n12k16.f32.bf16.bf16 {{{D16}}}, %d10, %d11, 1, 1, 1, 0, 0;",
        f"wgmma.mma_async.sync.aligned.m64n24k16.f32.bf16.bf16 {{{D16}}}, %d10, %d11, 1, 1, 1, 0, 0;",
        f"wgmma.mma_async.sync.aligned.m64n16k16.f16.f16.f16 {{{D16}}}, %d10, %d11, 1, 1, 1, 0, 0;",
        f"wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {{{D16}}}, %d10, %d11, 1, 1, 2, 0, 0;",
        f"wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {{{D16}}}, %d10, %d11, 1, 1, 1, 0;",
        f"wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {{{D16}}}, {{%r1, %r2}}, %d11, 1, 1, 1, 0;",
        f"wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {{{D16}}}, %r10, %d11, 1, 1, 1, 0, 0;",
        "wgmma.wait_group.sync.aligned %r1;",
        "wgmma.fence.sync;",
    ],
)
def test_what_is_not_known_is_an_error(wrong):
    with pytest.raises(PtxError, match="line 14"):
        Program(kernel(wrong, 1))
