"""The catalogue is found in a checkout and travels inside a wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import estimator
from estimator.catalog import data_folder, folder
from estimator.errors import CannotEstimateError

ROOT = Path(estimator.__file__).resolve().parents[1]

FIND_BOTH = """
from estimator.catalog import Access, data_folder, find_gpu, find_model, models
assert len(models()) == 558, len(models())
print(data_folder(), find_model("gpt2", Access.CATALOGUE).id, find_gpu("l4").key)
"""


def test_a_checkout_and_an_editable_install_read_the_top_level_folder():
    assert data_folder() == ROOT / "data"


def test_an_installation_without_its_data_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(folder, "_PACKAGE", tmp_path / "estimator")
    with pytest.raises(CannotEstimateError, match="install vramplan again"):
        data_folder.__wrapped__()


def test_a_wheel_carries_the_catalogue_and_reads_it_from_there(tmp_path):
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    assert {"estimator/_data/gpus.json", "estimator/_data/models/index.json"} <= names
    assert {f"estimator/_data/models/{path.name}" for path in (ROOT / "data/models").iterdir()} <= (
        names
    )
    answer = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r})\n{FIND_BOTH}"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert answer.split() == [str(site / "estimator/_data"), "openai-community/gpt2", "l4"]
