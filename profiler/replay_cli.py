"""The command `estimate replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command(
    name="replay",
    params=[
        click.Argument(["snapshot"], type=click.Path(path_type=Path, dir_okay=False)),
        click.Option(["--device"], type=int, metavar="N", help="One device; all, if left out."),
        click.Option(
            ["--write-fixture"],
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="Write sizes and order without addresses, frames and names: .jsonl.gz.",
        ),
        click.Option(
            ["--provenance"], default="", metavar="TEXT", help="Where it is from, for the fixture."
        ),
    ],
)
def replay(**options: Any) -> int:
    """Replay the allocations that a GPU has recorded.

    SNAPSHOT is what torch.cuda.memory._dump_snapshot writes, packed with gzip or not, or such a
    fixture. The model of the allocator must predict every segment that the device took and gave
    back, and where every block landed; the first difference is shown. Exit code 1: it did not.
    """
    from profiler.history_replay import answer

    code = 0
    for said, predicted in answer(
        options["snapshot"], options["device"], options["write_fixture"], options["provenance"]
    ):
        click.echo(said)
        code = code if predicted else 1
    return code
