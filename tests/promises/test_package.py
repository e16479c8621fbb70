"""What the package promises as a package: light to import, imports that only go down, and a surface that is pinned."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from architecture_page import LINE, faces, imports_of, is_below, modules, room_of
from heavy import HEAVY

import lmprobe_zarr as lz
from lmprobe_zarr import errors

# What a module must never know, whatever the line.
NEVER = [
    ("storage", "store.format"),
    ("store.format", "storage"),
    (
        "bridges.(entry|files|tensors|arrays|lmprobe_v1|lmprobe_v2|lmprobe_write|lazy|lmprobe_folders|raw_arrays|torch_archive|row_source|"
        "activault|hallulens|probelab|saelens)",
        "store(?!.format)",
    ),
    ("extraction.models", "store"),
]
FACES = faces()


def test_every_room_has_its_line() -> None:
    assert {room_of(module) for module in modules()} == set(LINE)


def test_imports_only_go_down() -> None:
    for module, path in modules().items():
        room = room_of(module)
        for other, name in imports_of(path):
            there = room_of(other)
            if there == room:
                continue
            assert is_below(room, there), f"{module} imports {other}, which is not below {room}"
            assert not name.startswith("_") or name == "__version__", f"{module} imports {name}, which is private to {other}"


def test_forbidden_imports_are_absent() -> None:
    for module, path in modules().items():
        for other, _ in imports_of(path):
            for room, unknown in NEVER:
                if re.match(rf"{room}(\.|$)", module):
                    assert not re.match(rf"{unknown}(\.|$)", other), f"{module} must not know {other}"


def test_another_room_is_entered_by_its_face() -> None:
    for module, path in modules().items():
        for other, name in imports_of(path):
            room = room_of(other)
            if room == room_of(module) or room not in FACES:
                continue
            if other == room and not name:
                continue  # the face itself
            if other == room:
                assert name in FACES[room].names, f"{module} imports {name}, which {room} does not name in __all__"
            else:
                assert f"``{other.removeprefix(room + '.')}``" in FACES[room].doc, (
                    f"{module} imports {other}, which the face of {room} does not name"
                )


def test_only_config_reads_the_environment() -> None:
    for module, path in modules().items():
        if module != "config":
            assert "environ" not in path.read_text(), path.name


def test_nothing_pickles_or_evaluates() -> None:
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "cloudpickle", "joblib", "marshal", "shelve"}, path.name
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, path.name


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True, timeout=120).stdout


def test_importing_the_package_is_light() -> None:
    code = f"import sys, lmprobe_zarr; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run_python(code).strip() == "[]"


WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'transformers', 'accelerate'): raise ModuleNotFoundError('No module named ' + name, name=name)
sys.meta_path.insert(0, Refuse())
import numpy as np, lmprobe_zarr as lz
store = lz.open_store(sys.argv[1] if len(sys.argv) > 1 else 'memory://without-torch')
rng = np.random.default_rng(0)
y = np.arange(40) % 2
x = rng.standard_normal((40, 8)).astype('f4') + 3 * y[:, None]
texts = [f'prompt {i}' for i in range(40)]
lz.write_activations(store, model='m', prompts=texts, pooled={'resid_mean': {0: x, 1: x[::-1].copy()}}, coords={'label': y})
ds = store.dataset('m')
assert (ds.resid_mean.sel(layer=0, prompt=lz.prompt_hash('prompt 3')).values == x[3]).all()
scores = lz.sweep(ds.resid_mean, labels='label', cv=2)
assert float(scores.accuracy.sel(layer=0).mean()) > 0.9
for call in (lambda: lz.extract('m/m', ['unseen'], store=store), lambda: ds.resid_mean.lz.to_torch()):
    try:
        call()
    except lz.errors.MissingDependencyError as error:
        assert 'lmprobe-zarr[models]' in str(error), error
    else:
        raise AssertionError('no error')
print('fine')
"""


def test_reading_slicing_and_sweeping_need_no_torch() -> None:
    assert run_python(WITHOUT_TORCH).strip() == "fine"


def test_the_surface_is_pinned() -> None:
    assert sorted(lz.__all__) == [
        "CacheInfo",
        "CachedPrompt",
        "CachedPromptInfo",
        "ExportSummary",
        "ExtractPlan",
        "ExtractStats",
        "Generate",
        "ImportSummary",
        "LayerSweep",
        "ModelCacheInfo",
        "Probe",
        "ProbeEnsemble",
        "Report",
        "SparseAutoencoder",
        "Store",
        "SweepPlan",
        "TokenIndex",
        "Watch",
        "cache_info",
        "clear_cache",
        "clear_read_cache",
        "compare",
        "compare_groups",
        "confidence_intervals",
        "config",
        "cosine_similarity",
        "discover_cached",
        "enable_cache_logging",
        "encode",
        "errors",
        "evict",
        "export_safetensors",
        "extract",
        "fit_directions",
        "fit_tokens",
        "import_activault",
        "import_hallulens",
        "import_lmprobe_dataset",
        "import_npy",
        "import_probelab",
        "import_pt",
        "import_saelens",
        "import_safetensors",
        "import_source",
        "import_tensors",
        "import_vllm",
        "list_cached_prompts",
        "list_sites",
        "load_directions",
        "load_sae",
        "logit_lens",
        "mask_tokens",
        "open_legacy",
        "open_store",
        "plan_extract",
        "plan_sweep",
        "pool_latents",
        "pooling_weights",
        "prompt_hash",
        "report",
        "score_tokens",
        "selectivity",
        "set_cache_backend",
        "set_cache_dtype",
        "set_cache_limit",
        "steer",
        "sweep",
        "sweep_tokens",
        "sweep_transfer",
        "top_tokens",
        "watch",
        "write_activations",
    ]
    for name in lz.__all__:
        assert getattr(lz, name).__doc__, name


@pytest.mark.parametrize("name", [n for n in errors.__all__ if n not in ("LmprobeZarrError", "CacheWarning")])
def test_every_error_is_ours_and_the_nearest_built_in(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.LmprobeZarrError)
    builtins = [base for base in error.__mro__ if base.__module__ == "builtins" and base not in (Exception, BaseException, object)]
    assert builtins, name
    assert str(error("what was given")) == "what was given", "a KeyError would add quotes"
