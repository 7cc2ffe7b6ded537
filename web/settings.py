"""What the operator of the server may set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits of the server.

    Args:
        max_body_bytes: the largest request body that is read [bytes].
    """

    max_body_bytes: int = 256 * 1024
