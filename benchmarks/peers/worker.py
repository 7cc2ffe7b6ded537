"""Runs inside a peer's environment: cases come in by lines, answers go out by lines."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from importlib import import_module
from textwrap import shorten
from typing import Any

from benchmarks.peers.case import CannotExpressError, Case
from benchmarks.peers.stand_in_hub import stand_in_hub

LONGEST_REASON = 120


def answer(adapter: Any, case: Case) -> dict[str, Any]:
    """Ask one peer one question."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            found = adapter.answer(case)
    except CannotExpressError as error:
        return {"id": case.id, "reason": str(error)}
    # A peer may raise anything; what it says is the reason. A command prints it and exits.
    except SystemExit:
        return {"id": case.id, "reason": refusal(printed.getvalue().strip().rpartition("\n")[2])}
    except Exception as error:
        return {"id": case.id, "reason": refusal(str(error) or type(error).__name__)}
    total, allocated = found if isinstance(found, tuple) else (found, None)
    return {
        "id": case.id,
        "bytes": round(total),
        "allocated_bytes": None if allocated is None else round(allocated),
    }


def refusal(text: str) -> str:
    """Return what a peer said, in one line."""
    return "it says: " + shorten(text, LONGEST_REASON, placeholder=" ...")


def main() -> None:
    """Answer every case of the standard input."""
    (module,) = sys.argv[1:]
    cases = [Case.from_json(line) for line in sys.stdin]
    # Loggers of some peers hold on to the standard output; from here on it leads nowhere.
    with os.fdopen(os.dup(1), "w") as out, open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 1)
        with stand_in_hub(cases):
            adapter = import_module(module)
            for case in cases:
                print(json.dumps(answer(adapter, case)), file=out, flush=True)


if __name__ == "__main__":
    main()
