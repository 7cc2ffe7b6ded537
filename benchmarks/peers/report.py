"""The part of docs/accuracy.md about the other calculators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median

from benchmarks.accuracy.comparison import Comparison
from benchmarks.peers.comparison import Pair, Spread, pairs
from benchmarks.peers.results import read
from benchmarks.peers.table import PEERS, Peer

INTRODUCTION = """\
Written from `benchmarks/peers/results.jsonl`, which `make peers` fills: every peer is installed in
an environment of its own and asked through its own interface about every row that counts.
[How each was asked](../benchmarks/peers/README.md) is said there. Most do not say which meter their
figure is, so it is compared with the row's own, and a row with two meters counts under each. Where
a peer says which part of its total is the allocator's, an allocated peak is compared with that.
"""


def sections(found: Iterable[Comparison]) -> Iterator[str]:
    """Yield the Markdown of the comparison with the peers, from our side of it."""
    every = pairs(found)
    yield "## Other calculators\n"
    yield INTRODUCTION
    yield from _peers(every)
    yield from _groups(every)
    yield from _only_they(every)
    yield from _reasons()


def _peers(every: Sequence[Pair]) -> Iterator[str]:
    total = len({row for _, row in read()})
    yield "### Each peer, and ours on the same measurements\n"
    yield (
        f"Rows are those it answers, of {total}. Errors are of the measurements that both answer:\n"
        "median, 90th percentile, worst, and mean signed error.\n"
    )
    yield "| peer | version | rows | both | its error | ours |"
    yield "|---|---|---:|---:|---|---|"
    for peer in PEERS:
        rows = {row for (name, row), each in read().items() if name == peer.name and each.bytes}
        both = [each for each in every if each.peer == peer.name and each.ours is not None]
        yield (
            f"| {peer.name} | {peer.version} | {len(rows)} | {len(both)} | "
            f"{_spread([each.error for each in both])} | {_spread(_our_errors(both))} |"
        )
    yield ""
    yield "| peer | figure that is taken | what it claims to be |"
    yield "|---|---|---|"
    yield from (f"| {peer.name} | {peer.figure} | {peer.claims} |" for peer in PEERS)
    yield ""


def _groups(every: Sequence[Pair]) -> Iterator[str]:
    yield "### By source and meter\n"
    yield (
        "The median error of ours, of the peer's, and in brackets how many measurements both\n"
        "answer.\n"
    )
    yield from _table([each for each in every if each.ours is not None], _beside)


def _only_they(every: Sequence[Pair]) -> Iterator[str]:
    yield "### Where only they answer\n"
    yield (
        "The median error of the peer's on measurements that this version cannot express, and in\n"
        "brackets how many.\n"
    )
    yield from _table([each for each in every if each.ours is None], _alone)


def _table(some: Sequence[Pair], cell: Callable[[Sequence[Pair]], str]) -> Iterator[str]:
    peers = [peer for peer in PEERS if any(each.peer == peer.name for each in some)]
    yield "| source | meter | " + " | ".join(peer.name for peer in peers) + " |"
    yield "|---|---|" + "---:|" * len(peers)
    for group in dict.fromkeys(each.group for each in sorted(some, key=lambda one: one.group)):
        own = [
            [each for each in some if (each.peer, each.group) == (peer.name, group)]
            for peer in peers
        ]
        cells = (cell(each) if each else "" for each in own)
        yield f"| {group[0]} | {group[1]} | " + " | ".join(cells) + " |"
    yield ""


def _beside(some: Sequence[Pair]) -> str:
    return f"{_median(_our_errors(some))}, {_alone(some)}"


def _alone(some: Sequence[Pair]) -> str:
    return f"{_median([each.error for each in some])} ({len(some)})"


def _reasons() -> Iterator[str]:
    yield "### Why a peer gives no figure\n"
    yield ('Under the first reason that applies. After "it says" stands the peer\'s own refusal.\n')
    yield "| peer | rows | reasons |"
    yield "|---|---:|---|"
    for peer in PEERS:
        counts = _counts(peer)
        listed = "; ".join(f"{reason} ({rows})" for reason, rows in counts)
        yield f"| {peer.name} | {sum(rows for _, rows in counts)} | {listed} |"
    yield ""


def _counts(peer: Peer) -> list[tuple[str, int]]:
    """Return a peer's reasons, the most frequent first."""
    own = (each for (name, _), each in read().items() if name == peer.name)
    counts = Counter(each.reason for each in own if each.reason is not None)
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _our_errors(some: Iterable[Pair]) -> list[float]:
    return [each.ours.error for each in some if each.ours is not None]


def _median(errors: Sequence[float]) -> str:
    return f"{median(abs(error) for error in errors):.2%}"


def _spread(errors: Sequence[float]) -> str:
    if not errors:
        return ""
    found = Spread.of(errors)
    return f"{found.median:.2%}, {found.ninetieth:.2%}, {found.worst:+.2%}, {found.bias:+.2%}"
