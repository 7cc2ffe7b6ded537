"""The console script `estimate`: a light start, and an end without a traceback."""

from __future__ import annotations

import gc
import os
import sys


def main() -> None:
    """Run the command and end the process with its exit code."""
    # A run this short makes no garbage; loading a server or a dry run collects again (plugins.py).
    gc.disable()
    try:
        from estimator.commands import run

        code = run()
    except KeyboardInterrupt:
        code = 130
    except Exception:
        # A fault of ours shows where it is, but not with exit code 1: that says "does not fit".
        sys.excepthook(*sys.exc_info())
        code = 3
    # What is frozen is not searched for garbage at the end, which took a tenth of the whole run.
    gc.freeze()
    if "torch" in sys.modules:
        # Bindings that came with torch print pages about themselves while Python takes them apart.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
