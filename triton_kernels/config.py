"""Launch sizes, as a table by kernel, architecture, bits per element and head size.

No row has been measured on a GPU yet. The sizes start from PyTorch 2.13's FlexAttention defaults where those are said
(its kernels have the same loops), and are the largest for which ahead-of-time compilation spills next to nothing
and fits the chip's shared memory; `tests/test_triton_compile.py` holds them to that.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton


class Config(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def arguments(self) -> dict[str, int]:
        """As the kernels take them."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


RELATIVE = ("forward", "dq", "dkdv", "rows")  # the kernels that have rows of their own with a relative term

# (kernel, architecture, bits): {largest padded head size: launch sizes}
TABLE: dict[tuple[str, str, int], dict[int, Config]] = {
    # 227 KB of shared memory. Compute capability 9.0, 10.0 and 10.3.
    ("forward", "hopper", 16): {
        64: Config(128, 64, 4, 3),  # two blocks fit one SM; 128 keys (FlexAttention's) would spill
        128: Config(128, 64, 8, 3),  # FlexAttention's
        256: Config(128, 32, 8, 2),  # 64 keys would spill
    },
    ("dq", "hopper", 16): {
        64: Config(128, 64, 8, 3),  # FlexAttention's
        128: Config(128, 64, 8, 2),  # FlexAttention's with one stage less
        256: Config(128, 32, 8, 2),  # 64 keys would spill
    },
    ("dkdv", "hopper", 16): {
        64: Config(64, 128, 8, 2),  # FlexAttention's with one stage less
        128: Config(64, 128, 8, 2),  # FlexAttention's with one stage less
        256: Config(32, 32, 8, 1),  # both sums of 64 keys would fill a warpgroup's registers
    },
    ("dkdv", "hopper crowded", 16): {
        64: Config(64, 128, 8, 2),
        128: Config(32, 128, 8, 2),  # 64 queries would spill up to 240 bytes with a softcap
        256: Config(32, 32, 8, 1),
    },
    # mma.sync reads its operands from shared memory, which bounds these kernels (benchmarks/model.py): 32 rows of tiles
    # to a warp, or products whose result is the next one's operand as it lies, read less. What fits into 99 KB of it
    # serves "ada" as well: compute capability 8.6, 8.9 and 12.0. 8.0 and 8.7 have 163 KB.
    ("forward", "ampere", 16): {
        64: Config(128, 64, 4, 3),  # FlexAttention's
        128: Config(128, 64, 8, 3),  # FlexAttention's
        256: Config(64, 32, 8, 2),  # 128 queries would spill
    },
    ("dq", "ampere", 16): {
        64: Config(128, 32, 4, 2),
        128: Config(64, 64, 4, 2),  # FlexAttention's
        256: Config(64, 32, 8, 1),  # 4 warps would spill
    },
    ("dkdv", "ampere", 16): {
        64: Config(32, 128, 4, 2),
        128: Config(128, 64, 8, 2),  # 114 KB
        256: Config(32, 32, 8, 1),
    },
    ("dkdv", "ada", 16): {
        64: Config(32, 128, 4, 2),
        128: Config(64, 64, 8, 2),  # FlexAttention's with 8 warps: 4 would spill
        256: Config(32, 32, 8, 1),  # 64 keys would exceed the shared memory
    },
    ("dq", "ampere crowded", 16): {
        64: Config(64, 64, 4, 2),
        128: Config(64, 64, 8, 2),  # 4 warps would spill up to 240 bytes with a padded head size
        256: Config(64, 32, 8, 1),
    },
    # 64 KB of shared memory and 512 registers. AMD CDNA.
    ("forward", "cdna", 16): {128: Config(128, 64, 4, 1), 256: Config(64, 32, 4, 1)},
    ("dq", "cdna", 16): {128: Config(64, 64, 4, 1), 256: Config(64, 32, 4, 1)},
    ("dkdv", "cdna", 16): {64: Config(64, 64, 4, 1), 128: Config(32, 64, 4, 1), 256: Config(32, 32, 4, 1)},
    ("dkdv", "cdna heavy", 16): {64: Config(32, 64, 8, 1), 128: Config(32, 32, 4, 1), 256: Config(32, 32, 8, 1)},
    # Exact float32 products run outside the matrix units on NVIDIA, unrolled: larger tiles spill and compile for long.
    ("forward", "any", 32): {64: Config(32, 32, 4, 1), 256: Config(16, 16, 4, 1)},
    ("dq", "any", 32): {128: Config(32, 32, 4, 1), 256: Config(16, 16, 4, 1)},
    ("dkdv", "any", 32): {128: Config(32, 32, 8, 1), 256: Config(16, 16, 4, 1)},
    # Dropout, a bias, a boolean mask or segment ids, any GPU: Philox's words, addresses and unseen values need the
    # registers of larger tiles.
    ("forward", "heavy", 16): {64: Config(64, 64, 8, 1), 128: Config(64, 32, 8, 1), 256: Config(32, 32, 8, 1)},
    ("dq", "heavy", 16): {128: Config(64, 32, 8, 1), 256: Config(32, 32, 8, 1)},
    ("dkdv", "heavy", 16): {64: Config(32, 64, 8, 1), 128: Config(32, 64, 8, 3), 256: Config(32, 32, 8, 1)},
    ("decode", "heavy", 16): {64: Config(16, 64, 4, 1), 128: Config(16, 32, 4, 1), 256: Config(16, 16, 4, 1)},
    # Decoding, any GPU: block_m follows the rows, of which there are few; what counts is bytes in flight.
    ("decode", "any", 16): {64: Config(16, 128, 4, 3), 128: Config(16, 64, 4, 3), 256: Config(16, 32, 4, 2)},
    ("decode", "cdna", 16): {64: Config(16, 128, 4, 2), 128: Config(16, 64, 4, 2), 256: Config(16, 32, 4, 2)},
    ("decode", "any", 32): {64: Config(16, 32, 4, 2), 256: Config(16, 16, 4, 2)},
    ("additive decode", "any", 16): {256: Config(16, 16, 4, 2)},
    ("additive decode", "any", 32): {256: Config(16, 16, 4, 2)},
    # Additive scores, by the size of the values alone. A thread's share of a tile stays small: two columns at a time,
    # each pair of a query and a key has a numerator and a denominator of either. A warp takes at least 16 rows of a
    # product, so that more warps than that many rows would compute the same scores twice.
    ("additive forward", "cdna", 16): {256: Config(64, 32, 4, 1)},
    ("additive forward", "any", 16): {256: Config(32, 32, 4, 1)},
    ("additive dq", "hopper", 16): {256: Config(64, 16, 4, 1)},
    ("additive dq", "cdna", 16): {256: Config(64, 32, 4, 1)},
    ("additive dq", "any", 16): {128: Config(64, 16, 4, 1), 256: Config(64, 16, 8, 1)},
    ("additive dkdv", "cdna", 16): {256: Config(32, 64, 4, 1)},
    ("additive dkdv", "any", 16): {256: Config(64, 32, 8, 1)},
    ("additive forward", "any", 32): {64: Config(32, 32, 4, 1), 256: Config(16, 16, 4, 1)},
    ("additive dq", "any", 32): {64: Config(16, 32, 4, 1), 256: Config(16, 16, 4, 1)},
    ("additive dkdv", "any", 32): {64: Config(16, 16, 4, 1), 256: Config(16, 16, 8, 1)},
    # With a relative term: tiles are square, and rows of distances take as much as two tiles of keys. Two stages,
    # because then loads do not go through registers, which are all taken.
    ("relative forward", "hopper", 16): {
        64: Config(64, 64, 4, 2),
        128: Config(64, 64, 8, 2),
        256: Config(32, 32, 8, 2),
    },
    ("relative forward", "ampere", 16): {
        64: Config(64, 64, 4, 2),
        128: Config(64, 64, 8, 2),
        256: Config(32, 32, 8, 2),
    },
    # With tiles of 64 the code for 10.0 would multiply rows that have not arrived yet in dq; so says the PTX machine.
    ("relative dkdv", "hopper", 16): {64: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 2)},
    **{
        (f"relative {k}", name, 16): {256: Config(32, 32, 8, 2)}
        for k in ("forward", "dq", "dkdv")
        for name in ("any", "heavy")
    },
    **{
        ("relative rows", name, 16): {
            64: Config(32, 32, 8, stages),
            128: Config(16, 16, 4, 1),
            256: Config(16, 16, 8, 1),
        }
        for name, stages in (("any", 2), ("heavy", 1))
    },
    **{
        (f"relative {k}", name, 16): {
            64: Config(32, 32, 4, 1),
            256: Config(16, 16, 4, 1) if k == "dkdv" else Config(32, 32, 4, 1),
        }
        for k in RELATIVE
        for name in ("cdna", "cdna heavy")
    },
    **{(f"relative {k}", "any", 32): {64: Config(32, 32, 8, 1), 256: Config(16, 16, 4, 1)} for k in RELATIVE},
    ("relative rows", "any", 32): {256: Config(16, 16, 8, 1)},
    # Small, so that small tests have several blocks in each direction.
    ("forward", "interpreter", 16): {256: Config(32, 32, 4, 1)},
    ("dq", "interpreter", 16): {256: Config(32, 32, 4, 1)},
    ("dkdv", "interpreter", 16): {256: Config(32, 32, 4, 1)},
    ("decode", "interpreter", 16): {256: Config(16, 32, 4, 1)},
    **{
        (f"additive {k}", "interpreter", bits): {256: Config(64, 64, 4, 1)}
        for k in ("forward", "dq", "dkdv")  # a decoding step's are small already
        for bits in (16, 32)
    },
    **{(f"relative {k}", "interpreter", bits): {256: Config(32, 32, 4, 1)} for k in RELATIVE for bits in (16, 32)},
}

_PADDED_ON_AMPERE = {64: Config(32, 128, 4, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 1)}

# Rows that a release of Triton needs so as not to spill, instead of those above or beside them. What they cost, smaller
# tiles or one stage less, has not been measured.
RELEASES: dict[str, dict[tuple[str, str, int], dict[int, Config]]] = {
    "3.6": {
        ("additive dq", "hopper", 16): {128: Config(64, 16, 4, 1), 256: Config(64, 16, 8, 1)},  # spilled 184 bytes
        ("relative forward", "ampere", 16): {64: Config(64, 64, 8, 2)},  # 88 bytes with a window
    },
    "3.8": {
        ("dkdv", "ampere crowded", 16): _PADDED_ON_AMPERE,  # 1552 bytes with a padded head size
        ("additive dq", "any", 16): {128: Config(64, 16, 8, 1)},  # 192 bytes on sm_80
        ("additive dkdv", "any", 32): {64: Config(16, 16, 8, 1)},  # 152 bytes on sm_80
        ("forward", "ampere crowded", 16): {  # 3 stages spill 88 bytes with packed sequences
            64: Config(128, 64, 4, 3),
            128: Config(128, 64, 8, 2),
            256: Config(64, 32, 8, 2),
        },
    },
    "3.9": {
        ("dkdv", "ampere crowded", 16): _PADDED_ON_AMPERE,  # 1552 bytes with a padded head size
        ("dkdv", "hopper", 16): {128: Config(32, 128, 8, 2)},  # 64 queries spill 192 bytes on sm_90
        ("additive dq", "any", 16): {128: Config(64, 16, 8, 1)},  # 192 bytes on sm_80
        ("additive dq", "any", 32): {64: Config(16, 16, 4, 1)},  # 88 bytes on sm_80
        ("additive dkdv", "any", 32): {64: Config(16, 16, 8, 1)},  # 152 bytes on sm_80
    },
}
for key, rows in RELEASES.get(".".join(triton.__version__.split(".")[:2]), {}).items():
    TABLE[key] = TABLE.get(key, {}) | rows


def choose(kernel: str, architecture: str, bits: int, head_dim: int, load: str) -> Config:
    """The row for a kernel ("forward", "dq", "dkdv", "decode" or "additive ...") and the larger of the two padded head
    sizes, for additive scores the values'.

    load: "heavy" for a call with dropout, a bias, a boolean mask or segment ids; "crowded" for one with another feature
    that takes registers, or a padded head size; else "light".
    """
    own = [architecture, "ampere"] if architecture == "ada" else [architecture]
    names = [*(f"{name} {load}" for name in own), *([] if architecture == "interpreter" else [load]), *own, "any"]
    rows = next(TABLE[kernel, name, bits] for name in names if (kernel, name, bits) in TABLE)
    return rows[min(size for size in rows if size >= head_dim)]


def architecture_of(device: torch.device) -> str:
    """The table's name for a device; tensors on the CPU are the interpreter's."""
    return "interpreter" if device.type == "cpu" else _gpu_architecture(device)


def processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; elsewhere as many as let small tests split their keys."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


@cache
def _gpu_architecture(device: torch.device) -> str:
    if torch.version.hip is not None:
        return "cdna"
    capability = torch.cuda.get_device_capability(device)
    if capability in ((8, 0), (8, 7)):
        return "ampere"
    return "hopper" if capability[0] in (9, 10) else "ada"
