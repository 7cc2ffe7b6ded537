"""What was measured: the document that asks about it, and the reading that it holds."""

from __future__ import annotations

from typing import Any, Final, Literal

from msgspec import Struct

from estimator.errors import InvalidRequestError
from estimator.oom_message import OomMessage
from estimator.out_of_memory import least_bytes
from estimator.record import Meter
from estimator.request import EstimateRequest, convert_request, decode_document
from estimator.result import Range
from estimator.section import Section
from estimator.units import MiB, parse_size

CardMeter = Literal[Meter, "nvidia-smi"]
METERS: Final[dict[CardMeter, str]] = {
    "allocated": "torch.cuda.max_memory_allocated",
    "reserved": "torch.cuda.max_memory_reserved",
    "device-used": "device memory in use by the process",
    "nvidia-smi": "used memory of the whole card",
}


class Measurement(Section, frozen=True):
    """The document that asks: a request, and what was read or printed when it ran.

    Args:
        request: the run; without one a message is read and nothing is compared.
        measured: a size as people write it, or bytes.
        message: an out-of-memory message, or a table of nvidia-smi.
    """

    request: EstimateRequest | None = None
    measured: str | int | None = None
    meter: CardMeter | None = None
    message: str | None = None


class Reading(Struct, frozen=True):
    """What was measured.

    Args:
        written: as the user wrote it, or where it was taken from.
        bytes: what the written number can stand for [bytes].
        bound: a run that died of too little memory shows only what it needed at least.
    """

    written: str
    meter: CardMeter
    bytes: Range
    bound: Literal["reading", "at_least"] = "reading"


def parse_measurement(document: str | bytes | dict[str, Any]) -> Measurement:
    """Read the document that asks.

    Raises:
        MalformedDocumentError: not JSON, or too large.
        InvalidRequestError: a field is unknown, of the wrong type or out of range.

    Example:
        >>> parse_measurement({"request": {"model": "gpt2"}, "measured": "2GiB"}).measured
        '2GiB'
    """
    value = decode_document(document)
    if not isinstance(value, dict):
        raise InvalidRequestError("the document must be an object with request and measured", ())
    for name in value:
        if name not in Measurement.__struct_fields__:
            known = ", ".join(Measurement.__struct_fields__)
            raise _refusal(name, f"unknown field {name[:60]!r}; known: {known}")
    request = value.get("request")
    return Measurement(
        request=None if request is None else _inner(request),
        measured=_typed(value, "measured", (str, int), "a size such as '19.4GiB', or bytes"),
        meter=_typed(value, "meter", (str,), "a word"),
        message=_typed(value, "message", (str,), "text"),
    )


def _typed(value: dict[str, Any], field: str, types: tuple[type, ...], what: str) -> Any:
    found = value.get(field)
    if found is not None and (not isinstance(found, types) or isinstance(found, bool)):
        raise _refusal(field, f"must be {what}")
    return found


def _inner(request: Any) -> EstimateRequest:
    """Read the request; a refusal points into the whole document."""
    try:
        return convert_request(request)
    except InvalidRequestError as error:
        errors = tuple((f"/request{pointer}", why) for pointer, why in error.errors)
        raise InvalidRequestError(f"request: {error}", errors) from None


def _refusal(field: str, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {why}", ((f"/{field}", why),))


def reading_of(asked: Measurement, message: OomMessage | None) -> Reading | None:
    """Return what was measured: the number given, or what a message shows.

    Raises:
        InvalidRequestError: nothing was given, or it is no size.
    """
    if asked.meter is not None and asked.meter not in METERS:
        raise _refusal("meter", f"{asked.meter[:60]!r} is no meter; known: {', '.join(METERS)}")
    if asked.measured is not None:
        if asked.request is None:
            raise _refusal("request", "a measurement is compared with a request; name a model")
        return Reading(
            str(asked.measured), asked.meter or "allocated", _measured_range(asked.measured)
        )
    if message is None:
        raise _refusal("measured", "give what was measured, such as 19.4GiB, or a message")
    if asked.request is None:
        return None
    if message.used_bytes is not None:
        return Reading("the table of nvidia-smi", "nvidia-smi", message.used_bytes)
    least = least_bytes(message)
    return None if least is None else Reading("the message", "allocated", least, "at_least")


def _measured_range(measured: str | int) -> Range:
    """Return the bytes that a size can stand for: half a unit of its last digit to either side.

    Example:
        >>> _measured_range("2GiB").low
        1610612736
    """
    if isinstance(measured, int):
        size = measured
        half = 0
    else:
        if len(measured) > MAX_SIZE_CHARACTERS:
            raise _refusal("measured", "is too long for a size; write one such as 19.4GiB")
        try:
            size = parse_size(measured)
        except (ValueError, OverflowError) as error:
            raise _refusal("measured", str(error)) from None
        digits = measured.strip()
        number = digits[: len(digits) - len(digits.lstrip("0123456789."))]
        decimals = len(number.partition(".")[2])
        half = round(parse_size(f"1{digits[len(number) :]}") / 10**decimals / 2)
    if not MiB <= size <= MAX_MEASURED:
        raise _refusal("measured", f"{measured} is {size} bytes; write a unit, such as 19.4GiB")
    return Range(max(0, size - half), size, size + half)


MAX_SIZE_CHARACTERS: Final = 40
MAX_MEASURED: Final = 2**60
