"""Write docs/models.md: every text model type of the installed transformers, and what `lmprobe_zarr` finds in a tiny model of it.

Run by ``make models``. Every type is examined in a process of its own, which has `LIMIT_S` seconds. The outcomes are kept in
docs/models.json, so that some mappings alone can be examined again: ``python tests/docs/models_page.py causal masked``.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = ROOT / "docs" / "models.md"
OUTCOMES: Final = ROOT / "docs" / "models.json"
sys.path.insert(0, str(ROOT / "tests" / "support"))

import torch  # noqa: E402 — after the path
import transformers  # noqa: E402
import zoo  # noqa: E402
from zoo_check import TOLERANCE, Outcome, examine  # noqa: E402

LIMIT_S: Final = 170.0
# Blocks that cannot be found by themselves, and how they are named.
BY_HAND: Final = {
    "hrm_text": {"layers": "model.L_module.layers"},
    "xlm": {"layers": "transformer.layer_norm2"},
    "flaubert": {"layers": "transformer.layer_norm2"},
}
TITLES: Final = {
    "causal": "Decoders (`MODEL_FOR_CAUSAL_LM_MAPPING`)",
    "masked": "Encoders (`MODEL_FOR_MASKED_LM_MAPPING`)",
    "seq2seq": "Encoder-decoders: their encoders (`MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING`)",
    "image": "Models of images and text, given text alone (`MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING`)",
    "multimodal": "Models of several media, given text alone (`MODEL_FOR_MULTIMODAL_LM_MAPPING`)",
}
PADDING: Final = {"unmasked": "padded", "masked": "padded, mask", "equal": "equal lengths", "single": "one prompt"}
HEAD: Final = """# Models

<!-- Written by `make models`. Do not edit. -->

For people who ask whether their model works. After this page you know what is found in its type, and how it is run.

Every model type of transformers {transformers} that reads text, and what `extract` finds in it without `modules=`. For each a tiny random
model is built from its configuration (float32, torch {torch}) and extracted in three compositions of batches. All layers of all tokens are
compared with plain transformers, one prompt at a time.

{summary}

* **Found**: the blocks, and the modules at the sites `attn` and `mlp` where the table names them. A `|` separates the modules of different
  layers; `ds.mixer` names that of each layer.
* **By hand**: found with the `modules=` in the column of the blocks.
* **Refused**: an error that says why and what to do, before anything is stored.
* **Not built**: no tiny model could be made from the configuration, so nothing is known. These types are run in the same way: by structure,
  and checked before the first prompt.
* **Batches**: how prompts share a batch, as the check of the model has seen: *padded* on the right without a mask, or with one; only
  prompts of *equal lengths*; *one prompt* at a time.
* **Difference**: the largest from transformers, relative to the largest value of the layer. A model that differs by more than
  {tolerance:g} is compared in float64 too, where it has to agree to a tenth of that.

"""


def rows_of(mappings: Iterable[str] = tuple(zoo.MAPPINGS), only: Iterable[str] | None = None) -> list[Outcome]:
    """The outcomes of all types of some mappings, or of those in `only`; each in a process of its own."""
    wanted = None if only is None else set(only)
    jobs = [(m, t) for m in mappings for t in zoo.types_of(m) if wanted is None or t in wanted]
    examine("causal", "llama")  # what all need is imported before the forks
    torch.set_num_threads(1)
    with ThreadPoolExecutor(max(1, min(os.cpu_count() or 1, 8))) as pool:
        return list(pool.map(_in_process, jobs))


def _in_process(job: tuple[str, str]) -> Outcome:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, *job))
    child.start()
    sender.close()
    try:
        values: dict[str, Any] | None = receiver.recv() if receiver.poll(LIMIT_S) else None
    except EOFError:
        values = None
    child.kill()
    child.join()
    if values is None:
        return Outcome(mapping=job[0], type=job[1], state="not built", why=f"more than {LIMIT_S:.0f} s, or the process ended")
    return Outcome(**values)


def _send(sender: Any, mapping: str, model_type: str) -> None:
    warnings.simplefilter("ignore")
    noise: Any = transformers.logging
    noise.set_verbosity_error()
    try:
        row = examine(mapping, model_type)
        if row.state == "refused" and model_type in BY_HAND:
            row = examine(mapping, model_type, BY_HAND[model_type])
    except BaseException as error:  # noqa: BLE001 — a row of the page says so
        why = "".join(traceback.format_exception(error)[-2:])[-400:]
        row = Outcome(mapping=mapping, type=model_type, state="wrong", why=why)
    sender.send(dataclasses.asdict(row))


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _why(row: Outcome) -> str:
    """The reason of a refusal in few words: what stands in the message's brackets or after its colon."""
    text = _plain(row.why)
    for start in ("is not run: ", "were not found ("):
        if start in text:
            text = text.split(start, 1)[1]
    return text.split("); lists of")[0].split(". Nothing was")[0][:200]


def page(rows: list[Outcome]) -> str:
    """The page as Markdown."""
    count = {state: sum(row.state == state for row in rows) for state in ("found", "by hand", "refused", "wrong", "not built")}
    built = len(rows) - count["not built"]
    causal = [row for row in rows if row.mapping == "causal" and row.state != "not built"]
    found = sum(row.state == "found" for row in causal)
    summary = (
        f"Of {len(rows)} types {built} were built: {count['found']} are found ({count['found'] / max(1, built):.1%}), "
        f"{count['by hand']} are named by hand, {count['refused']} are refused, and {count['wrong']} are wrong. Of {len(causal)} causal "
        f"types that were built, {found} are found ({found / max(1, len(causal)):.1%})."
    )
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    text = HEAD.format(**versions, summary=summary, tolerance=TOLERANCE)
    for mapping, title in TITLES.items():
        mine = [row for row in rows if row.mapping == mapping]
        if not mine:
            continue
        text += f"## {title}\n\n| type | outcome | blocks | attn | mlp | batches | difference |\n|---|---|---|---|---|---|---|\n"
        for row in sorted(mine, key=lambda row: row.type):
            if row.state in ("found", "by hand"):
                cells = [f"`{_plain(row.paths[site])}`" if site in row.paths else "—" for site in ("layers", "attn", "mlp")]
                text += f"| {row.type} | {row.state} | {' | '.join(cells)} | {PADDING[row.padding]} | {row.difference:.1e} |\n"
            else:
                text += f"| {row.type} | {row.state} | {_why(row)} | | | | |\n"
        text += "\n"
    return text.rstrip() + "\n"


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(zoo.MAPPINGS)
    found = [Outcome(**values) for values in json.loads(OUTCOMES.read_text(encoding="utf-8"))] if OUTCOMES.exists() else []
    for name in chosen:
        found = [row for row in found if row.mapping != name] + rows_of([name])
        lines = [json.dumps(dataclasses.asdict(row)) for row in found]
        OUTCOMES.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
        PAGE.write_text(page(found), encoding="utf-8")
    for outcome in found:
        if outcome.state == "wrong":
            sys.stdout.write(f"{outcome.mapping} {outcome.type}: {outcome.why}\n")
    sys.exit(any(outcome.state == "wrong" for outcome in found))
