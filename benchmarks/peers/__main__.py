"""Ask the other calculators about every published row; `python -m benchmarks.peers --help`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from benchmarks.accuracy.published import measured
from benchmarks.peers import environment
from benchmarks.peers.case import Case
from benchmarks.peers.cases import cases
from benchmarks.peers.results import Answer, put, read
from benchmarks.peers.table import BY_NAME, PEERS, Peer

ROOT: Final = Path(__file__).resolve().parents[2]
KEPT_AFTER: Final = 5


def main() -> int:
    """Ask the peers that the command line names, or every one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--install", action="store_true", help="make the environments first")
    parser.add_argument("--again", action="store_true", help="ask again what is answered already")
    parser.add_argument("peer", nargs="*", metavar="PEER", help=", ".join(BY_NAME))
    chosen = parser.parse_args()
    unknown = [name for name in chosen.peer if name not in BY_NAME]
    if unknown:
        parser.error(f"unknown peer {unknown[0]!r}; known: {', '.join(BY_NAME)}")
    asked = [BY_NAME[name] for name in chosen.peer] or list(PEERS)
    refused = [peer.name for peer in asked if chosen.install and not _install(peer)]
    if refused:
        _say(f"not asked, because not installed: {', '.join(refused)}")
    asked = [peer for peer in asked if peer.name not in refused]
    found, missing = cases(tuple(row for row in measured() if row.scored))
    for peer in asked:
        if not peer.rule and not environment.installed(peer):
            _say(f"{peer.name}: {peer.version} is not installed; add --install")
            return 2
        _ask(peer, found, missing, again=chosen.again)
    return 2 if refused else 0


def _install(peer: Peer) -> bool:
    if peer.rule:
        return True
    _say(f"{peer.name}: installing {peer.version}")
    try:
        environment.install(peer)
    except environment.InstallError as error:
        _say(f"{peer.name}: not installed: {error}")
        return False
    return True


def _ask(peer: Peer, found: Iterable[Case], missing: dict[str, str], *, again: bool) -> None:
    """Put what one peer answers into the results, as the answers come."""
    own = {} if again else _known(peer)
    own |= {row: Answer(peer.name, peer.version, row, reason=why) for row, why in missing.items()}
    unanswered = [case for case in found if case.id not in own]
    for number, each in enumerate(_answers(peer, unanswered), 1):
        own[each.id] = each
        _say(f"\r{peer.name}: {number} of {len(unanswered)}", end="")
        if number % KEPT_AFTER == 0:
            put(peer.name, own.values())
    put(peer.name, own.values())
    answered = sum(each.bytes is not None for each in own.values())
    _say(f"\r{peer.name} {peer.version}: {answered} of {len(own)} rows")


def _known(peer: Peer) -> dict[str, Answer]:
    return {
        each.id: each
        for each in read().values()
        if each.peer == peer.name and each.version == peer.version
    }


def _answers(peer: Peer, asked: list[Case]) -> Iterator[Answer]:
    """Yield what a peer's own process answers, one after another."""
    if not asked:
        return
    python = sys.executable if peer.rule else str(environment.python(peer))
    with subprocess.Popen(  # noqa: S603  # the interpreter is our own
        [python, "-m", "benchmarks.peers.worker", peer.adapter],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=_environment(),
        cwd=ROOT,
    ) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("no pipes")
        process.stdin.write("".join(case.to_json() + "\n" for case in asked))
        process.stdin.close()
        for line in process.stdout:
            yield _answer(peer, json.loads(line))
    if process.returncode:
        raise SystemExit(f"{peer.name}: its process ended with exit code {process.returncode}")


def _answer(peer: Peer, line: dict[str, Any]) -> Answer:
    return Answer(peer.name, peer.version, **line)


def _environment() -> dict[str, str]:
    """Return the environment of a peer's process: this checkout, one thread, no network."""
    inherited = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    return {
        **inherited,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
