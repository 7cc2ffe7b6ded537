"""A campaign: its order, its budget, and what it does about children that fail."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.campaign import cases_in_budget
from estimator.nvml import LiveGpu
from estimator.record import Run, append, read
from profiler import campaign, turns
from profiler.campaign import main, seconds
from profiler.matrices import Case
from profiler.results import MEASUREMENTS, Results, Stand
from profiler.turns import Limits, Planned, processes, run

ROOT = Path(__file__).resolve().parents[2]
STUB = (sys.executable, "-S", "-E", str(Path(__file__).with_name("stub_measure.py")))
WHERE = Stand("simulated", "H100", "h100-80gb-sxm5", 79 * 2**30)


def _case(act: str, **fields: object) -> Case:
    return Case(act, "", request={"model": act}, **fields)  # type: ignore[arg-type]


def _planned(*acts: str) -> tuple[Planned, ...]:
    return turns.planned([("validation", _case(act)) for act in acts], WHERE, {})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


def _run(out: Path, acts: tuple[str, ...], **limits: float):
    results = Results(out, WHERE)
    with results.held(), processes(WHERE, out, measure=STUB) as start:
        return run(_planned(*acts), results, Limits(**{"jobs": 3, **limits}), start)  # type: ignore[arg-type]


# -- with children of their own time -------------------------------------------------------------


class World:
    """A clock that only sleeping moves, and children that need so many of its seconds."""

    def __init__(self, out: Path, build: float = 0.0, measure: float = 1.0) -> None:
        self.time, self.out, self.build, self.measure = 0.0, out, build, measure
        self.begun: list[str] = []
        self.alive: set[str] = set()
        self.most = 0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def start(self, each: Planned) -> World.Child:
        self.alive.add(each.id)
        self.most = max(self.most, len(self.alive))
        return self.Child(self, each)

    class Child:
        def __init__(self, world: World, each: Planned) -> None:
            self.world, self.each = world, each
            self.ready = world.time + world.build
            self.turn: float | None = None

        def give_turn(self) -> None:
            self.turn = self.world.time
            self.world.begun.append(self.each.case.name)

        def poll(self) -> int | None:
            if self.turn is None or self.each.case.name == "hangs":
                return None
            if self.world.time < max(self.turn, self.ready) + self.world.measure:
                return None
            record = Run(id=self.each.id, origin="simulated", group="", request={}, outcome="ok")
            append(self.world.out, record)
            self.world.alive.discard(self.each.id)
            return 0

        def kill(self) -> None:
            self.world.alive.discard(self.each.id)

        def last_words(self) -> str:
            return ""


def _in_world(world: World, acts: tuple[str, ...], **limits: float):
    results = Results(world.out, WHERE)
    return run(_planned(*acts), results, Limits(**limits), world.start, clock=world)  # type: ignore[arg-type]


NAMES = tuple(f"case {number}" for number in range(40))


def test_cases_use_the_device_in_their_order(out):
    world = World(out, build=8.0)
    report = _in_world(world, NAMES, jobs=4)
    assert world.begun == list(NAMES)
    assert (report.count("ok"), report.stopped) == (40, None)


def test_no_more_processes_run_than_asked_for(out):
    world = World(out, build=8.0)
    _in_world(world, NAMES, jobs=4)
    assert world.most == 4


def test_others_build_while_one_measures(out):
    """40 cases of 9 s to build and 3 s to measure take 40 × 3 s and the first 9, not 40 × 12 s."""
    world = World(out, build=9.0, measure=3.0)
    _in_world(world, NAMES, jobs=5)
    assert world.time == pytest.approx(129.0, abs=2.0)


def test_ten_minutes_are_enough_for_sixty_cases():
    """Four processors, 10 s of one to import and build, 9.5 s with the device: see the page."""
    assert cases_in_budget(4, 9.5) >= 60
    assert cases_in_budget(2, 8.0) >= 60
    assert cases_in_budget(4, 9.5, jobs=1) < 60


def test_the_budget_ends_a_campaign_and_what_runs_then_is_not_recorded(out):
    world = World(out, measure=1.0)
    report = _in_world(world, NAMES, jobs=4, budget_seconds=10.5)
    assert world.time == pytest.approx(10.5, abs=0.1)
    assert len(read(out)) == len(report.outcomes) == 10
    assert world.alive == set()
    assert report.stopped is not None
    assert "go on" in report.stopped


def test_a_case_that_hangs_costs_its_limit_and_no_more(out):
    world = World(out, build=1.0, measure=1.0)
    report = _in_world(world, ("case 1", "hangs", "case 2"), jobs=3, case_seconds=20.0)
    assert [each.outcome for each in read(out)] == ["ok", "error", "ok"]
    assert read(out)[1].reason == "killed after 20 s"
    assert world.time == pytest.approx(2.0 + 20.0 + 1.0, abs=0.2)
    assert report.count("error") == 1


def test_waiting_for_the_device_is_not_hanging(out):
    world = World(out, measure=15.0)
    _in_world(world, NAMES[:6], jobs=6, case_seconds=20.0)
    assert {each.outcome for each in read(out)} == {"ok"}


# -- with processes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "outcome", "reason"),
    [
        ("runs", "ok", None),
        ("runs out", "out_of_memory", None),
        ("crashes", "error", "exit status 1: RuntimeError: the kernel failed"),
        ("crashes early", "error", "exit status 1: ImportError: no torch"),
        ("dies", "error", "killed by SIGSEGV"),
        ("silent", "error", "the process ended without a record"),
        ("refused", "error", "refused: no such kernel"),
        ("fails after its record", "ok", None),
    ],
)
def test_however_a_case_ends_the_campaign_goes_on_with_one_record_of_it(out, act, outcome, reason):
    report = _run(out, (act, "then this one runs"))
    first, second = sorted(read(out), key=lambda each: each.request["model"] != act)
    assert (first.outcome, first.reason) == (outcome, reason)
    assert second.outcome == "ok"
    assert report.outcomes == {first.id: outcome, second.id: "ok"}


def test_a_process_that_hangs_is_killed_with_what_it_started(out, tmp_path, monkeypatch):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setenv("STUB_FIFO", str(fifo))
    _run(out, ("hangs with a child", "runs"), case_seconds=1.0)
    assert [each.outcome for each in read(out)] == ["error", "ok"]
    # The fork of the child holds the other end too: only when both are gone is this the end.
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_one_process_at_a_time_uses_the_device(out, tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log"))
    names = tuple(f"runs {number}" for number in range(6))
    _run(out, names, jobs=6)
    expected = [f"{name} {way}" for name in names for way in ("in", "out")]
    assert (tmp_path / "log").read_text().splitlines() == expected


def test_a_probe_is_run_with_its_arguments(out):
    case = Case("a probe", "", probe="embedding_backward", arguments={"tokens": 3073})
    results = Results(out, WHERE)
    with processes(WHERE, out, measure=STUB) as start:
        run(turns.planned([("constants", case)], WHERE, {}), results, Limits(), start)
    (found,) = read(out)
    assert (found.name, found.arguments) == ("embedding_backward", {"tokens": 3073})


def test_the_same_crash_again_and_again_stops_the_campaign(out):
    report = _run(out, ("crashes",) * 1)
    assert report.stopped is None
    cases = [("validation", _case("crashes", limit_bytes=number)) for number in range(1, 9)]
    results = Results(out, WHERE)
    with processes(WHERE, out, measure=STUB) as start:
        report = run(turns.planned(cases, WHERE, {}), results, Limits(jobs=1), start)
    assert report.count("error") == 5
    assert report.stopped is not None
    assert "the kernel failed" in report.stopped


# -- the file ------------------------------------------------------------------------------------


def test_a_line_that_a_crash_cut_off_is_taken_away(out):
    _run(out, ("runs",))
    with out.open("ab") as file:
        file.write(b'{"record": "run", "id"')
    with Results(out, WHERE).held():
        assert len(read(out)) == 1


def test_a_whole_last_line_without_its_end_is_kept(out):
    _run(out, ("runs",))
    out.write_bytes(out.read_bytes().rstrip(b"\n"))
    with Results(out, WHERE).held():
        pass
    assert out.read_bytes().endswith(b"}\n")
    assert len(read(out)) == 1


def test_a_process_that_dies_within_its_line_spoils_no_other(out):
    _run(out, ("half", "runs"))
    assert [(each.request["model"], each.outcome) for each in read(out)] == [
        ("half", "error"),
        ("runs", "ok"),
    ]


def test_two_campaigns_do_not_write_one_file(out, capsys):
    with out.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert _main(out) == 2
    assert "another campaign writes" in capsys.readouterr().err


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def acts(monkeypatch):
    """Let the matrix `validation` be of cases that the stub knows."""
    chosen: list[str] = []
    monkeypatch.setattr(campaign, "cases", lambda *_: tuple(map(_case, chosen)))
    return chosen


def _main(out: Path, *more: str) -> int:
    arguments = ["validation", "--device", "simulated", "--out", str(out), *more]
    return main(arguments, measure=STUB)


def test_a_second_run_skips_what_is_recorded(out, acts, capsys):
    acts[:] = ["runs", "crashes"]
    assert _main(out) == 0
    acts.append("runs out")
    assert _main(out) == 0
    assert [each.outcome for each in read(out)] == ["ok", "error", "out_of_memory"]
    assert "1 cases wait" in capsys.readouterr().err


def test_errors_are_run_again_only_when_asked(out, acts):
    acts[:] = ["runs", "crashes"]
    _main(out)
    first = read(out)
    _main(out, "--retry-errors")
    assert [each.outcome for each in read(out)] == ["ok", "error"]
    assert read(out)[0] == first[0]
    assert len({each.id for each in read(out)}) == 2


def test_a_campaign_in_which_nothing_could_be_measured_says_so(out, acts):
    acts[:] = ["refused", "crashes"]
    assert _main(out) == 3


def test_the_list_and_the_dry_run_start_nothing(out, acts, capsys):
    acts[:] = ["runs", "crashes"]
    assert _main(out, "--list") == 0
    assert _main(out, "--dry") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in printed[:2]] == ["waits", "waits"]
    assert all("--id" in line for line in printed[2:])
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["everything"], "invalid choice"),
        (["validation", "--budget", "soon"], "no length of time"),
        (["validation", "--jobs", "0"], "no number above 0"),
        (["validation", "--steps", "1"], "fewer than 3"),
        (["validation", "--device", "simulated"], "name a file with --out"),
        (
            ["validation", "--device", "simulated", "--out", str(MEASUREMENTS / "h100.jsonl")],
            "simulated records have no place",
        ),
        (["validation", "--device", "simulated", "--gpu", "abacus", "--out", "x"], "unknown GPU"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(arguments, words, capsys):
    try:
        code = main(arguments, measure=STUB)
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr().err
    assert code == 2
    assert words in printed
    assert printed.count("\n") == 1


def test_a_machine_without_a_gpu_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr("estimator.nvml.shutil.which", lambda _: None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert main(["constants"], measure=STUB) == 2
    assert "--device simulated" in capsys.readouterr().err


def test_a_card_that_others_use_is_told(out, acts, monkeypatch, capsys):
    live = LiveGpu("NVIDIA H100 80GB HBM3", 80 * 2**30, 70 * 2**30, 10 * 2**30, "580.1")
    monkeypatch.setattr("profiler.results.probe", lambda _: live)
    acts[:] = ["runs"]
    assert main(["validation", "--out", str(out)], measure=STUB) == 0
    assert "other processes hold 10.0 GiB" in capsys.readouterr().err


def test_the_file_of_a_card_has_its_id_and_the_software_in_its_name(monkeypatch):
    monkeypatch.setattr(
        "profiler.results.version", {"torch": "2.11.0+cu130", "transformers": "5.17.0"}.get
    )
    name = Stand("cuda", "NVIDIA H100 80GB HBM3", "h100-80gb-sxm").file_name()
    assert name == "h100-80gb-sxm--torch-2.11-transformers-5.17.jsonl"


def test_simulated_records_stay_out_of_measurements_in_any_checkout(tmp_path, capsys):
    elsewhere = tmp_path / "data" / "measurements" / "h100.jsonl"
    assert _main(elsewhere) == 2
    assert not elsewhere.parent.exists()


def test_lengths_of_time_are_read():
    assert [seconds(text) for text in ("90", "90s", "10m", "1.5h")] == [90, 90, 600, 5400]


# What a campaign does as a process of its own, told by a signal.
DRIVER = """
import sys
from profiler import campaign
from tests.profiler.test_campaign import STUB, _case
campaign.cases = lambda *_: tuple(map(_case, ("runs", "crashes", "hangs", "runs out")))
sys.exit(campaign.main(sys.argv[1:], measure=STUB))
"""


@pytest.fixture
def hanging(out, tmp_path):
    """A campaign whose third case hangs on the device, and the end of a pipe that it holds."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    started = subprocess.Popen(
        [sys.executable, "-c", DRIVER, "validation", "--device", "simulated", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "STUB_FIFO": str(fifo)},
        stderr=subprocess.PIPE,
    )
    # Opening waits until the case that hangs opens the other end.
    with fifo.open("rb") as pipe:
        yield started, pipe
    started.kill()
    started.wait()
    assert started.stderr is not None
    started.stderr.close()


def _is_gone(pipe) -> bool:
    """Whether every process that held the other end is gone, soon."""
    ready, _, _ = select.select([pipe], [], [], 20)
    return bool(ready) and pipe.read() == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_campaign_ends_its_processes_and_leaves_whole_lines(hanging, out, number):
    started, pipe = hanging
    started.send_signal(number)
    _, errors = started.communicate(timeout=30)
    assert started.returncode == 130, errors.decode()
    assert errors.decode().splitlines()[-1].endswith("run the same command to go on")
    assert _is_gone(pipe)
    assert [each.outcome for each in read(out)] == ["ok", "error"]


def test_a_killed_campaign_takes_its_processes_along_and_goes_on_where_it_was(hanging, out, acts):
    started, pipe = hanging
    started.kill()
    assert started.wait() == -signal.SIGKILL
    assert _is_gone(pipe)
    acts[:] = ["runs", "crashes", "runs out"]
    assert _main(out) == 0
    assert [each.outcome for each in read(out)] == ["ok", "error", "out_of_memory"]


@pytest.fixture
def command(acts, monkeypatch):
    """`estimate campaign`, with the stub as what it calls."""
    from click.testing import CliRunner

    from profiler import campaign_cli

    def stubbed(**asked):
        return campaign.Options(**{**asked, "measure": STUB})

    monkeypatch.setattr(campaign_cli, "Options", stubbed)

    def run_it(*arguments: str):
        return CliRunner().invoke(
            campaign_cli.campaign, arguments, standalone_mode=False, catch_exceptions=False
        )

    return run_it


def test_the_subcommand_does_what_the_module_does(out, acts, command):
    acts[:] = ["runs", "runs out", "crashes"]
    done = command("validation", "--device", "simulated", "--out", str(out), "--budget", "1m")
    assert done.return_value == 0
    assert [each.outcome for each in read(out)] == ["ok", "out_of_memory", "error"]
    assert "3 of 3 cases" in done.stderr
    assert done.stdout == ""


def test_the_subcommand_lists_on_standard_output(out, acts, command):
    acts[:] = ["runs", "crashes"]
    done = command("validation", "--device", "simulated", "--out", str(out), "--list")
    assert len(done.stdout.splitlines()) == 2
    assert not out.exists()


def test_a_terminal_gets_a_bar(out, acts, monkeypatch, capsys):
    from profiler import campaign_cli

    acts[:] = ["runs", "crashes"]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    asked = campaign.Options(("validation",), out=out, device="simulated", measure=STUB)
    assert campaign_cli.carry_out(campaign.Campaign(asked)) == 0
    assert "error: crashes" in capsys.readouterr().err


def test_it_runs_where_click_rich_yaml_and_msgspec_are_missing(out):
    blocked = (
        "import sys\n"
        "for name in ('click', 'rich', 'yaml', 'pydantic', 'fastapi', 'msgspec'):\n"
        "    sys.modules[name] = None\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocked + DRIVER, "validation", "--device", "simulated", "--list",
         "--out", str(out)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4


def test_the_command_of_a_case_is_the_contract_of_measure(out):
    case = _case("gpt2", limit_bytes=5 * 2**30)
    (each,) = turns.planned([("out-of-memory", case)], WHERE, {})
    line = turns.command(each, WHERE, out, snapshots=Path("snapshots"), measure=["measure"])
    assert line == [
        "measure", "--append", str(out), "--group", "out-of-memory", "--id", each.id,
        "--device", "simulated", "--gpu", "h100-80gb-sxm5", "--memory-limit", "5368709120",
        "--steps", "3", "--snapshot", f"snapshots/{each.id}.pickle.gz",
    ]  # fmt: skip


def test_the_id_is_of_the_request_the_limit_the_device_and_the_software(monkeypatch):
    other = Stand("cuda", "H100", "h100-80gb-sxm5")
    cases = [_case("gpt2"), _case("gpt2", limit_bytes=2**30), _case("opt")]
    ids = [WHERE.identity(case) for case in cases] + [other.identity(cases[0])]
    monkeypatch.setattr("profiler.results.version", lambda _: "99.0")
    ids.append(WHERE.identity(cases[0]))
    assert len(set(ids)) == 5


def test_the_id_is_not_of_the_name_or_the_order_of_fields():
    fields = {"model": "gpt2", "seq_len": 512}
    turned = dict(reversed(fields.items()))
    one, other = (Case(name, name, request=each) for name, each in (("a", fields), ("b", turned)))
    assert WHERE.identity(one) == WHERE.identity(other)
