"""Fitted probes on tokens as a dataset, and what they say of tokens and prompts. Never fits; never a store, a model or a plot.

``tokens`` fits them; ``token_stream`` reads the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import Stage, parse_stage, split_variable
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.interchange import read_list, to_interchange
from lmprobe_zarr.probes import (
    SequenceProbe,
    SequenceSolution,
    Solution,
    WatchedProbe,
    bare_variable,
    parse_sequence_probe,
    watch_solution,
)
from lmprobe_zarr.sweeps.given import layer_labels, parse_token_activations
from lmprobe_zarr.sweeps.origin import Origin, warn_of_origin
from lmprobe_zarr.sweeps.token_rows import LayerRows, TaskPlan
from lmprobe_zarr.sweeps.token_stream import score_stream
from lmprobe_zarr.tasks import Runner, parse_runner
from lmprobe_zarr.tokens import inner_dim, pool_tokens, sequences_of, token_texts
from lmprobe_zarr.typing import Array, Client

__all__ = ["name_model", "parse_score_stage", "pooling_weights", "score_tokens", "solutions_to_dataset", "watched_probes"]

#: What a probe with a pooling of its own makes of the tokens of a prompt.
LEARNED = "learned"


def parse_score_stage(pooling: Any) -> Stage:
    """What becomes of the scores of tokens.

    Raises
    ------
    InvalidArgumentError
        An unknown pooling, or one of activations.
    """
    stage = parse_stage(pooling)
    if stage.of == "activation":
        raise InvalidArgumentError(
            f"pooling={pooling!r} pools activations, and here scores of tokens are pooled: use 'all', or 'score:{stage.pooling}'"
        )
    return stage


# -- a dataset of probes ---------------------------------------------------------------------------------------------------


def solutions_to_dataset(
    solutions: Sequence[Solution | SequenceSolution], array: xr.DataArray, classes: Array, attrs: dict[str, Any]
) -> xr.Dataset:
    """The coefficients of one probe for each layer, as `lmprobe_zarr.fit_tokens` gives them."""
    two = len(classes) == 2
    inner, of_class = inner_dim(array), () if two else ("class",)
    coef_name = {"long_name": "coefficients, in the units of the activations"}
    first = solutions[0]
    made: dict[str, Any]
    if not isinstance(first, SequenceSolution):
        coef, intercept = (np.stack([getattr(each, name) for each in solutions]) for name in ("coef", "intercept"))
        made = {
            "coef": (("layer", *of_class, inner), coef[:, 0] if two else coef, coef_name),
            "intercept": (("layer", *of_class), intercept[:, 0] if two else intercept),
        }
    else:
        made = _sequence_variables([each for each in solutions if isinstance(each, SequenceSolution)], first.probe, of_class, inner)
        made["coef"] = (*made["coef"], coef_name)
    return xr.Dataset(made, coords={"layer": layer_labels(array), **({} if two else {"class": classes})}, attrs=attrs)


def _sequence_variables(solutions: list[SequenceSolution], probe: SequenceProbe, of_class: tuple[str, ...], inner: str) -> dict[str, Any]:
    coef, bias = np.stack([each.coef for each in solutions]), np.stack([each.bias for each in solutions])
    outputs, heads = bias.shape[1], probe.heads

    def squeezed(values: Array, axis: int) -> Array:
        return values if of_class else values.squeeze(axis)

    made: dict[str, Any] = {"intercept": (("layer", *of_class), squeezed(bias, 1))}
    if probe.inner:
        output = np.stack([each.output for each in solutions])
        made["coef"] = (("layer", *of_class, "unit"), squeezed(output, 1))
        made["inner_coef"] = (("layer", "unit", inner), coef, {"long_name": "coefficients of the inner units, in those of the activations"})
        made["inner_intercept"] = (("layer", "unit"), np.stack([each.intercept for each in solutions]))
        return made
    of_head = ("head",) if probe.name in ("attention", "multimax") else ()
    values = coef[:, coef.shape[1] - heads * outputs :].reshape(len(coef), heads, outputs, -1)
    made["coef"] = (("layer", *of_head, *of_class, inner), squeezed(values if of_head else values[:, 0], 2 if of_head else 1))
    if probe.name == "attention":
        long_name = {"long_name": "coefficients of the scores whose softmax weighs tokens"}
        made["query_coef"] = (("layer", "head", inner), coef[:, :heads], long_name)
    return made


def _units(dim: str) -> str:
    return "hidden units" if dim == "hidden" else f"units along {dim}"


def _check_probes(probes: Any) -> list[Any]:
    """The layers of fitted probes."""
    if not isinstance(probes, xr.Dataset) or "coef" not in probes or "intercept" not in probes or "classes" not in probes.attrs:
        raise InvalidTypeError(f"probes are the xarray.Dataset that fit_tokens gives, not {type(probes).__name__}")
    layers: list[Any] = np.atleast_1d(probes["layer"].values).tolist()
    return layers


def watched_probes(probes: Any, pooling: str | None = None, layers: Any = None) -> list[WatchedProbe]:
    """Fitted probes on tokens, in the form in which they score a text that still grows, layer by layer.

    Parameters
    ----------
    probes : Dataset
        From :func:`fit_tokens`.
    pooling : str, optional
        As for :func:`score_tokens`.
    layers : int or iterable of int, optional
        Only these.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        As :func:`score_tokens`; or probes of another site than the residual stream, or that are not finite.
    """
    fitted = _check_probes(probes)
    wanted = fitted if layers is None else [layers] if isinstance(layers, int | np.integer) else list(layers)
    strange = [layer for layer in wanted if layer not in fitted]
    if strange or not wanted:
        what = f"layers {strange} have no probe" if strange else "no layer was named"
        raise InvalidArgumentError(f"{what}: there are probes of layers {fitted}")
    probe = parse_sequence_probe(str(probes.attrs.get("probe", "")))
    inner = inner_dim(probes["coef" if probe is None or not probe.inner else "inner_coef"])
    site, pooled, _ = split_variable(str(probes.attrs.get("variable", "")))
    if inner != "hidden" or site not in ("", "resid") or pooled is not None:
        what = inner.removesuffix("_unit") if inner != "hidden" else site if pooled is None else probes.attrs["variable"]
        raise InvalidArgumentError(f"probes on {what!r}: only probes of fit_tokens on the residual stream, 'resid', can be watched")
    classes = np.asarray(read_list(probes.attrs, "classes") or ())
    found = []
    for layer, solution in zip(wanted, _solutions_of(probes, wanted, inner)[0], strict=True):
        if not (np.isfinite(solution.coef).all() and np.isfinite(solution.intercept).all()):
            raise InvalidArgumentError(f"the probe of layer {layer} is NaN or infinite: leave the layer out")
        found.append(watch_solution(solution, _stage_of(pooling, solution), int(layer), classes))
    return found


def _solutions(probes: Any, array: xr.DataArray) -> tuple[list[Solution | SequenceSolution], xr.Dataset]:
    fitted = _check_probes(probes)
    wanted = layer_labels(array).tolist()
    strange = [layer for layer in wanted if layer not in fitted]
    if strange:
        raise InvalidArgumentError(f"layers {strange} have no probe: there are probes of layers {fitted}, select these of the activations")
    probe = parse_sequence_probe(str(probes.attrs.get("probe", "")))
    first = probes["coef" if probe is None or not probe.inner else "inner_coef"]
    fitted_on, inner = inner_dim(first), inner_dim(array)
    if probes.sizes[fitted_on] != array.sizes[inner]:
        raise InvalidArgumentError(
            f"the probes were fitted on {probes.sizes[fitted_on]} {_units(fitted_on)}, and these activations have {array.sizes[inner]}: "
            "give the same site of the same model"
        )
    warn_of_origin(Origin(str(probes.attrs.get("model") or ""), str(probes.attrs.get("variable") or "")), Origin.of(array))
    return _solutions_of(probes, wanted, fitted_on)


def _solutions_of(probes: xr.Dataset, wanted: list[Any], fitted_on: str) -> tuple[list[Solution | SequenceSolution], xr.Dataset]:
    """The probes of some layers, and the part of the dataset that has them."""
    probe = parse_sequence_probe(str(probes.attrs.get("probe", "")))
    chosen = probes.sel(layer=wanted) if "layer" in probes.dims else probes.expand_dims("layer")
    classes = np.arange(len(read_list(probes.attrs, "classes") or ()))
    found: list[Solution | SequenceSolution] = []
    for n in range(len(wanted)):
        of_layer = chosen.isel(layer=n)
        if probe is not None:
            found.append(_sequence_solution(probe, of_layer, fitted_on, classes))
            continue
        coef = np.atleast_2d(of_layer["coef"].transpose(..., fitted_on).values)
        found.append(Solution(coef, np.atleast_1d(of_layer["intercept"].values), classes))
    return found, chosen


def _sequence_solution(probe: SequenceProbe, of_layer: xr.Dataset, inner: str, classes: Array) -> SequenceSolution:
    bias = np.atleast_1d(of_layer["intercept"].values)
    nothing = np.zeros((len(bias), 0))
    if probe.inner:
        coef = of_layer["inner_coef"].transpose("unit", inner).values
        output = np.atleast_2d(of_layer["coef"].transpose(..., "unit").values)
        return SequenceSolution(probe, coef, of_layer["inner_intercept"].values, output, bias, classes)
    parts = [of_layer["query_coef"].transpose("head", inner).values] if "query_coef" in of_layer else []
    values = of_layer["coef"].transpose("head", "class", inner, missing_dims="ignore").values
    coef = np.concatenate([*parts, values.reshape(-1, values.shape[-1])])
    return SequenceSolution(probe, coef, np.zeros(len(coef)), nothing, bias, classes)


def name_model(found: xr.Dataset, array: xr.DataArray) -> xr.Dataset:
    """A result with the model of its activations, if they say it."""
    if "model" in array.coords and array.coords["model"].ndim == 0:
        found.attrs["model"] = str(array.coords["model"].item())
        return found.assign_coords(model=found.attrs["model"])
    return found


# -- scores ----------------------------------------------------------------------------------------------------------------


def score_tokens(
    probes: xr.Dataset,
    activations: xr.DataArray,
    pooling: str | None = None,
    *,
    client: Client | None = None,
    scheduler: str | None = None,
    n_workers: int | None = None,
    progress: bool = False,
) -> xr.DataArray:
    """The decision function of :func:`fit_tokens` for every token, or of every prompt by its tokens.

    Parameters
    ----------
    probes : Dataset
        From :func:`fit_tokens`.
    activations : DataArray, dims (layer, token, hidden) in any order
        Of the layers that the probes were fitted on, or some of them; read block by block. Tokens without activations score NaN.
    pooling : str, optional
        "all": one score per token, the default for linear probes. ``score:max``, ``score:mean``, ``score:min``, ``score:last_token``,
        ``score:first_token``, and bare ``max`` and ``min``, as in `Probe`: the scores of a prompt's tokens become one, each class by
        itself. "learned" is the pooling that a probe has learned, and the default for such probes, which otherwise take "all" alone: the
        score that a prompt of this one token has.
    client, scheduler, n_workers, progress
        As for :func:`fit_tokens`.

    Returns
    -------
    DataArray of float32
        Dims (layer, token) or (layer, prompt), with ``class`` behind for more than two classes. Above 0 means the second class. Tokens
        keep their index over prompt and position and all columns, and get ``token_text``, what a token stands for, where the texts and
        the places of tokens in them are stored.

    Raises
    ------
    InvalidArgumentError
        Something that `fit_tokens` did not make, layers that it was not fitted on, another hidden size, or a pooling of activations.

    Warns
    -----
    UserWarning
        The activations are of another model or site than those that the probes learned from.
    """
    array, dim = parse_token_activations(activations)
    runner = parse_runner(client, scheduler, n_workers, progress=progress)
    if pooling is not None and not (isinstance(pooling, str) and pooling == LEARNED):
        parse_score_stage(pooling)
    solutions, chosen = _solutions(probes, array)
    stage = _stage_of(pooling, solutions[0])
    counts, order = sequences_of(array, dim)
    found: list[Array] = []
    for solution, rows in zip(solutions, _read_scores(array, dim, solutions, runner, len(chosen.get("class", ()))), strict=True):
        if not isinstance(solution, SequenceSolution):
            found.append(rows)
        elif stage is None:
            found.append(solution.pool(rows[order], counts))
        else:
            found.append(solution.pool(rows, np.ones(len(rows), np.int64)))
    scores = np.stack(found).astype(np.float32)
    of_class = {} if scores.ndim == 2 else {"class": chosen["class"].values}
    attrs = {"long_name": "score", **{name: probes.attrs[name] for name in ("probe", "labels", "classes")}}
    if stage is None:
        return to_interchange(_of_prompts(array, dim, scores, of_class, attrs))
    scored = to_interchange(_of_tokens(array, dim, scores, ("class",) if of_class else (), of_class, attrs, "score"))
    if stage.of == "nothing" or dim != "token":
        return scored
    # The stage has the bare name of the pooling. Each class is pooled by itself, as each layer is.
    return pool_tokens(scored.drop_vars("token_text", errors="ignore"), stage.pooling)


def pooling_weights(
    probes: xr.Dataset,
    activations: xr.DataArray,
    *,
    client: Client | None = None,
    scheduler: str | None = None,
    n_workers: int | None = None,
    progress: bool = False,
) -> xr.DataArray:
    """How much each token weighs in the score of its prompt, by probes with a pooling of their own: attention weights.

    Parameters
    ----------
    probes : Dataset
        From :func:`fit_tokens` with such a probe.
    activations : DataArray, dims (layer, token, hidden) in any order
        As for :func:`score_tokens`; whole prompts, since the weights of a prompt's tokens sum to 1.
    client, scheduler, n_workers, progress
        As for :func:`fit_tokens`.

    Returns
    -------
    DataArray of float32
        Dims (layer, token); with ``head`` behind for "attention" and "multimax", and ``class`` for more than two classes, but for
        attention, whose classes share their weights. Of "multimax" 1 for the largest token of a head, of "rolling_mean_max" the same for
        all tokens of the window with the largest mean, of "mlp" the same for all tokens. Coordinates as those of scores of tokens. NaN
        in a prompt with a token that was never extracted.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        As :func:`score_tokens`; or probes that score each token by itself.
    """
    array, dim = parse_token_activations(activations)
    runner = parse_runner(client, scheduler, n_workers, progress=progress)
    solutions, chosen = _solutions(probes, array)
    counts, order = sequences_of(array, dim)
    found = []
    for solution, rows in zip(solutions, _read_scores(array, dim, solutions, runner, len(chosen.get("class", ()))), strict=True):
        if not isinstance(solution, SequenceSolution):
            raise InvalidArgumentError(
                f"{probes.attrs.get('probe')!r} scores each token by itself, so it weighs none: fit a probe that pools, such as 'attention'"
            )
        weights = np.empty((len(rows), *solution.weights(rows[:1], np.ones(1, np.int64)).shape[1:]), np.float32)
        weights[order] = solution.weights(rows[order], counts)
        found.append(weights)
    values = np.stack(found)  # layer, token, head, 1 or class
    dims, coords = ["head"], {"head": np.arange(values.shape[2])}
    if values.shape[3] > 1:
        dims, coords = ["head", "class"], {**coords, "class": chosen["class"].values}
    else:
        values = values[..., 0]
    attrs = {"long_name": "weight", "units": "1", **{name: probes.attrs[name] for name in ("probe", "labels", "classes")}}
    made = _of_tokens(array, dim, values, tuple(dims), coords, attrs, "weight")
    return to_interchange(made if "head" in chosen.dims else made.isel(head=0, drop=True))


def _stage_of(pooling: str | None, solution: Solution | SequenceSolution) -> Stage | None:
    """What becomes of the scores of tokens; None for the pooling that the probe has learned."""
    if not isinstance(solution, SequenceSolution):
        if isinstance(pooling, str) and pooling == LEARNED:
            raise InvalidArgumentError("pooling='learned' is for probes with a pooling of their own: use 'all', or 'score:mean'")
        return parse_score_stage("all" if pooling is None else pooling)
    if pooling is None or (isinstance(pooling, str) and pooling == LEARNED):
        return None
    stage = parse_score_stage(pooling)
    if stage.of == "score":
        raise InvalidArgumentError(
            f"{str(solution.probe)!r} has learned how to pool a prompt, so pooling={pooling!r} has nothing to pool: leave it out, or give "
            "'all'"
        )
    return stage


def _read_scores(
    array: xr.DataArray, dim: str, solutions: Sequence[Solution | SequenceSolution], runner: Runner, n_classes: int
) -> Iterator[Array]:
    """The scores, or projections, of all rows, layer by layer."""
    n = array.sizes[dim]
    layer_rows = LayerRows(bare_variable(array.variable), dim, np.arange(n, dtype=np.int64))
    none = np.zeros(0, np.int8)
    plan = TaskPlan(
        layer_rows=None,
        n_rows=n,
        hidden=layer_rows.hidden,
        block_rows=layer_rows.block_rows,
        layers=tuple(str(layer) for layer in layer_labels(array)),
        probes=(),
        codes=none,
        cell=none,
        prompt=none,
        n_classes=n_classes,
        trains=np.ones((1, 1), bool),
        tests=None,
        random_state=0,
    )
    return score_stream(layer_rows, plan, runner, solutions)


def _of_tokens(
    array: xr.DataArray, dim: str, values: Array, dims: tuple[str, ...], coords: dict[str, Any], attrs: dict[str, Any], name: str
) -> xr.DataArray:
    """Values of tokens with all columns of theirs, and their texts."""
    columns = array.coords.to_dataset().drop_vars(["layer", inner_dim(array)], errors="ignore")
    found = xr.DataArray(values, dims=("layer", dim, *dims), coords={"layer": layer_labels(array), **coords}, name=name, attrs=attrs)
    found = found.assign_coords(columns.coords)
    texts = token_texts(array) if dim == "token" else None
    return found if texts is None else found.assign_coords(token_text=("token", texts))


def _of_prompts(array: xr.DataArray, dim: str, scores: Array, of_class: dict[str, Any], attrs: dict[str, Any]) -> xr.DataArray:
    """Scores of prompts, by first appearance, with the columns that all tokens of a prompt share."""
    dims = ("class",) if of_class else ()
    if dim == "prompt":
        return _of_tokens(array, dim, scores, dims, of_class, attrs, "score")
    tokens = np.zeros((len(scores), array.sizes[dim], *scores.shape[2:]), np.float32)
    pooled = pool_tokens(_of_tokens(array, dim, tokens, dims, of_class, attrs, "score").drop_vars("token_text", errors="ignore"), "mean")
    return pooled.transpose("layer", "prompt", *dims).copy(data=scores).rename("score")
