"""Every citation in the estimator, read from its source code without running it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from estimator.sources import SOURCES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "estimator"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Citation:
    """One pointer to a source: a `Cite(...)`, or a `Source:` line of a docstring.

    Args:
        where: the place inside the source, as it is written.
        file: the file that cites, from the root of the repository.
        function: the function or class around it; empty at the top of a file.
        in_docstring: whether it is a `Source:` line.
    """

    key: str
    where: str
    file: str
    function: str
    in_docstring: bool


def citations() -> tuple[Citation, ...]:
    """Return every citation of the package, in the order of files and lines."""
    return tuple(each for path in sorted(PACKAGE.rglob("*.py")) for each in _of_file(path))


def _of_file(path: Path) -> Iterator[Citation]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    file = path.relative_to(ROOT).as_posix()
    makers, constants = _makers(tree), _constants(tree)
    for owner, name in _owners(tree):
        docstring = ast.get_docstring(owner, clean=True) or ""
        for key, where in sources_of(docstring):
            yield Citation(key, where, file, name, in_docstring=True)
        for node in _own_nodes(owner):
            if isinstance(node, ast.Name) and node.id in constants and name:
                yield Citation(*constants[node.id], file, name, in_docstring=False)
            elif isinstance(node, ast.Call) and (found := _cited(node, makers)):
                yield Citation(*found, file, name, in_docstring=False)


def _owners(tree: ast.Module) -> Iterator[tuple[ast.Module | ast.ClassDef | Function, str]]:
    """Yield the module, and every class and every function that is not inside a function."""

    def inside(parent: ast.AST, prefix: str) -> Iterator[tuple[ast.ClassDef | Function, str]]:
        for child in ast.iter_child_nodes(parent):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield child, f"{prefix}{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from inside(child, f"{prefix}{child.name}.")

    yield tree, ""
    yield from inside(tree, "")


def _own_nodes(owner: ast.AST) -> Iterator[ast.AST]:
    """Walk an owner; what belongs to an owner inside it is left to that one."""
    for child in ast.iter_child_nodes(owner):
        nested = isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if nested and not isinstance(owner, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        yield child
        yield from _own_nodes(child) if not nested else ast.walk(child)


def _makers(tree: ast.Module) -> dict[str, str]:
    """Return the functions that put a place behind a fixed key, such as `_derivative`."""
    makers = {}
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or not node.args.args:
            continue
        last = node.body[-1]
        if isinstance(last, ast.Return) and isinstance(last.value, ast.Call):
            call = last.value
            named = isinstance(call.func, ast.Name) and call.func.id == "Cite"
            if named and len(call.args) == 2 and isinstance(call.args[1], ast.Name):
                makers[node.name] = str(ast.literal_eval(call.args[0]))
    return makers


def _constants(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Return the citations that a file gives a name at its top."""
    constants = {}
    for node in tree.body:
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        for target in targets:
            value = getattr(node, "value", None)
            if isinstance(target, ast.Name) and isinstance(value, ast.Call):
                found = _cited(value, {})
                if found:
                    constants[target.id] = found
    return constants


def _cited(call: ast.Call, makers: dict[str, str]) -> tuple[str, str] | None:
    """Return the key and the place of a call, where both are written down."""
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    words = [each.value for each in call.args if isinstance(each, ast.Constant)]
    if name == "Cite" and len(words) == 2:
        return str(words[0]), str(words[1])
    if name in makers and len(words) == 1 and isinstance(words[0], str):
        return makers[name], words[0]
    return None


def sources_of(docstring: str) -> tuple[tuple[str, str], ...]:
    """Return the sources that a docstring names; a clause without a key goes on with the last.

    Example:
        >>> sources_of("Bytes.\\n\\nSource: hu2021, section 4.1; peft, tuners/lora/layer.py.")
        (('hu2021', 'section 4.1'), ('peft', 'tuners/lora/layer.py'))
    """
    found = re.search(r"^Source: (.+?)(?:\n\s*\n|\Z)", docstring, re.MULTILINE | re.DOTALL)
    if not found:
        return ()
    named: list[tuple[str, str]] = []
    for clause in " ".join(found[1].split()).rstrip(".").split("; "):
        key, _, where = clause.partition(", ")
        if named and key not in SOURCES:
            named[-1] = (named[-1][0], f"{named[-1][1]}; {clause}")
        else:
            named.append((key, where))
    return tuple(named)
