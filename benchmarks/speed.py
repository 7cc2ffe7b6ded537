"""How long an estimate takes; `python -m benchmarks.speed` measures and writes docs/performance.md.

Every figure is a median of one run on one machine, so it is no test: what holds from machine to
machine are the ratios. Inside the process CPU time is counted, which other work on a shared machine
changes less than the time on the clock.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, Final

from estimator.catalog import Access, find_model
from estimator.pipeline import Engine, device_of
from estimator.request import EstimateRequest, parse_request
from estimator.resolve import resolve
from estimator.service import estimate, requested_gpu
from estimator.traits import traits

PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BIN: Final = Path(sys.executable).parent
MODEL: Final = "meta-llama/Llama-3.1-8B"
DOCUMENT: Final[dict[str, Any]] = {"model": MODEL, "hardware": {"gpu": "h100-80gb-sxm5"}}
# The recipe with the longest trace: adapters, packed weights, every layer run twice.
LONG: Final[dict[str, Any]] = {
    **DOCUMENT,
    "method": "qlora",
    "activation_checkpointing": "full",
}
COLD_RUNS: Final = 10
REPEATS: Final = 7
WARM_REPEATS: Final = 200
REQUESTS: Final = 200
SIDE: Final = 64

INTRODUCTION: Final = """\
# Performance

Written by `make bench` (`python -m benchmarks.speed`), on a machine that may have been shared:
{machine}.
Every figure is a median. Absolute times differ from machine to machine, the ratios hardly do.
"""


@dataclass(frozen=True, slots=True)
class Timing:
    """What was measured inside the process.

    Args:
        seconds: median of the CPU time [s].
        bar_seconds: what it should stay under [s], where the design says so.
    """

    what: str
    seconds: float
    bar_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Process:
    """A whole process from start to exit: medians [s] of what a clock and the CPU counted."""

    what: str
    wall_seconds: float
    cpu_seconds: float


# -- whole processes ---------------------------------------------------------------------------


def processes() -> Iterator[Process]:
    """Yield an empty interpreter, our command, and Accelerate's where it is installed."""
    yield process("`python -c pass`", [sys.executable, "-c", "pass"])
    command = [str(BIN / "estimate"), "--model", MODEL, "--json"]
    yield process(f"`estimate --model {MODEL} --json`", command)
    accelerate = BIN / "accelerate"
    if accelerate.exists():
        arguments = ["estimate-memory", "--help"]
        yield process("`accelerate estimate-memory --help`", [str(accelerate), *arguments])


def process(what: str, command: list[str]) -> Process:
    """Run a command until its bytecode is written, then measure it."""
    with tempfile.TemporaryDirectory() as empty:
        # As after any installation: bytecode is on disk, and the catalogue has the model.
        settings = {"PYTHONDONTWRITEBYTECODE": "", "HF_HOME": empty, "HF_HUB_OFFLINE": "1"}
        environment = {**os.environ, **settings}
        _run(command, environment)
        found = [_run(command, environment) for _ in range(COLD_RUNS)]
    return Process(what, median(wall for wall, _ in found), median(cpu for _, cpu in found))


def _run(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    before, start = os.times(), perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)  # noqa: S603 - our own command
    wall, after = perf_counter() - start, os.times()
    user = after.children_user - before.children_user
    return wall, user + after.children_system - before.children_system


# -- in process --------------------------------------------------------------------------------


def timings() -> Iterator[Timing]:
    """Yield what happens inside a process that has imported everything."""
    yield from _recipe("full fine-tuning", DOCUMENT)
    yield from _recipe("QLoRA with checkpointing", LONG)
    request = parse_request(DOCUMENT)
    engine, device = _engine(request), device_of(requested_gpu(request), request)

    def peak() -> None:
        engine.read(request.micro_batch_size, request.seq_len, device.constants)

    def heatmap() -> None:
        for batch, length in product(range(1, SIDE + 1), repeat=2):
            engine.read(batch, length * SIDE, device.constants)

    yield Timing("peak of a compiled recipe", _median(peak, WARM_REPEATS), 0.0005)
    yield Timing("whole answer again, limits and suggestions included", _warm(request), 0.005)
    yield Timing(f"heatmap of {SIDE} x {SIDE} peaks", _median(heatmap, REPEATS), 0.020)


def _recipe(name: str, document: dict[str, Any]) -> Iterator[Timing]:
    """Yield what a recipe costs that this process has not met before."""
    request = parse_request(document)
    device = device_of(requested_gpu(request), request)
    b, s = request.micro_batch_size, request.seq_len

    def compiled() -> None:
        _engine(request).read(b, s, device.constants)

    def replayed() -> None:
        _engine(request).blocks(b, s, device)

    yield Timing(f"{name}: resolve, trace, compile, peak", _median(compiled, REPEATS))
    yield Timing(f"{name}: replay through the allocator", _median(replayed, REPEATS))


def _engine(request: EstimateRequest) -> Engine:
    """Return an engine that has compiled nothing yet."""
    config = find_model(MODEL, Access.CATALOGUE).config
    run = resolve(request, config, MODEL)
    return Engine(run, {}, traits(request, run.spec.total_parameters()))


def _warm(request: EstimateRequest) -> float:
    estimate(request)
    return _median(lambda: estimate(request), REPEATS * REPEATS)


def _median(work: Callable[[], object], repeats: int) -> float:
    def once() -> float:
        start = process_time()
        work()
        return process_time() - start

    once()
    return median(once() for _ in range(repeats))


# -- the API -----------------------------------------------------------------------------------


def requests_per_second() -> float | None:
    """Return how many requests one core answers in a second; None without the web extra.

    The application is called in this process, one request after another, without a socket.
    """
    try:
        from web.app import create_app
    except ImportError:
        return None
    return asyncio.run(_post_all(create_app()))


async def _post_all(app: Any) -> float:
    body = json.dumps(DOCUMENT).encode()
    await _post(app, body)
    start = process_time()
    for _ in range(REQUESTS):
        await _post(app, body)
    return REQUESTS / (process_time() - start)


async def _post(app: Any, body: bytes) -> None:
    """Send one POST /v1/estimate as a server would hand it over."""
    content = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": "/v1/estimate", "raw_path": b"/v1/estimate", "root_path": "",
        "query_string": b"", "headers": [(b"host", b"localhost"), *content],
        "client": ("127.0.0.1", 1), "server": ("localhost", 80), "state": {},
    }  # fmt: skip
    statuses = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(scope, receive, send)
    if statuses != [200]:
        raise RuntimeError(f"POST /v1/estimate answered {statuses}")


# -- the page ----------------------------------------------------------------------------------


def render() -> str:
    """Measure everything and return the page."""
    lines = [INTRODUCTION.format(machine=_machine())]
    lines += [*_processes(list(processes())), *_timings(list(timings())), *_server()]
    return "\n".join(lines).rstrip() + "\n"


def _machine() -> str:
    """Say in words what kind of machine this is."""
    cores = os.cpu_count() or 1
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{cores} {platform.machine()} cores, {platform.system()}, {python}"


def _processes(found: list[Process]) -> Iterator[str]:
    bare, ours, *others = found
    yield f"## A process from start to exit, {COLD_RUNS} runs\n"
    yield "| process | wall | CPU | wall, against ours |"
    yield "|---|---:|---:|---:|"
    for each in (bare, ours, *others):
        share = each.wall_seconds / ours.wall_seconds
        yield f"| {each.what} | {_ms(each.wall_seconds)} | {_ms(each.cpu_seconds)} | {share:.2f} |"
    yield "\nThe bar for the second row is 300 ms of wall time on two quiet cores.\n"
    if others:
        yield (
            "Of `accelerate estimate-memory` only the help is measured: an estimate of it downloads"
            "\nthe model's files, and no network is used here. Its imports are the same.\n"
        )


def _timings(found: list[Timing]) -> Iterator[str]:
    yield "## Inside a process that has imported everything\n"
    yield "| what | CPU | bar |"
    yield "|---|---:|---:|"
    for each in found:
        bar = _ms(each.bar_seconds) if each.bar_seconds is not None else ""
        yield f"| {each.what} | {_ms(each.seconds)} | {bar} |"
    yield ""


def _server() -> Iterator[str]:
    rate = requests_per_second()
    if rate is None:
        return
    yield "## POST /v1/estimate\n"
    yield (
        f"{rate:.0f} requests for each second of CPU time: the same one {REQUESTS} times, one after"
        " another, by\nthe application in this process, without a socket. The bar is 1 000.\n"
    )


def _ms(seconds: float) -> str:
    """Write a time in milliseconds with three figures."""
    value = seconds * 1000
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} ms"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    sys.stdout.write(PAGE.read_text(encoding="utf-8"))
