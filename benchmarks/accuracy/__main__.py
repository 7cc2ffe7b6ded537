"""Write the records, the calibrations, docs/accuracy.md and its pictures."""

from __future__ import annotations

from benchmarks.accuracy.report import PICTURES, calibrate, findings, pages

if __name__ == "__main__":
    calibrate()
    PICTURES.mkdir(exist_ok=True)
    for path, text in pages(findings()):
        path.write_text(text, encoding="utf-8")
