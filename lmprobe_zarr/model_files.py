"""Digests of a model's and a tokenizer's files, read from disk once as long as they do not change. Never torch, or the network."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from lmprobe_zarr.errors import ModelNotFoundError

__all__ = [
    "CONFIG_NOISE",
    "folder_name",
    "read_json",
    "template_digest",
    "template_in",
    "tokenizer_digest",
    "tokenizer_object_digest",
    "weights_digest",
]

TOKENIZER_FILES: Final = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# They tell who wrote the configuration, not what the model computes. The dtype is a field of its own.
CONFIG_NOISE: Final = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
# A file changed more recently may change again within the same tick of the file system's clock.
SETTLED_SECONDS: Final = 2.0
# The time of change is read from the kernel's clock, which ticks at least a hundred times a second.
TICK_SECONDS: Final = 0.02
READ_BYTES: Final = 1 << 22
WEIGHT_ENDINGS: Final = (".bin", ".safetensors")
# Settings of a tokenizer object that change its tokens and are not in its backend.
TOKENIZER_SETTINGS: Final = ("truncation_side", "split_special_tokens", "add_bos_token", "add_eos_token")
# Digests of loaded tokenizers, by a digest of what they are written as: a tokenizer that was edited is written otherwise.
MOST_CANONICAL: Final = 64
_CANONICAL: Final[dict[str, str]] = {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises
    ------
    ModelNotFoundError
        The file is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{str(path)!r} cannot be read as JSON ({error}): download the model again") from error
    if not isinstance(content, dict):
        raise ModelNotFoundError(f"{str(path)!r} holds a {type(content).__name__}, not a JSON object: download the model again")
    return content


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _read_memory(memory: Path | None) -> dict[str, Any]:
    try:
        content = json.loads(memory.read_text(encoding="utf-8")) if memory is not None else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_memory(memory: Path, learned: Mapping[str, Any]) -> None:
    """Remember digests, if the file can be written; otherwise they are computed again."""
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        # Read again, because another process may have added digests.
        content = {**_read_memory(memory), **learned}
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=memory.parent, prefix=memory.name, suffix=".tmp", delete=False) as file:
            json.dump(content, file)
        try:
            Path(file.name).replace(memory)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
    except OSError:
        return


def _state(path: Path) -> dict[str, int]:
    """What changes with a file's content: length, times and the place on the disk. Links are followed.

    The time of modification alone can be set back by anybody (``cp -p``, ``rsync -t``, ``touch -r``). The time of change cannot.
    """
    found = path.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns, "inode": found.st_ino}


def _is_settled(state: Mapping[str, int]) -> bool:
    """Whether a later change of a file in this state would show. Where that is in doubt, its digest is not remembered."""
    if os.name == "nt" or not state["inode"]:
        return False  # the time of change is that of creation there, or files have no numbers
    now = time.time_ns()
    # A file system that keeps whole seconds needs the longer time for the time of change too.
    seconds = SETTLED_SECONDS if state["ctime_ns"] % 1_000_000_000 == 0 else TICK_SECONDS
    return state["mtime_ns"] < now - int(SETTLED_SECONDS * 1e9) and state["ctime_ns"] < now - int(seconds * 1e9)


def _file_digests(files: list[Path], memory: Path | None) -> list[str]:
    """The sha256 of every file; for files that have not changed since, the remembered one."""
    known = _read_memory(memory)
    paths = [path.resolve() for path in files]
    states = [_state(path) for path in paths]

    def remembered(number: int) -> str | None:
        entry = known.get(str(paths[number]))
        if isinstance(entry, dict) and {k: entry.get(k) for k in states[number]} == states[number] and isinstance(entry.get("sha256"), str):
            return str(entry["sha256"])
        return None

    digests = [remembered(n) for n in range(len(files))]
    unknown = [n for n, digest in enumerate(digests) if digest is None]
    if memory is not None and unknown:
        time.sleep(TICK_SECONDS)  # so that the state of files that were written just before is one from which a change would show
    with ThreadPoolExecutor(max(1, min(4, len(unknown)))) as pool:
        for n, digest in zip(unknown, pool.map(lambda n: _file_sha256(files[n]), unknown), strict=True):
            digests[n] = digest
    learned = {
        str(paths[n]): {**states[n], "sha256": digests[n]} for n in unknown if _is_settled(states[n]) and _state(paths[n]) == states[n]
    }
    if memory is not None and learned:
        _write_memory(memory, learned)
    return [str(digest) for digest in digests]


def weights_digest(folder: Path, memory: Path | None = None) -> str | None:
    """``sha256:…`` over a model folder's weights, configuration and own code; None where it holds no weights.

    Covers every file that transformers might load, and those settings of the configuration that change the computation.
    """
    weights = sorted(path for ending in WEIGHT_ENDINGS for path in folder.glob(f"*{ending}"))
    if not weights:
        return None
    files = weights + sorted(folder.glob("*.index.json")) + sorted(folder.glob("*.py"))
    digest = hashlib.sha256()
    for path, content in zip(files, _file_digests(files, memory), strict=True):
        digest.update(f"{path.name}\0{content}\n".encode())
    config = {key: value for key, value in read_json(folder / "config.json").items() if key not in CONFIG_NOISE}
    digest.update(json.dumps(config, sort_keys=True).encode())
    return "sha256:" + digest.hexdigest()


def tokenizer_digest(folder: Path) -> str | None:
    """``sha256:…`` over the tokenizer's files in a folder; None where there are none."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{_file_sha256(path)}\n".encode())
    return "sha256:" + digest.hexdigest()


def tokenizer_object_digest(tokenizer: Any) -> str:
    """``sha256:…`` over the content of a loaded tokenizer, without its current padding and truncation."""
    backend = getattr(tokenizer, "backend_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None
    settings = {name: getattr(tokenizer, name, None) for name in TOKENIZER_SETTINGS}
    if backend is not None:
        return _digest_of_backend(backend.to_str(), settings)
    special = getattr(tokenizer, "special_tokens_map", {})
    content = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab(), "special": special}
    given = getattr(tokenizer, "init_kwargs", {})
    # The paths of its files do not matter.
    content["init"] = {str(k): v for k, v in given.items() if not str(k).endswith(("_file", "name_or_path", "chat_template"))}
    return _digest_of({**content, "settings": settings})


def _digest_of_backend(text: str, settings: Mapping[str, Any]) -> str:
    """The digest of a tokenizer that writes itself as JSON, whose many entries are put into their canonical form once."""
    seen = hashlib.sha256(f"{json.dumps(settings, sort_keys=True, default=str)}\0{text}".encode()).hexdigest()
    digest = _CANONICAL.get(seen)
    if digest is None:
        digest = _digest_of({**json.loads(text), "padding": None, "truncation": None, "settings": settings})
        if len(_CANONICAL) >= MOST_CANONICAL:
            _CANONICAL.clear()
        _CANONICAL[seen] = digest
    return digest


def _digest_of(content: Mapping[str, Any]) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def template_digest(template: object) -> str | None:
    """``sha256:…`` of a chat template; for several named templates, of the one called ``default``."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, Mapping):
        template = template.get("default")
    return None if not isinstance(template, str) else "sha256:" + hashlib.sha256(template.encode()).hexdigest()


def template_in(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return template_digest((folder / "chat_template.jinja").read_text(encoding="utf-8"))
    settings = folder / "tokenizer_config.json"
    return template_digest(read_json(settings).get("chat_template")) if settings.is_file() else None


def folder_name(folder: Path) -> str:
    """The name under which the model in a folder is stored, unless the caller names it."""
    cached = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/")
    return folder.name
