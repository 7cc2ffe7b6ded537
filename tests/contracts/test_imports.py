"""Who may import whom, and what an estimate loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[2]

# Each module may import itself and what stands below it. `result` is below the steps that fill it
# in: it holds nothing but the types of the document.
ORDER = (
    ("__main__",),
    ("cli", "reconcile_command"),
    ("commands",),
    ("engines", "flags", "nvml", "render", "request_file"),
    ("plugins",),
    ("service",),
    ("reconcile",),
    ("terms",),
    ("measurement",),
    ("hypotheses", "out_of_memory"),
    ("waterfall",),
    ("planner",),
    ("pipeline",),
    ("breakdown", "resolve", "traits"),
    ("request",),
    ("calibration", "oom_message", "verdict"),
    ("calibration_file",),
    ("result",),
    ("memory",),
    ("techniques",),
    ("run",),
    ("model",),
    ("catalog",),
    ("hub",),
    ("config_file",),
    ("eager",),
    ("optimizer",),
    ("record",),
    ("components", "dtypes", "section"),
    ("errors", "sources", "units"),
)
RANKS = {name: rank for rank, names in enumerate(ORDER) for name in names}

HEAVY = ("torch", "numpy", "fastapi", "rich", "huggingface_hub", "transformers", "plotly")

ESTIMATE = """
import sys
import estimator.service
from estimator.render.document import to_json
result = estimator.service.estimate({"model": "meta-llama/Llama-3.1-8B", "method": "qlora"})
assert to_json(result)
print("\\n".join(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_the_import_contracts_of_the_project_hold():
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def _top_level_imports(path: Path) -> set[str]:
    """Return the estimator's modules that a file imports when it is loaded."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("estimator."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "estimator":
            found |= {each.name for each in node.names if each.name in RANKS}
    return found


def _module(path: Path) -> str:
    return path.relative_to(ROOT / "estimator").parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path",
    sorted(ROOT.glob("estimator/**/*.py")),
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_imports_point_one_way(path):
    own = _module(path)
    if own == "__init__":
        assert _top_level_imports(path) == set()
        return
    imported = _top_level_imports(path) - {own}
    assert {own, *imported} <= RANKS.keys(), "a module has no place in the order of imports"
    assert {each for each in imported if RANKS[each] <= RANKS[own]} == set()


def test_an_estimate_loads_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", ESTIMATE],
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) & {*HEAVY, "profiler", "web"} == set()
