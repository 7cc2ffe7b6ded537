"""One virtual environment for each peer, below `.peers/`."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from pathlib import Path
from typing import Final

from benchmarks.peers.table import Peer

ROOT: Final = Path(__file__).resolve().parents[2]
FOLDER: Final = ROOT / ".peers"
TIMEOUT_SECONDS: Final = 900


class InstallError(Exception):
    """A peer could not be installed; the message is the last line of pip."""


def python(peer: Peer) -> Path:
    """Return the interpreter of a peer's environment."""
    return FOLDER / peer.name / "bin" / "python"


def installed(peer: Peer) -> bool:
    """Whether the peer's environment holds the version of the table, whatever its build."""
    if not python(peer).is_file():
        return False
    return (version(peer) or "").partition("+")[0] == peer.version


def install(peer: Peer) -> None:
    """Make a peer's environment anew.

    Raises:
        InstallError: pip refused.
    """
    folder = FOLDER / peer.name
    venv.create(folder, clear=True, with_pip=bool(peer.requirements))
    if peer.shares:
        site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        # torch and transformers come from the environment that runs this command.
        (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    if not peer.requirements:
        return
    alone = ("--no-deps",) if peer.shares else ()
    if peer.builders:
        _pip(peer, *peer.builders)
        alone = (*alone, "--no-build-isolation")
    _pip(peer, *alone, *peer.requirements)


def _pip(peer: Peer, *arguments: str) -> None:
    done = subprocess.run(  # noqa: S603  # the arguments are those of the table
        [python(peer), "-m", "pip", "install", "--disable-pip-version-check", "-q", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env={**os.environ, **peer.build_environment},
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise InstallError(lines[-1].strip() if lines else f"pip exit code {done.returncode}")


def version(peer: Peer) -> str | None:
    """Return the version that a peer's environment has, or None."""
    found = subprocess.run(  # noqa: S603  # the interpreter is our own
        [
            python(peer),
            "-c",
            "import sys; from importlib.metadata import version; print(version(sys.argv[1]))",
            peer.distribution,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() if found.returncode == 0 else None
