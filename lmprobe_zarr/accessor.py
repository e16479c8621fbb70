"""``ds.lz``: what xarray does not know about activations. Works on any dataset or array with our dimension names."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import xarray as xr

from lmprobe_zarr.display import Html, card, definitions, sparkline, table
from lmprobe_zarr.errors import InvalidArgumentError, MissingDependencyError
from lmprobe_zarr.streaming import Batches, norms_of, open_batches, statistics_of
from lmprobe_zarr.tokens import pad_tokens, pool_tokens, tokens_at

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

__all__ = ["ArrayAccessor", "DatasetAccessor"]

T = TypeVar("T", xr.Dataset, xr.DataArray)


class _TokenAccessor(Generic[T]):
    """What datasets and arrays have in common."""

    _data: T

    def __init__(self, data: T) -> None:
        self._data = data

    def at(self, position: int) -> T:
        """The values at one place of every prompt, back to one row per prompt.

        Parameters
        ----------
        position : int
            Counted from the prompt's first token that is here, or, if negative, from its last: ``-1`` is the last token.

        Returns
        -------
        same kind, with ``token`` replaced by ``prompt``
            In the order in which prompts appear. Lazy where the data are.

        Raises
        ------
        LayerOutOfRangeError
            A prompt has fewer tokens (an `IndexError`, as for any sequence).
        """
        return tokens_at(self._data, position)


@xr.register_dataarray_accessor("lz")  # type: ignore[no-untyped-call]
class ArrayAccessor(_TokenAccessor[xr.DataArray]):
    """``array.lz``: tokens to prompts, to padded arrays, to torch."""

    def pool(self, pooling: str) -> xr.DataArray:
        """One vector per prompt from its tokens.

        Parameters
        ----------
        pooling : {"last_token", "first_token", "mean", "max", "min"}
            See `lmprobe_zarr.pooling.pool_ragged`. Over the tokens that are here: after a selection, over those selected.

        Returns
        -------
        xarray.DataArray
            ``token`` replaced by ``prompt``, named ``<name>_<pooling>``; in memory, computed layer by layer.
        """
        return pool_tokens(self._data, pooling)

    def padded(self) -> xr.DataArray:
        """``token`` replaced by ``prompt`` and ``position``, in memory; NaN (−1 for integers) where a prompt has no token.

        ``position`` holds the positions that occur, so after a selection each token still stands at its own.
        """
        return pad_tokens(self._data)

    def plot_tokens(self, prompt: str | None = None, **kwargs: Any) -> Axes:
        """Scores of one prompt's tokens by layer; see `lmprobe_zarr.plots.plot_tokens`.

        Parameters
        ----------
        prompt : str, optional
            Text or hash; may be left out where there is one.
        **kwargs
            As for `lmprobe_zarr.plots.plot_tokens`.

        Returns
        -------
        matplotlib Axes
        """
        from lmprobe_zarr.plots import plot_tokens

        return plot_tokens(self._data, prompt, **kwargs)

    def plot_cosine(self, **kwargs: Any) -> Axes:
        """A matrix of `lmprobe_zarr.cosine_similarity`; see `lmprobe_zarr.plots.plot_cosine`.

        Parameters
        ----------
        **kwargs
            As for `lmprobe_zarr.plots.plot_cosine`.

        Returns
        -------
        matplotlib Axes
        """
        from lmprobe_zarr.plots import plot_cosine

        return plot_cosine(self._data, **kwargs)

    def to_torch(self, *, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        """The values as a torch tensor.

        Parameters
        ----------
        dtype : torch.dtype, optional
            None keeps the dtype that was stored: bfloat16 comes back as bfloat16, unless the values have changed since and
            no longer fit into it.
        device : torch device, optional
            None stays on the CPU, where no value is copied beyond the read itself.

        Returns
        -------
        torch.Tensor
            Of the array's shape.

        Raises
        ------
        MissingDependencyError
            torch is not installed.
        """
        try:
            import torch
        except ImportError as error:
            raise MissingDependencyError('to_torch needs torch: pip install "lmprobe-zarr[models]"') from error
        values: npt.NDArray[Any] = np.asarray(self._data.values, order="C")
        if not values.flags.writeable:
            values = values.copy()  # torch has no read-only tensors
        if dtype is None and self._data.attrs.get("stored_dtype") == "bfloat16" and _fits_bfloat16(values):
            dtype = torch.bfloat16
        return torch.from_numpy(values).to(device=device, dtype=dtype)

    def batches(
        self,
        *,
        layer: int | Iterable[int] | None = None,
        batch_tokens: int = 4096,
        shuffle: bool = True,
        seed: int = 0,
        epochs: int | None = 1,
        drop_last: bool = False,
        buffer_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        skip_positions: int | Iterable[int] = (),
        max_norm: float | None = None,
        where: Any = None,
        missing: str = "raise",
        labels: str | Iterable[str] | None = None,
        mean: Any = None,
        scale: Any = None,
        dtype: Any = None,
        framework: str = "numpy",
        prefetch: bool = True,
    ) -> Batches:
        """Shuffled batches of rows, for training sparse autoencoders or probes of single tokens.

        Whole chunks are read in random order, as many at a time as the buffer holds, and the rows of one buffer are mixed. So each chunk
        is read once per epoch, and each row comes once. Nothing but the buffers is held in memory, and what is said of it below.

        Parameters
        ----------
        layer : int or sequence of int, optional
            One layer, for batches of shape (batch, hidden), or several, for (layer, batch, hidden). None for all that are here.
        batch_tokens : int
            Rows of a batch: tokens, or prompts where this is one value per prompt.
        shuffle : bool
            False gives rows in their order.
        seed : int
            The order depends on it, on the options, and on which parts hold the rows; on nothing else.
        epochs : int, optional
            How often all rows come, in another order each time; None for ever.
        drop_last : bool
            Whether the rows that fill no batch at the end of an epoch are left out; otherwise it is shorter.
        buffer_tokens : int, optional
            About how many rows are mixed together; None for 256 MiB of them. Another buffer is read while one is used. Where all rows fit
            into one buffer, they are shuffled entirely.
        rank, world_size : int
            Which of how many trainers this is. They get disjoint rows, together all, in equally many batches.
        start_step : int
            How many batches to leave out, over all epochs: those that follow are the same as without it. Costs at most one buffer.
        skip_positions : int or iterable of int
            Places of tokens in their prompts that are left out; 0 is the first token, which usually is an outlier.
        max_norm : float, optional
            Leaves out rows whose norm is more than so many times the median of its layer, in any of the layers, and those that are not
            finite. Reads all rows once before the first batch; see `norms` for doing that once and for all.
        where : DataArray of bool over token, or array of bool, shape (token,), optional
            Only rows where it is true.
        missing : {"raise", "drop"}
            What happens where rows are not stored in all of the layers.
        labels : str or iterable of str, optional
            Coordinates along token to give beside each batch, as a dict of arrays of shape (batch,): ``prompt``, ``position``,
            ``token_id``, columns of yours, or ``row``, the number of the row here. They are held in memory.
        mean, scale : DataArray over layer and hidden, float or array, optional
            Rows become (row − mean) / scale, computed in float32 at least. See `statistics`.
        dtype : dtype, optional
            float16, float32 or float64, and for torch bfloat16 too. None for that of the values, float32 where they are normalised.
        framework : {"numpy", "torch"}
            What batches are. Those of torch are an ``IterableDataset``: iterate them, or give them to ``DataLoader(…, batch_size=None)``.
        prefetch : bool
            Whether the next buffer is read, on a thread, while one is used.

        Returns
        -------
        Batches
            To be iterated, each time from `start_step`; ``len``, ``steps_per_epoch``, ``state_dict`` and ``load_state_dict``.

        Raises
        ------
        LayerOutOfRangeError
            A layer that is not here.
        MissingPromptsError
            Rows are not stored in a layer.
        NumberRangeError
            While iterating: a value is too large for float16.
        MissingDependencyError
            torch is asked for and not installed.
        InvalidArgumentError, InvalidTypeError
            An option that cannot be used, or filters that leave too little.
        """
        return open_batches(
            self._data,
            layer=layer,
            batch_tokens=batch_tokens,
            shuffle=shuffle,
            seed=seed,
            epochs=epochs,
            drop_last=drop_last,
            buffer_tokens=buffer_tokens,
            rank=rank,
            world_size=world_size,
            start_step=start_step,
            skip_positions=skip_positions,
            max_norm=max_norm,
            where=where,
            missing=missing,
            labels=labels,
            mean=mean,
            scale=scale,
            dtype=dtype,
            framework=framework,
            prefetch=prefetch,
        )

    def norms(self, layer: int | Iterable[int] | None = None) -> xr.DataArray:
        """The Euclidean norm of every row, float32, over ``layer`` and ``token`` (or ``prompt``), in memory; each layer is read once.

        Parameters
        ----------
        layer : int or sequence of int, optional
            As in `batches`. Rows that are not stored in all of them have NaN.

        Returns
        -------
        DataArray of float32

        Examples
        --------
        >>> norms = toks.resid.lz.norms(layer=6)  # doctest: +SKIP
        >>> toks.resid.lz.batches(layer=6, where=norms < 10 * norms.median())  # doctest: +SKIP
        """
        return norms_of(self._data, layer)

    def statistics(
        self,
        *,
        layer: int | Iterable[int] | None = None,
        skip_positions: int | Iterable[int] = (),
        where: Any = None,
        missing: str = "raise",
        outlier_factor: float = 10.0,
        keep: str | os.PathLike[str] | None = None,
    ) -> xr.Dataset:
        """Mean and standard deviation of every layer, and how long its rows are, in one pass over them.

        Parameters
        ----------
        layer, skip_positions, where, missing
            Which rows, as in `batches`. Those that are not finite are counted and left out.
        outlier_factor : float
            In medians of the norms.
        keep : str or path, optional
            A file, or a URL of one, to keep the result in, made by one step in which nobody sees it unfinished. Where it holds the
            statistics of the very same rows, they are returned and nothing is read; when parts or options have changed since, it is
            made again. Give each selection a file of its own.

        Returns
        -------
        Dataset
            ``mean_value`` and ``std_value`` (layer, hidden), float64, the latter divided by the number of rows. Over layer alone
            ``mean_norm``, ``median_norm``, ``largest_norm``; ``outlier_share``, the share of rows whose norm is above `outlier_factor`
            times the median; ``n_rows``, ``n_not_finite``; and ``norm_scale``, the mean norm divided by √hidden: rows divided by it have
            a norm of √hidden on average.

        Raises
        ------
        InvalidArgumentError
            As in `batches`; `keep` names something else, or these values are not read from a store.

        Notes
        -----
        Sums of blocks are merged in float64 (Chan, Golub and LeVeque 1979), so that nothing is lost to a mean far from zero. The norms
        of one layer are held in memory: 8 bytes per row.
        """
        return statistics_of(
            self._data,
            layer=layer,
            skip_positions=skip_positions,
            where=where,
            missing=missing,
            outlier_factor=outlier_factor,
            keep=keep,
        )


@xr.register_dataset_accessor("lz")  # type: ignore[no-untyped-call]
class DatasetAccessor(_TokenAccessor[xr.Dataset]):
    """``ds.lz``: the same for every variable of a dataset, and plots of scores."""

    def pool(self, pooling: str) -> xr.Dataset:
        """`ArrayAccessor.pool` of every variable along ``token``, as ``<name>_<pooling>``.

        Parameters
        ----------
        pooling : {"last_token", "first_token", "mean", "max", "min"}
            As for `ArrayAccessor.pool`.

        Returns
        -------
        Dataset
            One row per prompt, in memory.
        """
        return pool_tokens(self._data, pooling)

    def padded(self) -> xr.Dataset:
        """`ArrayAccessor.padded` of every variable along ``token``, and ``mask(prompt, position)``: True where there is a token."""
        return pad_tokens(self._data)

    def to_torch(self, *, dtype: torch.dtype | None = None, device: Any = None) -> dict[str, torch.Tensor]:
        """`ArrayAccessor.to_torch` of every variable, by name.

        Parameters
        ----------
        dtype, device
            As for `ArrayAccessor.to_torch`.

        Returns
        -------
        dict of str to torch.Tensor
        """
        return {str(name): ArrayAccessor(v).to_torch(dtype=dtype, device=device) for name, v in self._data.data_vars.items()}

    def batches(self, variable: str | None = None, **options: Any) -> Batches:
        """`ArrayAccessor.batches` of one variable: of ``resid``, or of the only one, if none is named.

        Parameters
        ----------
        variable : str, optional
            Its name.
        **options
            As for `ArrayAccessor.batches`.

        Returns
        -------
        Batches
        """
        return open_batches(self._array(variable), **options)

    def norms(self, variable: str | None = None, layer: int | Iterable[int] | None = None) -> xr.DataArray:
        """`ArrayAccessor.norms` of one variable: of ``resid``, or of the only one, if none is named.

        Parameters
        ----------
        variable : str, optional
            Its name.
        layer
            As for `ArrayAccessor.norms`.

        Returns
        -------
        DataArray of float32
        """
        return norms_of(self._array(variable), layer)

    def statistics(self, variable: str | None = None, **options: Any) -> xr.Dataset:
        """`ArrayAccessor.statistics` of one variable: of ``resid``, or of the only one, if none is named.

        Parameters
        ----------
        variable : str, optional
            Its name.
        **options
            As for `ArrayAccessor.statistics`.

        Returns
        -------
        Dataset
        """
        return statistics_of(self._array(variable), **options)

    def _array(self, variable: str | None) -> xr.DataArray:
        there = [str(name) for name, v in self._data.data_vars.items() if {"token", "prompt"} & set(v.dims)]
        if variable is None:
            variable = "resid" if "resid" in there else there[0] if len(there) == 1 else None
        if variable not in there:
            raise InvalidArgumentError(f"variable={variable!r}: name one of {there}")
        return self._data[variable]

    def plot(self, metric: str = "accuracy", **kwargs: Any) -> Axes:
        """Scores of a sweep by layer; see `lmprobe_zarr.plots.plot_scores`.

        Parameters
        ----------
        metric : str
            Name of the score.
        **kwargs
            As for `lmprobe_zarr.plots.plot_scores`.

        Returns
        -------
        matplotlib Axes
        """
        from lmprobe_zarr.plots import plot_scores

        return plot_scores(self._data, metric, **kwargs)

    def _best(self) -> list[tuple[str, str, npt.NDArray[Any], npt.NDArray[Any]]]:
        """For each probe and each of the usual scores: name, metric, layers, and the mean over everything but the layer."""
        data = self._data
        if not {"layer", "probe"} <= set(data.dims):
            return []
        metrics = [name for name in ("accuracy", "auroc", "r2") if name in data and {"layer", "probe"} <= set(data[name].dims)]
        found = []
        for metric in metrics:
            scores = data[metric]
            means = scores.mean([dim for dim in scores.dims if dim not in ("layer", "probe")]).sortby("layer").transpose("probe", "layer")
            found += [(str(probe), metric, means.layer.values, row.values) for probe, row in zip(means.probe.values, means, strict=True)]
        return sorted(found, key=lambda one: one[0])

    def __repr__(self) -> str:
        kind = "scores of a sweep" if self._best() else ", ".join(f"{dim}: {size}" for dim, size in self._data.sizes.items())
        lines = [f"<lz accessor, {kind}>"]
        for probe, metric, layers, values in self._best():
            if np.isfinite(values).any():
                best = int(np.nanargmax(values))
                lines.append(f"  {probe}: best {metric} {values[best]:.3f} at layer {layers[best]}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = self._best()
        attrs = self._data.attrs
        if not rows:
            sizes = {str(dim): f"{size:,}" for dim, size in self._data.sizes.items()}
            return str(card(".lz", "pool, at, padded, to_torch, plot", definitions(sizes)))
        body: list[tuple[object, ...]] = []
        for probe, metric, layers, values in rows:
            if not np.isfinite(values).any():
                body.append((probe, metric, "undefined", "", ""))
                continue
            low, high, best = float(np.nanmin(values)), float(np.nanmax(values)), int(np.nanargmax(values))
            label = f"{metric} of {probe} by layer, from {low:.3f} to {high:.3f}, highest at layer {layers[best]}"
            curve = sparkline(values.tolist(), low, high, label=label) if len(layers) > 1 else Html("")
            body.append((probe, metric, Html(f"{high:.3f}"), str(layers[best]), curve))
        told = " from ".join(str(attrs[name]) for name in ("labels", "variable") if attrs.get(name))
        note = " · ".join(part for part in (str(attrs.get("model", "")), told) if part)
        return str(card("scores of a sweep", note, table(("probe", "score", "best", "at layer", "by layer"), body)))

    def plot_transfer(self, metric: str = "accuracy", **kwargs: Any) -> Axes:
        """Scores of `lmprobe_zarr.sweep_transfer`; see `lmprobe_zarr.plots.plot_transfer`.

        Parameters
        ----------
        metric : str
            Name of the score.
        **kwargs
            As for `lmprobe_zarr.plots.plot_transfer`.

        Returns
        -------
        matplotlib Axes
        """
        from lmprobe_zarr.plots import plot_transfer

        return plot_transfer(self._data, metric, **kwargs)

    def plot_roc(self, **kwargs: Any) -> Axes:
        """Curves of `lmprobe_zarr.probes.roc_curves`; see `lmprobe_zarr.plots.plot_roc`.

        Parameters
        ----------
        **kwargs
            As for `lmprobe_zarr.plots.plot_roc`.

        Returns
        -------
        matplotlib Axes
        """
        from lmprobe_zarr.plots import plot_roc

        return plot_roc(self._data, **kwargs)

    def plot_calibration(self, **kwargs: Any) -> Axes:
        """Curves of `lmprobe_zarr.probes.calibration_curves`; see `lmprobe_zarr.plots.plot_calibration`.

        Parameters
        ----------
        **kwargs
            As for `lmprobe_zarr.plots.plot_calibration`.

        Returns
        -------
        matplotlib Axes
        """
        from lmprobe_zarr.plots import plot_calibration

        return plot_calibration(self._data, **kwargs)


def _fits_bfloat16(values: npt.NDArray[Any]) -> bool:
    # Arithmetic keeps the attribute, and its results seldom are bfloat16 numbers: those have 16 zeros at the end.
    return values.dtype == np.float32 and not int(np.bitwise_or.reduce(values.reshape(-1).view(np.uint32))) & 0xFFFF
