"""What an extraction would do (`ExtractPlan`) and what it did (`ExtractStats`), as records that print well. Never a model or a store."""

from __future__ import annotations

from dataclasses import dataclass

from lmprobe_zarr.batch import describe_layers
from lmprobe_zarr.display import count_of, format_bytes
from lmprobe_zarr.store.format import describe_unrecorded

__all__ = ["ExtractPlan", "ExtractStats", "HeldElsewhere", "describe_elsewhere"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldElsewhere:
    """A group of a model of the same name that holds prompts which an extraction would run the model on.

    Parameters
    ----------
    group, model : str
        Its name, and that of its model.
    prompts : int
        How many of the missing prompts it holds, with all that is requested of them.
    unknown : tuple of str
        Fields of the provenance that it does not record, as imported groups do not.
    differs : tuple of str
        Fields in which it says otherwise than this call.
    """

    group: str
    model: str
    prompts: int
    unknown: tuple[str, ...]
    differs: tuple[str, ...]

    @property
    def can_serve(self) -> bool:
        """Whether it serves where the caller says that it is of the same model."""
        return bool(self.unknown) and not self.differs

    def __str__(self) -> str:
        held = f"{self.prompts} in group {self.group!r} of {self.model!r}"
        if self.differs:
            return f"{held}, which differs in {', '.join(self.differs)}"
        unknown = describe_unrecorded(self.unknown)
        return f"{held}, which does not record {unknown}; if it is the same model: group={self.group!r} or provenance='any'"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractPlan:
    """What an extraction would do. Printing it shows it as a table.

    Parameters
    ----------
    model : str
        Name of the model in the store.
    url : str
        The store.
    prompts : int
        Distinct prompts that are requested.
    found : int
        Of these, how many are stored with everything that is requested, or with tokens that it can be pooled from.
    derived : int
        Of the latter, how many have something pooled from their stored tokens, without the model.
    tokens : int
        Tokens of the missing prompts.
    layers : tuple of int
        Requested layers.
    variables : tuple of str
        What would be stored per prompt and per token.
    dtype : str
        The dtype that activations are stored with.
    nbytes : int
        Bytes of the missing activations before compression.
    needed_bytes : int
        The same for everything that is requested, stored or not.
    free_bytes : int, optional
        Bytes that are free where the store is; None if that is unknown.
    modules : str
        Which modules of the model give its sites; empty where that is found only when the model is loaded.
    group : str
        Name of the stored group that serves; empty where there is none yet.
    unknown : tuple of str
        Fields of the provenance that this group does not record, and that are taken on the caller's word.
    elsewhere : tuple of HeldElsewhere
        Other groups of a model of this name that hold some of the missing prompts.
    in_lmprobe : int
        How many of the missing prompts lmprobe's own entries beside the store have, which can be imported.
    to_generate : int
        How many answers have to be generated. Where there are any, `tokens`, `nbytes` and `needed_bytes` are upper bounds, since nobody
        knows yet how long these are.
    max_new_tokens : int
        Tokens of an answer at most; 0 where none was asked for.
    continued_from : int, optional
        The stored layer from which the model goes on, so that only the blocks after it run; None where all have to. Where the loaded model
        turns out not to give the same so, or the stored values to be rounded, all run after all.
    work_share : float
        How many of the blocks are run, of those that would be run otherwise.
    weights : str
        ``"streamed"`` where the weights of a block are in memory only when it is its turn, otherwise ``"loaded"``.
    weights_why : str
        Why they are streamed; empty where they are not.
    """

    model: str
    url: str
    prompts: int
    found: int
    derived: int
    tokens: int
    layers: tuple[int, ...]
    variables: tuple[str, ...]
    dtype: str
    nbytes: int
    needed_bytes: int
    free_bytes: int | None
    modules: str = ""
    group: str = ""
    unknown: tuple[str, ...] = ()
    elsewhere: tuple[HeldElsewhere, ...] = ()
    in_lmprobe: int = 0
    to_generate: int = 0
    max_new_tokens: int = 0
    continued_from: int | None = None
    work_share: float = 1.0
    weights: str = "loaded"
    weights_why: str = ""

    @property
    def missing(self) -> int:
        """Prompts that the model has to be run on."""
        return self.prompts - self.found

    @property
    def fits(self) -> bool:
        """Whether the missing activations, uncompressed, fit where the store is."""
        return self.free_bytes is None or self.nbytes <= self.free_bytes

    def __str__(self) -> str:
        bound = "at most " if self.to_generate else ""
        free = "unknown" if self.free_bytes is None else format_bytes(self.free_bytes)
        pooled = f", {self.derived} of them to be pooled from stored tokens" if self.derived else ""
        rows = {
            "model": self.model,
            "store": self.url,
            "prompts": f"{self.prompts} ({self.found} found{pooled}, {self.missing} to extract)",
            "tokens": f"{bound}{self.tokens} to run",
            "layers": describe_layers(self.layers) if self.layers else "none",
            "modules": self.modules or "found when the model is loaded",
            "variables": ", ".join(self.variables),
            "size": f"{bound}{format_bytes(self.nbytes)} of {self.dtype}, before compression",
            "free": f"{free}{'' if self.fits else ', which is too little'}",
        }
        if self.continued_from is not None:
            rows["tokens"] += f", continued from layer {self.continued_from}: {100 * self.work_share:.0f} % of the work"
        if self.weights_why:
            rows["weights"] = f"{self.weights}, one block at a time ({self.weights_why})"
        if self.max_new_tokens:
            rows["answers"] = f"{self.to_generate} to generate, of at most {self.max_new_tokens} tokens each"
        if self.unknown:
            rows["unknown"] = f"{', '.join(self.unknown)}: not recorded by group {self.group!r}, which is taken on your word"
        lines = [f"{name:<10}{value}" for name, value in rows.items()]
        others = [str(held) for held in self.elsewhere]
        if self.in_lmprobe:
            others.append(f"{self.in_lmprobe} among lmprobe's own entries beside the store: import them, with as_model=")
        lines += [f"{'' if number else 'elsewhere':<10}{held}" for number, held in enumerate(others)]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractStats:
    """What an extraction did.

    Parameters
    ----------
    model, group : str
        Name of the model, and the group of the store that holds it.
    prompts : int
        Distinct prompts that are requested.
    found : int
        Of these, how many were stored already.
    derived : int
        Of the latter, how many had something pooled from their stored tokens, without the model.
    extracted : int
        How many the model was run on.
    tokens : int
        Tokens of the latter.
    nbytes : int
        Bytes of activations written, before compression.
    parts : int
        Parts committed.
    model_loaded : bool
        Whether the model's weights were needed at all.
    seconds : float
        Time from call to return.
    not_finite : int
        Stored values that are infinite or NaN: the model computed them so, and no probe can learn from them.
    blank : int
        Stored rows, one for each layer of a prompt or token, that hold only zeros.
    unknown : tuple of str
        Fields of the provenance that the group does not record, and that were taken on the caller's word.
    generated, generated_tokens : int
        How many answers were generated, and their tokens. With `extract(generate=…)` a prompt is one with its answer: all that are not
        generated were found, those of `extracted` included that lacked other values.
    repeats : int
        Prompts that were given more than once, beyond the first time; they are not counted in `prompts`.
    """

    model: str
    group: str
    prompts: int
    found: int
    derived: int
    extracted: int
    tokens: int
    nbytes: int
    parts: int
    model_loaded: bool
    seconds: float
    not_finite: int = 0
    blank: int = 0
    unknown: tuple[str, ...] = ()
    generated: int = 0
    generated_tokens: int = 0
    repeats: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the prompts that were stored already."""
        return self.found / self.prompts

    def __str__(self) -> str:
        loaded = "" if self.model_loaded else "; the model was not loaded"
        answers = f", {count_of(self.generated, 'answer')} of {count_of(self.generated_tokens, 'token')} generated"
        answers = answers if self.generated else ""
        odd = f"; {count_of(self.not_finite, 'value')} not finite" if self.not_finite else ""
        odd += f"; {count_of(self.blank, 'row')} of zeros alone" if self.blank else ""
        odd += f"; group {self.group!r} does not record {describe_unrecorded(self.unknown)}" if self.unknown else ""
        pooled = f" ({self.derived} pooled from stored tokens)" if self.derived else ""
        repeats = f" ({count_of(self.repeats, 'repeat')} left out)" if self.repeats else ""
        return (
            f"{self.model}: {count_of(self.prompts, 'prompt')}{repeats}, {self.found} found in the store{pooled}, "
            f"{self.extracted} extracted ({count_of(self.tokens, 'token')}, {format_bytes(self.nbytes)}){answers} "
            f"in {self.seconds:.1f} s{loaded}{odd}"
        )


def describe_elsewhere(plan: ExtractPlan, *, open_dtype: bool) -> str:
    """What to do so that prompts which other groups hold are not extracted again; empty where nothing helps.

    Parameters
    ----------
    plan : ExtractPlan
    open_dtype : bool
        Whether the caller left the dtype open, so that a group that differs in it alone is worth a word too.
    """
    lines = []
    for held in plan.elsewhere:
        if held.can_serve:
            lines.append(
                f"{held.prompts} of {plan.missing} prompts to extract are stored in group {held.group!r} of {held.model!r}, which does not "
                f"record {describe_unrecorded(held.unknown)}: if it is the same model, give group={held.group!r} or provenance='any'"
            )
        elif open_dtype and held.differs == ("compute_dtype",) and not held.unknown:
            lines.append(
                f"{held.prompts} of {plan.missing} prompts to extract are stored in group {held.group!r}, computed in another dtype than "
                f"{plan.dtype}: name that dtype with dtype= to use them"
            )
    return "\n".join(lines)
