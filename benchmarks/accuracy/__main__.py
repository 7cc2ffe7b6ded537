"""Write docs/accuracy.md."""

from __future__ import annotations

from benchmarks.accuracy.report import PAGE, render

if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
