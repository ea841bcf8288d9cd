"""Drop-in faces: the names, signatures and meanings of other attention implementations."""

from typing import TYPE_CHECKING

from pyattn.face import importing, showing

__all__ = ["flash_attn", "flash_attn_interface", "patch", "torch", "transformers", "xformers"]

__dir__ = showing(__all__)
if TYPE_CHECKING:
    from pyattn.compat import flash_attn, flash_attn_interface, patch, torch, transformers, xformers
else:
    __getattr__ = importing(__name__, __all__)
