"""`watch`: a loaded model whose tokens are scored while somebody else runs it, and `Watch`, the context in which that happens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError
from lmprobe_zarr.probes import WatchedProbe
from lmprobe_zarr.sweeps import watched_probes
from lmprobe_zarr.typing import Array, Floats, Ints, Mask

if TYPE_CHECKING:
    import torch

    from lmprobe_zarr.extraction.models.watching import Generation, Pass

__all__ = ["Callback", "Watch", "watch"]

_TOKENS: Final = ("all", "generated")
_NO_END: Final = np.iinfo(np.int64).max
Callback = Callable[[int, Array], Any]


def watch(
    model: torch.nn.Module,
    probes: xr.Dataset,
    pooling: str | None = None,
    *,
    layers: int | Iterable[int] | None = None,
    threshold: float | None = None,
    label: Any = None,
    callback: Callback | None = None,
    tokens: str = "all",
    modules: Mapping[str, str] | None = None,
) -> Watch:
    """A context in which probes of :func:`fit_tokens` score every token that a model reads or generates.

    Parameters
    ----------
    model : torch Module
        A loaded model of transformers, or around one. It is not copied, moved or changed otherwise.
    probes : Dataset
        From :func:`fit_tokens`, on the residual stream.
    pooling : str, optional
        As for :func:`score_tokens`: by default "all", the score of the last token alone, and of probes with a pooling of their own that;
        ``score:max``, ``score:mean`` and so on pool the scores of all tokens so far.
    layers : int or iterable of int, optional
        Only these layers of the probes.
    threshold, label, callback, tokens, modules
        As for :meth:`Probe.watch`.

    Returns
    -------
    Watch
        Its scores are decision values, dims (layer, step, prompt).

    Raises
    ------
    InvalidTypeError
        A model that is not loaded, or something that `fit_tokens` did not make.
    InvalidArgumentError
        A layer without a probe, probes of another site, an unknown pooling; no threshold that can be compared. When the context is
        entered: a model of another width, or with fewer layers.
    UnknownArchitectureError
        The blocks of the model were not found.

    Examples
    --------
    >>> with lz.watch(model, probes, "score:max", layers=6, threshold=0) as seen:  # doctest: +SKIP
    ...     model.generate(**inputs, stopping_criteria=[seen])
    """
    found = watched_probes(probes, pooling, layers)
    return Watch(model, found, by_layer=True, threshold=threshold, label=label, callback=callback, tokens=tokens, modules=modules)


class Watch:
    """Scores of the tokens that a model reads and generates, as long as the context lasts: made by `watch` and :meth:`Probe.watch`.

    It is also a criterion for ``model.generate(…, stopping_criteria=[…])``, which ends a prompt's answer once its score has been above the
    threshold, or the callback has said so.

    A model reads the prompts in one pass and then one token at a time. After each pass there is a new score of each prompt: of all its
    tokens so far, as they are pooled. A token is scored when the model reads it, in the step after it was chosen, so the last token of an
    answer is not. Padding is left out, and so is what ``generate`` fills ended answers with. Without a cache, where every pass reads all
    tokens again, scores are the same. A new text begins anew.

    Parameters
    ----------
    model : torch Module
    probes : sequence of WatchedProbe
    by_layer : bool
        Whether scores have the dimension ``layer``.
    threshold, label, callback, tokens, modules
        As for :meth:`Probe.watch`.
    """

    def __init__(
        self,
        model: Any,
        probes: Sequence[WatchedProbe],
        *,
        by_layer: bool = False,
        threshold: float | None = None,
        label: Any = None,
        callback: Callback | None = None,
        tokens: str = "all",
        modules: Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(tokens, str) or tokens not in _TOKENS:
            raise InvalidArgumentError(f"tokens={tokens!r} names no tokens: use 'all' or 'generated'")
        if callback is not None and not callable(callback):
            raise InvalidTypeError(f"callback is a function of a step and its scores, not {type(callback).__name__}")
        self._probes, self._by_layer = tuple(probes), by_layer
        self._threshold, self._callback, self._tokens, self._modules = _parse_threshold(threshold), callback, tokens, modules
        self._label = _parse_label(self._probes[0].classes, label, needed=threshold is not None)
        try:
            import torch

            from lmprobe_zarr.extraction.models.watching import Generation
        except ImportError as error:
            raise MissingDependencyError("watching a model needs torch and transformers: pip install 'lmprobe-zarr[models]'") from error
        if not isinstance(model, torch.nn.Module):
            raise InvalidTypeError(f"model is a loaded torch Module, not {type(model).__name__}: load it with transformers")
        self._model = model
        self._generation: Generation = Generation()
        self._entered: AbstractContextManager[None] | None = None
        self._text: _Text | None = None

    def __enter__(self) -> Self:
        from lmprobe_zarr.extraction.models.watching import watched

        if self._entered is not None:
            raise InvalidArgumentError("this watch has been entered already: make another one")
        matrices = {
            layer: None if probe.coef is None else probe.coef[at] for probe in self._probes for at, layer in enumerate(probe.layers)
        }
        entered = watched(self._model, matrices, self._probes[0].hidden, self._take, self._generation, self._modules)
        entered.__enter__()
        self._entered, self._text = entered, None
        return self

    def __exit__(self, *error: Any) -> None:
        entered, self._entered = self._entered, None
        if entered is not None:
            entered.__exit__(None, None, None)

    def __repr__(self) -> str:
        layers = sorted({layer for probe in self._probes for layer in probe.layers})
        seen = "nothing yet" if self._text is None else f"{len(self._text.steps)} passes over {len(self._text.limit)} prompts"
        return f"<lmprobe_zarr.Watch of layers {', '.join(map(str, layers))}: {seen}>"

    # ---------------------------------------------------------------------------------------------------------------- scores

    @property
    def scores(self) -> xr.DataArray:
        """The scores of the last text after each pass.

        Returns
        -------
        DataArray of float64
            Dims (step, prompt), with ``layer`` before for probes of several layers, and ``class`` behind for more than two classes. Step
            0 has read the prompts, step *n* the *n*-th generated token too. ``n_tokens``, over step and prompt, is how many tokens have
            been pooled. NaN where there is none yet, and after an answer has ended.

        Raises
        ------
        InvalidArgumentError
            The model has not been run.
        """
        return self._array(np.stack(self._seen.steps), np.stack(self._seen.counts))

    @property
    def latest(self) -> xr.DataArray:
        """The last score of each prompt: of all its tokens. As `scores`, without ``step``."""
        text = self._seen
        return self._array(text.latest[None], text.n_tokens[None]).isel(step=0, drop=True)

    @property
    def above(self) -> Mask:
        """Which prompts have had a score above the threshold, in any layer; shape (prompt,)."""
        return self._seen.above.copy()

    @property
    def _seen(self) -> _Text:
        if self._text is None:
            raise InvalidArgumentError("nothing was watched: run the model within the context, `with probe.watch(model) as seen:`")
        return self._text

    def _array(self, steps: Array, counts: Ints) -> xr.DataArray:
        # Scores of one step have dims (layer, prompt[, class]).
        dims, coords = ["step", "layer", "prompt"], dict[str, Any](n_tokens=(("step", "prompt"), counts))
        if steps.ndim == 4:
            dims, coords = [*dims, "class"], {**coords, "class": self._probes[0].classes}
        if not self._by_layer:
            steps, dims = steps[:, 0], [dim for dim in dims if dim != "layer"]
        else:
            coords = {**coords, "layer": [probe.layers[0] for probe in self._probes]}
        found = xr.DataArray(steps, dims=dims, coords=coords, name="score", attrs={"long_name": "score"})
        return found.transpose("layer", "step", ...) if self._by_layer else found

    # ------------------------------------------------------------------------------------------------------------- criterion

    def __call__(self, input_ids: Any, scores: Any = None, **options: Any) -> Any:
        """Which answers end, for transformers' ``stopping_criteria``.

        Parameters
        ----------
        input_ids : torch Tensor, shape (prompt, token)
        scores, options
            Not used.

        Returns
        -------
        torch Tensor of bool, shape (prompt,)

        Raises
        ------
        InvalidArgumentError
            Neither threshold nor callback, or the context was not entered; or the texts are not those that were watched.
        """
        from lmprobe_zarr.extraction.models.watching import criterion_answer

        if self._threshold is None and self._callback is None:
            raise InvalidArgumentError("this watch has nothing to stop for: give threshold= or callback=")
        text = self._seen
        if self._entered is None:
            raise InvalidArgumentError("this watch has ended: generate within the context, `with probe.watch(model) as seen:`")
        if len(input_ids) != len(text.limit) or (text.ids_known and input_ids.shape[1] != text.length + 1):
            raise InvalidArgumentError(
                f"the criterion was given texts of shape {tuple(input_ids.shape)}, and {len(text.limit)} of {text.length} tokens were "
                "watched: use it with the model that is watched, one token at a time"
            )
        done = text.above | text.stopped
        text.limit[done] = np.minimum(text.limit[done], input_ids.shape[1] if text.ids_known else text.length + 1)
        return criterion_answer(done, input_ids)

    # ---------------------------------------------------------------------------------------------------------------- passes

    def _take(self, seen: Pass) -> None:
        """Score what a pass has read."""
        prompts, n = seen.real.shape
        text = self._continued(seen)
        if text is None:
            text = _Text(self._probes, prompts, n, ids_known=seen.ids is not None, number=self._generation.number)
        elif not seen.before:
            text.forget(self._probes)  # without a cache all tokens are read again
        if self._generation.running and self._generation.prompt_length is not None:
            text.prompt_length = self._generation.prompt_length
        elif seen.before and n > 1:
            text.prompt_length = seen.before + n  # the next turn of a conversation
        columns = np.arange(seen.before, seen.before + n)
        text.end(seen, columns, self._generation)
        kept = seen.real & (columns < text.limit[:, None])
        if self._tokens == "generated":
            kept &= columns >= text.prompt_length
        values = [_tokens_of(probe, seen, kept) for probe in self._probes]
        for pooling, tokens in zip(text.poolings, values, strict=True):
            pooling.update(tokens, kept)
        text.length = seen.before + n
        text.n_tokens += kept.sum(axis=1)
        if seen.ids is not None and not seen.before:
            text.ids = seen.ids
        found = np.stack([probe.score(pooling.value()) for probe, pooling in zip(self._probes, text.poolings, strict=True)])
        text.keep(found)
        self._text = text
        if self._threshold is not None:
            compared = found if found.ndim == 2 else found[..., self._label]
            text.above |= (compared > self._threshold).any(axis=0)
        if self._callback is not None:
            text.stopped |= _answered(self._callback(len(text.steps) - 1, self._shown(text.steps[-1])), prompts)

    def _shown(self, step: Floats) -> Array:
        return (step if self._by_layer else step[0]).copy()

    def _continued(self, seen: Pass) -> _Text | None:
        """The text that this pass goes on with; None of a new one."""
        text, (prompts, n) = self._text, seen.real.shape
        if seen.before:
            if text is None or text.length != seen.before:
                read = 0 if text is None else text.length
                raise InvalidArgumentError(
                    f"the cache holds {seen.before} tokens and this watch has seen {read}: begin a text within the context, and let no "
                    "token be taken back"
                )
            if prompts != len(text.limit):
                raise InvalidArgumentError(
                    f"the batch has {prompts} prompts after {len(text.limit)}: watch a batch from its beginning to its end, without beams"
                )
            if self._generation.number != text.number:
                if (text.limit < seen.before).any():
                    row = int((text.limit < seen.before).argmax())
                    raise InvalidArgumentError(
                        f"the answer to prompt number {row} of the batch had ended and was filled up, and the batch goes on from its "
                        "cache: generate without that cache, or one conversation at a time"
                    )
                text.number, text.limit[:] = self._generation.number, _NO_END
            return text
        if text is None or text.ids is None or seen.ids is None or self._generation.number != text.number:
            return None
        same = prompts == len(text.limit) and n == text.length + 1 and np.array_equal(seen.ids[:, : text.length], text.ids)
        return text if same else None


class _Text:
    """What is known of the prompts of a batch that is being read.

    Parameters
    ----------
    probes : sequence of WatchedProbe
    prompts, length : int
        Of the batch; tokens of its first pass, padding included.
    ids_known : bool
    number : int
        Of the call of ``generate``.
    """

    def __init__(self, probes: Sequence[WatchedProbe], prompts: int, length: int, *, ids_known: bool, number: int) -> None:
        self.number, self.ids_known, self.prompt_length, self.length = number, ids_known, length, 0
        self.ids: Ints | None = None
        #: The number of the first token of each that is none of its own any more.
        self.limit: Ints = np.full(prompts, _NO_END)
        self.above, self.stopped = np.zeros(prompts, bool), np.zeros(prompts, bool)
        self.steps: list[Floats] = []
        self.counts: list[Ints] = []
        self.latest: Floats = np.zeros(0)
        self.forget(probes)

    def forget(self, probes: Sequence[WatchedProbe]) -> None:
        """Pool anew; what was found stays."""
        self.poolings = [probe.pool(len(self.limit)) for probe in probes]
        self.n_tokens: Ints = np.zeros(len(self.limit), np.int64)

    def end(self, seen: Pass, columns: Ints, generation: Generation) -> None:
        """Take note of answers that have ended; ``generate`` fills them up until the others have ended too."""
        if not generation.running or seen.ids is None:
            return
        made = columns >= self.prompt_length
        for token, column in zip(seen.ids[:, made].T, columns[made], strict=True):
            self.limit[np.isin(token, generation.ends)] = np.minimum(self.limit[np.isin(token, generation.ends)], column + 1)
            if generation.padding is not None:
                self.limit[token == generation.padding] = np.minimum(self.limit[token == generation.padding], column)

    def keep(self, found: Floats) -> None:
        """Keep the scores after a pass; of prompts without a new token only as the latest."""
        self.latest = found
        shown = found.copy()
        shown[:, self.n_tokens == (self.counts[-1] if self.counts else 0)] = np.nan
        self.steps.append(shown)
        self.counts.append(self.n_tokens.copy())


def _tokens_of(probe: WatchedProbe, seen: Pass, kept: Mask) -> Floats:
    """What is pooled of each token, shape (prompt, token, value).

    Raises
    ------
    InvalidArgumentError
        Activations that are NaN or infinite.
    """
    rows = [seen.values[layer] for layer in probe.layers]
    values = np.concatenate(rows, axis=2) if probe.coef is None else np.sum(rows, axis=0) + probe.intercept
    bad = kept & ~np.isfinite(values).all(axis=2)
    if bad.any():
        raise InvalidArgumentError(
            f"layers {list(probe.layers)} are NaN or infinite for prompt number {int(bad.any(axis=1).argmax())} of the batch, so it has no "
            "score: compute in another dtype"
        )
    if probe.of_token is None:
        return np.asarray(values)
    made = probe.of_token(values[kept])
    found = np.zeros((*kept.shape, made.shape[1]))
    found[kept] = made
    return found


def _parse_threshold(threshold: Any) -> float | None:
    if threshold is None:
        return None
    number = isinstance(threshold, int | float | np.integer | np.floating) and not isinstance(threshold, bool)
    if not number or not np.isfinite(threshold):
        raise InvalidArgumentError(f"threshold={threshold!r} is no finite number")
    return float(threshold)


def _parse_label(classes: Array | None, label: Any, *, needed: bool) -> int:
    """Which class a threshold is for."""
    names = [] if classes is None else classes.tolist()
    if len(names) > 2:
        if label is None and not needed:
            return 0
        if label not in names:
            known = ", ".join(map(repr, names))
            raise InvalidArgumentError(f"label={label!r}: a threshold is for the score of one class, give one of {known}")
        return names.index(label)
    if label is not None and (not names or label != names[1]):
        what = "the values of a regression have no classes" if not names else f"scores are of the second class, {names[1]!r}"
        raise InvalidArgumentError(f"label={label!r}: {what}, leave it out")
    return 0


def _answered(answer: Any, prompts: int) -> Mask:
    """Which prompts a callback stops."""
    if answer is None:
        return np.zeros(prompts, bool)
    values = np.asarray(answer)
    if values.dtype != bool or values.shape not in ((), (prompts,)):
        raise InvalidArgumentError(
            f"callback returned {answer!r:.60}: return None, True, False, or one truth value for each of {prompts} prompts"
        )
    return np.broadcast_to(values, prompts)
