"""Which group is read where several match, and how the error says in what they differ."""

from __future__ import annotations

import pytest
from stores import GROUP, make_batch

from lmprobe_zarr.cli import main
from lmprobe_zarr.errors import AmbiguousProvenanceError
from lmprobe_zarr.store import Store
from lmprobe_zarr.store.format import GroupInfo


def test_a_group_that_differs_in_settings_of_the_process_alone_is_read_by_name_only(store: Store) -> None:
    lowered = GroupInfo(model="acme/toy", provenance={**GROUP.provenance, "autocast": "bfloat16"}, num_layers=4, hidden_size=8)
    store.write(lowered, make_batch(["b"]))
    assert store.dataset("acme/toy").text.values.tolist() == ["b"]
    store.write(GROUP, make_batch(["a"]))
    assert store.dataset("acme/toy").text.values.tolist() == ["a"]
    assert store.dataset("acme/toy", provenance={"autocast": "bfloat16"}).text.values.tolist() == ["b"]
    assert store.dataset(group=lowered.name).text.values.tolist() == ["b"]


def test_where_groups_differ_is_said_in_words(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    edited = GroupInfo(model="acme/toy", provenance={**GROUP.provenance, "model_code": "Block.forward: 0f"}, num_layers=4, hidden_size=8)
    store.write(GROUP, make_batch(["a"]))
    store.write(edited, make_batch(["b"]))
    words = r"model_code: 'Block\.forward: 0f' or as installed \(functions and classes of the model that were replaced"
    with pytest.raises(AmbiguousProvenanceError, match=words):
        store.dataset("acme/toy")
    if store.url.startswith("/"):
        main(["info", store.url])
        assert "from the other groups of this model in model_code" in " ".join(capsys.readouterr().out.split())
