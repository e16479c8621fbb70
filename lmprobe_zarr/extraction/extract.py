"""`extract` and `plan_extract`: the public calls, which make a request and options from their arguments."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lmprobe_zarr.batch import Generate, LayerSpec, Outputs, OverSpec, SitesSpec, parse_chat_options
from lmprobe_zarr.extraction.columns import Columns
from lmprobe_zarr.extraction.model_choice import ModelChoice
from lmprobe_zarr.extraction.models import parse_engine
from lmprobe_zarr.extraction.options import Options, Weights, keeping_of
from lmprobe_zarr.extraction.plan import ExtractPlan, ExtractStats
from lmprobe_zarr.extraction.request import check_request
from lmprobe_zarr.extraction.run import carry_out, prepare
from lmprobe_zarr.extraction.shares import sendable
from lmprobe_zarr.store import PART_BYTES, PART_SECONDS, GivenProvenance, Place, note_request, open_again, parse_provenance
from lmprobe_zarr.tasks import check_client, is_in_process

if TYPE_CHECKING:
    import torch

__all__ = ["extract", "plan_extract"]

LogitsPositions = Literal["last_token", "all"]


def plan_extract(
    model: str | os.PathLike[str] | torch.nn.Module,
    prompts: Iterable[Any],
    *,
    store: Place = None,
    layers: LayerSpec = "all",
    sites: SitesSpec = ("resid",),
    pooling: str | Sequence[str] = ("last_token",),
    over: OverSpec = "all",
    keep_tokens: bool = False,
    perplexity: bool = False,
    logits: LogitsPositions | None = None,
    logits_top_k: int | None = None,
    router: bool = False,
    generate: Generate | None = None,
    coords: Columns | None = None,
    name: str | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    dtype: Any = "auto",
    storage_dtype: str | None = None,
    keep_bits: int | None = None,
    overflow: str | None = None,
    max_length: int | None = None,
    truncation: bool = False,
    add_special_tokens: bool = True,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | str | None = None,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    refresh: bool = False,
    provenance: GivenProvenance = None,
    group: str | None = None,
    modules: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
    device: Any = "auto",
    device_map: Any = None,
    weights: Weights = "auto",
    engine: str | None = None,
    engine_options: Mapping[str, Any] | None = None,
    batch_tokens: int | None = None,
    batch_prompts: int | None = None,
    part_bytes: int = PART_BYTES,
    part_seconds: float = PART_SECONDS,
    shards: bool = False,
    store_text: bool = True,
    client: Any = None,
    progress: bool = True,
) -> ExtractPlan:
    """What `extract` would do with the same arguments; loads a tokenizer at most, and writes nothing.

    Parameters
    ----------
    model, prompts, store, layers, sites, pooling, over, keep_tokens, perplexity, logits, logits_top_k
        As for `extract`.
    router, generate, name, tokenizer, revision, dtype, storage_dtype, keep_bits, overflow, max_length
        As for `extract`.
    truncation, add_special_tokens, add_generation_prompt, continue_final_message, tools, chat_template_kwargs
        As for `extract`.
    refresh, provenance, group, modules, trust_remote_code, device, device_map, weights, engine, engine_options
        As for `extract`.
    coords, batch_tokens, batch_prompts, part_bytes, part_seconds, shards, store_text, client, progress
        As for `extract`, and checked as there, so that a call of `extract` can be planned as it stands.

    Returns
    -------
    ExtractPlan
        Prompts found and missing, tokens, bytes, free space; prints as a table. Where answers are to be generated, tokens and bytes are
        upper bounds.

    Raises
    ------
    As `extract` does before it loads the model.
    """
    opened = open_again(store)
    keeping = keeping_of(
        is_default=opened.is_default, dtype=storage_dtype, keep_bits=keep_bits, overflow=overflow, part_bytes=part_bytes, shards=shards
    )  # fmt: skip
    fields, any_provenance = parse_provenance(provenance)
    runner = parse_engine(engine, engine_options)
    if runner is not None:
        runner.check_choice(model, modules=modules, device=device, device_map=device_map, client=client)
    choice = ModelChoice(
        model=model, name=name, tokenizer=tokenizer, revision=revision, dtype=dtype, max_length=max_length, truncation=truncation,
        provenance=dict(fields), modules=modules, trust_remote_code=trust_remote_code,
        add_special_tokens=add_special_tokens, engine=runner,
    )  # fmt: skip
    chat = parse_chat_options(
        add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message, tools=tools,
        chat_template_kwargs=chat_template_kwargs,
    )  # fmt: skip
    request = check_request(
        choice, prompts, opened, layers=layers, sites=sites, pooling=pooling, over=over, keep_tokens=keep_tokens, refresh=refresh,
        chat=chat, outputs=Outputs(perplexity=perplexity, logits=logits, top_k=logits_top_k, router=router), columns=coords,
        group=group, any_provenance=any_provenance, store_text=store_text, generate=generate,
    )  # fmt: skip
    options = Options(
        keeping=keeping, device=device, device_map=device_map, batch_tokens=batch_tokens, batch_prompts=batch_prompts,
        part_seconds=part_seconds, store_text=store_text, client=client, progress=progress, weights=weights,
    )  # fmt: skip
    try:
        return prepare(request, options).plan
    finally:
        options.memory.release()


def extract(
    model: str | os.PathLike[str] | torch.nn.Module,
    prompts: Iterable[Any],
    *,
    store: Place = None,
    layers: LayerSpec = "all",
    sites: SitesSpec = ("resid",),
    pooling: str | Sequence[str] = ("last_token",),
    over: OverSpec = "all",
    keep_tokens: bool = False,
    perplexity: bool = False,
    logits: LogitsPositions | None = None,
    logits_top_k: int | None = None,
    router: bool = False,
    generate: Generate | None = None,
    coords: Columns | None = None,
    name: str | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    dtype: Any = "auto",
    storage_dtype: str | None = None,
    keep_bits: int | None = None,
    overflow: str | None = None,
    device: Any = "auto",
    device_map: Any = None,
    batch_tokens: int | None = None,
    batch_prompts: int | None = None,
    max_length: int | None = None,
    truncation: bool = False,
    add_special_tokens: bool = True,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | str | None = None,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    refresh: bool = False,
    provenance: GivenProvenance = None,
    group: str | None = None,
    modules: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
    weights: Weights = "auto",
    engine: str | None = None,
    engine_options: Mapping[str, Any] | None = None,
    store_text: bool = True,
    part_bytes: int = PART_BYTES,
    part_seconds: float = PART_SECONDS,
    shards: bool = False,
    client: Any = None,
    progress: bool = True,
) -> ExtractStats:
    """Run a model over the prompts that are not stored yet, and store their activations.

    Parameters
    ----------
    model : str, path or torch Module
        A hub id, a folder that ``save_pretrained`` wrote, or a loaded model (PEFT, quantised, edited in memory; then give
        `name` and `tokenizer` too).
    prompts : iterable of str, of chats, of token ids, or of pairs of str
        One kind per call: a list, a column of a table, or an array; not a whole table, a mapping or a set. A chat is a list of
        ``{"role", "content"}``, rendered by the tokenizer's template, whose text is the prompt's text and makes its hash. If the template
        prints the time, the hash is that of messages, template and arguments, so that the chat is found on another day. A content may be
        a list of parts of text. Token ids hold no padding. A pair is a tuple of the texts that an encoder and its decoder read: values are
        the decoder's, whose text is the prompt's, and the encoder's text is the column ``encoder_text``. The decoder reads what
        transformers makes of the text as labels, so its first token is ``decoder_start_token_id``. Other prompts of an encoder-decoder are
        run through its encoder. Prompts that occur twice are run once.
    store : Store, path or URL, or a sequence of these, optional
        Where activations are stored; None is the default root, ``$LMPROBE_CACHE_DIR/.zarr``.
    layers : "all", "middle", "last", int, sequence of int or slice
        Negative numbers count from the end. Nothing after the deepest layer is computed.
    sites : str, sequence of str, or mapping of str to str
        What is taken of each block: ``resid`` is its output, ``resid_mid`` the residual stream between attention and MLP, ``attn`` and
        ``mlp`` are what these add to it, ``heads`` is the input of attention's output projection, ``neurons`` that of the MLP's last
        projection, ``router`` the scores of a mixture of experts; ``embed`` is taken once per model. A mapping names modules by path:
        ``{"resid": "resid", "z": "self_attn.o_proj:input", "final_norm": "/model.norm"}``, in a block or, with a slash, outside of the
        blocks; ``:input`` takes what the module is given. Layers that lack a site are left out of it. See :func:`list_sites`.
    pooling : str or sequence of {"last_token", "first_token", "mean", "max", "min"}
        What is stored per prompt, as ``<site>_<pooling>``; may be empty if tokens are kept.
    over : str, sequence of str, or mapping
        Which tokens each pooling is over: ``"all"``; ``"generated"``, the tokens of an answer; or a role of chats, such as ``"assistant"``.
        What is pooled over a part is ``<site>_<pooling>_<part>``, NaN where a prompt has no such token. A mapping names parts by criteria:
        ``{"tail": {"position": slice(-8, None)}, "name": {"span": [(3, 9), …]}, "after": {"after": "Answer:"}}``: ``role``, ``generated``,
        ``position`` (a slice), ``span`` (a text; first and last character; or one pair for each prompt) and ``after`` (a text, after whose
        last place the tokens begin). A token has to meet all of them.
    keep_tokens : bool
        Whether every token is stored too, as ``<site>``.
    perplexity : bool
        Whether the perplexity of every prompt (``perplexity``: mean, least, greatest of its tokens') and of every token
        (``token_perplexity``, ``token_log_prob``) is stored too, from the same pass.
    logits : {"last_token", "all"}, optional
        Which of the head's logits are stored too, as ``logits_last_token`` or, for every token, ``logits``.
    logits_top_k : int, optional
        How many of the largest logits are stored, with their token ids (``…_top_k_values``, ``…_top_k_indices``). A larger number that is
        stored serves a smaller one.
    router : bool
        Whether the raw scores of all experts are stored too, as ``router(layer, token, expert)``, for mixtures of experts.
    generate : Generate, optional
        Has the model answer the prompts first. What is stored are then prompts with their answers, each a prompt of its own beside the
        plain one: values are those of one pass over both, text and token ids are of both, and ``generated`` marks the answer's tokens.
        Columns say what the answer is: ``completion``, ``completion_ids``, ``prompt_of``, ``finish_reason``, ``generation``,
        ``generation_seed`` and ``generation_sample``. An answer is generated once: the same call finds it without the model, and a call for
        other layers, or with `refresh`, runs the model over the stored answer.
    coords : mapping of str to sequence, optional
        Columns aligned with `prompts`, such as ``{"label": y}``. For prompts that are stored already, new values are added as an
        annotation.
    name : str, optional
        Name in the store; by default the hub id or the folder's own name.
    tokenizer : tokenizer, folder or hub id, optional
        By default the model's own. A given tokenizer is identified by its content, so even one equal to the model's makes another group.
    revision : str, optional
        Branch, tag or commit of a hub model.
    dtype : "auto", str or torch.dtype
        The dtype that the model computes in, which is also stored; ``"auto"`` is the one that its configuration names.
    storage_dtype : {"float16", "bfloat16", "float32"}, optional
        The dtype that activations are stored with. None stores them as computed or, in the default store, by the cache's setting.
    keep_bits : int, optional
        How many bits of the fraction stored values keep; fewer take less space. See `lmprobe_zarr.batch.Precision`.
    overflow : {"bfloat16", "raise"}, optional
        What happens to values beyond the range of float16: they are stored with bfloat16's precision (also by default), or raise an
        error. They are never stored as infinity.
    device, device_map : optional
        ``"auto"`` takes CUDA, then MPS, then the CPU; a device map spreads the model as in transformers.
    batch_tokens : int, optional
        Padded tokens per batch; None chooses by device. Halved automatically when the device runs out of memory.
    batch_prompts : int, optional
        At most this many prompts per batch.
    max_length : int, optional
        Longest prompt in tokens; None is the model's context window, scaled rotary positions included. It may be larger than the window,
        except for models whose positions are a table of that size.
    truncation : bool
        Whether longer prompts are cut; otherwise they are an error. Part of the provenance.
    add_special_tokens : bool
        Whether texts get the tokenizer's special tokens; False for texts that have them already, such as chats that were rendered by hand.
        Part of the provenance.
    add_generation_prompt : bool, optional
        Whether the template ends a chat with the beginning of an answer. None: yes, unless the last message is the assistant's.
    continue_final_message : bool or str, optional
        Whether the last message of a chat stays open, so that it can be continued; a text names the field that does.
    tools : list of dict or of function, optional
        Tools that the template describes to the model: JSON schemas, or functions with type hints and a docstring.
    chat_template_kwargs : mapping, optional
        Further arguments of the template, such as ``{"enable_thinking": False}`` or ``{"date_string": "26 Jul 2024"}``: what JSON can hold.
    refresh : bool
        Run the model on all prompts, stored or not; the new activations win.
    provenance : mapping or "any", optional
        ``"any"`` says that stored groups of the model's name are of this very model even if they do not record all that identifies it, as
        imported ones do not; what they do record must agree. Otherwise fields of your own, such as ``{"steering": "v3"}``, which become
        part of the group: needed for models with hooks, which cannot be distinguished otherwise. Fixed fields, such as ``revision``,
        choose among stored groups that otherwise match equally well.
    group : str, optional
        Name of a stored group that is of this model, such as that of an import. It serves, and takes what is missing; what it does not
        record is taken on your word, and named in plan, log and result.
    modules : mapping, optional
        For unknown architectures, ``{"layers": "model.layers", "attn": "self_attn", "mlp": "mlp"}``.
    trust_remote_code : bool
        Whether code that comes with the model may run.
    weights : {"auto", "loaded", "streamed"}
        ``"streamed"`` has the weights of two blocks in memory, not of all: the safetensors files of a named model are read block by
        block, and all prompts go through a block before the next is read. Values are the same. What was computed lies in files beside a
        local store, otherwise among temporary files, until it is stored; a call that is stopped and made again goes on from there.
        ``"auto"`` streams where the weights are larger than what is free on the device; `plan_extract` says so.
    engine : {"vllm"}, optional
        What runs the model in the place of transformers, on the same tokens. Its values differ from those of transformers by rounding, so
        they are a group of their own; :func:`compare_groups` says how far. Sites are found in its own modules. Outputs of the head,
        `router` and `generate` cannot be had of it, and it takes no `device`, `device_map`, `modules` or `client`.
    engine_options : mapping of str to object, optional
        Settings of the engine, such as ``{"tensor_parallel_size": 4, "gpu_memory_utilization": 0.8}``. ``quantization`` and
        ``kv_cache_dtype`` are part of the group's provenance.
    store_text : bool
        False leaves the texts out of the store; prompts are still found by text or hash. Answers, which cannot be had again, stay.
    part_bytes, part_seconds : int, float
        When to commit; an interruption loses at most this much.
    shards : bool
        Write the chunks of a layer to few files, as `Store.compact` does: for parts of many GiB, whose files would be thousands. On S3
        each layer that is being written takes 16 MiB of memory then.
    client : distributed.Client, optional
        Its workers run the model, each on a share of the missing prompts. They load the model once per process and write directly to the
        store, which they must reach under the same name. The model and a tokenizer must be given by name, not as objects. If a worker
        dies, what it committed is kept, and another worker runs the rest of its share.
    progress : bool
        A bar on terminals and in notebooks.

    Returns
    -------
    ExtractStats

    Raises
    ------
    InvalidArgumentError, InvalidTypeError, LayerOutOfRangeError, PromptTooLongError
        The arguments or the prompts are invalid; raised before anything is run or written.
    ModelNotFoundError, UnknownArchitectureError, MissingDependencyError
        The model cannot be loaded, or its blocks are not found; or its weights are to be streamed and cannot be, with the reason.
    AmbiguousProvenanceError
        Several stored groups match what is known of the model.
    NoSpaceError
        The missing activations would not fit; or the storage became full, and then what was committed stays valid.
    NumberRangeError
        A value is beyond the range of float16, and ``overflow="raise"``.
    UnreachableError
        Workers died repeatedly on the same prompts.
    EngineError
        The engine failed, or did not give one row for every token; nothing of that batch is stored.
    ReadOnlyError, DeviceMemoryError

    Warns
    -----
    UserWarning
        Texts begin or end with the special token that the tokenizer adds; token ids that may hold padding; an argument that the template
        never uses.
    CacheWarning
        The cache's limit is smaller than what is requested; or a damaged part is skipped, and its prompts are run again.
    """
    opened = open_again(store)
    keeping = keeping_of(
        is_default=opened.is_default, dtype=storage_dtype, keep_bits=keep_bits, overflow=overflow, part_bytes=part_bytes, shards=shards
    )  # fmt: skip
    fields, any_provenance = parse_provenance(provenance)
    runner = parse_engine(engine, engine_options)
    if runner is not None:
        runner.check_choice(model, modules=modules, device=device, device_map=device_map, client=client)
    choice = ModelChoice(
        model=model, name=name, tokenizer=tokenizer, revision=revision, dtype=dtype, max_length=max_length, truncation=truncation,
        provenance=dict(fields), modules=modules, trust_remote_code=trust_remote_code,
        add_special_tokens=add_special_tokens, engine=runner,
    )  # fmt: skip
    chat = parse_chat_options(
        add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message, tools=tools,
        chat_template_kwargs=chat_template_kwargs,
    )  # fmt: skip
    request = check_request(
        choice, prompts, opened, layers=layers, sites=sites, pooling=pooling, over=over, keep_tokens=keep_tokens, refresh=refresh,
        chat=chat, outputs=Outputs(perplexity=perplexity, logits=logits, top_k=logits_top_k, router=router), columns=coords,
        group=group, any_provenance=any_provenance, store_text=store_text, generate=generate,
    )  # fmt: skip
    options = Options(
        keeping=keeping, device=device, device_map=device_map, batch_tokens=batch_tokens, batch_prompts=batch_prompts,
        part_seconds=part_seconds, store_text=store_text, client=client, progress=progress, weights=weights,
    )  # fmt: skip
    if client is not None:
        check_client(client)
        request = sendable(request)
        if not is_in_process(client):
            for root in opened.stack:
                root.storage.check_reach()  # here, since a worker that cannot unpickle its task reports nothing
    try:
        outcome = carry_out(request, options)
    finally:
        options.memory.release()
    if len(outcome.prompts.row) == len(outcome.prompts):
        note_request(opened.url, outcome.group.name, outcome.prompts.sha256)
    return outcome.stats
