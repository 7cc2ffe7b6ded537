"""From measurement records to calibration files: split-conformal spreads and device constants.

A residual is `max(m / e, e / m) - 1` for a measured value m and an expected value e: how far the
two lie apart, whichever is larger. With n residuals that are exchangeable with the next one, the
k-th smallest of them, k = ceil((n + 1) c), is not exceeded with probability c (split-conformal
prediction; mapie, section 8). Our residuals come in groups, sources or model families, and
those of one group are alike, so the spread of a stratum is the largest of its groups' own
quantiles and of that of all rows together. What so few rows cannot support is extrapolated with an
exponential tail, and the file says from where on.

Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log
from pathlib import Path
from statistics import median
from typing import Final, get_args

from msgspec import structs

from estimator.calibration import UNMEASURED, using
from estimator.calibration_file import (
    SCHEMA,
    Calibration,
    Constants,
    HeldOut,
    Input,
    Kind,
    Quantity,
    Stratum,
    Traits,
)
from estimator.catalog import Access
from estimator.errors import EstimatorError, InvalidCalibrationError, InvalidRecordError
from estimator.pipeline import answer, device_of, engine_for
from estimator.record import Probe, Record, Run, probes, read, runs
from estimator.request import parse_request
from estimator.result import Range
from estimator.service import model_config, requested_gpu
from profiler.versions import file_stem, two_numbers

QUANTITIES: Final[tuple[Quantity, ...]] = get_args(Quantity)
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
LEVELS: Final = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975, 0.99, 0.995, 0.999, 0.9999)
CONFIDENCE: Final = 0.95
"""At which the held-out coverage is told."""
LEAST_ROWS: Final = 20
"""Fewer rows do not support a confidence of 0.95 by themselves: ceil(21 x 0.95) = 20."""
LEAST_GROUPS: Final = 3
"""A kind of method gets a stratum of its own from so many groups on."""
DIGITS: Final = 6
PROGRESS = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class Residual:
    """One measured quantity of one run beside what was expected.

    Args:
        ratio: measured over expected.
        traits: those of the request.
    """

    quantity: Quantity
    group: str
    ratio: float
    traits: Traits
    tokens: int
    seq_len: int

    @property
    def size(self) -> float:
        """How far measured and expected lie apart, whichever is larger."""
        return max(self.ratio, 1 / self.ratio) - 1


@dataclass(frozen=True, slots=True)
class Expected:
    """What the analytic engine expects of a record's run [bytes].

    Args:
        needed: of the allocator, with room to give its cached blocks back.
    """

    traits: Traits
    tokens: int
    seq_len: int
    family: str
    allocated: int
    reserved: int
    device_used: int
    needed: int


def calibrations(
    files: Sequence[Path],
    *,
    root: Path,
    progress: PROGRESS = lambda share, text: None,
    allow_simulated: bool = False,
) -> tuple[tuple[Calibration, ...], tuple[str, ...]]:
    """Return a calibration for each card and stack in the files, and what was left out.

    Args:
        files: measurement records.
        root: what the names of the files in the result are relative to.
        progress: told how far the work is.
        allow_simulated: take records of a simulated device too; never for a file that is used.

    Raises:
        InvalidRecordError: a file cannot be read.
        InvalidCalibrationError: there is nothing to calibrate from.
    """
    wanted: dict[tuple[str, ...], list[tuple[Path, Record]]] = defaultdict(list)
    for path in files:
        for record in read(path):
            if record.origin == "simulated" and not allow_simulated:
                raise InvalidCalibrationError(
                    f"{path}: record {record.id} comes from a simulated device; calibrate from "
                    "measured or published records"
                )
            wanted[_key(record)].append((path, record))
    if not wanted:
        raise InvalidCalibrationError("the files hold no records; name one that does")
    found: list[Calibration] = []
    left_out: list[str] = []
    for key, records in sorted(wanted.items()):
        made, dropped = _calibration(key, records, root, progress)
        found.append(made)
        left_out += dropped
    return tuple(found), tuple(left_out)


def _key(record: Record) -> tuple[str, ...]:
    """Return the origin of a record, with card and stack where they decide."""
    if record.origin == "published":
        return (record.origin,)
    place = record.environment
    return (
        record.origin,
        place.gpu_id or place.gpu or "unknown",
        two_numbers(place.versions.get("torch")),
        two_numbers(place.versions.get("transformers")),
    )


def _calibration(
    key: tuple[str, ...], records: list[tuple[Path, Record]], root: Path, progress: PROGRESS
) -> tuple[Calibration, tuple[str, ...]]:
    everything = [record for _, record in records]
    usable = [run for run in runs(everything) if run.outcome != "error"]
    inputs = Counter(path for path, _ in records)
    place = everything[0].environment
    published = key[0] == "published"
    bare = Calibration(
        schema=SCHEMA,
        name="any--published" if published else file_stem(*key[1:]),
        origin=everything[0].origin,
        gpu=None if published else key[1],
        compute_capability=None if published else place.compute_capability,
        stack={} if published else {"torch": key[2], "transformers": key[3]},
        made_from=tuple(
            Input(path.relative_to(root).as_posix(), _hash(path), count)
            for path, count in sorted(inputs.items())
        ),
        constants=_constants(usable, probes(everything)),
        strata=(),
        held_out=(),
    )
    # What is expected are the answers that this file will give, whatever is installed now.
    with using(bare):
        found, left_out = _residuals(usable, progress)
    if not found:
        raise InvalidCalibrationError(
            f"no run of {' '.join(key)} has a meter and an answer; nothing to calibrate"
            f"{f'; {left_out[0]}' if left_out else ''}"
        )
    return structs.replace(bare, strata=strata(found), held_out=held_out(found)), left_out


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- what was expected -------------------------------------------------------------------------


def _expected(
    wanted: Sequence[Run], progress: PROGRESS
) -> tuple[dict[str, Expected], tuple[str, ...]]:
    found: dict[str, Expected] = {}
    left_out = []
    for index, run in enumerate(wanted):
        progress(index / len(wanted), run.id)
        try:
            found[run.id] = expected(run)
        except EstimatorError as error:
            left_out.append(f"{run.id}: {error}")
    return found, tuple(left_out)


def expected(run: Run) -> Expected:
    """Return what the analytic engine expects of a record's run.

    Raises:
        InvalidRecordError: a meter read nothing, or nothing was allowed to be held.
        EstimatorError: the request has no answer.
    """
    read_nothing = run.outcome == "ok" and 0 in structs.astuple(run.peak)
    if read_nothing or run.limit_bytes == 0:
        raise InvalidRecordError("a meter or a limit of 0 bytes")
    request = parse_request(dict(run.request))
    model = model_config(request, Access.CATALOGUE)
    gpu = requested_gpu(request)
    result = answer(request, model.config, model.id, gpu)
    engine = engine_for(request, model.config, model.id)
    peak, context = result.peak, device_of(gpu, request).constants.context.expected
    return Expected(
        traits=engine.recipe,
        tokens=request.micro_batch_size * request.seq_len,
        seq_len=request.seq_len,
        family=str(model.config.get("model_type", model.id)),
        allocated=peak.allocated_bytes.expected,
        reserved=peak.reserved_bytes.expected,
        device_used=peak.device_used_bytes.expected,
        needed=peak.needed_bytes.expected - context,
    )


# -- device constants --------------------------------------------------------------------------


def _constants(measured: Sequence[Run], looked: Sequence[Probe]) -> Constants:
    """Return what a process takes beside its tensors; nothing of it can be read off publications.

    The context after a step is what the device shows as used less what the allocator holds.
    """
    beside = [
        run.peak.device_used_bytes - run.peak.reserved_bytes
        for run in measured
        if run.origin != "published"
        and run.outcome == "ok"
        and run.peak.device_used_bytes is not None
        and run.peak.reserved_bytes is not None
    ]
    beside += _values(looked, "context", "after_step")
    # The first product of a process takes one workspace of cuBLAS.
    workspace = next(iter(_values(looked, "cublas_workspace", "first_forward")), None)
    idle = [run.idle_bytes for run in measured if run.idle_bytes is not None]
    idle += _values(looked, "context", "idle")
    return Constants(_spanned(beside), _spanned(idle), workspace)


def _spanned(values: Sequence[int]) -> Range | None:
    return Range(min(values), int(median(values)), max(values)) if values else None


def _values(looked: Sequence[Probe], name: str, value: str) -> list[int]:
    """Return what every probe of a name found."""
    return [
        probe.values[value]
        for probe in looked
        if probe.name == name and probe.outcome == "ok" and value in probe.values
    ]


# -- residuals ---------------------------------------------------------------------------------


def residuals(measured: Sequence[Run]) -> list[Residual]:
    """Return the residuals of the records that have an answer, nothing of a device measured."""
    usable = [run for run in measured if run.outcome != "error"]
    with using():
        return _residuals(usable, lambda share, text: None)[0]


def _residuals(
    measured: Sequence[Run], progress: PROGRESS
) -> tuple[list[Residual], tuple[str, ...]]:
    expected, left_out = _expected(measured, progress)
    found: list[Residual] = []
    for run in measured:
        if run.id in expected and run.outcome == "ok" and run.limit_bytes is None:
            found += _of_run(run, expected[run.id])
    return [*found, *_of_sweeps(measured, expected)], left_out


def _of_run(run: Run, expected: Expected) -> Iterator[Residual]:
    pairs: tuple[tuple[Quantity, int | None, int], ...] = (
        ("allocated", run.peak.allocated_bytes, expected.allocated),
        ("reserved", run.peak.reserved_bytes, expected.reserved),
        ("device-used", run.peak.device_used_bytes, expected.device_used),
    )
    for quantity, value, against in pairs:
        if value is not None:
            yield _residual(run, quantity, value / against, expected)


def _residual(run: Run, quantity: Quantity, ratio: float, expected: Expected) -> Residual:
    group = run.group if run.origin == "published" else expected.family
    return Residual(quantity, group, ratio, expected.traits, expected.tokens, expected.seq_len)


def _of_sweeps(measured: Sequence[Run], expected: Mapping[str, Expected]) -> Iterator[Residual]:
    """Yield what the least limit that was enough says of what a run needs.

    Where a lower limit failed, the need lies between the two, and the farther end counts.
    """
    swept: dict[str, list[Run]] = defaultdict(list)
    for run in measured:
        if run.limit_bytes is not None and run.id in expected:
            swept[repr(sorted(run.request.items()))].append(run)
    for tried in swept.values():
        enough = [run for run in tried if run.outcome == "ok"]
        failed = [run for run in tried if run.outcome == "out_of_memory"]
        if not enough or not failed:
            continue
        least = min(enough, key=lambda run: run.limit_bytes or 0)
        most = max(failed, key=lambda run: run.limit_bytes or 0)
        need = expected[least.id].needed
        ratios = [(each.limit_bytes or 0) / need for each in (least, most)]
        farthest = max(ratios, key=lambda ratio: max(ratio, 1 / ratio))
        yield _residual(least, "needed", farthest, expected[least.id])


# -- quantiles ---------------------------------------------------------------------------------


def strata(residuals: Sequence[Residual]) -> tuple[Stratum, ...]:
    """Return a stratum for each quantity, and one for each kind of method with enough rows."""
    found = []
    for quantity in QUANTITIES:
        rows = _with_kin(residuals, quantity)
        if not rows:
            continue
        found.append(_stratum(quantity, None, rows))
        for kind in KINDS:
            own = [each for each in rows if each.traits.kind == kind]
            if len(own) >= LEAST_ROWS and len({each.group for each in own}) >= LEAST_GROUPS:
                found.append(_stratum(quantity, kind, own))
    return tuple(found)


def _with_kin(residuals: Sequence[Residual], quantity: Quantity) -> list[Residual]:
    """Return the rows of a quantity; the two that hold the allocator's cache help each other out.

    What is reserved and what the device shows differ by the context alone, which is small beside
    what decides their errors: the blocks that the allocator keeps.
    """
    own = [each for each in residuals if each.quantity == quantity]
    if len(own) >= LEAST_ROWS or quantity not in ("reserved", "device-used"):
        return own
    return [each for each in residuals if each.quantity in ("reserved", "device-used")]


def _stratum(quantity: Quantity, kind: Kind | None, rows: Sequence[Residual]) -> Stratum:
    parameters = [each.traits.parameters for each in rows]
    choices: dict[str, set[str]] = defaultdict(set)
    for each in rows:
        for field, value in each.traits.choices:
            choices[field].add(value)
    return Stratum(
        quantity=quantity,
        kind=kind,
        rows=len(rows),
        groups=dict(sorted(Counter(each.group for each in rows).items())),
        supported=_rounded(len(rows) / (len(rows) + 1)),
        levels=tuple(
            (level, _rounded(max(spread(rows, level), _least(quantity, level, rows))))
            for level in LEVELS
        ),
        parameters=(min(parameters), max(parameters)),
        tokens=max(each.tokens for each in rows),
        seq_len=max(each.seq_len for each in rows),
        choices={field: tuple(sorted(values)) for field, values in choices.items()},
    )


LEAST_SOURCES: Final = 5
LEAST_READINGS: Final = 60
HIGH_CONFIDENCE: Final = 0.95


def _least(quantity: Quantity, level: float, rows: Sequence[Residual]) -> float:
    """Return the spread that a level has at least.

    What the allocator holds depends on the history of a run, and a source repeats one. As long as
    there are few sources and few readings, no more is promised than of a quantity without any.
    """
    few = len(rows) < LEAST_READINGS and len({each.group for each in rows}) < LEAST_SOURCES
    held = quantity in ("reserved", "device-used")
    return UNMEASURED if few and held and level >= HIGH_CONFIDENCE else 0.0


def _rounded(value: float) -> float:
    return round(value, DIGITS)


def spread(rows: Sequence[Residual], confidence: float) -> float:
    """Return the spread that holds the next measurement with a confidence.

    The largest over the groups is taken because rows of one group are alike. Beyond n / (n + 1) the
    tail is taken to be exponential.

    Source: mapie, section 8, for exchangeable rows.
    """
    sizes = defaultdict(list)
    for each in rows:
        sizes[each.group].append(each.size)
    everything = [each.size for each in rows]
    largest = max(_quantile(each, confidence) for each in (everything, *sizes.values()))
    supported = len(rows) / (len(rows) + 1)
    if confidence <= supported:
        return largest
    return largest * log(1 - confidence) / log(1 - supported)


def _quantile(sizes: Sequence[float], confidence: float) -> float:
    """Return the k-th smallest value, k = ceil((n + 1) c); the largest where that is beyond n."""
    rank = min(len(sizes), ceil((len(sizes) + 1) * confidence - 1e-9))
    return sorted(sizes)[rank - 1]


def held_out(residuals: Sequence[Residual], confidence: float = CONFIDENCE) -> tuple[HeldOut, ...]:
    """Return, for each quantity, how many rows lie inside ranges made without their own group."""
    made = {
        group: {
            each.quantity: each
            for each in strata([other for other in residuals if other.group != group])
            if each.kind is None
        }
        for group in {each.group for each in residuals}
    }
    found = []
    for quantity in QUANTITIES:
        sizes = [
            (each.size, made[each.group][quantity])
            for each in residuals
            if each.quantity == quantity and quantity in made[each.group]
        ]
        if sizes:
            inside = sum(size <= without.spread(confidence) for size, without in sizes)
            found.append(HeldOut(quantity, confidence, len(sizes), inside))
    return tuple(found)
