"""The cache on the command line: what deletes asks first, and says what it did."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import call, call_json
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.store.store import Store


@pytest.fixture
def cache() -> Store:
    store = lz.open_store()
    for i in range(3):
        store.write(GROUP, make_batch([f"prompt {i}", f"secret {i}"]))
    return store


def answer(monkeypatch: pytest.MonkeyPatch, word: str) -> list[str]:
    """A user at the terminal types this answer; returns the questions."""
    questions: list[str] = []

    def reply(question: str = "") -> str:
        questions.append(question)
        return word

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", reply)
    return questions


def test_cache_info_prints_and_is_json(cache: Store, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "cache", "info")
    assert code == 0
    assert "acme/toy" in out
    assert "6 prompts" in out
    document = call_json(capsys, "cache", "info")
    assert document["total_size_bytes"] == lz.cache_info().total_size_bytes
    assert document["models"][0]["num_prompts"] == 6
    assert document["limit_bytes"] is None
    assert call_json(capsys, "cache", "info", "--model", "nobody")["models"] == []
    empty = call_json(capsys, "cache", "info", str(Path(cache.url).parent / "other"))
    assert empty["models"] == []


def test_evict_obeys_the_answer(cache: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = call(capsys, "evict", "--max-gb", "0")
    assert (code, out) == (1, "")
    assert "--yes" in err
    questions = answer(monkeypatch, "n")
    assert call(capsys, "evict", "--max-gb", "0")[0] == 1
    assert "3 parts of 6 prompts" in questions[0]
    assert lz.cache_info().models, "a no is a no"
    answer(monkeypatch, "y")
    code, out, _ = call(capsys, "evict", "--max-gb", "0")
    assert code == 0
    assert "3 parts of 6 prompts evicted" in out
    assert not lz.cache_info().models


def test_evict_says_why_there_is_nothing_to_evict(capsys: pytest.CaptureFixture[str]) -> None:
    place = lz.config.default_name()
    assert call(capsys, "evict", "--max-gb", "1", "--yes")[:2] == (0, f"nothing to evict: there is no cache yet at {place}\n")
    lz.open_store().write(GROUP, make_batch(["a"]))
    no_limit = "nothing to evict: no limit is set: give --max-gb, or set LMPROBE_CACHE_MAX_GB\n"
    assert call(capsys, "evict", "--yes")[:2] == (0, no_limit)
    lz.set_cache_limit(0)
    assert call(capsys, "evict")[1].startswith("nothing to evict: the limit is 0, which stores nothing more and keeps what is stored")
    lz.set_cache_limit("10 MB")
    assert call(capsys, "evict", "--yes")[1].startswith("nothing evicted; ")
    assert call(capsys, "evict", "--dry-run")[1].startswith("nothing would be evicted; ")
    lz.set_cache_backend("memory://evicted-by-nobody")
    lz.open_store("memory://evicted-by-nobody/.zarr").write(GROUP, make_batch(["a"]))
    says = "is remote, and is evicted only when the call names it\n"
    assert call(capsys, "evict", "--yes")[1].endswith(says)


def test_a_model_that_is_not_there_is_not_cleared(cache: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert lz.clear_cache("acme/toi") == 0, "as lmprobe's, so that a script may clear twice"
    for options in (["--yes"], ["--dry-run"]):
        code, _, err = call(capsys, "clear", "--model", "acme/toi", *options)
        assert (code, "did you mean 'acme/toy'?" in err) == (1, True)
    assert lz.clear_cache("acme/toy") == 3
    assert lz.clear_cache("acme/toy") == 0, "an empty cache has nothing to clear"


def test_evict_as_json(cache: Store, capsys: pytest.CaptureFixture[str]) -> None:
    document = call_json(capsys, "evict", "--max-gb", "0", "--yes")
    assert len(document["entries"]) == 3
    assert document["kept"] == 0
    assert document["fits"]
    assert call_json(capsys, "evict")["entries"] == []
    assert call(capsys, "evict", cache.url, "--yes")[0] == 1, "a named place wants a limit"
    assert call(capsys, "evict", "--max-gb", "-1", "--yes")[0] == 1


def test_a_dry_run_of_evict_says_what_would_be(cache: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    parts = len(cache.entries(cache.find_group(None)))
    place = lz.open_store(tmp_path / "acts")
    place.write(GROUP, make_batch(["another"]))
    code, out, _ = call(capsys, "evict", cache.url, "--max-gb", "0", "--min-age", "0", "--given", "--dry-run")
    assert code == 0
    assert " would be evicted, " in out
    assert " would be freed; 0 B would be kept, limit 0 B" in out
    code, out, _ = call(capsys, "evict", place.url, "--max-gb", "0", "--dry-run")
    assert "were committed or used less than 600 seconds ago (--min-age 600)" in out
    assert len(cache.entries(cache.find_group(None))) == parts
    code, out, _ = call(capsys, "evict", cache.url, "--max-gb", "0", "--min-age", "0", "--given", "--yes")
    assert "would be" not in out
    assert " evicted, " in out


def test_a_dry_run_of_clear_and_delete_removes_nothing(cache: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts = cache.dataset().prompt.values.tolist()
    (tmp_path / "p.txt").write_text(prompts[0] + "\n")
    code, out, _ = call(capsys, "clear", "--dry-run")
    assert (code, "All of this would be deleted" in out) == (0, True)
    assert call_json(capsys, "clear", "--dry-run")["models"][0]["num_prompts"] == 6
    code, out, _ = call(capsys, "delete", cache.url, str(tmp_path / "p.txt"), "--dry-run")
    assert (code, out) == (0, f"1 prompt in {cache.url} would be deleted permanently.\n")
    assert call_json(capsys, "delete", cache.url, str(tmp_path / "p.txt"), "--dry-run") == {"prompts": 1, "dry_run": True}
    (tmp_path / "p.txt").write_text("nobody stored this\n")
    assert call(capsys, "delete", cache.url, str(tmp_path / "p.txt"), "--dry-run")[0] == 1
    assert cache.dataset().prompt.values.tolist() == prompts


def test_clear_asks_first_and_prints_the_number(cache: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(capsys, "clear")[0] == 1
    answer(monkeypatch, "")
    assert call(capsys, "clear")[0] == 1
    assert lz.cache_info().models
    answer(monkeypatch, "yes")
    code, out, _ = call(capsys, "clear")
    assert code == 0
    assert "3 entries deleted: 3 parts of" in out
    assert call_json(capsys, "clear") == {"deleted": 0, "parts": 0, "annotations": 0, "legacy_left": 0, "reads_left_bytes": 0}, (
        "nothing to delete asks nobody"
    )


def test_clear_of_one_model(cache: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "clear", "--model", "nobody", "--yes", "--json")[0] == 1
    assert call_json(capsys, "clear", "--model", "acme/toy", "--yes")["deleted"] == 3


def test_delete_takes_prompts_from_a_file(cache: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(f"secret 0\n{lz.prompt_hash('secret 2')}\n")
    assert call(capsys, "delete", cache.url, str(tmp_path / "p.txt"))[0] == 1
    assert call_json(capsys, "delete", cache.url, str(tmp_path / "p.txt"), "--yes") == {"prompts": 2, "parts": 2}
    assert sorted(str(cached.prompt) for cached in lz.list_cached_prompts("acme/toy")) == ["prompt 0", "prompt 1", "prompt 2", "secret 1"]
    code, _, err = call(capsys, "delete", cache.url, str(tmp_path / "p.txt"), "--yes")
    assert code == 1
    assert "not in" in err


@pytest.mark.parametrize("command", [["cache", "info"], ["evict"], ["clear"]])
def test_a_bad_variable_is_one_line_that_names_it(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMPROBE_CACHE_MAX_GB", "much")
    lz.config.reload()
    code, _, err = call(capsys, *command)
    assert code == 1
    assert err.count("\n") == 1
    assert "LMPROBE_CACHE_MAX_GB" in err


@pytest.mark.model
def test_extract_takes_precision_and_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    from tiny_models import save_tiny

    model = save_tiny("llama", tmp_path / "llama", head="AutoModelForCausalLM")
    (tmp_path / "p.txt").write_text("one prompt\nanother\n")
    arguments = ["extract", str(model), str(tmp_path / "p.txt"), "--store", str(tmp_path / "s"), "--perplexity"]
    arguments += ["--logits", "last_token", "--logits-top-k", "5", "--storage-dtype", "float16", "--keep-bits", "6", "--device", "cpu"]
    document: Any = call_json(capsys, *arguments)
    assert document["extracted"] == 2
    data = lz.open_store(tmp_path / "s").dataset()
    assert data.resid_last_token.stored_dtype == "float16"
    assert lz.open_store(tmp_path / "s").dataset(dtype="stored").resid_last_token.dtype == "float16"
    assert data.sizes["top_k"] == 5
    assert "perplexity" in data
    assert call(capsys, *arguments, "--keep-bits", "40")[0] == 1
    assert json.dumps(document)
