"""Options of the whole test suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--update-golden`, which writes the expected documents instead of comparing."""
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write tests/golden/*.json again; review the difference",
    )
