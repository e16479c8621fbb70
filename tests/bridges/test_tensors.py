"""The header of a file that nobody vouches for, and values to and from bytes."""

from __future__ import annotations

import json
import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from foreign_caches import of_bits, raw_file, read_safetensors, safetensors_bytes, to_bits
from hypothesis import given
from hypothesis import strategies as st

from lmprobe_zarr.bridges.files import open_files
from lmprobe_zarr.bridges.tensors import read_header, read_tensor
from lmprobe_zarr.errors import CorruptFileError
from lmprobe_zarr.safetensors_file import encode, narrow_bfloat16, parse_header, widen_bfloat16

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def tensor(**changes: Any) -> dict[str, Any]:
    return {**F32, **changes}


def test_every_tensor_of_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    written = {
        "ids": rng.integers(0, 9, (1, 5)),
        "a": rng.standard_normal((2, 3)).astype("float32"),
        "half": rng.standard_normal(4).astype("float16"),
        "brain": to_bits(rng.standard_normal((3, 2))),
        "empty": np.zeros((0, 3), "float32"),
        "scalar": np.array(2.5),
    }
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(written, {"by": "hand"}))
    files = open_files(tmp_path)
    header, _ = read_header(files, "x.safetensors")
    assert dict(header.metadata) == {"by": "hand"}
    for name, expected in written.items():
        values, dtype = read_tensor(files, "x.safetensors", header.tensors[name])
        if name == "brain":
            assert dtype == "bfloat16"
            expected = of_bits(expected)
        assert values.dtype == expected.dtype
        np.testing.assert_array_equal(values, expected)


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "five bytes": (b"12345", "it has 5 bytes"),
    "a header longer than the file": (struct.pack("<Q", 1000) + b"{}", "a header of 1008"),
    "a header of petabytes": (struct.pack("<Q", 2**60) + b"{}", "claims 1152921504606846976 bytes"),
    "a header of a gigabyte": (struct.pack("<Q", 2**30) + b"{}", "claims"),
    "no JSON": (raw_file(b"{nothing"), "Expecting property name"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "not JSON"),
    "a list": (raw_file([1, 2]), "not an object"),
    "a number": (raw_file(b"12"), "not an object"),
    "nested without end": (raw_file(b"[" * 100_000), "not JSON"),
    "NaN": (raw_file(b'{"a": NaN}'), "holds NaN"),
    "a name twice": (raw_file(b'{"a": 1, "a": 2}'), "occurs twice"),
    "metadata that is no text": (raw_file({"__metadata__": {"a": 1}}), "__metadata__"),
    "a tensor that is a number": (raw_file({"a": 1}), "not described"),
    "a tensor without offsets": (raw_file({"a": {"dtype": "F32", "shape": [2]}}), "not described"),
    "a negative length": (raw_file({"a": tensor(shape=[-2])}, bytes(8)), "lengths"),
    "a length that is a fraction": (raw_file({"a": tensor(shape=[2.0])}, bytes(8)), "lengths"),
    "a length that is true": (raw_file({"a": tensor(shape=[2, True])}, bytes(8)), "lengths"),
    "a length beyond 64 bits": (raw_file({"a": tensor(shape=[2**70])}, bytes(8)), "lengths"),
    "three offsets": (raw_file({"a": tensor(data_offsets=[0, 4, 8])}, bytes(8)), "3 offsets"),
    "offsets backwards": (raw_file({"a": tensor(data_offsets=[8, 0])}, bytes(8)), "-8 bytes"),
    "a shape that does not fit": (raw_file({"a": tensor(shape=[3])}, bytes(8)), "has 8 bytes"),
    "a shape that overflows": (raw_file({"a": tensor(shape=[2**32, 2**32])}, bytes(8)), "has 8 bytes"),
    "overlapping tensors": (raw_file({"a": F32, "b": tensor(data_offsets=[4, 12])}, bytes(12)), "begins at byte"),
    "one range twice": (raw_file({"a": F32, "b": F32}, bytes(8)), "begins at byte"),
    "a gap": (raw_file({"a": F32, "b": tensor(data_offsets=[12, 20])}, bytes(20)), "begins at byte"),
    "cut off": (raw_file({"a": F32}, bytes(7)), "its header says"),
    "too long": (raw_file({"a": F32}, bytes(9)), "its header says"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_header_that_is_not_allowed_is_refused(what: str, tmp_path: Path) -> None:
    data, message = BAD[what]
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"x\.safetensors is damaged") as error:
        read_header(open_files(tmp_path), "x.safetensors")
    assert message in str(error.value)
    assert len(str(error.value)) < 500


def test_an_unknown_dtype_is_only_refused_where_it_is_read(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    (tmp_path / "x.safetensors").write_bytes(raw_file(header, bytes(4)))
    files = open_files(tmp_path)
    found, _ = read_header(files, "x.safetensors")
    with pytest.raises(CorruptFileError, match="F8_E4M3"):
        read_tensor(files, "x.safetensors", found.tensors["a"])


def test_a_claim_of_petabytes_allocates_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(raw_file({"a": {"dtype": "U8", "shape": [2**50], "data_offsets": [0, 2**50]}}, bytes(8)))
    tracemalloc.start()
    with pytest.raises(CorruptFileError, match="its header says"):
        read_header(open_files(tmp_path), "x.safetensors")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@given(st.binary(max_size=300))
def test_any_bytes_are_a_header_or_a_value_error(data: bytes) -> None:
    with suppress(ValueError):
        parse_header(struct.pack("<Q", len(data)) + data)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 20) | st.sampled_from(["F32", "BF16", "dtype", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), JSON_VALUES, max_size=3))
def test_any_json_is_a_header_or_a_value_error(document: dict[str, Any]) -> None:
    text = json.dumps(document).encode()
    try:
        header = parse_header(struct.pack("<Q", len(text)) + text)
    except ValueError:
        return
    assert header.size == len(text) + 8 + sum(t.stop - t.start for t in header.tensors.values())


def test_a_simple_reader_reads_the_values_that_were_written() -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((2, 3)).astype("float32")
    brain = of_bits(to_bits(values))
    data = b"".join(
        encode({"b": (values, "float32"), "a": (np.arange(3), "int64"), "h": (values.astype("f2"), "float16"), "n": (brain, "bfloat16")})
    )
    found = read_safetensors(data)
    assert list(found) == ["a", "b", "h", "n"]
    np.testing.assert_array_equal(found["b"], values)
    np.testing.assert_array_equal(found["n"], to_bits(values))
    np.testing.assert_array_equal(found["a"], [0, 1, 2])
    assert int.from_bytes(data[:8], "little") % 8 == 0


@pytest.mark.model
def test_safetensors_reads_our_files_and_we_read_its_files(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    values = torch.randn(3, 5)
    tensors = {"a": values, "b": values.to(torch.bfloat16), "h": values.half(), "i": torch.arange(4), "d": values.double()}
    path = tmp_path / "theirs.safetensors"
    safetensors.save_file(tensors, path)
    files = open_files(tmp_path)
    header, _ = read_header(files, path.name)
    read = {name: read_tensor(files, path.name, t) for name, t in header.tensors.items()}
    (tmp_path / "ours.safetensors").write_bytes(b"".join(encode(read, {"padding": "none"})))
    for name, tensor in safetensors.load_file(tmp_path / "ours.safetensors").items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=50))
def test_every_bfloat16_survives_being_a_float32(bits: list[int]) -> None:
    held = np.array(bits, np.uint16)
    np.testing.assert_array_equal(narrow_bfloat16(widen_bfloat16(held)), held)


@pytest.mark.model
def test_narrowing_rounds_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    values: npt.NDArray[np.float32] = bits.view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(narrow_bfloat16(values), expected)
    assert np.isnan(widen_bfloat16(narrow_bfloat16(np.array([np.nan, -np.nan], np.float32)))).all()
