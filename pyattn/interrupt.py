"""Ctrl-C while the command imports torch, which takes seconds: it ends as it does later, without a traceback.

The package imports this first, since nothing of the command runs before it is imported.
"""

import sys
from pathlib import Path
from types import TracebackType


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("Aborted.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if Path(sys.argv[0] if sys.argv else "").stem == "pyattn":
    sys.excepthook = _report
