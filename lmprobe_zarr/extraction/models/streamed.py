"""A model whose blocks share the memory of a few: the weights of a block are read when it is its turn.

transformers itself builds the model, with everything outside of the blocks, and what it is given for the tensors of the blocks has no
values. Blocks that are built alike then share two sets of tensors, by turns, so that the next block is read while one computes. What a
checkpoint keeps in another form, such as experts one by one, is converted by transformers' own operations, a parameter at a time.

A pass over all blocks at once computes with the weights of whichever blocks are there: it shows how the model is built, and no values.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from lmprobe_zarr.errors import InvalidArgumentError, MissingDependencyError, ModelNotFoundError, UnknownArchitectureError
from lmprobe_zarr.extraction.models.architectures import submodule
from lmprobe_zarr.extraction.models.checkpoint import Checkpoint
from lmprobe_zarr.extraction.models.structure import block_lists, first_line
from lmprobe_zarr.extraction.models.tensor_bits import TensorBits
from lmprobe_zarr.extraction.models.weight_files import weight_files

__all__ = ["StreamedBlocks", "build", "downloaded", "explained", "not_streamed"]

# Sets of tensors that blocks of one kind share: one that computes, and one that is being read.
ROOMS: Final = 2

Kind = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


def not_streamed(name: str, why: str) -> UnknownArchitectureError:
    """The error for a model whose weights cannot be streamed."""
    return UnknownArchitectureError(
        f"the weights of {name!r} cannot be streamed: {why}. Nothing was stored; weights='loaded' loads it whole"
    )


@contextmanager
def explained(name: str, blocks: StreamedBlocks | None) -> Iterator[None]:
    """What is wrong with a model whose blocks share their memory may be only that they do: then its error says how to load it whole."""
    try:
        yield
    except UnknownArchitectureError as error:
        if blocks is None:
            raise
        raise not_streamed(name, f"run by blocks that share their memory, it is refused ({first_line(error)})") from error


@dataclass(frozen=True, slots=True)
class _Absent:
    """What transformers is given for a tensor of a block: shape and dtype without values, which it moves and converts as any other."""

    tensor: torch.Tensor  # on the meta device

    def __getitem__(self, _key: Any) -> _Absent:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.tensor if dtype is None else self.tensor.to(dtype)


@dataclass(frozen=True, slots=True)
class _Present:
    """What transformers is given for a tensor outside of the blocks: it is read when its place in the model is known."""

    checkpoint: Checkpoint
    name: str

    def __getitem__(self, _key: Any) -> torch.Tensor:
        return self.checkpoint.read(self.name)


@dataclass(frozen=True, slots=True)
class _Source:
    """Where parameters of a block come from: a tensor of the checkpoint, or several that transformers converts.

    Parameters
    ----------
    target : str
        The parameter in the model; of a conversion, the first.
    names, patterns : tuple of str
        The tensors, and which pattern of the conversion each is of.
    converter : WeightConverter, optional
    """

    target: str
    names: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    converter: Any = None


@dataclass(slots=True)
class StreamedBlocks:
    """The blocks of a model, and what reads their weights.

    Parameters
    ----------
    name : str
        Of the model, for messages.
    model : Module
    path : str
        Of the list of blocks in the model.
    checkpoint : Checkpoint
    sources : list of list of _Source
        By block.
    """

    name: str
    model: nn.Module
    path: str
    checkpoint: Checkpoint
    sources: Sequence[Sequence[_Source]]
    blocks: tuple[nn.Module, ...] = ()
    _places: list[tuple[Kind, int]] = field(default_factory=list)
    _rooms: dict[tuple[Kind, int], dict[str, torch.Tensor]] = field(default_factory=dict)
    _held: dict[tuple[Kind, int], int | None] = field(default_factory=dict)
    _ahead: dict[int, Future[None]] = field(default_factory=dict)
    _reader: ThreadPoolExecutor | None = None
    _turn: threading.RLock = field(default_factory=threading.RLock)

    def share(self, device: torch.device) -> None:
        """Give all blocks tensors on a device, which those that are built alike share, and read the first blocks of each kind into them.

        What lies outside of the blocks is moved to the device.
        """
        listed: Any = submodule(self.model, self.path)
        self.blocks = tuple(listed)
        counts: dict[Kind, int] = {}
        for block in self.blocks:
            empty = {name: weight for name, weight in block.named_parameters() if weight.device.type == "meta"}
            kind: Kind = tuple(sorted((name, tuple(weight.shape), weight.dtype) for name, weight in empty.items()))
            place = kind, counts.get(kind, 0) % ROOMS
            counts[kind] = counts.get(kind, 0) + 1
            if place not in self._rooms:
                self._rooms[place] = {name: torch.empty(weight.shape, dtype=weight.dtype, device=device) for name, weight in empty.items()}
                self._held[place] = None
            for name, room in self._rooms[place].items():
                owner, _, own = name.rpartition(".")
                block.get_submodule(owner)._parameters[own] = nn.Parameter(room, requires_grad=False)
            self._places.append(place)
        _move_rest(self.model, device)
        for layer, place in enumerate(self._places):
            if self._held[place] is None:
                self.bring(layer)

    @property
    def room_nbytes(self) -> int:
        """Bytes of the tensors that the blocks share."""
        return sum(room.nbytes for rooms in self._rooms.values() for room in rooms.values())

    def bring(self, layer: int) -> None:
        """Have the weights of a block in its place.

        Raises
        ------
        ModelNotFoundError
            They cannot be read.
        """
        place = self._places[layer]
        ahead = self._ahead.pop(layer, None)
        if ahead is not None:
            ahead.result()
        if self._held[place] != layer:
            self._read(layer)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, no other thread changes the blocks, and they may be read ahead; afterwards nothing is being read."""
        with self._turn:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="lmprobe-zarr-weights")
            try:
                yield
            finally:
                self._reader.shutdown(wait=True, cancel_futures=True)
                self._reader = None
                self._ahead.clear()

    def read_ahead(self, layer: int) -> None:
        """Begin to read the weights of a block into its place, which no block may need until then."""
        if self._reader is not None and self._held[self._places[layer]] != layer:
            self._ahead[layer] = self._reader.submit(self._read, layer)

    def _read(self, layer: int) -> None:
        place = self._places[layer]
        self._held[place] = None
        rooms = {f"{self.path}.{layer}.{name}": room for name, room in self._rooms[place].items()}
        left = set(rooms)
        with torch.no_grad(), _stream_of(next(iter(rooms.values()), None)):
            for source in self.sources[layer]:
                if source.converter is None:
                    self.checkpoint.read_into(source.names[0], rooms[source.target])
                    left.discard(source.target)
                    continue
                for target, values in self._converted(source):
                    if target not in rooms or values.shape != rooms[target].shape:
                        raise not_streamed(
                            self.name, f"transformers converts a tensor to {target!r} {list(values.shape)}, which has no place"
                        )
                    rooms[target].copy_(values)
                    left.discard(target)
        if left:
            raise not_streamed(self.name, f"no tensor of its checkpoint is that of {min(left)!r}")
        self._held[place] = layer

    def _converted(self, source: _Source) -> Iterator[tuple[str, torch.Tensor]]:
        converter = copy.deepcopy(source.converter)
        for name, pattern in zip(source.names, source.patterns, strict=True):
            converter.add_tensor(source.target, name, pattern, self.checkpoint.read(name))
        for target, values in converter.convert(source.target, model=self.model, config=self.model.config).items():
            yield target, values[0] if isinstance(values, list) else values

    def digest(self) -> list[Any]:
        """A digest of the tensors that the blocks share, to notice a pass that changes its weights."""
        bits = TensorBits()
        return [bits.digest(name, room, lambda _, value: str(value)) for rooms in self._rooms.values() for name, room in rooms.items()]


@contextmanager
def _stream_of(weight: torch.Tensor | None) -> Iterator[None]:
    """Inside, copies to a CUDA device do not wait for what is being computed there; afterwards they are done."""
    if weight is None or weight.device.type != "cuda":
        yield
        return
    stream: Any = torch.cuda.Stream(weight.device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def _move_rest(model: nn.Module, device: torch.device) -> None:
    """Move what has values to a device, each tensor by itself: blocks share theirs, and go on sharing them."""
    for part in model.modules():
        for weight in part._parameters.values():
            if weight is not None and weight.device.type not in ("meta", device.type):
                weight.data = weight.data.to(device)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)


# ------------------------------------------------------------------------------------------------------------------ building


def downloaded(source: str, revision: str | None) -> Path:
    """The folder in the hub's local cache with the safetensors files of a model, which are fetched where they are not there yet."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=revision, allow_patterns=["*.safetensors", "*.json"]))


def build(
    name: str, folder: Path, config: Any, kind: Any, dtype: str, *, layers: str | None, **options: Any
) -> tuple[Any, Any, StreamedBlocks]:
    """The model in a folder without the weights of its blocks, what transformers reports of loading it, and its blocks.

    Parameters
    ----------
    name : str
        For messages.
    folder : Path
    config : PretrainedConfig
    kind : class
        The auto class that builds it.
    dtype : str
        The dtype that it computes in.
    layers : str, optional
        The path of its list of blocks, where the caller names it.
    **options
        Of ``from_config``.

    Raises
    ------
    UnknownArchitectureError, InvalidArgumentError, ModelNotFoundError, MissingDependencyError
        Its weights are quantised or in no safetensors files, tensors of its blocks have no place, or its blocks are not found.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise InvalidArgumentError(
            f"the weights of {name!r} are quantised, and what is kept beside packed numbers cannot be read one block at a time: give "
            "weights='loaded', or the model that it was made of"
        )
    weights = weight_files(folder)
    if weights is None:
        raise ModelNotFoundError(f"the weights of {name!r} are in no safetensors files, which alone can be read one block at a time")
    checkpoint = Checkpoint(weights)
    with torch.device("meta"):
        empty = kind.from_config(config, dtype=getattr(torch, dtype), **options)
    lists = [found.path for found in block_lists(empty)]
    path = layers if layers is not None and submodule(empty, layers) is not None else next(iter(lists), None)
    if path is None:
        raise not_streamed(name, "its blocks are not found")
    sources, given = _sources(empty, path, checkpoint)
    module, report = type(empty).from_pretrained(
        None, config=config, dtype=getattr(torch, dtype), state_dict=given, output_loading_info=True
    )
    module.config._name_or_path = name
    return module, report, StreamedBlocks(name=name, model=module, path=path, checkpoint=checkpoint, sources=sources)


def _sources(empty: Any, path: str, checkpoint: Checkpoint) -> tuple[list[list[_Source]], dict[str, Any]]:
    """What the parameters of each block come from, and what transformers is given instead of the checkpoint's tensors."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError as error:
        raise MissingDependencyError("weights='streamed' needs transformers 5 or later: give weights='loaded'") from error
    mapping = get_model_conversion_mapping(empty)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    held, prefix, owned = empty.state_dict(), empty.base_model_prefix, _owned_by_one_block(empty, path)
    found: list[dict[str, list[tuple[str, str | None]]]] = [{} for _ in submodule(empty, path) or ()]  # type: ignore[union-attr]
    given: dict[str, Any] = {}
    for key in sorted(checkpoint.tensors, key=_natural):
        target, pattern = rename_source_key(key, renamings, converters, prefix, held)
        if target not in held and key in held:
            target, pattern = rename_source_key(key, [], [], prefix, held)
        layer = owned.get(target)
        if layer is None:
            given[key] = _Present(checkpoint, key)
            continue
        given[key] = _Absent(torch.empty(checkpoint.tensors[key].shape, dtype=checkpoint.dtype(key), device="meta"))
        found[layer].setdefault(target, []).append((key, pattern))
    return [[_source(target, keys, by_pattern) for target, keys in each.items()] for each in found], given


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts names as transformers does, numbers by their value: experts are stacked in this order."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _source(target: str, keys: Sequence[tuple[str, str | None]], by_pattern: Mapping[str, Any]) -> _Source:
    names, patterns = tuple(key for key, _ in keys), tuple(pattern or "" for _, pattern in keys)
    if patterns[0]:
        return _Source(target, names, patterns, by_pattern[patterns[0]])
    return _Source(target, names[-1:])


def _owned_by_one_block(model: nn.Module, path: str) -> dict[str, int]:
    """The block of every parameter that belongs to one block alone. What blocks share with one another, or with the rest, stays loaded."""
    owners: dict[int, set[int | None]] = {}
    places = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        inside = name.removeprefix(f"{path}.") if name.startswith(f"{path}.") else ""
        layer = int(inside.partition(".")[0]) if inside else None
        owners.setdefault(id(weight), set()).add(layer)
        places[name] = id(weight), layer
    return {name: layer for name, (weight, layer) in places.items() if layer is not None and owners[weight] == {layer}}
