"""Launch sizes."""
from __future__ import annotations
from dataclasses import dataclass
import os, ast
import torch

@dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def arguments(self):
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "num_warps": self.num_warps, "num_stages": self.num_stages}

OVERRIDE = {}
def architecture(device): return "interpreter"
def choose(kernel: str, q, block_d: int, block_dv: int) -> Config:
    if kernel in OVERRIDE: return OVERRIDE[kernel]
    return Config(16, 32, 4, 1)
