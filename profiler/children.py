"""One case as a fresh process: started, given its turn on the device, and ended.

Each process gets a lock file of its own. The campaign holds it until the device is free and lets go
when it is this case's turn, so processes import and build while another one measures, and the
order of the cases is the order of the measurements.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

SHOWN_CHARACTERS: Final = 300

# Exit codes of `profiler.measure` that are refusals; any other than 0 is a crash.
REFUSED: Final = (2, 3)

_PR_SET_PDEATHSIG: Final = 1


class Child(Protocol):
    """One running case, as the campaign sees it."""

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""

    def give_turn(self) -> None:
        """Let it use the device."""

    def kill(self) -> None:
        """End it and all that it has started; return when it is gone."""

    def last_words(self) -> str:
        """Return the last line that it wrote to standard error."""


class Process:
    """A child process in a group of its own.

    Args:
        command: the command line; the lock is appended to it.
        folder: where its lock and its standard error lie; the campaign's own.
        name: of these two files.
    """

    def __init__(self, command: Sequence[str], folder: Path, name: str) -> None:
        self._errors = folder / f"{name}.stderr"
        lock = folder / f"{name}.lock"
        self._lock: int | None = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(  # noqa: S603 - our own module, no shell
                [*command, "--lock", str(lock)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                preexec_fn=_die_with_the_campaign,
            )

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self._process.poll()

    def give_turn(self) -> None:
        """Let go of its lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def kill(self) -> None:
        """End its whole process group."""
        with_group(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.give_turn()

    def last_words(self) -> str:
        """Return the last line on standard error that is not empty."""
        text = self._errors.read_bytes()[-100_000:].decode("utf-8", "replace")
        lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
        return lines[-1][:SHOWN_CHARACTERS] if lines else ""


def with_group(leader: int, number: int) -> None:
    """Send a signal to a process group that may be gone."""
    try:
        os.killpg(leader, number)
    except (ProcessLookupError, PermissionError):
        return


def exit_text(code: int) -> str:
    """Return in words how a process ended.

    Example:
        >>> exit_text(-9), exit_text(1)
        ('killed by SIGKILL', 'exit status 1')
    """
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _die_with_the_campaign() -> None:
    """Ask Linux to end this process when its parent dies, however that dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
