"""Scripts in children of a process that has imported the heavy packages, so that each script need not import them again.

A child is forked before the process has any thread, runs the script as ``__main__``, and ends as an interpreter does. Its working folder,
its environment, the encoding of its output and its warnings are its own. Only what is imported already differs from a new interpreter, so
tests of imports, of memory and of settings that are read at an import start an interpreter of their own instead.
"""

from __future__ import annotations

import atexit
import importlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What the scripts import sooner or later, where it is installed.
PACKAGES = (
    "torch",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "sklearn.linear_model",
    "dask.array",
    "distributed",
    "matplotlib.figure",
    "s3fs",
    "lmprobe_zarr.extraction.models.loading",
)


def fork_workers() -> None:
    """Have Dask fork worker processes from one that has imported the heavy packages, so that each worker need not import them again."""
    import dask

    dask.config.set({"multiprocessing.context": "forkserver", "distributed.worker.multiprocessing-method": "forkserver"})
    if "distributed" in sys.modules:
        from distributed.utils import get_mp_context

        get_mp_context()  # type: ignore[no-untyped-call]  # which chooses packages of its own, once
    multiprocessing.set_forkserver_preload(list(PACKAGES))


class Warmed:
    """A process that runs scripts in forked children; a context manager.

    Warnings are errors in it, at the imports and in the scripts.
    """

    def __enter__(self) -> Warmed:
        self._folder = tempfile.TemporaryDirectory()
        # What OpenMP starts in the parent would be missing in a child: the parent computes nothing, and starts none.
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", *(f"-W{option}" for option in sys.warnoptions), __file__, *PACKAGES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Its options are among those above, and one that is there twice counts where it stands first.
            env={name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"},
        )
        return self

    def __exit__(self, *error: object) -> None:
        # Not by the end of its standard input, which a child that some test has left behind may keep open.
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def run(
        self, script: Path | str, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: int = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run a script: the path of a file, or code; what comes back has `returncode`, `stdout` and `stderr`.

        A script that takes longer than `timeout` seconds is ended by SIGALRM, and returns -14. PYTHONIOENCODING in its environment gives
        the encoding of its output.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        outputs = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        environment = dict(os.environ if env is None else env)
        request = {
            "script": str(script), "file": isinstance(script, Path), "arguments": arguments, "cwd": str(cwd or Path.cwd()),
            "env": environment, "timeout": timeout, "outputs": [str(path) for path in outputs],
        }  # fmt: skip
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that runs scripts has ended with {self._process.wait()}: could it import {PACKAGES}?")
        printed = [path.read_bytes().decode(environment.get("PYTHONIOENCODING", "utf-8")) for path in outputs]
        return subprocess.CompletedProcess([str(script), *arguments], int(answer), *printed)


def serve() -> Any:
    """Fork a child for each request on standard input; returns the request in the child, and None in the parent when there are no more."""
    for line in sys.stdin:
        threads = len(list(Path("/proc/self/task").glob("*")))
        if threads > 1:
            raise RuntimeError(f"an import in PACKAGES started threads: the parent has {threads}, and a child would have only one of them")
        child = os.fork()
        if not child:
            return json.loads(line)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()
    return None


def become(request: Any) -> tuple[Any, dict[str, Any]]:
    """Be a new interpreter for a script, as far as a script can see; returns its code and the names of its ``__main__``."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, path in enumerate(request["outputs"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if encoding := os.environ.get("PYTHONIOENCODING"):
        for stream, errors in ((sys.stdout, "strict"), (sys.stderr, "backslashreplace")):
            stream.reconfigure(encoding=encoding, errors=errors)  # type: ignore[union-attr]
    random.seed()
    sys.modules["numpy"].random.seed()
    signal.alarm(request["timeout"])
    main: Any = types.ModuleType("__main__")
    if request["file"]:
        main.__file__ = request["script"]  # worker processes that are started by spawn import it
        sys.path[0] = str(Path(request["script"]).parent)
        code = compile(Path(request["script"]).read_text(), request["script"], "exec")
        sys.argv = [request["script"], *request["arguments"]]
    else:
        sys.path[0] = ""
        code = compile(request["script"], "<string>", "exec")
        sys.argv = ["-c", *request["arguments"]]
    sys.modules["__main__"] = main
    return code, vars(main)


def end(status: int) -> None:
    """End as an interpreter does, but leave the memory to the system: to free what the parent has imported takes a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    for package in sys.argv[1:]:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as absent:
            # Not installed, or it needs what is not; a module of ours that is missing is a fault.
            if (absent.name or "").startswith("lmprobe_zarr"):
                raise
    work = serve()
    if work:
        status: Any = 0
        try:
            exec(*become(work))  # noqa: S102
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:  # noqa: BLE001 — as an interpreter does with what nobody has caught
            traceback.print_exc()
            status = 1
        end(status)
