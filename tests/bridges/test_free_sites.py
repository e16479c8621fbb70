"""Sites of any name and width in other people's files: imported, refused before anything is written, exported where they can be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call, call_json
from foreign_caches import safetensors_bytes

import lmprobe_zarr as lz
from lmprobe_zarr.batch import TokenBatch, prompt_sha256
from lmprobe_zarr.bridges.entry import Entry, Held, batch_of, rows_of
from lmprobe_zarr.bridges.imports import import_npy, import_source, import_tensors
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.store.store import Store

PROMPTS, COUNTS = ["one", "two and more", "three"], [3, 5, 2]
RNG = np.random.default_rng(0)
RESID = RNG.standard_normal((2, 10, 4)).astype("f4")
Z = RNG.standard_normal((2, 10, 7)).astype("f2")
Z_MEAN = RNG.standard_normal((2, 3, 7)).astype("f4")
LAST = RNG.standard_normal((10, 5)).astype("f4")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return lz.open_store(tmp_path / "store", durable=False)


@pytest.fixture
def tensors(tmp_path: Path) -> Path:
    """One file with sites of three widths, one of them without layers."""
    held = {f"resid.{i}": RESID[i] for i in range(2)} | {f"z.{i}": Z[i] for i in range(2)} | {f"pooled.{i}": Z_MEAN[i] for i in range(2)}
    path = tmp_path / "acts.safetensors"
    path.write_bytes(safetensors_bytes({**held, "last": LAST, "counts": np.array(COUNTS)}))
    return path


def empty(store: Store) -> bool:
    return not lz.open_store(store.url).groups()


def test_sites_of_several_widths_come_in_one_import_and_are_found_again(store: Store, tensors: Path) -> None:
    mapping = {"resid": "resid.{layer}", "z": "z.{layer}", "z_mean": "pooled.{layer}", "last": "last"}
    options: dict[str, Any] = {"model": "m", "prompts": PROMPTS, "mapping": mapping, "offsets": "counts", "progress": False}
    assert import_tensors(tensors, store, **options).imported == 3
    toks, ds = store.tokens("m", dtype="stored", prompts=PROMPTS), store.dataset("m", prompts=PROMPTS)
    assert toks.resid.dims == ("layer", "token", "hidden")
    assert toks.z.dims == ("layer", "token", "z_unit")
    assert toks.last.dims == ("token", "last_unit")
    assert ds.z_mean.dims == ("layer", "prompt", "z_unit")
    for array, values in ((toks.resid, RESID), (toks.z, Z), (toks.last, LAST), (ds.z_mean, Z_MEAN)):
        np.testing.assert_array_equal(array.values, values)
        assert array.dtype == values.dtype
    again = import_tensors(tensors, store, **options)
    assert (again.imported, again.stored) == (0, 3)
    assert store.verify(progress=False).ok


def test_a_folder_of_npy_files_holds_a_site_of_any_name(store: Store, tmp_path: Path) -> None:
    for layer in range(2):
        np.save(tmp_path / f"layer_{layer}.npy", Z[layer])
    np.save(tmp_path / "offsets.npy", np.array(COUNTS))
    import_npy(tmp_path, store, model="m", prompts=PROMPTS, variable="mlp_gate", progress=False)
    np.testing.assert_array_equal(store.tokens("m", prompts=PROMPTS, dtype="stored").mlp_gate.values, Z)
    assert store.tokens("m").mlp_gate.dims == ("layer", "token", "mlp_gate_unit")


@pytest.mark.parametrize(
    ("mapping", "problem"),
    [
        ({"resid": "resid.{layer}", "a-b": "z.{layer}"}, r"'a-b' is no name .*letters a to z"),
        ({"hidden": "z.{layer}"}, "'hidden' is no name .*a name of the format itself"),
        ({"position": "z.{layer}"}, "a name of the format itself"),
        ({"z_mean_max": "pooled.{layer}"}, "'z_mean_max' is no name .*ends like a pooling, _mean"),
        ({"z": "z.{layer}", "Z": "z.{layer}"}, "differ by case alone"),
        ({"z": "z.{layer}", "z_mean": {0: "resid.0"}}, None),  # rows of tokens are not those of prompts
        ({"embed": "z.{layer}"}, "'embed' has no layers: give it without layers"),
        ({"mlp": "last"}, "'mlp' has layers: give {layer: …}"),
        ({"": "last"}, "letters a to z"),
    ],
)
def test_names_that_no_variable_can_have_are_refused_before_anything_is_written(
    store: Store, tensors: Path, mapping: Any, problem: str | None
) -> None:
    with pytest.raises(InvalidArgumentError, match=problem):
        import_tensors(tensors, store, model="m", prompts=PROMPTS, mapping=mapping, offsets="counts", progress=False)
    assert empty(store)


def test_a_site_has_one_width_and_no_columns_name(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(safetensors_bytes({"z.0": Z[0], "pooled.0": RESID[0, :3], "counts": np.array(COUNTS)}))
    mapping = {"z": "z.{layer}", "z_mean": "pooled.{layer}"}
    with pytest.raises(InvalidArgumentError, match=r"'z_mean' has rows of shape \(4,\) and 'z' of \(7,\): a site has one width"):
        import_tensors(path, store, model="m", prompts=PROMPTS, mapping=mapping, offsets="counts", progress=False)
    assert empty(store)
    lz.write_activations(store, model="m", prompts=["other"], pooled={"resid_mean": {0: np.ones((1, 4), "f4")}}, coords={"z": [1]})
    with pytest.raises(InvalidArgumentError, match=r"'z' is a column of .*choose another name for the variable"):
        import_tensors(path, store, model="m", prompts=PROMPTS, mapping={"z": "z.{layer}"}, offsets="counts", progress=False)
    assert store.dataset("m").sizes["prompt"] == 1


class Given:
    """A source of two prompts whose variables have the given names."""

    url = "mine"

    def __init__(self, *holds: Held) -> None:
        self.holds = holds

    def entries(self) -> Iterator[Entry]:
        for text in ("a", "b"):
            yield Entry(name=text, sha256=prompt_sha256(text), text=text, n_tokens=2, holds=self.holds, place=text)

    def read(self, entries: Sequence[Entry], holds: Sequence[Held]) -> TokenBatch:
        bounds = rows_of(entries)
        arrays = {held: held.empty(int(bounds[held.level][-1])) for held in holds}
        for array in arrays.values():
            array[...] = np.arange(array.size).reshape(array.shape)
        return batch_of(entries, arrays)


def held(level: Any, variable: str, layers: Any = (0, 1)) -> Held:
    return Held(level=level, variable=variable, layers=layers, dtype="float32", row_shape=(3,))


def test_a_source_of_ones_own_names_its_sites(store: Store) -> None:
    source = Given(held("tokens", "z"), held("prompts", "z_max"), held("prompts", "final_mean", None))
    assert import_source(source, store, model="m", progress=False).imported == 2
    assert store.dataset("m").final_mean.dims == ("prompt", "final_unit")
    np.testing.assert_array_equal(store.tokens("m", prompts=["a", "b"]).z.values, np.arange(24.0).reshape(2, 4, 3))
    for bad, problem in (
        (held("prompts", "w"), "one row per prompt: give <site>_<pooling>"),
        (held("tokens", "w_mean"), "one row per token"),
    ):
        with pytest.raises(InvalidArgumentError, match=problem):
            import_source(Given(bad), store, model="other", progress=False)
    assert store.models() == ["m"]


# -- exports ---------------------------------------------------------------------------------------------------------------


def test_what_lmprobe_has_a_name_for_is_exported_and_the_rest_is_named(store: Store, tensors: Path, tmp_path: Path) -> None:
    mapping = {"resid": "resid.{layer}", "z": "z.{layer}", "last": "last"}
    import_tensors(tensors, store, model="m", prompts=PROMPTS, mapping=mapping, offsets="counts", progress=False)
    summary = lz.export_safetensors(store, tmp_path / "cache", model="m", progress=False)
    assert summary.exported == 3
    assert sorted(summary.notes[0].names) == ["last", "z"]
    lz.import_safetensors(tmp_path / "cache", tmp_path / "again", progress=False)
    np.testing.assert_array_equal(lz.open_store(tmp_path / "again").tokens(prompts=PROMPTS).resid.values, RESID)
    only = lz.export_safetensors(store, tmp_path / "only", model="m", variables=["resid"], progress=False)
    assert (only.exported, only.notes) == (3, ())


def test_what_was_asked_for_by_name_is_never_left_out_without_an_error(store: Store, tensors: Path, tmp_path: Path) -> None:
    mapping = {"resid": "resid.{layer}", "z": "z.{layer}"}
    import_tensors(tensors, store, model="m", prompts=PROMPTS, mapping=mapping, offsets="counts", progress=False)
    for variables, problem in (
        (["resid", "z"], "lmprobe's format has no name for 'z': it holds resid, .*of what is stored here, resid"),
        ("attn", "'attn' is not stored in .*: there is resid, z"),
        ([], "variables is empty: give some of resid"),
    ):
        with pytest.raises(InvalidArgumentError, match=problem):
            lz.export_safetensors(store, tmp_path / "cache", model="m", variables=variables, progress=False)
    assert not (tmp_path / "cache").exists()


def test_a_group_of_which_lmprobe_has_no_name_for_anything_is_an_error(store: Store, tensors: Path, tmp_path: Path) -> None:
    import_tensors(tensors, store, model="m", prompts=PROMPTS, mapping={"z": "z.{layer}"}, offsets="counts", progress=False)
    with pytest.raises(InvalidArgumentError, match=r"no name for anything that .* holds \(z\): it holds resid, .*copy_to"):
        lz.export_safetensors(store, tmp_path / "cache", model="m", progress=False)
    assert not (tmp_path / "cache").exists()


def test_the_command_line_names_variables(store: Store, tensors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mapping = {"resid": "resid.{layer}", "z": "z.{layer}"}
    import_tensors(tensors, store, model="m", prompts=PROMPTS, mapping=mapping, offsets="counts", progress=False)
    command = ("export", "--from", store.url, "--to", str(tmp_path / "cache"), "--variables")
    code, _, problem = call(capsys, *command, "resid,z")
    assert code == 1
    assert "no name for 'z'" in problem
    assert call_json(capsys, *command, "resid")["exported"] == 3
