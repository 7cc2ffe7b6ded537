"""From a range and a capacity to a verdict, and from a verdict to one sentence."""

from __future__ import annotations

from estimator.result import Capacity, Peak, Range, Suggestion, Verdict
from estimator.units import gib


def judge(needed: Range, usable_bytes: int | None) -> Verdict:
    """Return whether a run fits, may fit or does not, with the confidence of the range.

    `fits` needs the high end of the range to fit: a run needs more than that with a chance of at
    most 1 - confidence. `does_not_fit` needs the low end not to; between the two it is `tight`.
    Without a capacity there is nothing to judge by.
    """
    if usable_bytes is None:
        return "unknown"
    if needed.high <= usable_bytes:
        return "fits"
    return "does_not_fit" if needed.low > usable_bytes else "tight"


def sentence(
    verdict: Verdict,
    peak: Peak,
    capacity: Capacity,
    suggestions: tuple[Suggestion, ...],
    confidence: float,
) -> str:
    """Return the answer in one breath: the need, the offer, the moment, the cheapest fix."""
    needed = peak.needed_bytes
    need = f"{gib(needed.low)} to {gib(needed.high)} of device memory"
    need = f"{need} with {100 * confidence:g} % confidence"
    when = f"the peak is the moment {peak.moment!r}"
    if capacity.usable_bytes is None:
        return f"Needs {need}; {when}. Not judged: {capacity.source}."
    card = capacity.gpu or "the card"
    offer = f"{card} offers {gib(capacity.usable_bytes)}"
    opening = {"fits": "Fits", "tight": "Tight", "does_not_fit": "Does not fit"}[verdict]
    text = f"{opening}: needs {need}, {offer}; {when}."
    helping = next((each for each in suggestions if each.verdict_after == "fits"), None)
    if verdict == "fits" or helping is None:
        return text
    return f"{text} Cheapest change that fits: {helping.summary} (-{gib(helping.saves_bytes)})."
