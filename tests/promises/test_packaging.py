"""What is published: a wheel and a source archive that build, install and work; and what stands beside the code for its readers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from heavy import HEAVY
from paths import ROOT

import lmprobe_zarr as lz

PACKAGE = Path(lz.__file__).parent

# Run with the installed wheel in front of the libraries that it needs, and nothing of the clone.
SMOKE = """
import sys
site, place, *heavy = sys.argv[1:]
sys.path[:0] = [site]
import lmprobe_zarr as lz
assert lz.__file__.startswith(site), lz.__file__
loaded = [name for name in heavy if name in sys.modules]
assert not loaded, loaded
import numpy as np
values = np.arange(12, dtype="float32").reshape(3, 4)
lz.write_activations(place, model="acme/toy", prompts=["a", "b", "c"], pooled={"resid_mean": {2: values}})
data = lz.open_store(place, mode="r").dataset("acme/toy")
assert (data.resid_mean.sel(layer=2, prompt=lz.prompt_hash("b")).values == values[1]).all()
from lmprobe_zarr.cli import main
assert main(["info", place]) == 0
from importlib.metadata import distribution
found = distribution("lmprobe-zarr")
assert found.version == lz.__version__, found.version
print({entry.group: entry.value for entry in found.entry_points})
"""


def run(*command: str | Path, cwd: Path, seconds: float = 240) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git knows of this folder, so that what builds is what others get."""
    if find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the package, is not installed: pip install hatchling")
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no clone of git's")
    copy = tmp_path_factory.mktemp("clone")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in listed:
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def built(clone: Path) -> Path:
    """A folder with the wheel and the source archive."""
    run(sys.executable, "-m", "hatchling", "build", "--directory", clone / "dist", cwd=clone)
    return clone / "dist"


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"lmprobe_zarr-{lz.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"lmprobe_zarr-{lz.__version__}.dist-info/METADATA").decode()
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    there = {
        path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == there
    assert {"lmprobe_zarr/py.typed", "lmprobe_zarr/pages/page.js", "lmprobe_zarr/demo/sentences.csv"} <= names
    assert licences
    assert "License-Expression: Apache-2.0" in metadata
    assert "torch" not in re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE), "reading needs no torch"


def test_the_source_archive_holds_what_builds_tests_and_explains_it(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    wanted = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile"}
    assert wanted <= names, sorted(wanted - names)
    assert {
        "docs/index.md",
        "docs/conf.py",
        "docs/notebook_pages.py",
        "notebooks/first_store.ipynb",
        "docs/templates/sections.html",
    } <= names
    assert {"tests/conftest.py", "lmprobe_zarr/py.typed", "tests/old_stores/version-1/store/zarr.json"} <= names


def test_the_wheel_installs_and_works_away_from_the_clone(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    printed = run(sys.executable, "-I", "-W", "error", "-c", SMOKE, site, tmp_path / "acts", *HEAVY, cwd=tmp_path)
    assert "acme/toy" in printed
    assert "'console_scripts': 'lmprobe_zarr.cli:main'" in printed
    assert "'xarray.backends': 'lmprobe_zarr.backend:LmprobeZarrBackend'" in printed
    # The command that pip made.
    environment = {**os.environ, "PYTHONPATH": str(site)}
    version = subprocess.run(
        [site / "bin" / "lmprobe-zarr", "--version"], capture_output=True, text=True, env=environment, check=True, timeout=60
    )
    assert version.stdout.strip() == f"lmprobe-zarr {lz.__version__}"


def test_the_citation_and_the_changelog_name_this_version() -> None:
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == lz.__version__
    assert {"cff-version", "message", "title", "authors", "license"} <= set(cited)
    assert re.search(rf"^## {re.escape(lz.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_forms_for_issues_are_what_the_forge_takes() -> None:
    yaml = pytest.importorskip("yaml")
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) >= 3
    for form in forms:
        document = yaml.safe_load(form.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(document), form.name
        fields = [field for field in document["body"] if field["type"] != "markdown"]
        assert all(field["type"] in {"textarea", "input", "dropdown", "checkboxes"} for field in fields), form.name
        assert all(field["attributes"]["label"] for field in fields), form.name
        assert len({field["id"] for field in fields}) == len(fields), form.name


# As somebody uses it who has installed nothing else: what is printed comes from the installed package and the libraries that pip chose.
FIRST_USE = """
import sys
import numpy as np
import lmprobe_zarr as lz
place = sys.argv[1]
values = np.random.default_rng(0).standard_normal((2, 40, 8)).astype("float32")
labels = np.arange(40) % 2
values[1] += 3 * labels[:, None]
lz.write_activations(place, model="acme/toy", prompts=[f"p{i}" for i in range(40)], pooled={"resid_mean": {0: values[0], 1: values[1]}})
data = lz.open_store(place, "r").dataset()
assert (data.resid_mean.sel(layer=1).values == values[1]).all()
scores = lz.sweep(data.resid_mean, labels=labels, probes=["ridge"], cv=3)
assert scores.accuracy.sel(layer=1).min() > 0.9 > scores.accuracy.sel(layer=0).mean()
"""


def find_interpreter(version: str) -> str:
    """An interpreter of this version that can make environments, from the path or pyenv's folder; skips where there is none."""
    known = [f"python{version}", *map(str, sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"), reverse=True))]
    code = f"import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != {version!r})"
    for command in known:
        if shutil.which(command) and subprocess.run([command, "-c", code], capture_output=True, check=False).returncode == 0:
            return command
    pytest.skip(f"there is no Python {version} on this machine")


@pytest.mark.long
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_the_wheel_is_installed_into_an_empty_environment_and_used(version: str, built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    run(find_interpreter(version), "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path, seconds=500)
    run(python, "-I", "-W", "error", "-c", FIRST_USE, tmp_path / "acts", cwd=tmp_path)
    command = tmp_path / "env" / "bin" / "lmprobe-zarr"
    assert run(command, "--version", cwd=tmp_path).strip() == f"lmprobe-zarr {lz.__version__}"
    assert "acme/toy" in run(command, "info", tmp_path / "acts", cwd=tmp_path)


@pytest.mark.long
def test_the_source_archive_builds_the_documentation(built: Path, tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    run(sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", "docs", tmp_path / "site", cwd=source)
    assert (tmp_path / "site" / "notebooks" / "first_store.html").stat().st_size > 10_000
