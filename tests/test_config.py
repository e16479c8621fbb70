"""Settings: read at first use, overridden by calls, and a bad value says which variable it stands in."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

import lmprobe_zarr as lz
from lmprobe_zarr import config
from lmprobe_zarr.batch.precision import Precision
from lmprobe_zarr.errors import CacheWarning, InvalidArgumentError, InvalidTypeError


def test_nothing_is_read_at_import_and_each_variable_at_its_first_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LMPROBE_CACHE_MAX_GB", "2")
    monkeypatch.setenv("LMPROBE_CACHE_DTYPE", "nonsense")
    assert config.cache_limit() == 2 * 1024**3, "a bad dtype does not keep the limit from being read"
    monkeypatch.setenv("LMPROBE_CACHE_MAX_GB", "3")
    assert config.cache_limit() == 2 * 1024**3, "read once"
    lz.config.reload()
    assert config.cache_limit() == 3 * 1024**3
    lz.set_cache_limit(0.5)
    lz.config.reload()
    assert config.cache_limit() == 1024**3 // 2, "a call goes before the environment, also after a reload"
    lz.set_cache_limit(None)
    assert config.cache_limit() is None


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("LMPROBE_CACHE_MAX_GB", "lots", "a number of at least 0"),
        ("LMPROBE_CACHE_MAX_GB", "-1", "a number of at least 0"),
        ("LMPROBE_CACHE_MAX_GB", "nan", "a number of at least 0"),
        ("LMPROBE_CACHE_MAX_GB", "inf", "a number of at least 0"),
        ("LMPROBE_CACHE_DTYPE", "float8", "float16, bfloat16 or float32"),
        ("LMPROBE_CACHE_DEBUG", "loud", "debug"),
    ],
)
def test_a_bad_value_names_the_variable_and_the_valid_ones(monkeypatch: pytest.MonkeyPatch, name: str, value: str, valid: str) -> None:
    monkeypatch.setenv(name, value)
    ask = {
        "LMPROBE_CACHE_MAX_GB": config.cache_limit,
        "LMPROBE_CACHE_DTYPE": config.cache_precision,
        "LMPROBE_CACHE_DEBUG": config.debug_level,
    }
    with pytest.raises(InvalidArgumentError) as error:
        ask[name]()
    message = str(error.value)
    assert name in message
    assert value in message
    assert valid in message
    assert len(message.splitlines()) <= 2


def test_unset_and_empty_variables_leave_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in config.SETTINGS.values():
        monkeypatch.setenv(setting.variable, "")
    assert config.cache_limit() is None
    assert config.cache_precision() == Precision()
    assert config.cache_backend() is None
    assert config.debug_level() is None
    assert config.kept_chunk_bytes() == 64 * 2**20
    assert config.cache_dir() == Path("~/.cache/lmprobe").expanduser()
    assert config.default_root() == Path("~/.cache/lmprobe").expanduser() / ".zarr"


def test_every_variable_of_the_page_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    page = {
        "LMPROBE_CACHE_DIR": "/mnt/fast-ssd/lmprobe",
        "LMPROBE_CACHE_MAX_GB": "100",
        "LMPROBE_CACHE_DTYPE": "float16",
        "LMPROBE_CACHE_KEPT_MB": "256",
        "LMPROBE_READ_CACHE": "64 GB",
        "LMPROBE_READ_CACHE_DIR": "/mnt/fast-ssd/reads",
        "LMPROBE_CACHE_BACKEND": "s3://my-bucket/prefix",
        "LMPROBE_CACHE_DEBUG": "debug",
    }
    assert {setting.variable for setting in config.SETTINGS.values()} == set(page)
    for name, value in page.items():
        monkeypatch.setenv(name, value)
    assert config.cache_dir() == Path("/mnt/fast-ssd/lmprobe")
    assert config.cache_limit() == 100 * 1024**3
    assert config.cache_precision() == Precision(dtype="float16")
    assert config.cache_backend() == "s3://my-bucket/prefix"
    assert config.kept_chunk_bytes() == 256 * 2**20
    assert config.debug_level() == logging.DEBUG


def test_a_limit_may_have_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, nbytes in [("50 MB", 50 * 2**20), ("50MB", 50 * 2**20), ("2 gib", 2 * 2**30), ("0.5", 2**29), ("0", 0)]:
        lz.set_cache_limit(text)
        assert config.cache_limit() == nbytes
    config._from_calls.pop("limit")
    for text, nbytes in [("50MB", 50 * 2**20), ("1.5 GB", 3 * 2**29), ("3", 3 * 2**30)]:
        monkeypatch.setenv("LMPROBE_CACHE_MAX_GB", text)
        lz.config.reload()
        assert config.cache_limit() == nbytes


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("LMPROBE_CACHE_LIMIT", "LMPROBE_CACHE_MAX_GB"),
        ("LMPROBE_CACHE_MAXGB", "LMPROBE_CACHE_MAX_GB"),
        ("LMPROBE_CACHE_DIRECTORY", "LMPROBE_CACHE_DIR"),
        ("LMPROBE_READ_CACHES", "LMPROBE_READ_CACHE"),
    ],
)
def test_a_mistyped_variable_is_warned_of_once(monkeypatch: pytest.MonkeyPatch, variable: str, meant: str) -> None:
    monkeypatch.setenv(variable, "1")
    lz.config.reload()
    with pytest.warns(CacheWarning, match=f"{variable} is read by nobody: did you mean {meant}, ") as found:
        assert (config.cache_limit(), config.cache_precision()) == (None, Precision())
    assert len(found) == 1


def test_variables_of_others_are_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LMPROBE_PROFILE", "LMPROBE_ZARR_STRESS", "LMPROBE_HOME", "MY_LMPROBE_CACHE_LIMIT"):
        monkeypatch.setenv(variable, "1")
    lz.config.reload()
    assert config.cache_limit() is None  # warnings are errors


@pytest.mark.parametrize("gb", [-1, float("nan"), float("inf"), "much", "-1 GB", "1 XB", [1]])
def test_a_limit_that_is_no_size_is_refused(gb: object) -> None:
    with pytest.raises(InvalidArgumentError, match="at least 0"):
        lz.set_cache_limit(gb)  # type: ignore[arg-type]


def test_dtypes_and_backends_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="'float16', 'bfloat16', 'float32'"):
        lz.set_cache_dtype("int8")
    with pytest.raises(InvalidArgumentError, match="1 to 10"):
        lz.set_cache_dtype("float16", keep_bits=11)
    with pytest.raises(InvalidArgumentError, match="overflow"):
        lz.set_cache_dtype("float16", overflow="clip")
    with pytest.raises(InvalidTypeError, match="URL"):
        lz.set_cache_backend(3)
    with pytest.raises(InvalidArgumentError, match="empty"):
        lz.set_cache_backend(" ")


def test_the_backend_is_an_existing_store_or_else_a_cache_with_a_store_inside(tmp_path: Path) -> None:
    lz.set_cache_backend(tmp_path / "cache")
    assert lz.open_store().url == str(tmp_path / "cache" / ".zarr"), "beside lmprobe's own entries"
    lz.write_activations(tmp_path / "team", model="m", prompts=["a"], pooled={"resid_mean": {0: [[1.0, 2.0]]}})
    lz.set_cache_backend(str(tmp_path / "team"))
    assert lz.open_store().url == str(tmp_path / "team")
    assert lz.open_store().is_default
    store = lz.open_store(tmp_path / "third", mode="a")
    lz.set_cache_backend(store)
    assert lz.open_store().url == store.url
    assert not store.is_default, "the store that was given stays as it is"
    lz.set_cache_backend(None)
    assert lz.open_store().url == str(config.default_root())


def test_a_read_only_store_as_backend_is_never_written_to(tmp_path: Path) -> None:
    lz.write_activations(tmp_path / "team", model="m", prompts=["a"], pooled={"resid_mean": {0: [[1.0, 2.0]]}})
    lz.set_cache_backend(lz.open_store(tmp_path / "team", mode="r"))
    assert lz.open_store().mode == "r"


SILENT = """
import logging, lmprobe_zarr as lz
assert not logging.getLogger("lmprobe_zarr.cache").handlers and not logging.getLogger("lmprobe_zarr").handlers
lz.cache_info(); lz.evict()
print(len(logging.getLogger("lmprobe_zarr.cache").handlers))
"""


@pytest.mark.few(1)
@pytest.mark.parametrize(("value", "handlers", "shown"), [("", "0", False), ("1", "1", True), ("debug", "1", True)])
def test_logging_is_silent_until_enabled(value: str, handlers: str, shown: bool, tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "LMPROBE_CACHE_DIR": str(tmp_path), "LMPROBE_CACHE_DEBUG": value}
    done = subprocess.run([sys.executable, "-c", SILENT], check=True, capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == handlers
    assert ("[cache] evict" in done.stderr) == shown


def test_enabling_twice_shows_every_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("lmprobe_zarr.cache")
    before, level = list(logger.handlers), logger.level
    try:
        lz.enable_cache_logging()
        lz.enable_cache_logging("debug")
        assert logger.level == logging.DEBUG
        lz.evict()
        assert capsys.readouterr().err.count("[cache] evict") == 1
    finally:
        logger.handlers[:] = before
        logger.setLevel(level)
