"""Print the tensors that are alive at the peak of a request's step, and at the end of forward.

    python -m profiler.inspect_step REQUEST.json

For the one who writes a formula: the largest rows first, each with its module and operator.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from estimator.catalog import Access
from estimator.request import parse_request
from estimator.service import model_config
from profiler import engine, trace

_WIDTHS = (16, 11, 52, 46, 9)


def table(traced: trace.Trace, event: int) -> str:
    """Return the rows that are alive right after an event, largest first."""
    lines = []
    for row in trace.rows(traced, event):
        shape = "x".join(str(size) for size in row.shape) or "scalar"
        cells = (row.component, row.site, row.module, row.operator, row.dtype)
        text = " ".join(str(cell).ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True))
        lines.append(f"{row.bytes:>16,} {row.count:>5} x {text} {shape}")
    return "\n".join(lines)


def main(path: str) -> None:
    """Trace the request in a file and print its tables."""
    request = parse_request(json.loads(Path(path).read_text()))
    config = model_config(request, Access.LOCAL).config
    traced = engine.trace(request, dict(config))
    reading = trace.read(traced)
    for point in reading.points:
        print(
            f"{point.phase:16} requested {point.requested_bytes:>16,}  512-byte blocks "
            f"{point.block_bytes:>16,}  allocated {point.allocated_bytes:>16,}"
        )
    print(f"reserved {reading.reserved_bytes:,}\n\nalive at the peak ({reading.peak.phase})")
    print(table(traced, reading.peak.event))
    saved = trace.last_event_of(traced, trace.LOSS_FORWARD)
    if saved is not None:
        print("\nalive at the end of forward")
        print(table(traced, saved))


if __name__ == "__main__":
    main(sys.argv[1])
