"""Tiny models of transformers' types, found by structure and compared with plain transformers; all of them in ``make stress``."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import zoo  # noqa: E402 — after the skips
from zoo_check import TOLERANCE, Outcome, examine  # noqa: E402

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore")]  # of transformers' own, in many model types

PAGE = Path(__file__).resolve().parents[3] / "docs" / "models.md"
NAMED = (
    "qwen3_5_text", "qwen3_next", "gemma4_text", "gpt_oss", "olmo3", "glm4", "glm4_moe", "granite", "llama4_text", "gemma3n_text", "mamba",
    "rwkv", "jamba", "recurrent_gemma", "smollm3", "olmo2", "phi3", "cohere2", "mistral", "bloom",
)  # fmt: skip
OTHERS = (
    "apertus", "arcee", "biogpt", "codegen", "ernie4_5", "falcon_mamba", "gpt_bigcode", "gpt_neo", "gptj", "internlm2", "lfm2", "minicpm3",
    "mpt", "nemotron_h", "olmoe", "persimmon", "stablelm", "starcoder2", "xglm", "xlnet", "zamba2", "ctrl", "mllama", "cpmant",
)  # fmt: skip
ELSEWHERE = (
    ("masked", "modernbert"), ("masked", "albert"), ("masked", "distilbert"), ("masked", "deberta-v2"), ("masked", "longformer"),
    ("seq2seq", "t5"), ("seq2seq", "bart"), ("image", "gemma3"), ("image", "qwen2_5_vl"), ("image", "llava"),
)  # fmt: skip


def outcome(mapping: str, model_type: str) -> Outcome:
    if model_type not in zoo.types_of(mapping):
        pytest.skip(f"{model_type} is not in transformers {transformers.__version__}")
    if model_type == "recurrent_gemma" and transformers.__version__.startswith("4."):
        pytest.skip("keeps the state of the last batch, so that in transformers 4 the next call with another number of prompts fails")
    row = examine(mapping, model_type)
    if row.state == "not built":
        pytest.skip(row.why)
    return row


@pytest.mark.parametrize(("mapping", "model_type"), [*(("causal", t) for t in (*NAMED, *OTHERS)), *ELSEWHERE], ids=str)
@pytest.mark.few(6)
def test_a_type_is_found_by_itself_and_gives_what_transformers_gives_for_one_prompt(mapping: str, model_type: str) -> None:
    row = outcome(mapping, model_type)
    assert row.state == "found", row
    assert row.difference <= TOLERANCE


def test_most_of_the_sample_is_known_to_the_installed_transformers() -> None:
    assert len(set(NAMED + OTHERS) & set(zoo.types_of("causal"))) >= 20


@pytest.mark.few(1)
@pytest.mark.parametrize(("mapping", "model_type"), [("causal", "hrm_text"), ("causal", "xlm"), ("causal", "deepseek_v4")])
def test_a_type_that_is_not_found_is_refused_with_a_reason(mapping: str, model_type: str) -> None:
    row = outcome(mapping, model_type)
    assert row.state == "refused", row
    assert re.search(r"is not run: |were not found \(", row.why), row.why
    assert "modules={'layers'" in row.why


@pytest.mark.skipif(not os.environ.get("LMPROBE_ZARR_STRESS"), reason="all types take a quarter of an hour: make stress")
@pytest.mark.parametrize("mapping", zoo.MAPPINGS)
def test_no_type_of_transformers_is_wrong(mapping: str) -> None:
    from models_page import rows_of

    rows = rows_of([mapping])
    assert [row for row in rows if row.state == "wrong"] == []
    built = [row for row in rows if row.state != "not built"]
    assert sum(row.state == "found" for row in built) >= 0.95 * len(built)


def test_the_page_of_models_holds_every_type_and_names_none_as_wrong() -> None:
    text = PAGE.read_text(encoding="utf-8")
    version = re.search(r"model type of transformers (\S+) that", text)
    assert version is not None
    assert "and 0 are wrong" in text
    assert "| wrong |" not in text
    if version.group(1) == transformers.__version__:
        for mapping in zoo.MAPPINGS:
            for model_type in zoo.types_of(mapping):
                assert f"| {model_type} |" in text
