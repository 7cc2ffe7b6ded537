"""From a measurement to named terms: which other recipes would have given the number that was read.

Every hypothesis is answered by the engine itself. First each change alone, by its peak; then sums
of two and three; the best of all are estimated once more as one request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any, Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from estimator import __version__
from estimator.errors import EstimatorError
from estimator.hypotheses import Plausibility, changed, conflict, document_of
from estimator.measurement import Reading
from estimator.out_of_memory import Diagnosis, asking
from estimator.pipeline import answer
from estimator.planner import Question
from estimator.request import convert_request
from estimator.result import Range, Result
from estimator.terms import Case, Term, Tried, at_meter, tried_terms
from estimator.units import gib

SCHEMA: Final = "reconcile/v1"


class Hypothesis(Struct, frozen=True):
    """One to three terms together, answered as one request.

    Args:
        estimated_bytes: what the meter would read then.
        left_bytes: what they do not explain: measured less estimated.
        explained: share of the gap that they explain, 0 to 1.
        inside: the measurement lies in that estimate's range.
    """

    terms: tuple[str, ...]
    summary: str
    change: dict[str, Any]
    difference_bytes: int
    estimated_bytes: Range
    left_bytes: int
    explained: float
    inside: bool


class Reconciliation(Struct, frozen=True, kw_only=True):
    """The whole answer, `reconcile/v1`; null is what cannot be said without a request or a number.

    Args:
        gap_bytes: measured less expected.
        inside: the measurement lies in the range of the estimate as asked.
        hypotheses: what would explain the gap, best first.
        unexplained_bytes: what the first of them leaves; the gap where there is none.
        rivals: other sets of as many terms as the first that explain as much, by sum.
        terms: every change that was tried, largest first.
        not_tried: what would show in the number and is in no request.
        out_of_memory: what a pasted message says.
    """

    schema: Literal["reconcile/v1"] = SCHEMA
    message: str = ""
    model: str | None = None
    reading: Reading | None = None
    predicted_bytes: Range | None = None
    gap_bytes: int | None = None
    inside: bool | None = None
    hypotheses: tuple[Hypothesis, ...] = ()
    unexplained_bytes: int | None = None
    rivals: int = 0
    terms: tuple[Term, ...] = ()
    not_tried: tuple[str, ...] = ()
    out_of_memory: Diagnosis | None = None
    request: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = {}


NOT_TRIED: Final = (
    "what loading the model, evaluating, saving and generating hold: no estimate has their peaks",
    "gradients of parameters that the optimizer does not know, unless the method is partial",
    "tensors that the training script itself keeps: metrics, losses that are not detached",
)
_JUDGEMENT: Final = (
    "how plausible a change is, is this project's judgement: it orders changes that explain alike"
)


# -- ranking -----------------------------------------------------------------------------------

SHOWN: Final = 6
_SINGLES, _PAIRS, _TRIPLES = 8, 6, 3
# Hypotheses that are estimated whole. What the allocator holds does not follow from the peak, so
# there all that is shown is estimated whole, by the number of terms.
_WHOLE: Final = 3
_WHOLE_HELD: Final = (4, 1, 1)
# In units of one thirtieth of the gap: what a less plausible or a further term has to explain more.
_DOUBT: Final[dict[Plausibility, float]] = {"often": 0.0, "sometimes": 0.5, "seldom": 1.0}
_FURTHER: Final = 1.5
_FITTED: Final = 3.0
_WEIGHT: Final = 30.0
_MOST_EXCESS: Final = 5.0
_LEAST_EXPLAINED: Final = 0.2

_Set = tuple["Tried", ...]


def _cost(case: Case, terms: _Set, difference: int) -> float:
    """Return how much stands against a set of terms: what it leaves, and how far-fetched."""
    left = abs(case.left(difference))
    beyond, within = max(0, left - case.noise), min(left, case.noise)
    misfit = _WEIGHT * beyond / max(abs(case.gap), 1) + within / case.noise
    doubt = sum(_DOUBT[each.term.plausibility] for each in terms)
    fitted = sum(_FITTED for each in terms if each.term.fitted)
    # A run that needs far more than a bound would have died before it got there.
    excess = max(0, difference - case.gap) if case.reading.bound == "at_least" else 0
    misfit += min(excess / max(abs(case.gap), 1), _MOST_EXCESS)
    return misfit + doubt + fitted + _FURTHER * (len(terms) - 1)


def explain(
    question: Question, base: Result, reading: Reading | None, diagnosis: Diagnosis | None
) -> Reconciliation:
    """Return what would explain a measurement, and what a message says.

    Args:
        question: the request, its model and its card.
        base: the estimate of the request.
        reading: what was measured; None where a message holds no number to compare.
    """
    found = Reconciliation(
        model=base.model,
        out_of_memory=diagnosis,
        request=question.request.to_dict(),
        notes=base.notes,
        versions={"vramplan": __version__},
    )
    if reading is None:
        return replace(found, message=_said_by(diagnosis))
    case = Case(question, base, reading)
    tried = tuple(tried_terms(case))
    ranked = tuple(_that_ask(_ranked(case, tried)[:SHOWN], diagnosis, question))
    first = ranked[0] if ranked else None
    terms = sorted((each.term for each in tried), key=lambda term: -abs(term.difference_bytes))
    found = replace(
        found,
        reading=reading,
        predicted_bytes=case.predicted,
        gap_bytes=case.gap,
        inside=_overlap(case.predicted, reading),
        hypotheses=ranked,
        unexplained_bytes=first.left_bytes if first is not None else case.left(0),
        rivals=_rivals(case, tried, first),
        terms=tuple(terms),
        not_tried=NOT_TRIED,
        notes=(_JUDGEMENT, *base.notes),
    )
    return replace(found, message=" ".join(filter(None, (_said_by(diagnosis), sentence(found)))))


def unasked(diagnosis: Diagnosis) -> Reconciliation:
    """Return what a message says by itself."""
    return Reconciliation(
        message=_said_by(diagnosis), out_of_memory=diagnosis, versions={"vramplan": __version__}
    )


def _overlap(predicted: Range, reading: Reading) -> bool:
    if reading.bound == "at_least":
        return reading.bytes.low <= predicted.high
    return predicted.low <= reading.bytes.high and reading.bytes.low <= predicted.high


# -- sets of terms -----------------------------------------------------------------------------


def _ranked(case: Case, tried: tuple[Tried, ...]) -> tuple[Hypothesis, ...]:
    """Return the best sets of terms: by their sums first, then by an estimate of each."""
    if case.left(0) == 0:
        return ()
    candidates = [
        *_best(case, ((each,) for each in tried), _SINGLES),
        *_best(case, _together(case, tried, 2), _PAIRS),
        *_best(case, _together(case, tried, 3), _TRIPLES),
    ]
    estimated = [(each, difference) for each in candidates if (difference := _jointly(case, each))]
    estimated.sort(key=lambda pair: _cost(case, *pair))
    if case.reading.meter == "allocated":
        found = [(terms, _verified(case, terms)) for terms, _ in estimated[:_WHOLE]]
        found += [(terms, _shifted(case, terms, by)) for terms, by in estimated[_WHOLE:]]
    else:
        chosen = [
            terms
            for number, most in enumerate(_WHOLE_HELD, start=1)
            for terms in [each for each, _ in estimated if len(each) == number][:most]
        ]
        found = [(terms, _verified(case, terms)) for terms in chosen]
    ordered = sorted(found, key=lambda pair: _cost(case, pair[0], pair[1].difference_bytes))
    kept: list[Hypothesis] = []
    for _, each in ordered:
        if each.explained >= _LEAST_EXPLAINED and not any(_covers(one, each) for one in kept):
            kept.append(each)
    return tuple(kept)


# A run passes by the point of a message when it holds as much, give or take this share.
_NEAR: Final = 0.03


def _that_ask(
    ranked: tuple[Hypothesis, ...], diagnosis: Diagnosis | None, question: Question
) -> Iterator[Hypothesis]:
    """Leave out what cannot be: runs where no tensor asks for that size when that much is there."""
    allocated = diagnosis.message.allocated_bytes if diagnosis is not None else None
    if diagnosis is None or allocated is None or not diagnosis.askers:
        yield from ranked
        return
    said = allocated.expected
    for each in ranked:
        if not each.change:
            # It is in no request, so that there is no other run to look at.
            yield each
            continue
        request = convert_request({**question.request.to_dict(), **each.change})
        asked = asking(diagnosis.message, question, request)
        if any(abs(one.before_bytes - said) <= _NEAR * said for one in asked):
            yield each


def _covers(fewer: Hypothesis, more: Hypothesis) -> bool:
    """Whether some of the terms alone leave hardly more than all of them."""
    subset = set(fewer.terms) < set(more.terms)
    return subset and abs(more.left_bytes) > abs(fewer.left_bytes) // 2


def _together(case: Case, tried: tuple[Tried, ...], number: int) -> Iterator[_Set]:
    """Yield sets of terms that say something together: none is fitted, no two set one field."""
    usable = [
        each
        for each in tried
        if not each.term.fitted and abs(each.term.difference_bytes) > case.noise // 4
    ]
    for terms in combinations(usable, number):
        if not any(_exclude(one, other) for one, other in combinations(terms, 2)):
            yield terms


def _exclude(one: Tried, other: Tried) -> bool:
    if one.change is None or other.change is None:
        return one.change is other.change
    return conflict(one.change, other.change)


def _best(case: Case, sets: Iterable[_Set], number: int) -> list[_Set]:
    return sorted(sets, key=lambda terms: _cost(case, terms, _sum(terms)))[:number]


def _sum(terms: _Set) -> int:
    return sum(each.term.difference_bytes for each in terms)


def _fields(terms: _Set) -> dict[str, Any]:
    return {
        pointer: value
        for each in terms
        if each.change is not None
        for pointer, value in each.change.fields.items()
    }


def _outside(terms: _Set) -> int:
    """Return what the terms add that are in no request."""
    return sum(each.term.difference_bytes for each in terms if each.change is None)


def _jointly(case: Case, terms: _Set) -> int | None:
    """Return what terms do together, from the peak of their request."""
    if len(terms) == 1:
        return _sum(terms)
    try:
        difference = case.difference(changed(case.question.request, _fields(terms)))
    except EstimatorError:
        return None
    return None if difference is None else difference + _outside(terms)


def _verified(case: Case, terms: _Set) -> Hypothesis:
    """Return terms as a hypothesis, with the whole estimate of their request."""
    fields, question = _fields(terms), case.question
    if not fields:
        return _shifted(case, terms, _outside(terms))
    request = changed(question.request, fields)
    peak = answer(request, question.config, question.name, question.gpu).peak
    found, outside = at_meter(peak, case.reading.meter), _outside(terms)
    return _hypothesis(case, terms, _moved(found, outside))


def _shifted(case: Case, terms: _Set, difference: int) -> Hypothesis:
    return _hypothesis(case, terms, _moved(case.predicted, difference))


def _moved(found: Range, by: int) -> Range:
    return Range(*(max(0, each + by) for each in (found.low, found.expected, found.high)))


def _hypothesis(case: Case, terms: _Set, estimated: Range) -> Hypothesis:
    difference = estimated.expected - case.predicted.expected
    fields = _fields(terms)
    return Hypothesis(
        terms=tuple(each.term.name for each in terms),
        summary=", and ".join(each.term.summary for each in terms),
        change=document_of(case.question.request, fields) if fields else {},
        difference_bytes=difference,
        estimated_bytes=estimated,
        left_bytes=case.left(difference),
        explained=round(case.explained(difference), 4),
        inside=_overlap(estimated, case.reading),
    )


def _rivals(case: Case, tried: tuple[Tried, ...], first: Hypothesis | None) -> int:
    """Count the other sets of as many terms that leave no more, or no more than noise."""
    if first is None or len(first.terms) == 1:
        return 0
    most = max(abs(first.left_bytes), case.noise)
    as_good = sum(
        abs(case.left(_sum(each))) <= most for each in _together(case, tried, len(first.terms))
    )
    return max(0, as_good - 1)


# -- the sentence ------------------------------------------------------------------------------


def sentence(found: Reconciliation) -> str:
    """Return the answer in one breath; an explanation is never more than what would explain."""
    reading, predicted = found.reading, found.predicted_bytes
    if reading is None or predicted is None or found.gap_bytes is None:
        return ""
    span = f"{gib(predicted.low)} to {gib(predicted.high)}"
    least = reading.bound == "at_least"
    verb = "The tensors needed at least" if least else "Measured"
    start = f"{verb} {gib(reading.bytes.expected)} ({reading.meter})"
    if found.inside:
        where = "which the estimate allows for" if least else "inside the estimate"
        return f"{start}, {where}: {span}. Nothing has to be explained."
    way = "above" if found.gap_bytes > 0 else "below"
    off = f"{gib(abs(found.gap_bytes))} {way} the expected {gib(predicted.expected)} ({span})"
    if not found.hypotheses:
        return f"{start}, {off}. None of the {len(found.terms)} changes tried would explain it."
    first = found.hypotheses[0]
    would = f"would be explained to {first.explained:.0%} if {first.summary}"
    return f"{start}, {off}. The difference {would}."


def _said_by(diagnosis: Diagnosis | None) -> str:
    """Return why there was no memory, and who would have asked for it."""
    if diagnosis is None:
        return ""
    message = diagnosis.message
    if message.used_bytes is not None and message.total_bytes is not None:
        used, total = gib(message.used_bytes.expected), gib(message.total_bytes.expected)
        return f"nvidia-smi shows {used} of {total} in use on GPU {message.device}."
    parts = [f"{each.cause.capitalize()}: {each.summary}." for each in diagnosis.findings[:1]]
    if diagnosis.askers:
        asker = diagnosis.askers[0]
        parts.append(f"{asker.tensor!r} would ask for that much in {asker.moment!r}.")
    return " ".join(parts) or "The message names no size that could be compared."
