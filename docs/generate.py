"""Write the generated pages and the generated parts of README.md from the code.

`python docs/generate.py` writes them; with `--check` it names those that are out of date instead,
and exits 1 if there are any.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

import formulas
import techniques
from citations import ROOT, citations
from formulas import EXAMPLE, table

from estimator.catalog import models
from estimator.errors import EstimatorError, UnsupportedCombinationError
from estimator.flags import request_fields
from estimator.model.families import FAMILIES, read_spec
from estimator.render.text import thin
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.sources import SOURCES
from estimator.techniques.execution import CHECKPOINTING
from estimator.techniques.kernels import KERNELS
from estimator.techniques.optimizers import OPTIMIZERS

DOCS: Final = ROOT / "docs"
README: Final = ROOT / "README.md"
RECONCILE: Final = DOCS / "reconcile.md"


def main(arguments: list[str]) -> int:
    """Write every page that is out of date, or only name it under `--check`."""
    check = "--check" in arguments
    stale = [(path, text) for path, text in pages() if not path.exists() or _read(path) != text]
    for path, text in stale:
        if not check:
            path.write_text(text, encoding="utf-8")
        print(f"{'out of date' if check else 'written'}: {path.relative_to(ROOT)}")
    return 1 if check and stale else 0


def pages() -> Iterator[tuple[Path, str]]:
    """Yield every generated page with the text that it should have."""
    yield DOCS / "formulas.md", formulas.page()
    yield DOCS / "sources.md", _sources()
    yield DOCS / "techniques.md", techniques.page()
    yield DOCS / "models.md", _models()
    yield README, _filled(README, SECTIONS)
    yield RECONCILE, _filled(RECONCILE, EXPLAINED)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# -- sources.md --------------------------------------------------------------------------------


def _sources() -> str:
    """Return the page of sources: what each key stands for, and the places that are cited in it."""
    cited: dict[str, dict[str, set[str]]] = {key: {} for key in SOURCES}
    for each in citations():
        if each.key in cited:
            cited[each.key].setdefault(each.where, set()).add(each.file)
    overview = table(
        ("key", "kind", "source"),
        (
            (f"[`{key}`](#{key})", row.kind, f"[{row.title}]({row.url})")
            for key, row in SOURCES.items()
        ),
    )
    parts = [
        f"""\
# Sources

Written by `docs/generate.py` from `estimator/sources.py` and from every citation in the code; a
test fails when this page is out of date, and another opens the installed libraries and looks for
each cited file and function.

{overview}"""
    ]
    for key, places in cited.items():
        rows = ((where, ", ".join(sorted(files))) for where, files in sorted(places.items()))
        parts.append(f"## {key}\n\n{table(('place', 'cited in'), rows)}")
    return "\n".join(parts)


# -- models.md ---------------------------------------------------------------------------------


def _models() -> str:
    """Return the page of models: families that have an answer, and catalogue models of each."""
    known = [model for model in models() if model.family in FAMILIES]
    refused = Counter(model.family for model in models() if model.family not in FAMILIES)
    parts = [
        f"""\
# Models

Written by `docs/generate.py`; a test fails when this page is out of date. A model whose
`model_type` is one of the families below has an answer, from the catalogue or from its own
`config.json`. Any other family is refused by name with exit code 3.

The catalogue holds {len(known)} models of these {len(FAMILIES)} families. Parameters are what the
estimator counts, tied tensors once; a test compares them with what transformers builds. `yes` in
the last column: the count was also found printed elsewhere and agrees, its parts explained.
"""
    ]
    for family in sorted(FAMILIES):
        rows = []
        for model in sorted(known, key=lambda each: (each.parameters.computed, each.id)):
            if model.family == family:
                total = read_spec(model.config, model.id).total_parameters()
                rows.append((model.id, thin(total), "yes" if model.parameters.verified else "no"))
        source = f"`estimator/model/families/{FAMILIES[family]}.py`"
        columns = ("model", "parameters", "agrees with a printed count")
        parts.append(f"## {family}\n\nIts forward pass: {source}.\n\n{table(columns, rows)}")
    rest = ", ".join(f"{family} ({count})" for family, count in sorted(refused.items()))
    parts.append(f"## In the catalogue, refused for now\n\n{rest}.\n")
    return "\n".join(parts)


# -- README.md ---------------------------------------------------------------------------------


def _filled(path: Path, sections: dict[str, Callable[[], str]]) -> str:
    """Return a page with its generated parts written again between their markers."""
    text = _read(path)
    for name, part in sections.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"{path.name} needs the markers of {name!r} once")
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}{part()}{end}{rest.partition(end)[2]}"
    return text


def _command(*arguments: str) -> str:
    """Return what the command prints on a page of 80 columns, as a block."""
    done = subprocess.run(  # noqa: S603 - our own command, with arguments of our own
        [sys.executable, "-m", "estimator", *arguments],
        capture_output=True,
        encoding="utf-8",
        check=False,
        env={**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"},
    )
    if done.stderr:
        raise SystemExit(done.stderr)
    return f"```text\n{done.stdout.strip()}\n```\n"


def _run() -> str:
    """Return the output of `make run`, read off the Makefile."""
    found = re.search(r"^run:.*\n\t\$\(BIN\)/estimate (.+)$", _read(ROOT / "Makefile"), re.M)
    if not found:
        raise SystemExit("the Makefile has no run target that calls estimate")
    return _command("--offline", *found[1].split())


def _help() -> str:
    return _command("--help")


def _supported() -> str:
    """Return what has an answer and what is refused by name, found by asking for each choice."""
    rows = []
    for pointer in ASKED:
        answered: list[str] = []
        refused: list[str] = []
        for choice in _choices(pointer):
            (answered if _has_answer(pointer, choice) else refused).append(f"`{choice}`")
        rows.append((pointer.strip("/"), ", ".join(answered), ", ".join(refused)))
    counts = Counter(model.family for model in models() if model.family in FAMILIES)
    listed = ", ".join(f"{family} ({counts[family]})" for family in sorted(FAMILIES))
    return (
        f"Model families, with their models in the catalogue ({counts.total()} in all, "
        f"[docs/models.md](docs/models.md)): {listed}.\n\n"
        f"{table(('field of the request', 'answered', 'refused by name for now'), rows)}"
    )


# -- reconcile.md ------------------------------------------------------------------------------


def _explained(command: str) -> str:
    """Return what a command of the page prints, without its last lists."""
    text = _command("reconcile", "--offline", *shlex.split(command))
    return f"{text.partition('Not tried')[0].rstrip()}\n```\n"


_EXAMPLES: Final = f"{ROOT}/examples"
EXPLAINED: Final[dict[str, Callable[[], str]]] = {
    "measurement": lambda: _explained(
        f"--request {_EXAMPLES}/qlora_measured.json --measured 19.25GiB"
    ),
    "message": lambda: _explained(
        "--model mistralai/Mistral-7B-v0.1 --optimizer adamw_torch --seq-len 4096 "
        "--activation-checkpointing full --attention flash_attention_2 --framework-version 4.45 "
        f"--oom {_EXAMPLES}/out_of_memory.txt"
    ),
}


ASKED: Final = (
    "/task",
    "/method/name",
    "/quantization/name",
    "/precision",
    "/autocast",
    "/fp8/name",
    "/qat/name",
    "/fp8/recipe",
    "/fp8/fp8_format",
    "/optimizer/name",
    "/optimizer/implementation",
    "/activation_checkpointing",
    "/attention",
    "/loss",
    "/method/bias",
    "/parallelism/strategy",
    "/software/framework",
    "/kernels",
)

# Fields that are text in the request, because their choices are a table of the estimator.
_TABLES: Final[dict[str, tuple[str, ...]]] = {
    "/optimizer/name": tuple(OPTIMIZERS),
    "/activation_checkpointing": tuple(CHECKPOINTING),
    "/kernels": tuple(KERNELS),
}


_LITGPT: Final = {"model": "meta-llama/Llama-2-7b-hf", "software": {"framework": "litgpt"}}
# What a choice needs beside it to make sense at all.
_BESIDE: Final[dict[str, dict[str, Any]]] = {
    "partial": {"method": {"last_layers": 1}},
    "llama_adapter": _LITGPT,
    "llama_adapter_v2": _LITGPT,
    "litgpt": {**_LITGPT, "method": {"name": "lora"}},
    **{
        name: {"optimizer": {"momentum": 0.9}, "precision": "fp32"}
        for name in ("sgd_8bit", "sgd_32bit", "lars_32bit")
    },
    **{
        name: {"precision": "fp32"}
        for name in ("rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "adagrad_8bit", "adagrad_32bit")
    },
    "tensorwise": {"fp8": {"name": "torchao"}},
    "rowwise": {"fp8": {"name": "torchao"}},
    "rowwise_with_gw_hp": {"fp8": {"name": "torchao"}},
    "HYBRID": {"fp8": {"name": "te"}},
    "E4M3": {"fp8": {"name": "te"}},
    # As autocast: bf16 weights have gradients that the loss scaler refuses.
    "fp16": {"precision": "fp32"},
    "foak": {"software": {"version": "4"}},
    "unsloth": {"method": {"name": "lora", "lora_dropout": 0.0}},
}


def _choices(pointer: str) -> tuple[str, ...]:
    if pointer in _TABLES:
        return _TABLES[pointer]
    return tuple(
        value
        for kind in request_fields()[pointer].types
        if get_origin(kind) is Literal
        for value in get_args(kind)
    )


def _has_answer(pointer: str, choice: str) -> bool:
    """Ask for one choice of one field, everything else at its default."""
    document: dict[str, Any] = {"model": EXAMPLE, **deepcopy(_BESIDE.get(choice, {}))}
    section, *field = pointer.strip("/").split("/")
    if section == "quantization" or (section == "method" and field != ["name"]):
        document["method"] = {"name": "lora"}
    if section == "kernels":
        document[section] = [choice]
    elif field:
        document[section] = {**document.get(section, {}), field[0]: choice}
    else:
        document[section] = choice
    name = document["model"]
    config = next(model.config for model in models() if model.id == name)
    try:
        resolve(parse_request(document), config, name)
    except UnsupportedCombinationError:
        return False
    except EstimatorError as error:
        raise SystemExit(f"{pointer} {choice!r}: {error}") from None
    return True


SECTIONS: Final[dict[str, Callable[[], str]]] = {
    "run": _run,
    "supported": _supported,
    "help": _help,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
