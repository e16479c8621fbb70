"""What transformers reports while it loads a model: warnings, which reach the user once, and weights without a place or without values."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from torch import nn
from transformers.utils import logging as transformers_logging

from lmprobe_zarr.errors import ModelNotFoundError
from lmprobe_zarr.log import warn

__all__ = ["check_weights", "listening", "quiet_logging"]

# Reports of weights that are missing or have no place, which are checked here.
CHECKED: Final = ("Some weights of", "A new version of the following files was downloaded")
# Names of tensors of a checkpoint that are computed, or belong to a cache of quantised keys and values, which is never used here.
COMPUTED: Final = re.compile(
    r"(^|\.)(inv_freq|masked_bias|position_ids|relative_position_index|num_batches_tracked|_extra_state|attn\.bias|attention\.bias"
    r"|attention\.masked_bias|(k|v|kv|q|prob|input|output|weight|activation)_(scale|zero_point|scale_inv))$|\.output_scale$|_scale$"
)
# Parts of a name that belong to a head, or to a module for training.
HEADS: Final = re.compile(
    r"(^|\.)(lm_head|embed_out|output_projection|cls|classifier|classification_head|score|qa_outputs|logits_dense|vocab_\w+|generator_\w+"
    r"|predictions|discriminator_predictions|pooler|mtp|mtp_\w+|v_head|value_head|reward_head|final_logits_bias|lm_loss|pred_layer)(\.|$)"
)


class _Quiet:
    """transformers logs errors only. The level belongs to the process, so the first to enter sets it and the last to leave restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._verbosity = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        noise: Any = transformers_logging
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._verbosity = noise.get_verbosity()
                noise.set_verbosity_error()
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    noise.set_verbosity(self._verbosity)


quiet_logging = _Quiet()


# ---------------------------------------------------------------- what transformers says


class _Kept(logging.Handler):
    """Keeps what this thread logs, and passes on what others do."""

    def __init__(self, others: list[logging.Handler]) -> None:
        super().__init__()
        self.others, self.own, self.records = others, threading.get_ident(), list[logging.LogRecord]()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.own:
            self.records.append(record)
            return
        for handler in self.others:
            if record.levelno >= handler.level:
                handler.handle(record)


# By model, the messages that the user has seen.
_SEEN: Final[set[tuple[str, str]]] = set()


def _is_new(source: str, message: str) -> bool:
    key = source, message
    if key in _SEEN:
        return False
    _SEEN.add(key)
    return True


@contextmanager
def listening(source: str) -> Iterator[None]:
    """No reports or progress bars of transformers inside; its warnings come out afterwards, where they would, once per model and process.

    Only one thread at a time may be inside.
    """
    noise: Any = transformers_logging
    bars = noise.is_progress_bar_enabled()
    noise.disable_progress_bar()
    logger = logging.getLogger("transformers")
    handlers, propagate = list(logger.handlers), logger.propagate
    kept = _Kept(handlers)
    logger.handlers, logger.propagate = [kept], False
    heard: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        if bars:
            noise.enable_progress_bar()
        for record in kept.records:
            # By the file that says it: newer transformers say it through the logger of another module.
            checked = record.module == "loading_report" or record.getMessage().startswith(CHECKED)
            if record.levelno >= logging.WARNING and not checked and _is_new(source, record.getMessage()):
                logger.handle(record)
    for each in heard:
        # What is deprecated concerns the authors of transformers.
        concerns = issubclass(each.category, UserWarning | RuntimeWarning)
        if concerns and not str(each.message).startswith(CHECKED) and _is_new(source, str(each.message)):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


# ---------------------------------------------------------------- weights without a place, and without values


def _unused(report: Mapping[str, Any], module: nn.Module) -> tuple[list[str], list[str]]:
    """Tensors of the checkpoint that found no place: those that belong to what runs, and those of which that is not known."""
    prefix = f"{getattr(module, 'base_model_prefix', '') or ''}."
    modules = {name for name, _ in module.named_modules()}
    buffers = {name for name, _ in module.named_buffers()}
    lists = {name for name, part in module.named_modules() if isinstance(part, nn.ModuleList)}
    inside: list[str] = []
    elsewhere: list[str] = []
    for key in sorted(report.get("unexpected_keys") or ()):
        if COMPUTED.search(key) or HEADS.search(key):
            continue
        # A checkpoint of the whole model has a prefix before the names of its body.
        names = {key, key.removeprefix(prefix), f"{prefix}{key}"}
        if names & buffers:
            continue
        owners = {name.rpartition(".")[0] for name in names} - {""}
        above = {".".join(name.split(".")[:count]) for name in names for count in range(1, name.count(".") + 1)}
        (inside if owners & modules or above & lists else elsewhere).append(key)
    return inside, elsewhere


def check_weights(source: str, module: nn.Module, report: Mapping[str, Any], *, head: bool) -> None:
    """Check that a loaded model has all of its weights from the checkpoint, and that the checkpoint has none for which it has no place.

    Parameters
    ----------
    source : str
        For messages.
    module : Module
    report : mapping
        What ``from_pretrained`` gives with ``output_loading_info=True``.
    head : bool
        Whether the head was loaded too. What a head lacks or has too much matters only then.

    Raises
    ------
    ModelNotFoundError
        Tensors are missing, have another shape, or lie in blocks of the checkpoint that the model does not have.

    Warns
    -----
    CacheWarning
        The checkpoint has tensors that are not known to belong to a head, and that are not used.
    """
    # transformers fills tensors that a checkpoint lacks with random numbers. A pooler may be missing, because it never runs here.
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key.split("."))
    projection = module.get_output_embeddings() if head else None  # type: ignore[operator]
    owners = {name for name, part in module.named_modules() if part is projection}
    if missing and {key.rpartition(".")[0] for key in missing} <= owners:
        raise ModelNotFoundError(
            f"{source!r} was saved without its head ({missing[0]!r} is missing), and logits and perplexity would be random numbers: "
            "give the checkpoint of the whole model, or extract activations only"
        )
    if missing:
        raise ModelNotFoundError(
            f"the weights of {source!r} lack {len(missing)} of the model's tensors, {missing[0]!r} for one: the download is not complete, "
            "or config.json belongs to another model"
        )
    reshaped = sorted(str(entry[0] if isinstance(entry, tuple | list) else entry) for entry in report.get("mismatched_keys") or ())
    if reshaped:
        raise ModelNotFoundError(
            f"{len(reshaped)} tensors of {source!r} have another shape than config.json says, {reshaped[0]!r} for one: "
            "config.json belongs to another model"
        )
    inside, elsewhere = _unused(report, module)
    if inside:
        raise ModelNotFoundError(
            f"{source!r} holds {len(inside)} tensors that the model of its config.json has no place for, {inside[0]!r} for one, so it "
            "would run without them: config.json belongs to another model, or the model needs its own code (trust_remote_code=True). To "
            "leave them out on purpose, load the model yourself, and pass that object with name='…'"
        )
    if elsewhere:
        warn(
            f"{len(elsewhere)} tensors of {source!r} are not used, {elsewhere[0]!r} for one, because the model of its config.json has no "
            "place for them: compare config.json with the checkpoint if they are not of a head or of another part that you do not need"
        )
