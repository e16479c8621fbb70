"""Settings of the process that change what is computed have provenance fields, and the defaults have none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import PROMPTS, save_tiny, tiny_model, tiny_tokenizer

import lmprobe_zarr as lz
from lmprobe_zarr.batch import prompt_hash

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
pytestmark = pytest.mark.model

from lmprobe_zarr.extraction.models.numerics import device_types, settings_fields  # noqa: E402


@contextmanager
def precision(name: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def default_dtype(dtype: Any) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")


def test_the_defaults_have_no_fields() -> None:
    assert settings_fields(("cpu",)) == settings_fields(("cuda", "cpu")) == settings_fields(device_types()) == {}
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        assert settings_fields(("cpu",)) == {}


@pytest.mark.parametrize(
    ("setting", "device", "fields"),
    [
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), "cpu", {"autocast": "bfloat16"}),
        (lambda: torch.autocast("cpu", dtype=torch.float16), "cpu", {"autocast": "float16"}),
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), "cuda", {}),
        (lambda: precision("medium"), "cpu", {"float32_precision": "products in bf16"}),
        (lambda: precision("high"), "cpu", {"float32_precision": "products in tf32"}),
        (lambda: precision("high"), "cuda", {"float32_precision": "products in tf32"}),
        (tf32, "cuda", {"float32_precision": "products in tf32"}),
        (lambda: default_dtype(torch.float64), "cpu", {"default_dtype": "float64"}),
        (lambda: default_dtype(torch.bfloat16), "cpu", {"default_dtype": "bfloat16"}),
    ],
)
def test_each_setting_has_its_field(setting: Any, device: str, fields: dict[str, str]) -> None:
    with setting():
        assert settings_fields((device,)) == fields
    assert settings_fields((device,)) == {}


def test_nothing_is_imported_to_find_that_nothing_was_set() -> None:
    code = (
        "import sys; from lmprobe_zarr.extraction.models import identify\n"
        "print(identify(sys.argv[1]).provenance)\n"
        "assert 'torch' not in sys.modules"
    )
    folder = "owner/never-seen"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert "autocast" not in done.stdout


SETTINGS = [lambda: torch.autocast("cpu", dtype=torch.bfloat16), lambda: precision("medium"), lambda: default_dtype(torch.float64)]


@pytest.mark.few(1)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("lowered_first", [True, False])
def test_what_is_computed_under_a_setting_never_serves_a_call_without_it(
    setting: Any, by_name: bool, lowered_first: bool, tmp_path: Path
) -> None:
    folder = save_tiny("llama", tmp_path / "m")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    store = lz.open_store(tmp_path / "store")
    own: dict[str, Any] = {} if by_name else {"tokenizer": tiny_tokenizer(), "name": "m"}
    given = folder if by_name else model

    def extract(inside: AbstractContextManager[Any] | None = None) -> Any:
        if inside is None:
            return lz.extract(given, PROMPTS, store=store, keep_tokens=True, progress=False, device="auto" if not by_name else "cpu", **own)
        with inside:
            return lz.extract(given, PROMPTS, store=store, keep_tokens=True, progress=False, device="auto" if not by_name else "cpu", **own)

    runs = [extract(setting()), extract()] if lowered_first else [extract(), extract(setting())]
    lowered, plain = runs if lowered_first else reversed(runs)
    assert (lowered.found, plain.found) == (0, 0)
    assert lowered.group != plain.group
    assert extract(setting()).found == extract().found == len(PROMPTS)
    for prompt in PROMPTS[:2]:
        ids = torch.tensor([tiny_tokenizer()(prompt)["input_ids"]])
        with torch.no_grad():
            truth = model(input_ids=ids, output_hidden_states=True).hidden_states[3][0].numpy()
        # Read by the model's name alone, it is the group without settings.
        kept = store.tokens("m").resid.sel(layer=2, prompt=prompt_hash(prompt)).values
        np.testing.assert_allclose(kept, truth, atol=1e-5)
    assert set(store.groups()[lowered.group].provenance) - set(store.groups()[plain.group].provenance) in (
        {"autocast"}, {"float32_precision"}, {"default_dtype"},
    )  # fmt: skip


def test_two_settings_beside_each_other_are_an_error_in_words(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path)
    options: dict[str, Any] = {"store": store, "name": "m", "tokenizer": tiny_tokenizer(), "progress": False}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lz.extract(tiny_model("llama"), PROMPTS, **options)
    with precision("medium"):
        lz.extract(tiny_model("llama"), PROMPTS, **options)
    with pytest.raises(lz.errors.AmbiguousProvenanceError, match=r"autocast: 'bfloat16' or off \(the dtype of torch.autocast") as error:
        store.dataset("m")
    assert "float32_precision: 'products in bf16' or the default" in str(error.value)
