"""What CONTRIBUTING.md tells a contributor to do does what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from paths import ROOT

import lmprobe_zarr as lz

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

SWEEP = """
import sys
import numpy as np, lmprobe_zarr as lz
from lmprobe_zarr.cli import main
from lmprobe_zarr.probes import named_probes
assert lz.__file__.startswith(sys.argv[1]), lz.__file__
assert "no probabilities" in named_probes("classification")["perceptron"]
rng = np.random.default_rng(0)
y = np.arange(40) % 2
x = rng.standard_normal((40, 8)).astype("float32") + 3 * y[:, None]
lz.write_activations("acts", model="m", prompts=[f"prompt {i}" for i in range(40)], pooled={"resid_mean": {0: x}}, coords={"label": y})
scores = lz.sweep(lz.open_store("acts").dataset().resid_mean, labels="label", probes=["perceptron"], cv=2)
assert float(scores.accuracy.mean()) > 0.9
assert main(["sweep", "acts", "--variable", "resid_mean", "--probes", "perceptron", "--cv", "2"]) == 0
"""


def test_the_recipe_for_a_classifier_gives_a_probe_like_the_others(tmp_path: Path) -> None:
    function, line = re.findall(r"^```py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    package = tmp_path / "clone" / "lmprobe_zarr"
    shutil.copytree(Path(lz.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    module = package / "probes" / "classifiers.py"
    code = module.read_text(encoding="utf-8")
    for anchor, piece in (
        ("@dataclass(frozen=True, slots=True)\nclass _NamedProbe", f"{function}\n\n"),
        ('    "majority": _NamedProbe(', line),
    ):
        assert code.count(anchor) == 1
        code = code.replace(anchor, piece + anchor)
    module.write_text(code, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SWEEP, str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "perceptron" in done.stdout


def test_the_files_and_names_of_the_page_are_there() -> None:
    for name in set(re.findall(r"`((?:tests|lmprobe_zarr|docs)/[\w/.]*)`", PAGE)):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", PAGE, re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", PAGE):
        assert f"def {name}(" in tests, name
    assert "NAMES" in (ROOT / "tests" / "probes" / "test_classifiers.py").read_text()
    assert "_KINDS" in (ROOT / "lmprobe_zarr" / "probes" / "files.py").read_text()
