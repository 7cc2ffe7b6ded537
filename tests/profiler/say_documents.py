"""Print as JSON what our documents and values do, with msgspec or with what stands in for it.

Run by test_plain_structs.py, once each way, in a process of its own.
"""

from __future__ import annotations

import json
import sys
from typing import Any

NOT_THERE = ("msgspec", "pydantic", "click", "rich", "yaml")


class _Refused:
    """Refuse to import what a machine that only measures does not have."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.split(".")[0] in NOT_THERE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if "--without-msgspec" in sys.argv:
    sys.meta_path.insert(0, _Refused())  # type: ignore[arg-type]
    from profiler.plain_structs import install_if_missing

    assert install_if_missing()

import msgspec  # noqa: E402 - after the line above, whoever answers to the name
from msgspec import Struct  # noqa: E402

from estimator import record  # noqa: E402
from estimator.eager.size import Dim  # noqa: E402
from estimator.errors import EstimatorError  # noqa: E402
from estimator.render.document import to_json  # noqa: E402
from estimator.request import parse_request  # noqa: E402
from estimator.service import estimate  # noqa: E402


def _subclasses(cls: type) -> list[type]:
    return [each for child in cls.__subclasses__() for each in (child, *_subclasses(child))]


def _class(cls: Any) -> dict[str, Any]:
    config = cls.__struct_config__
    return {
        "fields": cls.__struct_fields__,
        "tag": [config.tag_field, config.tag],
        "frozen": config.frozen,
        "eq": config.eq,
        "closed": config.forbid_unknown_fields,
        "omit_defaults": config.omit_defaults,
    }


def _said(function: Any, *arguments: Any) -> str:
    try:
        return str(function(*arguments))
    except (EstimatorError, msgspec.MsgspecError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def _values(document: dict[str, Any]) -> list[bool]:
    one, other = parse_request(document), parse_request(document)
    changed = msgspec.structs.replace(one, seq_len=7)
    return [one == other, hash(one) == hash(other), one == changed, len({one, other, changed}) == 2]


def _answer(document: dict[str, Any]) -> str:
    return to_json(estimate(document)).decode()


def _read(document: Any) -> str:
    return json.dumps(parse_request(document).to_dict())


def _record(line: str) -> str:
    return record.encode(msgspec.json.decode(line.encode(), type=record.Record)).decode()


def _call(arguments: Any) -> record.Meters:
    return record.Meters(*arguments[0], **arguments[1])


def _identity() -> list[bool]:
    """Say whether values that are compared by identity are."""
    one, other = Dim("b", 1), Dim("b", 1)
    return [one == one, one == other, len({one, other}) == 2]


def main() -> None:
    """Read what to say from standard input."""
    asked = json.load(sys.stdin)
    said = {
        "name": msgspec.__name__,
        "answers": {name: _answer(each) for name, each in asked["answers"].items()},
        "requests": [_said(_read, each) for each in asked["requests"]],
        "values": [_values(each) for each in asked["values"]],
        "identity": _identity(),
        "records": [_said(_record, line) for line in asked["records"]],
        "numbers": [msgspec.json.encode(float(each)).decode() for each in asked["numbers"]],
        "text": msgspec.json.format(msgspec.json.encode(asked["text"]), indent=2).decode(),
        "frozen": _said(setattr, parse_request({"model": "gpt2"}), "seq_len", 1),
        "calls": [_said(_call, each) for each in asked["calls"]],
    }
    said["classes"] = {
        f"{cls.__module__}.{cls.__qualname__}": _class(cls)
        for cls in _subclasses(Struct)
        if cls.__module__.startswith("estimator.")
    }
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
