"""Where no home directory is known, as for a user id that the system does not know: what names its store works."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from warmed import Warmed

BEGIN = """
import os, pwd, warnings
import numpy as np
import lmprobe_zarr as lz
import lmprobe_zarr.errors

def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = unknown
os.environ.pop("HOME", None)
values = {"resid_mean": {0: np.ones((1, 4), "float32")}}

def refused(call, *words):
    try:
        call()
    except lz.errors.LmprobeZarrError as error:
        assert all(word in str(error) for word in words), str(error)
    else:
        raise AssertionError("not refused")
"""
NAMED = """
folder = os.getcwd()
lz.write_activations(folder + "/acts", model="m", prompts=["a"], pooled=values)
assert lz.open_store("acts").models() == ["m"]
for call in (lz.cache_info, lz.open_store, lz.clear_cache, lambda: lz.evict(max_gb=1)):
    refused(call, "LMPROBE_CACHE_DIR", "home directory")
for place in ("~", "~/acts", "~/.cache/lmprobe"):
    refused(lambda: lz.write_activations(place, model="m", prompts=["a"], pooled=values), "home directory is not known", "./~")
os.environ["LMPROBE_CACHE_DIR"] = "~/cache"
lz.config.reload()
refused(lz.open_store, "LMPROBE_CACHE_DIR", "home directory")
os.environ["LMPROBE_CACHE_DIR"] = folder + "/cache"
lz.config.reload()
lz.write_activations(None, model="m", prompts=["a"], pooled=values)
assert lz.cache_info().models[0].num_prompts == 1
from lmprobe_zarr.cli import main
assert main(["info", "acts"]) == 0
"""
MODEL = """
import sys
lz.extract(sys.argv[1], ["a cat"], store="named", progress=False)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    probe = lz.Probe(sys.argv[1], layers=1).fit(["a cat", "a"], ["b", "b dog"])
    probe.predict(["a"])
ours = [w for w in caught if issubclass(w.category, lz.errors.CacheWarning)]
assert len(ours) == 1 and "LMPROBE_CACHE_DIR" in str(ours[0].message), [str(w.message) for w in caught]
"""


def run(warmed: Warmed, code: str, folder: Path, *arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LMPROBE_")} | {"HF_HUB_OFFLINE": "1"}
    done = warmed.run(BEGIN + code, *arguments, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert not (folder / "~").exists()


def test_without_a_home_directory_a_call_that_names_its_store_works(warmed: Warmed, tmp_path: Path) -> None:
    run(warmed, NAMED, tmp_path)


@pytest.mark.model
def test_without_a_home_directory_a_model_is_extracted_and_a_probe_warns_once(warmed: Warmed, tmp_path: Path, tiny_models: Any) -> None:
    run(warmed, MODEL, tmp_path, str(tiny_models("gpt2")))
