"""Code that comes with a model: whether it runs is in the key where transformers has a class of that type too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import PROMPTS, save_tiny, tiny_tokenizer

import lmprobe_zarr as lz
from lmprobe_zarr.batch import prompt_hash
from lmprobe_zarr.extraction.models import identify
from lmprobe_zarr.extraction.models.identity import remote_code_field

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
pytestmark = pytest.mark.model

CODE = """from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel


class Shifted(LlamaModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)

    def __init__(self, config):
        super().__init__(config)
        for block in self.layers:
            block.self_attn.scaling = block.self_attn.scaling * 3


class ShiftedForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for block in self.model.layers:
            block.self_attn.scaling = block.self_attn.scaling * 3
"""


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def with_code(folder: Path, **auto_map: str) -> Path:
    save_tiny("llama", folder, head="AutoModelForCausalLM")
    (folder / "own_code.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    return folder


@pytest.mark.few(1)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("auto_map", [{"AutoModel": "own_code.Shifted"}, {"AutoModelForCausalLM": "own_code.ShiftedForCausalLM"}])
def test_one_folder_with_and_without_its_code_is_two_groups(auto_map: dict[str, str], first: bool, tmp_path: Path) -> None:
    folder = with_code(tmp_path / f"m{first}{len(str(auto_map))}", **auto_map)
    store = lz.open_store(tmp_path / "store")
    options: dict[str, Any] = {"store": store, "keep_tokens": True, "progress": False, "device": "cpu"}
    groups = {}
    for trusted in (first, not first):
        stats = lz.extract(folder, PROMPTS, trust_remote_code=trusted, **options)
        assert stats.found == 0
        groups[trusted] = stats.group
        assert lz.extract(folder, PROMPTS, trust_remote_code=trusted, **options).found == len(PROMPTS)
    for trusted, group in groups.items():
        kind = getattr(transformers, next(iter(auto_map)))
        model = kind.from_pretrained(folder, trust_remote_code=trusted).eval()
        with torch.no_grad():
            out = model(input_ids=torch.tensor([tiny_tokenizer()(PROMPTS[0])["input_ids"]]), output_hidden_states=True)
        kept = store.tokens(folder.name, group=group).resid.sel(layer=1, prompt=prompt_hash(PROMPTS[0])).values
        np.testing.assert_allclose(kept, out.hidden_states[2][0].numpy(), atol=1e-5)


def test_the_field_names_the_classes_and_is_absent_where_nothing_else_could_run(tmp_path: Path) -> None:
    folder = with_code(tmp_path / "m", AutoModel="own_code.Shifted")
    assert "remote_code" not in identify(folder).provenance
    assert identify(folder, trust_remote_code=True).provenance["remote_code"] == "own_code.Shifted"
    (folder / "inner").mkdir()
    (folder / "inner" / "more.py").write_text("A = 1")
    with_more = identify(folder, trust_remote_code=True).provenance["remote_code"]
    (folder / "inner" / "more.py").write_text("A = 2")
    assert "own_code.Shifted" != with_more != identify(folder, trust_remote_code=True).provenance["remote_code"]
    unknown = {"model_type": "of_nobody", "auto_map": {"AutoModel": "own_code.Shifted"}}
    assert remote_code_field(unknown, folder, folder, None, trusted=True) == {}


def test_code_from_another_repository_is_named_with_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = []
    for commit in ("a" * 40, "b" * 40):
        reference = tmp_path / "models--other--code" / "refs" / "main"
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
        config = {"model_type": "llama", "auto_map": {"AutoModel": "other/code--own_code.Shifted"}}
        found.append(remote_code_field(config, None, None, None, trusted=True)["remote_code"])
    assert found == [f"other/code--own_code.Shifted@{letter * 40}" for letter in "ab"]


def test_a_tokenizer_that_runs_code_of_its_own_counts(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "m")
    tokens = tmp_path / "tokens"
    tiny_tokenizer().save_pretrained(tokens)
    settings = json.loads((tokens / "tokenizer_config.json").read_text())
    (tokens / "tokenizer_config.json").write_text(json.dumps({**settings, "auto_map": {"AutoTokenizer": [None, "own_tokens.Mine"]}}))
    found = set()
    for text in ("A = 1", "A = 2"):
        (tokens / "own_tokens.py").write_text(text)
        found.add(identify(folder, tokenizer=tokens, trust_remote_code=True).provenance["remote_code"])
        assert "remote_code" not in identify(folder, tokenizer=tokens).provenance
    assert len(found) == 2
