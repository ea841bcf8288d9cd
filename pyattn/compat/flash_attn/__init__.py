"""The package flash_attn 2.8, function for function, on every device that pyattn runs on, the CPU among them.

`install()` puts it in that package's place, for code that imports flash_attn.
"""

from __future__ import annotations

import sys

from pyattn.compat import stand_ins
from pyattn.compat.flash_attn import bert_padding, flash_attn_interface
from pyattn.compat.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from pyattn.face import showing

__version__ = "2.8.3"  # of the interface; users compare it with the version they need

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "uninstall",
]

__dir__ = showing(__all__)

_STAND_INS = {
    "flash_attn": sys.modules[__name__],
    "flash_attn.flash_attn_interface": flash_attn_interface,
    "flash_attn.bert_padding": bert_padding,
}


def install() -> None:
    """From here on `import flash_attn` imports this package, in this process. A second call changes nothing.

    Raises:
        UnsupportedError: another flash_attn is imported already, and may be in use.
    """
    stand_ins.install(_STAND_INS)


def uninstall() -> None:
    """Undoes `install`. Who has imported flash_attn meanwhile keeps what was imported."""
    stand_ins.uninstall(_STAND_INS)
