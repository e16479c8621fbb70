"""What runs in the workers of vLLM: finds the sites of its model, and takes their rows with hooks. Never a file, a store or a tokenizer.

vLLM's modules are not those of transformers: attention and MLP multiply by fused matrices, and a block may return two tensors, what its MLP
gave and the stream without it, whose sum is the residual stream. Which of this holds is seen by running a short prompt: the two are added
where the first module of the next block adds them, and where what attention and MLP give explains what the block changed.

The rows of a pass are those of several requests. Whose they are is known of vLLM's model runner, of which there are two kinds. That it is
so is seen by the token ids of the rows, which are handed over with them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from lmprobe_zarr.batch import Sites
from lmprobe_zarr.extraction.models.additions import Addition, BlockSites, sites_of
from lmprobe_zarr.extraction.models.architectures import Site, constants_of, submodule
from lmprobe_zarr.extraction.models.gathered import Gathered, Piece, Wish
from lmprobe_zarr.extraction.models.inside import inside_of
from lmprobe_zarr.extraction.models.structure import CHAIN_TOLERANCE, Call, Part, chained, text_settings
from lmprobe_zarr.typing import Ints

__all__ = ["REQUEST_ARGUMENT", "Extension", "answer_of"]

#: The key of ``SamplingParams.extra_args`` under which a request has the number of its prompt.
REQUEST_ARGUMENT: Final = "lmprobe_zarr_prompt"
# Modules of these names are no part of what reads text.
OTHER_PARTS: Final = re.compile(r"vis(ion|ual)|image|audio|speech|encoder|mtp|draft", re.IGNORECASE)


# ------------------------------------------------------------------------------------------------------------------ values


def _floats(values: Any) -> list[torch.Tensor]:
    """The floating-point tensors among arguments or in what a module returns, in order."""
    if isinstance(values, torch.Tensor):
        return [values] if values.is_floating_point() else []
    if isinstance(values, tuple | list):
        return [tensor for value in values for tensor in _floats(value)]
    if isinstance(values, Mapping):
        return [tensor for value in values.values() for tensor in _floats(value)]
    return []


def _added(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The sum of two tensors of one shape, or the first tensor; a copy either way."""
    if len(tensors) > 1 and tensors[0].shape == tensors[1].shape:
        return tensors[0] + tensors[1]
    return tensors[0].clone() if tensors else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tap:
    """Where the values of a site are in one layer.

    Parameters
    ----------
    module : Module
    given : bool
        Whether they are what the module is given, rather than what it returns.
    both : bool
        Whether they are the sum of the first two tensors, rather than the first.
    scale : float
        What they are multiplied by.
    """

    module: nn.Module
    given: bool = False
    both: bool = False
    scale: float = 1.0

    def of(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The values, from the tensors that the module was given or returned."""
        found = _added(tensors) if self.both else tensors[0] if tensors else None
        return found if found is None or self.scale == 1 else found * self.scale

    def register(self, take: Callable[[torch.Tensor | None], None]) -> Any:
        """Hand its values to `take` whenever the module is called; returns the handle of the hook."""
        if self.given:
            return self.module.register_forward_pre_hook(
                lambda _module, args, kwargs: take(self.of(_floats([*args, *kwargs.values()]))), with_kwargs=True
            )
        return self.module.register_forward_hook(lambda _module, _args, output: take(self.of(_floats(output))))


# ---------------------------------------------------------------------------------------------------------------- a model


class _UnknownError(Exception):
    """Something is not found in this model; the message says what."""


def _blocks_of(model: nn.Module, depth: int) -> tuple[str, tuple[nn.Module, ...]]:
    """The list of the blocks, and its path."""
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and not any(name.isdigit() for name in path.split("."))
    ]
    own = [(path, module) for path, module in lists if not OTHER_PARTS.search(path)]
    if not own:
        raise _UnknownError(f"vLLM's {type(model).__name__} has no list of {depth} modules, as many as its configuration has layers")
    path, blocks = max(own, key=lambda pair: sum(parameter.numel() for parameter in pair[1].parameters()))
    return path, tuple(blocks)


@dataclass(slots=True, kw_only=True)
class _BlockCall:
    """One call of a block in the short pass."""

    layer: int
    given: list[torch.Tensor]
    # Where the tensors lie that the block was given, and those that the first module inside of it was given.
    pointers: list[int]
    first_pointers: list[int] | None = None
    returned: list[torch.Tensor] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    # Paths of the modules that add two tensors.
    adding: set[str] = field(default_factory=set)

    @property
    def adds_both(self) -> bool:
        """Whether the first module inside is given both tensors that the block is given."""
        return len(self.pointers) > 1 and self.pointers[1] in (self.first_pointers or ())

    def as_call(self, both: bool) -> Call:
        """The call as the arithmetic of blocks takes it, with the residual stream as its input and output."""
        given, output = (_added(tensors if both else tensors[:1]) for tensors in (self.given, self.returned))
        return Call(index=self.layer, given=given, output=output, parts=self.parts)


@dataclass(slots=True)
class _Shapes:
    """The shapes of the first tensor that a module is given and returns, in a short pass."""

    given: tuple[int, ...] | None
    returned: tuple[int, ...] | None
    calls: int = 0


def _shape(tensors: Sequence[torch.Tensor]) -> tuple[int, ...] | None:
    return tuple(tensors[0].shape) if tensors else None


class _Trace:
    """Notes what every module in the blocks, and some outside of them, are given and return in one short pass."""

    def __init__(self, blocks: Sequence[nn.Module], outside: Sequence[nn.Module]) -> None:
        self.calls: list[_BlockCall] = []
        self.shapes: dict[int, _Shapes] = {}
        self._running: list[_BlockCall] = []
        self._stack = ExitStack()
        watched: set[int] = set()
        for layer, block in enumerate(blocks):
            self._hook(block, functools.partial(self._enter, layer), self._leave)
            for path, module in block.named_modules():
                if path and id(module) not in watched:  # blocks share rotary embeddings
                    watched.add(id(module))
                    self._hook(module, self._enter_part, functools.partial(self._leave_part, path, module))
        for module in outside:
            self._hook(module, lambda _: None, lambda _given, _returned: None)

    def close(self) -> None:
        self._stack.close()

    def _hook(
        self,
        module: nn.Module,
        before: Callable[[list[torch.Tensor]], None],
        after: Callable[[list[torch.Tensor], list[torch.Tensor]], None],
    ) -> None:
        held: list[list[torch.Tensor]] = []

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = _floats([*args, *kwargs.values()])
            before(given)
            held.append([tensor.clone() for tensor in given])  # norms write into what they are given

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            given, returned = held.pop(), [tensor.clone() for tensor in _floats(output)]
            self.shapes.setdefault(id(module), _Shapes(_shape(given), _shape(returned))).calls += 1
            after(given, returned)

        self._stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        self._stack.callback(module.register_forward_hook(leave).remove)

    def _enter(self, layer: int, given: list[torch.Tensor]) -> None:
        pointers = [tensor.data_ptr() for tensor in given]
        self._running.append(_BlockCall(layer=layer, given=[tensor.clone() for tensor in given], pointers=pointers))

    def _leave(self, _given: list[torch.Tensor], returned: list[torch.Tensor]) -> None:
        call = self._running.pop()
        call.returned = returned
        self.calls.append(call)

    def _enter_part(self, given: list[torch.Tensor]) -> None:
        if self._running and self._running[-1].first_pointers is None and given:
            self._running[-1].first_pointers = [tensor.data_ptr() for tensor in given]

    def _leave_part(self, path: str, module: nn.Module, given: list[torch.Tensor], returned: list[torch.Tensor]) -> None:
        if not self._running:
            return
        # A norm that is given two tensors adds them first, and returns their sum as its second.
        both = len(given) > 1 and given[0].shape == given[1].shape and len(returned) > 1
        if both:
            self._running[-1].adding.add(path)
        output = returned[0] if returned else None
        self._running[-1].parts.append(Part(path=path, module=module, given=_added(given if both else given[:1]), output=output))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Anatomy:
    """What a short pass showed of the blocks: whether they hand on two tensors to be added, and what each of them adds."""

    both: bool
    calls: tuple[_BlockCall, ...]
    added: tuple[BlockSites, ...]

    @staticmethod
    def of(trace: _Trace, depth: int, constants: Sequence[float]) -> _Anatomy:
        """The anatomy of as many blocks.

        Raises
        ------
        _UnknownError
            It is not certain which values are the residual stream.
        """
        calls = tuple(trace.calls)
        if [call.layer for call in calls] != list(range(depth)):
            raise _UnknownError(f"a pass calls blocks {[call.layer for call in calls]}, and not each of the {depth} once, in order")
        pairs = {len(call.returned) > 1 for call in calls}
        adding = {call.adds_both for call in calls[1:]}
        if len(pairs) > 1 or (pairs == {True} and len(adding) != 1):
            raise _UnknownError("its blocks return two tensors, and not all of them use these in the same way")
        both = pairs == {True} and adding == {True}
        as_calls = [call.as_call(both) for call in calls]
        if (gap := chained(as_calls)) > CHAIN_TOLERANCE:
            raise _UnknownError(f"what goes into a block is not what came out of the one before it (relative difference {gap:.2g})")
        added = tuple(sites_of(call, constants) for call in as_calls)
        if pairs == {True} and BlockSites() in added:
            raise _UnknownError(
                "its blocks return two tensors, and what its modules add does not explain the difference that layer "
                f"{added.index(BlockSites())} makes"
            )
        return _Anatomy(both=both, calls=calls, added=added)


def _taps_by_structure(blocks: Sequence[nn.Module], anatomy: _Anatomy) -> dict[str, dict[int | None, _Tap]]:
    """Every built-in site that is found, by layer."""
    found: dict[str, dict[int | None, _Tap]] = {"embed": {None: _Tap(module=blocks[0], given=True, both=anatomy.both)}}
    for layer, (block, call, added) in enumerate(zip(blocks, anatomy.calls, anatomy.added, strict=True)):
        found.setdefault("resid", {})[layer] = _Tap(module=block, both=anatomy.both)
        sites: dict[str, Site | None] = {}
        for name in ("attn", "mlp"):
            addition: Addition | None = getattr(added, name)
            module = None if addition is None else submodule(block, addition.path)
            sites[name] = None if addition is None or module is None else Site(module=module, scale=addition.scale)
            if (site := sites[name]) is not None:
                found.setdefault(name, {})[layer] = _Tap(module=site.module, scale=site.scale)
        for name, path in inside_of(call.as_call(anatomy.both), sites["attn"], sites["mlp"]).items():
            if (module := submodule(block, path)) is not None:
                found.setdefault(name, {})[layer] = _Tap(module=module, given=True, both=path in call.adding)
    # A block that is explained by one of them alone has no other; of any other block, what it adds there is not known.
    uncertain = [name for name in ("attn", "mlp") if any(getattr(each, name) is None and not each.whole for each in anatomy.added)]
    return {name: taps for name, taps in found.items() if name not in uncertain}


def _taps_by_path(model: nn.Module, blocks: Sequence[nn.Module], path: str) -> dict[int | None, _Tap]:
    """The modules at a path in the blocks, or outside of them."""
    where, given = Sites.parse_path(path)
    if where.startswith("/"):
        module = submodule(model, where[1:])
        return {} if module is None else {None: _Tap(module=module, given=given)}
    found = {layer: submodule(block, where) for layer, block in enumerate(blocks)}
    return {layer: _Tap(module=module, given=given) for layer, module in found.items() if module is not None}


# ----------------------------------------------------------------------------------------------------------------- requests


class _Requests:
    """Whose the rows of a pass are, as vLLM's model runner knows it. It has two kinds of runners, which keep that in two ways."""

    def __init__(self, runner: Any) -> None:
        self.prompts: dict[str, int] = {}
        self._runner, self._batch, self._running = runner, None, False
        run = runner.execute_model

        @functools.wraps(run)
        def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            # A pass that only warms something up has no requests.
            self._running = not kwargs.get("dummy_run", False)
            for request in scheduled.scheduled_new_reqs if self._running else ():
                extra = getattr(request.sampling_params, "extra_args", None) or {}
                if REQUEST_ARGUMENT in extra:
                    self.prompts[request.req_id] = int(extra[REQUEST_ARGUMENT])
            try:
                return run(scheduled, *args, **kwargs)
            finally:
                self._running = False

        runner.execute_model = execute_model
        if not hasattr(runner, "input_batch"):
            prepare = runner.prepare_inputs

            @functools.wraps(prepare)
            def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
                self._batch = prepare(*args, **kwargs)
                return self._batch

            runner.prepare_inputs = prepare_inputs

    def pieces(self, positions: torch.Tensor) -> tuple[list[Piece], Ints] | None:
        """The pieces of the pass that begins, and the token ids of its rows; None of one without requests."""
        if not self._running:
            return None
        ids: torch.Tensor
        if self._batch is None:
            held = self._runner.input_batch
            names = list(held.req_ids[: held.num_reqs])
            counts = np.diff(self._runner.query_start_loc.np[: len(names) + 1]).astype(np.int64)
            ids = self._runner.input_ids.gpu
        else:
            batch: Any = self._batch
            names, counts, ids = list(batch.req_ids), np.asarray(batch.num_scheduled_tokens, np.int64), batch.input_ids
        total = int(counts.sum())
        flat = positions[0] if positions.ndim > 1 else positions  # of text, all axes of a position are the same
        at = flat[:total].cpu().numpy().astype(np.int64)
        begins = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
        pieces = [
            Piece(prompt=self.prompts[name], first=int(at[begin]), count=int(count))
            for name, begin, count in zip(names, begins, counts, strict=True)
        ]
        return pieces, ids[:total].cpu().numpy().astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------- extension


class _Inside:
    """What the extension keeps between calls: the model, where its sites are, and what is being gathered."""

    def __init__(self, worker: Any) -> None:
        self.runner = worker.model_runner
        self.model: nn.Module = self.runner.get_model()
        self.depth = int(worker.vllm_config.model_config.get_total_num_hidden_layers())
        self.path, self.blocks = _blocks_of(self.model, self.depth)
        self.requests = _Requests(self.runner)
        self.gathered: Gathered | None = None
        self.taps: dict[str, dict[int | None, _Tap]] = {}
        self._trace: _Trace | None = None
        self._hooks = ExitStack()

    def trace(self, paths: Sequence[str]) -> None:
        """Note the next pass. `paths` are those of modules outside of the blocks that are wanted."""
        taps = [_taps_by_path(self.model, self.blocks, path) for path in paths if path.startswith("/")]
        self._trace = _Trace(self.blocks, [tap.module for found in taps for tap in found.values()])

    def places(self, paths: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Where the sites are, from the pass that was noted: all that are found, and those that the caller named."""
        assert self._trace is not None  # noqa: S101 - the driver calls `trace` first
        trace, self._trace = self._trace, None
        trace.close()
        anatomy = _Anatomy.of(trace, self.depth, constants_of(self.model, self.depth))
        self.taps = _taps_by_structure(self.blocks, anatomy)
        named = {site: _taps_by_path(self.model, self.blocks, path) for site, path in paths.items()}
        self.taps |= named
        heads = getattr(text_settings(self.model), "num_attention_heads", None)
        return {
            site: {
                "layers": [layer for layer in taps if layer is not None],
                "shapes": [_shape_of(trace, tap) for tap in taps.values()],
                "calls": [trace.shapes[id(tap.module)].calls if id(tap.module) in trace.shapes else 0 for tap in taps.values()],
                "heads": heads if site == "heads" else None,
            }
            for site, taps in self.taps.items()
        }

    def begin(self, wish: Wish) -> None:
        """Take the rows of the prompts that come next."""
        self._hooks.close()
        self.requests.prompts.clear()
        gathered = self.gathered = Gathered(wish)
        handles = [self.model.register_forward_pre_hook(self._enter, with_kwargs=True)]
        for site, layers in wish.layers_of.items():
            handles += [self.taps[site][layer].register(functools.partial(gathered.take, site, layer)) for layer in layers]
        handles.append(self.model.register_forward_hook(lambda *_: gathered.end_pass()))
        for handle in handles:
            self._hooks.callback(handle.remove)

    def _enter(self, _model: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
        begun = self.requests.pieces(kwargs["positions"])
        if begun is not None and self.gathered is not None:
            self.gathered.begin_pass(*begun)

    def take(self) -> Gathered:
        """What has come since `begin`."""
        gathered, self.gathered = self.gathered, None
        self._hooks.close()
        assert gathered is not None  # noqa: S101 - as above
        return gathered


def _shape_of(trace: _Trace, tap: _Tap) -> list[int] | None:
    shapes = trace.shapes.get(id(tap.module))
    shape = None if shapes is None else shapes.given if tap.given else shapes.returned
    return None if shape is None else list(shape)


def _as_bytes(tensor: torch.Tensor) -> dict[str, Any]:
    """A tensor as what goes from process to process: of tensors only lists would arrive."""
    flat = tensor.contiguous().view(torch.uint8).numpy()
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "values": flat.tobytes()}


def answer_of(gathered: Gathered) -> dict[str, Any]:
    """What was gathered, in the form in which it goes to the process that asked."""
    return {
        "seen": gathered.seen.tolist(),
        "token_ids": gathered.token_ids.tobytes(),
        "problem": gathered.problem,
        "arrays": {level: {name: _as_bytes(tensor) for name, tensor in held.items()} for level, held in gathered.arrays().items()},
    }


class Extension:
    """Methods that vLLM gives its workers. What they take and return is numbers, texts, bytes, lists and dicts."""

    def lmprobe_zarr_start(self) -> dict[str, Any]:
        """Find the blocks; returns how vLLM runs the model, or the ``problem``."""
        worker: Any = self
        config = worker.vllm_config
        layers = list(config.compilation_config.static_forward_context.values())
        backend = next((layer.get_attn_backend().get_name() for layer in layers if hasattr(layer, "get_attn_backend")), None)
        about = {
            "eager": bool(config.model_config.enforce_eager) and not int(config.compilation_config.mode or 0),
            "prefix_caching": bool(config.cache_config.enable_prefix_caching),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "quantization": config.model_config.quantization,
            "kv_cache_dtype": str(config.cache_config.cache_dtype),
            "max_model_len": int(config.model_config.max_model_len),
            "max_num_batched_tokens": int(config.scheduler_config.max_num_batched_tokens),
            "attention": backend,
            "runner": f"{type(worker.model_runner).__module__}.{type(worker.model_runner).__name__}",
            "device": str(worker.device),
        }
        try:
            worker.lmprobe_zarr_inside = _Inside(worker)
        except _UnknownError as error:
            return about | {"problem": str(error)}
        return about | {"path": worker.lmprobe_zarr_inside.path, "layers": worker.lmprobe_zarr_inside.depth}

    def lmprobe_zarr_trace(self, paths: Sequence[str]) -> None:
        """Note the next pass."""
        worker: Any = self
        if worker.rank == 0:  # of processes that share each layer, all have the same stream
            worker.lmprobe_zarr_inside.trace(paths)

    def lmprobe_zarr_places(self, paths: Mapping[str, str]) -> dict[str, Any]:
        """Where the sites are, as ``places``, or the ``problem``."""
        worker: Any = self
        if worker.rank:
            return {}
        try:
            return {"places": worker.lmprobe_zarr_inside.places(paths)}
        except _UnknownError as error:
            return {"problem": str(error)}

    def lmprobe_zarr_begin(self, wish: Mapping[str, Any]) -> None:
        """Take the rows of the prompts that come next: what `Wish` holds, with lists for arrays and bytes for masks."""
        worker: Any = self
        if worker.rank:
            return
        worker.lmprobe_zarr_inside.begin(
            Wish(
                lengths=np.array(wish["lengths"], np.int64),
                layers_of={site: tuple(layers) for site, layers in wish["layers_of"].items()},
                poolings=tuple(wish["poolings"]),
                parts={part: None if mask is None else np.frombuffer(mask, np.bool_) for part, mask in wish["parts"].items()},
                keep_tokens=bool(wish["keep_tokens"]),
            )
        )

    def lmprobe_zarr_take(self) -> dict[str, Any]:
        """What has come: rows of each prompt, token ids, the first problem, and the arrays by level and variable."""
        worker: Any = self
        return {} if worker.rank else answer_of(worker.lmprobe_zarr_inside.take())
