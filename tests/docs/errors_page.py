"""``docs/errors.md``: every error class with its message as it prints, each provoked.

``python tests/docs/errors_page.py`` writes the page again.
"""

from __future__ import annotations

import builtins
import inspect
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from paths import ROOT
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr import errors
from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.batch.precision import Precision
from lmprobe_zarr.storage.local import LocalStorage
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.ingest import Ingest
from lmprobe_zarr.store.store import Store

PAGE = ROOT / "docs" / "errors.md"

HEAD = """# Errors

For people who catch errors in code, or want to see a real message. After this page you know every class. Cause and way out of each are in
one table under [troubleshooting](troubleshooting.md#errors).

Every error that the package raises on purpose is a `LmprobeZarrError` from `lmprobe_zarr.errors`. It is also the nearest built-in error,
so that `except ValueError` and the like go on working. A message says what was given, what was expected, and what to do, in at most two
lines. The command line prints it after `lmprobe-zarr: `, with an option in place of an argument of Python
where the command has one, and exits with 1.

`tests/docs/errors_page.py` provokes each message below and writes this page. `tests/docs/test_errors_page.py` fails if it would write
another one. In these examples your data are in `/data`.
"""


def stored(folder: Path, **options: Any) -> Store:
    store = lz.open_store(folder / "acts")
    store.write(GROUP, make_batch(["one prompt", "another"], columns={"label": [0, 1]}, **options))
    return store


def part_of(store: Store) -> Path:
    return next(p for p in (Path(store.url) / GROUP.name).iterdir() if len(p.name) == 26)


@contextmanager
def answering(status: int) -> Iterator[str]:
    """A web server that answers everything with one status."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815 — as the protocol has it

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 — the name that it is called with
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/acts"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# What provokes each class. Those in MODELS need torch and transformers.


def access_denied(_: Path) -> None:
    with answering(403) as url:
        lz.open_store(url)


def already_committed(folder: Path) -> None:
    storage = LocalStorage(folder / "acts")
    storage.commit("g/p/zarr.json", b"one", durable=False, replace=False)
    storage.commit("g/p/zarr.json", b"two", durable=False, replace=False)


def ambiguous_provenance(folder: Path) -> None:
    store = stored(folder)
    store.write(GroupInfo(model=GROUP.model, provenance={"revision": "def"}, num_layers=4, hidden_size=8), make_batch(["one prompt"]))
    store.dataset(GROUP.model)


def cache_warning(folder: Path) -> None:
    (part_of(stored(folder)) / "zarr.json").write_bytes(b"{}")
    warnings.simplefilter("error", errors.CacheWarning)
    lz.cache_info(store=folder / "acts")


def corrupt_file(folder: Path) -> None:
    (folder / "mine").mkdir()
    for name in ("offsets.npy", "layer_0.npy"):
        (folder / "mine" / name).write_bytes(b"\x93NUMPY\x01\x00 broken")
    lz.import_npy(folder / "mine", folder / "acts", model="m", prompts=["one prompt"], progress=False)


def corrupt_part(folder: Path) -> None:
    store = stored(folder)
    chunk = part_of(store) / "prompts" / "resid_mean" / "c.0.0.0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    _ = lz.open_store(store.url).dataset().resid_mean.values


def device_memory(_: Path) -> None:
    import torch
    from loaded_models import Scarce, loaded_from
    from tiny_models import tiny_model

    from lmprobe_zarr.extraction import models as extraction
    from lmprobe_zarr.extraction.models import parse_prompts, tokenize

    loaded = loaded_from(model := tiny_model("llama"))
    Scarce(model, 15, lambda: torch.OutOfMemoryError("CUDA out of memory"))
    list(extraction.run(loaded, tokenize(parse_prompts(["Who?", "a prompt of rather more words than fit here"]), loaded.tokenizer)))


def engine(_: Path) -> None:
    import numpy as np
    from tiny_models import tiny_tokenizer

    from lmprobe_zarr.extraction.models import parse_prompts, tokenize
    from lmprobe_zarr.extraction.models.gathered import Gathered, Wish
    from lmprobe_zarr.extraction.models.vllm_engine import checked_answer
    from lmprobe_zarr.extraction.models.vllm_worker import answer_of

    prompts = tokenize(parse_prompts(["Who?", "Go for a walk"]), tiny_tokenizer())
    none_came = Gathered(
        Wish(lengths=np.array(prompts.lengths), layers_of={"resid": (0,)}, poolings=("mean",), parts={"all": None}, keep_tokens=False)
    )
    checked_answer(answer_of(none_came), prompts)


def invalid_argument(folder: Path) -> None:
    lz.sweep(stored(folder).dataset().resid_mean, labels="label", probes=["random_forest"])


def invalid_type(folder: Path) -> None:
    nothing: Any = [[0.1, 0.2]]
    lz.sweep(nothing, labels="label")


def label(folder: Path) -> None:
    lz.sweep(stored(folder).dataset().resid_mean, labels=[0, 1, 1])


def layer_out_of_range(folder: Path) -> None:
    stored(folder).dataset(layers=[2])


def missing_dependency(folder: Path) -> None:
    array = stored(folder).dataset().resid_mean
    with mock.patch.dict(sys.modules, {"torch": None}):
        array.lz.to_torch()


def missing_prompts(folder: Path) -> None:
    stored(folder).dataset(prompts=["one prompt", "a prompt that nobody has extracted yet, and a long one"])


def model_not_found(folder: Path) -> None:
    lz.extract("no/such-model", ["one prompt"], store=folder / "acts", progress=False)


def model_not_stored(folder: Path) -> None:
    stored(folder).dataset("acme/tow")


def no_space(folder: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with mock.patch.object(os, "replace", full):
        LocalStorage(folder / "acts").commit("zarr.json", b"{}", durable=False)


def not_a_probe(folder: Path) -> None:
    (folder / "p.probe").write_bytes(b"something else")
    lz.Probe.load(folder / "p.probe")


def not_a_store(folder: Path) -> None:
    (folder / "notes").mkdir()
    (folder / "notes" / "todo.txt").write_text("read this")
    lz.open_store(folder / "notes")


def not_fitted(_: Path) -> None:
    lz.Probe().predict_from_activations(np.zeros((1, 4)))


def number_range(folder: Path) -> None:
    batch = make_batch(["one prompt"])
    batch.prompts["resid_mean"][0, 0, 3] = 7e5
    with Ingest(lz.open_store(folder / "acts"), GROUP, precision=Precision(dtype="float16", overflow="raise")) as ingest:
        ingest.put(batch)


def part_gone(folder: Path) -> None:
    store = stored(folder)
    data = store.dataset()
    shutil.rmtree(part_of(store))
    _ = data.resid_mean.values


def prompt_collision(folder: Path) -> None:
    store = stored(folder)
    batch = make_batch(["something else"])
    object.__setattr__(batch, "sha256", [prompt_sha256("one prompt")[:16] + "1" * 48])
    store.write(GROUP, batch)


def prompt_too_long(_: Path) -> None:
    from tiny_models import tiny_tokenizer

    from lmprobe_zarr.extraction.models import parse_prompts, tokenize

    tokenize(parse_prompts(["Who?", "The quick brown fox jumps over the lazy dog."]), tiny_tokenizer(encoder=True), context_length=10)


def read_only(folder: Path) -> None:
    stored(folder)
    lz.open_store(folder / "acts", "r").annotate(GROUP.model, {"split": {"one prompt": "train"}})


def store_not_found(folder: Path) -> None:
    lz.open_store(folder / "atcs", "r")


def unknown_architecture(folder: Path) -> None:
    import transformers
    from tiny_models import tiny_tokenizer

    sizes: dict[str, Any] = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    sizes |= dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 16)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    model = transformers.BartModel(transformers.BartConfig(vocab_size=300, max_position_embeddings=32, **sizes))
    modules = {"layers": "decoder.layers"}
    lz.extract(model, ["Who?"], store=folder / "acts", name="bart", tokenizer=tiny_tokenizer(), modules=modules, progress=False)


def unreachable(_: Path) -> None:
    lz.open_store("http://127.0.0.1:9/acts")


def unsupported_version(folder: Path) -> None:
    store = stored(folder)
    root = Path(store.url) / "zarr.json"
    root.write_text(
        root.read_text().replace('"format_version":1', '"format_version":7').replace('"format_version": 1', '"format_version": 7')
    )
    lz.open_store(store.url)


MODELS = ("DeviceMemoryError", "EngineError", "ModelNotFoundError", "PromptTooLongError", "UnknownArchitectureError")


def provoked() -> dict[str, Callable[[Path], None]]:
    """What provokes each class, by its name."""
    found = {}
    for name in errors.__all__:
        if name != "LmprobeZarrError":
            words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=A)(?=Store|Probe)", "_", name.removesuffix("Error")).lower()
            found[name] = globals()[words]
    return found


def message_of(name: str, folder: Path) -> str:
    """The message of a class as it prints, with what differs from one machine and run to the next made the same."""
    with warnings.catch_warnings():
        try:
            provoked()[name](folder)
        except getattr(errors, name) as error:
            message = str(error)
        else:
            raise AssertionError(f"nothing raises {name}")
    message = message.replace(str(folder), "/data")
    message = re.sub(r"\b01[0-9a-hjkmnp-tv-z]{24}\b", "01k2…", message)
    message = re.sub(r"127\.0\.0\.1:\d+", "example.org", message)
    assert "/tmp" not in message, message  # noqa: S108 — what must not be there
    return message


def entry(name: str, message: str) -> str:
    """The page's piece about one class."""
    cls: type[Exception] = getattr(errors, name)
    near = [
        base.__name__
        for base in cls.__mro__
        if getattr(builtins, base.__name__, None) is base and base not in (Exception, BaseException, object)
    ]
    kept = [
        base_name
        for base_name in near
        if not any(base_name != other and issubclass(getattr(builtins, other), getattr(builtins, base_name)) for other in near)
    ]
    first = str(inspect.getdoc(cls)).splitlines()[0]
    return f"## {name}\n\n{first} Also a `{'` and a `'.join(kept)}`.\n\n```text\n{message}\n```\n"


def messages() -> dict[str, str]:
    """Every message, each provoked in a folder of its own."""
    found = {}
    for name in sorted(provoked()):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = message_of(name, Path(folder))
    return found


def page(texts: dict[str, str]) -> str:
    return "\n".join([HEAD, *(entry(name, texts[name]) for name in sorted(texts))])


if __name__ == "__main__":
    PAGE.write_text(page(messages()), encoding="utf-8")
