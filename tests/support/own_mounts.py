"""Tests that mount small file systems of their own, in a namespace that no other process sees."""

from __future__ import annotations

import shutil
import subprocess

import pytest

OWN_MOUNTS = ("unshare", "--map-root-user", "--mount")


def has_namespaces() -> bool:
    """Whether this machine lets a process have mounts of its own."""
    command = [*OWN_MOUNTS, "sh", "-c", "mount -t tmpfs none /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0


needs_mounts = pytest.mark.skipif(
    not has_namespaces(), reason="needs mounts of its own: unshare --map-root-user --mount is not allowed here"
)
