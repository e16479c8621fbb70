"""Files of torch.save, described without torch and without unpickling."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmprobe_zarr.bridges.files import open_files
from lmprobe_zarr.bridges.torch_archive import read_archive
from lmprobe_zarr.errors import CorruptFileError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.model


def saved(folder: Path, value: Any) -> Any:
    torch.save(value, folder / "file.pt")
    return read_archive(open_files(folder), "file.pt")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int64", "int32"])
def test_tensors_are_those_that_torch_reads(tmp_path: Path, dtype: str) -> None:
    values = (torch.randn(3, 40, 5) * 10).to(getattr(torch, dtype))
    found = saved(tmp_path, {"a": values, "view": values[1:, :], "n": 12, "large": 2**40, "text": "…", "none": torch.empty(0, 2)})
    assert (found["n"], found["large"], found["text"], found["none"].shape) == (12, 2**40, "…", (0, 2))
    read = torch.load(tmp_path / "file.pt", weights_only=True)
    for name in ("a", "view"):
        expected = read[name].double().numpy()
        np.testing.assert_array_equal(found[name].read().astype("float64"), expected)
        np.testing.assert_array_equal(found[name].rows((1,), 7, 31), expected[1, 7:31])


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


def test_a_pickle_that_would_run_code_is_an_error_and_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="names"):
        saved(tmp_path, {"states": torch.zeros(2), "evil": Evil(str(tmp_path / "ran"))})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [[torch.zeros(2)], torch.zeros(2), {1: torch.zeros(2)}, {"a": torch.zeros(3, 4).T}, {"a": {"b": 1.5}}])
def test_other_values_are_errors(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CorruptFileError, match=r"file\.pt"):
        saved(tmp_path, value)


def rewritten(path: Path, change: Any, *, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))


def test_archives_that_lie_are_errors(tmp_path: Path) -> None:
    path, files = tmp_path / "file.pt", open_files(tmp_path)
    torch.save({"a": torch.zeros(64)}, path)
    rewritten(path, lambda name, data: data, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CorruptFileError, match="compressed"):
        read_archive(files, "file.pt")
    torch.save({"a": torch.zeros(64)}, path)
    rewritten(path, lambda name, data: data[:8] if name.endswith("data/0") else data)
    with pytest.raises(CorruptFileError, match="more than the 8 bytes"):
        read_archive(files, "file.pt")
    torch.save({"a": torch.zeros(64)}, path)
    rewritten(path, lambda name, data: b"big" if name.endswith("byteorder") else data)
    with pytest.raises(CorruptFileError, match="little-endian"):
        read_archive(files, "file.pt")
    path.write_bytes(b"\x80\x02}.")
    with pytest.raises(CorruptFileError, match=r"file\.pt"):
        read_archive(files, "file.pt")
    with pytest.raises(FileNotFoundError):
        read_archive(files, "other.pt")


def test_no_cut_and_no_changed_byte_of_the_description_gets_out_as_another_error(tmp_path: Path) -> None:
    torch.save({"states": torch.zeros(2, 3), "n": 1}, tmp_path / "file.pt")
    data, files = (tmp_path / "file.pt").read_bytes(), open_files(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(400):
        changed = bytearray(data)
        if number % 4 == 0:
            changed = changed[: rng.integers(len(data))]
        for at in rng.integers(0, max(1, len(changed)), 3) if changed else ():
            changed[at] = rng.integers(256)
        (tmp_path / "file.pt").write_bytes(changed)
        try:
            found = read_archive(files, "file.pt")
        except CorruptFileError:
            continue
        for value in found.values():
            if hasattr(value, "read"):
                value.read()
