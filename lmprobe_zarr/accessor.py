"""The xarray accessor ``.lz``: pooling, tensors, batches, statistics and plots. Each method calls the room that computes the result.

Works on any dataset or array with the dimension names of this package.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np
import pandas as pd
import xarray as xr

from lmprobe_zarr.display import card, definitions
from lmprobe_zarr.errors import InvalidArgumentError, MissingDependencyError
from lmprobe_zarr.latents import to_sparse
from lmprobe_zarr.store.format import FORMAT_COLUMNS
from lmprobe_zarr.store.parts import as_series, prompt_index
from lmprobe_zarr.streaming import Batches, BatchOptions, norms_of, open_batches, statistics_of
from lmprobe_zarr.tokens import TokenIndex, pad_tokens, pool_tokens, tokens_at

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

__all__ = ["ArrayAccessor", "DatasetAccessor"]

T = TypeVar("T", xr.Dataset, xr.DataArray)


class _TokenAccessor(Generic[T]):
    """Methods that datasets and arrays share."""

    _data: T

    def __init__(self, data: T) -> None:
        self._data = data

    def at(self, position: int, *, of: str | None = None, turn: int | None = None) -> T:
        """The values at one position of each prompt, one row per prompt.

        Parameters
        ----------
        position : int
            Counted from the prompt's first token in the data; if negative, from its last: ``-1`` is the last token.
        of : str, optional
            Count only the tokens of a role, such as ``"assistant"`` or ``"reasoning"``, over all turns that have it; ``"generated"`` counts
            the tokens that the model generated.
        turn : int, optional
            Count only the tokens of one message, from 0; with `of`, those of its content, and without it, its header too.

        Returns
        -------
        same kind, with ``token`` replaced by ``prompt``
            In the order in which prompts first appear. Lazy if the data are lazy.

        Raises
        ------
        LayerOutOfRangeError
            A prompt has fewer tokens (an `IndexError`, as for any sequence).
        MissingPromptsError
            No token at all has the role, or the turn.
        InvalidArgumentError
            Roles, turns, or what was generated are not stored.

        Examples
        --------
        >>> toks.lz.at(0, of="generated")  # doctest: +SKIP
        >>> toks.resid.lz.at(-1, of="assistant", turn=2)  # doctest: +SKIP
        """
        return tokens_at(self._data, position, of=of, turn=turn)


@xr.register_dataarray_accessor("lz")  # type: ignore[no-untyped-call]
class ArrayAccessor(_TokenAccessor[xr.DataArray]):
    """``array.lz``: pools and pads tokens, makes tensors and batches, computes statistics, plots."""

    def pool(self, pooling: str) -> xr.DataArray:
        """One vector per prompt from its tokens.

        Parameters
        ----------
        pooling : {"last_token", "first_token", "mean", "max", "min"}
            See `lmprobe_zarr.batch.pool_ragged`. After a selection, only the selected tokens are pooled.

        Returns
        -------
        xarray.DataArray
            With ``token`` replaced by ``prompt``, named ``<name>_<pooling>``. In memory; computed layer by layer.
        """
        return pool_tokens(self._data, pooling)

    def padded(self) -> xr.DataArray:
        """The values with ``token`` replaced by ``prompt`` and ``position``, in memory; NaN (−1 for integers) where a prompt has no token.

        ``position`` has only positions that occur, so each token keeps its position after a selection.
        """
        return pad_tokens(self._data)

    def heads(self, num_heads: int | None = None) -> xr.DataArray:
        """The values of every attention head by themselves, such as those of the site ``heads``.

        Parameters
        ----------
        num_heads : int, optional
            By default what is stored with the variable, which a computation may lose.

        Returns
        -------
        xarray.DataArray
            With the last dimension replaced by ``head`` and ``head_dim``. In memory, unless the data are Dask arrays.

        Raises
        ------
        InvalidArgumentError
            The number of heads is not known, or does not divide the width.
        """
        dim, known = self._data.dims[-1] if self._data.dims else None, self._data.attrs.get("num_heads") if num_heads is None else num_heads
        if known is None or isinstance(known, bool) or not isinstance(known, int | np.integer) or known < 1:
            if known is None:
                raise InvalidArgumentError(f"the number of heads of {self._data.name!r} is not recorded: give it, .lz.heads(32)")
            raise InvalidArgumentError(f"num_heads={known!r} is no number of heads: give a positive integer, .lz.heads(32)")
        if dim in (None, "layer", "prompt", "token") or self._data.sizes[dim] % int(known):
            width = "no width" if dim is None else f"the dimension {dim!r} of {self._data.sizes[dim]}"
            raise InvalidArgumentError(f"{self._data.name!r} has {width} at its end, which is not {known} heads of one size")
        bare = self._data.drop_vars([name for name, coord in self._data.coords.items() if dim in coord.dims])
        return bare.coarsen({dim: self._data.sizes[dim] // int(known)}).construct({dim: ("head", "head_dim")})

    def to_series(self) -> pd.Series[Any]:
        """A column as it was given: a pandas Series with its dtype, categories and time zone, by prompt.

        `DataArray.to_series` gives the dtype of numpy instead, in which integers with gaps are floats and categories are texts.

        Raises
        ------
        InvalidArgumentError
            It is not one-dimensional.
        """
        return as_series(self._data)

    def plot_tokens(self, prompt: str | None = None, **kwargs: Any) -> Axes:
        """Scores of one prompt's tokens by layer; see `lmprobe_zarr.plots.plot_tokens`.

        Parameters
        ----------
        prompt : str, optional
            Text or hash; may be left out if there is only one prompt.
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

    def table(self, **options: Any) -> pd.DataFrame | str:
        """`DatasetAccessor.table` of one score, such as ``scores.accuracy`` or that of `lmprobe_zarr.score_tokens`.

        Parameters
        ----------
        **options
            As for `DatasetAccessor.table`.

        Returns
        -------
        pandas.DataFrame or str
            Rows are tokens or prompts, and columns layers, where there are no probes.
        """
        from lmprobe_zarr.sweeps import table_of_scores

        return table_of_scores(self._data, **options)

    def to_torch(self, *, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        """The values as a torch tensor.

        Parameters
        ----------
        dtype : torch.dtype, optional
            None for the stored dtype. Values stored as float16 or bfloat16 become that again, unless they were changed and it
            cannot hold them exactly any more.
        device : torch device, optional
            None for the CPU, where values are not copied after they were read.

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
            from lmprobe_zarr.streaming.torch import as_tensor
        except ImportError as error:
            raise MissingDependencyError('to_torch needs torch: pip install "lmprobe-zarr[models]"') from error
        return as_tensor(self._data, dtype=dtype, device=device)

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

        Whole chunks are read in random order, as many at a time as the buffer holds, and the rows of a buffer are shuffled. So each chunk
        is read once per epoch, and each row occurs once. Only buffers and labels are held in memory.

        Parameters
        ----------
        layer : int or sequence of int, optional
            One layer, for batches of shape (batch, hidden), or several, for (layer, batch, hidden). None for all layers.
        batch_tokens : int
            Rows of a batch: tokens, or prompts where the array has one value per prompt.
        shuffle : bool
            False keeps the order of the rows.
        seed : int
            The order depends only on the seed, the options, and which parts hold the rows.
        epochs : int, optional
            How many times all rows are returned, each time in another order; None for endless batches.
        drop_last : bool
            Whether to leave out the rows at the end of an epoch that do not fill a batch; otherwise the last batch is shorter.
        buffer_tokens : int, optional
            About how many rows are shuffled together; None for 256 MiB of rows. The next buffer is read while one is used. If all rows fit
            into one buffer, they are shuffled completely.
        rank, world_size : int
            The number of this trainer, and how many there are. Each row belongs to one trainer, and all have the same number of batches.
        start_step : int
            How many batches to skip, over all epochs. The remaining batches do not change. At most one buffer is read in vain.
        skip_positions : int or iterable of int
            Positions of tokens to leave out; 0 is the first token of each prompt, which is usually an outlier.
        max_norm : float, optional
            Leave out rows whose norm exceeds this many times the median norm of the layer, in any of the layers, and rows that are not
            finite. Reads all rows once before the first batch; use `norms` to do that once for several calls.
        where : DataArray of bool over token, or array of bool, shape (token,), optional
            Only rows for which it is true.
        missing : {"raise", "drop"}
            What to do about rows that are not stored in all of the layers.
        labels : str or iterable of str, optional
            Coordinates along ``token`` to return with each batch, as a dict of arrays of shape (batch,): ``prompt``, ``position``,
            ``token_id``, your own columns, or ``row``, the number of the row in this array. They are held in memory.
        mean, scale : DataArray over layer and hidden, float or array, optional
            Rows become (row − mean) / scale, computed in float32 at least. Arrays from `statistics` are matched by layer, variable and
            model; without `mean`, ``norm_scale`` is that of rows as they are.
        dtype : dtype, optional
            float16, float32 or float64; for torch also bfloat16. None for the dtype that is stored, or that of the values
            where they are not read from a store; for normalised values at least float32.
        framework : {"numpy", "torch"}
            Arrays or tensors. Batches of tensors are an ``IterableDataset``: iterate it, or pass it to ``DataLoader(…, batch_size=None)``.
        prefetch : bool
            Whether the next buffer is read on a thread while one is used.

        Returns
        -------
        Batches
            Each iteration starts at `start_step`. Has ``len``, ``steps_per_epoch``, ``state_dict`` and ``load_state_dict``.

        Raises
        ------
        LayerOutOfRangeError
            The array lacks a layer.
        MissingPromptsError
            Rows are not stored in a layer.
        NumberRangeError
            While iterating: a value is too large for float16.
        MissingDependencyError
            ``framework="torch"``, and torch is not installed.
        InvalidArgumentError, InvalidTypeError
            An option cannot be used, or the filters leave too few rows.
        """
        options = BatchOptions(
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
        return open_batches(self._data, options)

    def norms(self, layer: int | Iterable[int] | None = None) -> xr.DataArray:
        """The Euclidean norm of every row, float32, over ``layer`` and ``token`` (or ``prompt``), in memory; each layer is read once.

        Parameters
        ----------
        layer : int or sequence of int, optional
            As in `batches`. Rows that one of the layers lacks are NaN.

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
        """Mean, standard deviation and norms of every layer, in one pass over its rows.

        Parameters
        ----------
        layer, skip_positions, where, missing
            Choose rows, as in `batches`. Rows that are not finite are counted and left out.
        outlier_factor : float
            Rows whose norm exceeds this many medians are outliers.
        keep : str or path, optional
            Path or URL of a file to keep the result in; it is written atomically. If the file holds the statistics of the same rows, they
            are returned and no row is read. If parts or options have changed, it is written again. Use one file per selection.

        Returns
        -------
        Dataset
            ``mean_value`` and ``std_value`` (layer, hidden), float64, the latter divided by the number of rows. Over layer alone
            ``mean_norm``, ``median_norm``, ``largest_norm``; ``outlier_share``, the share of rows whose norm is above `outlier_factor`
            times the median; ``n_rows``, ``n_not_finite``; and ``norm_scale``, the mean norm of rows less ``mean_value`` over √hidden.
            Its coordinates ``without_mean``, the factor for rows as they are, and ``norm_of_mean`` are for `batches`.

        Raises
        ------
        InvalidArgumentError
            As in `batches`; `keep` names a file that holds something else, or the values are not read from a store.

        Notes
        -----
        Sums of blocks are merged in float64 (Chan, Golub and LeVeque 1979), so a mean far from zero costs no precision. The norms of one
        layer are held in memory: 8 bytes per row. ``norm_scale`` is exact for two million values, else corrected by as many.
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
    """``ds.lz``: the methods of `ArrayAccessor` for the variables of a dataset, and plots of scores."""

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
        """`ArrayAccessor.padded` of every variable along ``token``, and ``mask`` (prompt, position), True where there is a token."""
        return pad_tokens(self._data)

    def to_dataframe(self) -> pd.DataFrame:
        """The columns of the user's as they were given: a pandas DataFrame with their dtypes, categories and time zones, by prompt.

        Returns
        -------
        pandas.DataFrame
            One row per prompt (of a dataset of tokens: per token), its hash as the index; without the format's own columns.
        """
        dims = [dim for dim in ("token", "prompt") if dim in self._data.dims][:1]
        index = self._data.xindexes.get("prompt")
        others = FORMAT_COLUMNS.union(index.columns if isinstance(index, TokenIndex) else ())
        own = {str(n): c for n, c in self._data.coords.items() if list(c.dims) == dims and n not in others}
        return pd.DataFrame({name: as_series(column) for name, column in own.items()}, index=prompt_index(self._data, dims))

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

    def to_sparse(self, name: str | None = None, *, kind: Literal["coo", "csr"] = "coo") -> Any:
        """The latents of the tokens as one sparse array, shape (token, latent), in memory: what is not stored of a token's latents is 0.

        Parameters
        ----------
        name : str, optional
            Which latents, where the dataset has those of several autoencoders.
        kind : {"coo", "csr"}
            ``"coo"`` gives a DataArray of ``sparse.COO``, which needs the package sparse, with the coordinates of the tokens; ``"csr"`` a
            ``scipy.sparse.csr_array`` without any.

        Returns
        -------
        DataArray or scipy.sparse.csr_array, of float32

        Raises
        ------
        InvalidArgumentError
            The dataset has no latents, or several and no `name`.
        MissingPromptsError
            Tokens without latents: they would read as zeros.
        MissingDependencyError
            sparse is not installed.
        """
        return to_sparse(self._data, name, kind)

    def batches(self, variable: str | None = None, **options: Any) -> Batches:
        """`ArrayAccessor.batches` of one variable; by default of ``resid``, or else of the only variable.

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
        return ArrayAccessor(self._array(variable)).batches(**options)

    def norms(self, variable: str | None = None, layer: int | Iterable[int] | None = None) -> xr.DataArray:
        """`ArrayAccessor.norms` of one variable; by default of ``resid``, or else of the only variable.

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
        """`ArrayAccessor.statistics` of one variable; by default of ``resid``, or else of the only variable.

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
        names = [str(name) for name, v in self._data.data_vars.items() if {"token", "prompt"} & set(v.dims)]
        if variable is None:
            variable = "resid" if "resid" in names else names[0] if len(names) == 1 else None
        if not isinstance(variable, str) or variable not in names:
            raise InvalidArgumentError(f"variable={variable!r:.60}: name one of {names}")
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

    def plot_heatmap(self, metric: str = "accuracy", **kwargs: Any) -> Axes:
        """Scores of a sweep by layer and probe, or by layer and another dim; see `lmprobe_zarr.plots.plot_heatmap`.

        Parameters
        ----------
        metric : str
            Name of the score.
        **kwargs
            As for `lmprobe_zarr.plots.plot_heatmap`, such as ``rows="variable"``.

        Returns
        -------
        matplotlib Axes
        """
        from lmprobe_zarr.plots import plot_heatmap

        return plot_heatmap(self._data, metric, **kwargs)

    def table(
        self,
        metrics: str | Iterable[str] | None = None,
        *,
        intervals: xr.Dataset | None = None,
        format: str | None = None,  # noqa: A002 (the word that pandas and others use)
        path: str | os.PathLike[str] | None = None,
    ) -> pd.DataFrame | str:
        """Mean scores with their intervals, one column per probe and one row per layer (and per entry of further dims).

        Parameters
        ----------
        metrics : str or iterable of str, optional
            Names of scores; all of them if not given.
        intervals : Dataset, optional
            From `lmprobe_zarr.confidence_intervals`. Without it the interval is the standard deviation over the folds, and over the seeds;
            for labels that were shuffled many times, over the shuffles.
        format : {"markdown", "latex", "csv"}, optional
            None for a DataFrame, or for the format of `path`. A LaTeX table is a plain ``tabular``.
        path : str or path, optional
            A file to write the text to. If no `format` is given, it ends with ``.md``, ``.tex`` or ``.csv``.

        Returns
        -------
        pandas.DataFrame or str
            Cells as ``0.833 ± 0.041``, or ``0.833 [0.790, 0.871]`` with `intervals`. The interval is rounded to two digits, and the mean to
            as many decimals. "not stored" is a score that was never fitted, such as that of a layer that a variable lacks; "not finite"
            is a score that is NaN or infinite in every fold, and the attribute ``nan_reasons`` says why; "not tested" are datasets of
            `lmprobe_zarr.sweep_transfer` with no other prompts. ``(4 of 5)`` says that only so many folds have a finite score.
            In CSV the mean and the numbers of the interval have columns of their own. Where labels were shuffled many times, the column
            after that of a probe has its p-values, and the caption, ``attrs["caption"]`` of a DataFrame, that of the best layer; in CSV
            ``p any layer`` is a column.

        Raises
        ------
        InvalidArgumentError
            No such score, format or ending, intervals of other scores, or a file that cannot be written.
        """
        from lmprobe_zarr.sweeps import table_of_scores

        return table_of_scores(self._data, metrics, intervals=intervals, format=format, path=path)

    def best(self, metric: str | None = None, along: str | Iterable[str] = "layer") -> xr.Dataset:
        """The layer with the best mean score, for each probe; the score is too high, since it is the one that the layer was chosen by.

        `lmprobe_zarr.sweep` with ``choose="layer"`` chooses within each training fold instead, and reports scores of prompts that had no
        part in the choice.

        Parameters
        ----------
        metric : str, optional
            The score to choose by; the first of the sweep if not given. Losses and errors are best where they are least.
        along : str or several
            What is chosen: "layer", "probe" (never a control), "strength", "variable".

        Returns
        -------
        Dataset
            The mean score over folds and seeds of the best, and ``best_layer`` and so on, over the other dims. The coordinate
            ``chosen_by`` and the attribute ``chosen`` say that the choice was made on the scores themselves.

        Raises
        ------
        InvalidArgumentError
            No such score or dim, or a dim along which the sweep itself has chosen.
        """
        from lmprobe_zarr.sweeps import best_scores

        return best_scores(self._data, metric, along)

    def save(self, path: str | os.PathLike[str], *, unit: str = "activations") -> None:
        """Write directions to a file, which :func:`lmprobe_zarr.load_directions` and other tools read.

        Parameters
        ----------
        path : str or path
            Ends in ``.safetensors``, which holds everything as it is; or in ``.gguf``, a control vector as llama.cpp applies it: float32,
            one direction for each layer from 1 on. Metadata of both say model, site, layers, sign (which class the direction points to)
            and scale. What is there is replaced, once the new file is whole.
        unit : {"activations", "mean_norm"}
            Of a control vector: whether its vectors have length 1, in units of the activations, or the mean norm of the rows that were
            fitted. llama.cpp's strength is then counted in that.

        Raises
        ------
        InvalidTypeError
            The dataset holds no directions.
        InvalidArgumentError
            Another ending, a folder, or directions that a control vector cannot hold: of layer 0, of several classes, NaN or zero.
        MissingDependencyError
            A control vector without the package gguf.
        """
        from lmprobe_zarr.sweeps import save_directions

        save_directions(self._data, path, unit=unit)

    def __repr__(self) -> str:
        from lmprobe_zarr.sweeps import describe_scores

        lines = describe_scores(self._data)
        if lines is None:
            return f"<lz accessor, {', '.join(f'{dim}: {size}' for dim, size in self._data.sizes.items())}>"
        return f"<lz accessor, scores of a sweep>\n{lines}".rstrip()

    def _repr_html_(self) -> str:
        from lmprobe_zarr.sweeps import scores_card

        sizes = {str(dim): f"{size:,}" for dim, size in self._data.sizes.items()}
        return str(scores_card(self._data) or card(".lz", "pool, at, padded, to_torch, plot", definitions(sizes)))

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
