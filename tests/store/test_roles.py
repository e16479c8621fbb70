"""Roles, turns and what was generated, as they are stored and selected."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import lmprobe_zarr as lz
from lmprobe_zarr.batch import ROLES, TokenBatch, prompt_sha256, role_code
from lmprobe_zarr.errors import CorruptPartError, InvalidArgumentError, LayerOutOfRangeError, MissingPromptsError
from lmprobe_zarr.store.format import GroupInfo, new_part_name
from lmprobe_zarr.store.parts import PartWriter, write_group
from lmprobe_zarr.store.store import Store

GROUP = GroupInfo(model="acme/chat", num_layers=1, hidden_size=4)
# Each token as its role and turn; what was generated are the tokens of the last turn.
CHATS: dict[str, list[tuple[str, int]]] = {
    "one": [("", -1), ("user", 0), ("user", 0), ("", 1), ("assistant", 1), ("assistant", 1)],
    "two": [("", -1), ("system", 0), ("user", 1), ("reasoning", 2), ("assistant", 2), ("user", 3), ("assistant", 4)],
    "six": [("", -1), ("user", 0), ("my critic", 1)],
}
VALUES = itertools.count()


def batch(*texts: str, names: tuple[str, ...] | None = None) -> TokenBatch:
    tokens = [token for text in texts for token in CHATS[text]]
    names = names or (*ROLES, "my critic")
    last = [max(turn for _, turn in CHATS[text]) for text in texts for _ in CHATS[text]]
    return TokenBatch(
        sha256=[prompt_sha256(text) for text in texts],
        text=list(texts),
        n_tokens=np.array([len(CHATS[text]) for text in texts]),
        layers=(0,),
        tokens={"resid": np.array([[next(VALUES)] * 4 for _ in tokens], np.float32)[None]},
        token_columns={
            "role": np.array([role_code(role, names) for role, _ in tokens]),
            "turn": np.array([turn for _, turn in tokens]),
            "generated": np.array([turn == end for (_, turn), end in zip(tokens, last, strict=True)]).astype(np.int64),
        },
        role_names=names,
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two parts, of which one has more names of roles, in another order."""
    made = lz.open_store(tmp_path / "acts", durable=False)
    made.write(GROUP, batch("one"))
    made.write(GROUP, batch("two", "six", names=("my critic", "assistant", "user", "system", "reasoning")))
    return lz.open_store(tmp_path / "acts")


@pytest.fixture
def toks(store: Store) -> xr.Dataset:
    return store.tokens()


def all_tokens() -> list[tuple[str, int]]:
    return [token for text in CHATS for token in CHATS[text]]


def of(data: Any) -> list[tuple[str, int]]:
    return [*zip(data.role.values.tolist(), data.turn.values.tolist(), strict=True)]


# ------------------------------------------------------------------------------------------------------------------- storing


def test_names_are_read_whatever_the_codes_of_their_parts(store: Store, toks: xr.Dataset) -> None:
    assert of(toks) == all_tokens()
    assert toks.generated.dtype == bool
    assert toks.turn.dtype == np.int64
    flags = [part.info.arrays["tokens/role"].attributes["flag_meanings"] for part in store.view(store.find_group()).parts]
    assert [names.split(" ")[:6] for names in flags] == [list(ROLES)] * 2, "the usual roles have the same code in every part"
    assert [names.split(" ")[6:] for names in flags] == [[], ["my%20critic"]]


@pytest.mark.few(2)
@pytest.mark.parametrize("upkeep", ["compact", "copy", "subset", "publish", "repair"])
def test_upkeep_keeps_roles(upkeep: str, store: Store, toks: xr.Dataset, tmp_path: Path) -> None:
    before = toks.load()
    if upkeep == "compact":
        assert store.compact(progress=False).parts_after == 1
        after = lz.open_store(tmp_path / "acts").tokens()
    elif upkeep == "publish":
        store.publish(tmp_path / "frozen", progress=False)
        after = lz.open_store(tmp_path / "frozen").tokens()
    elif upkeep == "repair":
        for part in store.view(store.find_group()).parts:
            (chunk,) = (tmp_path / "acts" / part.path / "prompts" / "text").glob("c*")
            chunk.write_bytes(b"nothing")
        assert len(store.repair(progress=False).rewritten) == 2
        after = lz.open_store(tmp_path / "acts").tokens()
        before = before.drop_vars("text")
    else:
        chosen: dict[str, Any] = {"prompts": ["two", "six"]} if upkeep == "subset" else {}
        store.copy_to(tmp_path / "copy", progress=False, **chosen)
        after = lz.open_store(tmp_path / "copy").tokens()
        before = store.tokens(prompts=["two", "six"]).load() if upkeep == "subset" else before
    xr.testing.assert_identical(after.load().drop_attrs(), before.drop_attrs())


def test_parts_without_roles_have_unknown_ones(store: Store) -> None:
    values = batch("one").tokens["resid"][:, :2]
    for text, columns in (("new", {}), ("raw", {"role": np.array([3, 3])})):
        held: dict[str, Any] = {"sha256": [prompt_sha256(text)], "n_tokens": np.array([2]), "layers": (0,), "tokens": {"resid": values}}
        store.write(GROUP, TokenBatch(**held, token_columns=columns))
    toks = lz.open_store(store.storage.url).tokens()
    assert of(toks)[-4:] == [("", -1)] * 4, "codes that no part explains mean nothing"
    assert toks.generated.values[-4:].tolist() == [False] * 4
    lz.open_store(store.storage.url).compact(progress=False)
    assert of(lz.open_store(store.storage.url).tokens()) == of(toks)


def test_one_part_has_one_list_of_names_for_all_its_batches(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts", durable=False)
    write_group(store.storage, GROUP, durable=False)
    with PartWriter(store.storage, GROUP, new_part_name(), durable=False) as writer:
        writer.append(batch("six", names=("user", "my critic")))
        writer.append(batch("two", names=("assistant", "system", "user", "reasoning")))
        with pytest.raises(InvalidArgumentError, match="one part holds the same variables, layers and columns throughout"):
            writer.append(replace(batch("one"), role_names=()))
        writer.commit()
    assert of(store.tokens()) == CHATS["six"] + CHATS["two"]
    with pytest.raises(InvalidArgumentError, match="role holds the code 6, but there are 2 role_names"):
        replace(batch("six"), role_names=("a", "b"))


def test_flags_that_contradict_themselves_are_damage(store: Store, tmp_path: Path) -> None:
    part = store.view(store.find_group()).parts[0]
    document = json.loads((tmp_path / "acts" / part.path / "zarr.json").read_text())
    array = document["consolidated_metadata"]["metadata"]["tokens/role"]
    array["attributes"]["flag_meanings"] = "user"
    from lmprobe_zarr.store.format.array import parse_array

    with pytest.raises(ValueError, match="flag_values and flag_meanings do not fit together"):
        parse_array(array)
    (tmp_path / "acts" / part.path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(CorruptPartError):
        lz.open_store(tmp_path / "acts").view(store.find_group())


def test_opening_reads_no_column_of_tokens(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprobe_zarr.store.parts.variable import VirtualArray

    read: list[str] = []
    plain = VirtualArray.read

    def spied(self: VirtualArray, *args: Any, **options: Any) -> Any:
        read.append(self.arrays[0].path)
        return plain(self, *args, **options)

    monkeypatch.setattr(VirtualArray, "read", spied)
    toks = lz.open_store(store.storage.url).tokens()
    repr(toks)
    some = toks.isel(token=slice(2, 9)).sel(prompt=lz.prompt_hash("one"))
    assert not read
    assert some.sel(role="assistant").sizes["token"] == 2
    assert [path.rpartition("/")[2] for path in read] == ["role"]
    toks.sel(turn=1)
    toks.sel(turn=2)
    assert [path.rpartition("/")[2] for path in read] == ["role", "turn"], "what was read once stays in memory"


# ----------------------------------------------------------------------------------------------------------------- selecting


def test_tokens_are_selected_by_role_turn_and_generated(toks: xr.Dataset) -> None:
    for data in (toks, toks.resid):
        assert of(data.sel(role="assistant")) == [token for token in all_tokens() if token[0] == "assistant"]
        assert of(data.sel(role=["user", "reasoning"])) == [t for t in all_tokens() if t[0] in ("user", "reasoning")]
        assert of(data.sel(role="")) == [token for token in all_tokens() if not token[0]], "those without a role"
        assert of(data.sel(turn=1)) == [token for token in all_tokens() if token[1] == 1]
        assert of(data.sel(turn=slice(1, 2))) == [token for token in all_tokens() if 1 <= token[1] <= 2]
        assert of(data.sel(generated=True)) == [*CHATS["one"][3:], *CHATS["two"][6:], *CHATS["six"][2:]]
        two, one = lz.prompt_hash("two"), "one"
        assert of(data.sel(prompt=two, role="user")) == [("user", 1), ("user", 3)]
        assert of(data.sel(prompt=[two, one], role="user", turn=0)) == [("user", 0)] * 2
        assert of(data.sel(prompt=[two, one], role=["user", "assistant"]))[:4] == [t for t in CHATS["two"] if t[0] in ("user", "assistant")]
        assert of(data.sel(role="user", position=[1, 2])) == [("user", 0)] * 2 + [("user", 1), ("user", 0)]
        one_token = data.sel(prompt=two, position=6, role="assistant")
        assert "token" not in one_token.dims
        assert one_token.turn == 4
        # In several steps as in one.
        assert of(data.sel(role="user").sel(prompt=two).sel(turn=3)) == [("user", 3)]


@pytest.mark.few(7)
@pytest.mark.parametrize(
    ("which", "error", "message"),
    [
        ({"role": "assistent"}, MissingPromptsError, "no token here has role='assistent': there are 'assistant', 'my critic', 'reasoning'"),
        ({"role": ["user", "tool"]}, MissingPromptsError, "no token here has role='tool'"),
        ({"role": "reasoning", "prompt": "one"}, MissingPromptsError, "there are 'assistant', 'user'"),
        ({"turn": 9}, MissingPromptsError, "no token here has turn=9"),
        ({"role": 3}, InvalidArgumentError, "'role' is selected by texts, not 3"),
        ({"role": slice("a", "b")}, InvalidArgumentError, "'role' is selected by one value or a flat list of them"),
        ({"role": {"user"}}, InvalidArgumentError, "a flat list of them, not by set"),
        ({"turn": True}, InvalidArgumentError, "'turn' is selected by whole numbers, not True"),
        ({"turn": slice(0, 2, 2)}, InvalidArgumentError, "'turn' is selected by one value"),
        ({"generated": 1}, InvalidArgumentError, "'generated' is selected by True or False, not 1"),
        (
            {"prompt": xr.DataArray(["one"], dims="pair"), "position": xr.DataArray([1], dims="pair"), "role": "user"},
            InvalidArgumentError,
            "pairs of prompt and position are selected alone",
        ),
    ],
)
def test_what_selects_nothing_says_what_there_is(which: Any, error: type[Exception], message: str, toks: xr.Dataset) -> None:
    with pytest.raises(error, match=message):
        toks.sel(which)


def test_a_store_without_roles_is_as_it_was(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts", durable=False)
    plain = batch("one", "two")
    store.write(GROUP, TokenBatch(sha256=plain.sha256, n_tokens=plain.n_tokens, layers=(0,), tokens=plain.tokens))
    toks = store.tokens()
    assert list(toks.xindexes) == ["layer", "prompt", "position"]
    with pytest.raises(KeyError, match="role"):
        toks.sel(role="user")
    for call in (lambda: lz.mask_tokens(toks, role="user"), lambda: toks.lz.at(0, of="user"), lambda: toks.lz.at(0, of="generated")):
        with pytest.raises(InvalidArgumentError, match="not stored with these tokens: extract the chats again"):
            call()


def test_a_column_of_prompts_may_be_named_like_one_of_tokens(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts", durable=False)
    plain = batch("one", "two")
    held: dict[str, Any] = {"sha256": plain.sha256, "n_tokens": plain.n_tokens, "layers": (0,), "tokens": plain.tokens, "text": plain.text}
    store.write(GROUP, TokenBatch(**held, prompt_columns={"role": ["expert", "layman"]}))
    toks = store.tokens()
    assert toks.role.values.tolist() == ["expert"] * 6 + ["layman"] * 7
    assert toks.lz.pool("mean").role.values.tolist() == ["expert", "layman"]
    store.write(GROUP, TokenBatch(**held, token_columns=plain.token_columns, role_names=plain.role_names))
    store = lz.open_store(tmp_path / "acts")
    assert of(store.tokens()) == CHATS["one"] + CHATS["two"], "that of tokens is the coordinate of tokens"
    assert store.dataset().role.values.tolist() == ["expert", "layman"]


# ------------------------------------------------------------------------------------------------ what xarray does afterwards


def test_the_index_goes_through_what_xarray_does(toks: xr.Dataset, tmp_path: Path) -> None:
    users, others = toks.resid.sel(role="user"), toks.resid.sel(role=["user", "assistant"])
    assert of(users + others) == of(users), "arithmetic takes the tokens that both have"
    with xr.set_options(arithmetic_join="outer"):  # type: ignore[no-untyped-call]
        joined = users + others
        assert sorted(of(joined)) == sorted(of(others))
        assert [role == "user" for role, _ in of(joined)] == (~np.isnan(joined.values[0, :, 0])).tolist()
    assert of(xr.concat([users, toks.resid.sel(role="reasoning")], "token")) == [*of(users), ("reasoning", 2)]
    assert of(toks.isel(token=[4, 0, 9])) == [all_tokens()[i] for i in (4, 0, 9)]
    assert of(toks.where(toks.role == "user", drop=True)) == of(users)
    assert of(toks.roll(token=2, roll_coords=True)) == [*all_tokens()[-2:], *all_tokens()[:-2]]
    renamed = toks.rename({"role": "who", "token": "t"})
    assert renamed.sel(who="user").sizes["t"] == users.sizes["token"]
    for same in (pickle.loads(pickle.dumps(toks)), copy.deepcopy(toks), toks.copy(), toks.load()):  # noqa: S301
        xr.testing.assert_identical(same.sel(role="user").load(), toks.sel(role="user").load())
    means = toks.resid.groupby("role").mean()
    assert means.role.values.tolist() == ["", "assistant", "my critic", "reasoning", "system", "user"]
    np.testing.assert_allclose(means.sel(role="user"), users.mean("token"))
    toks.to_zarr(tmp_path / "plain.zarr", consolidated=False)
    plain = xr.open_zarr(tmp_path / "plain.zarr", consolidated=False)
    assert of(plain) == all_tokens()
    again = plain.set_xindex(["prompt", "position", "role", "turn", "generated"], lz.TokenIndex)
    assert of(again.sel(role="user", prompt=lz.prompt_hash("two"))) == [("user", 1), ("user", 3)]
    assert of(plain.lz.at(0, of="user")) == [("user", 0), ("user", 1), ("user", 0)]
    toks.to_netcdf(tmp_path / "plain.nc")
    with xr.open_dataset(tmp_path / "plain.nc") as read:
        assert of(read) == all_tokens()


def test_columns_can_be_left_out(store: Store) -> None:
    opened = xr.open_dataset(store.storage.url, engine="lmprobe_zarr", level="tokens", drop_variables=["role", "token_id"])
    assert {"role"}.isdisjoint(opened.coords)
    assert opened.sel(turn=4, prompt="two").sizes["token"] == 1
    assert list(store.tokens().lz.to_dataframe().columns) == []


# ------------------------------------------------------------------------------------------------------- masks, steps, pooling


def test_masks_take_stored_roles(toks: xr.Dataset) -> None:
    for data in (toks, toks.resid, toks.sel(prompt=["two", "one"])):
        mask = lz.mask_tokens(data, role="assistant")
        assert mask.values.tolist() == (data.role == "assistant").values.tolist()
        assert of(data.isel(token=mask.values)) == of(data.sel(role="assistant"))
        assert data.where(mask, drop=True).sizes["token"] == int(mask.sum())
    both = lz.mask_tokens(toks, role=["user", "my critic"], position=slice(2, None))
    assert of(toks.isel(token=both.values)) == [("user", 0), ("user", 1), ("user", 3), ("my critic", 1)]
    with pytest.raises(InvalidArgumentError, match="no token has the role 'tool': there are assistant, my critic, reasoning, system, user"):
        lz.mask_tokens(toks, role=["tool", "user"])


def test_steps_are_counted_among_the_tokens_of_a_role(toks: xr.Dataset) -> None:
    two = toks.sel(prompt=["two", "one"])
    for data in (two, two.resid):
        assert of(data.lz.at(0, of="assistant")) == [("assistant", 2), ("assistant", 1)]
        assert of(data.lz.at(-1, of="assistant")) == [("assistant", 4), ("assistant", 1)]
        assert data.lz.at(-1, of="assistant").position.values.tolist() == [6, 5]
        assert data.lz.at(0, of="generated").position.values.tolist() == [6, 3]
        assert data.lz.at(0, turn=1).position.values.tolist() == [2, 3]
    assert toks.lz.at(0, of="user").prompt.values.tolist() == [lz.prompt_hash(text) for text in CHATS]
    assert of(toks.sel(prompt="two").lz.at(-1, of="user", turn=1)) == [("user", 1)]


@pytest.mark.parametrize(
    ("position", "options", "error", "message"),
    [
        (
            2,
            {"of": "user"},
            LayerOutOfRangeError,
            r"3 of 3 prompts have fewer tokens of 'user' than position 2 needs, the shortest 1, first",
        ),
        (0, {"of": "assistant"}, LayerOutOfRangeError, r"1 of 3 prompts have fewer tokens of 'assistant' .* the shortest 0, first prompt "),
        (-1, {"of": "user", "turn": 1}, LayerOutOfRangeError, "2 of 3 prompts have fewer tokens of 'user' in turn 1"),
        (0, {"of": "tool"}, MissingPromptsError, "no token here has role='tool': there are 'assistant'"),
        (0, {"turn": 9}, MissingPromptsError, "no token here has turn=9"),
    ],
)
def test_steps_that_prompts_lack(position: int, options: Any, error: type[Exception], message: str, toks: xr.Dataset) -> None:
    with pytest.raises(error, match=message):
        toks.lz.at(position, **options)


def test_a_role_is_pooled_by_selecting_it(toks: xr.Dataset) -> None:
    pooled = toks.resid.sel(role="user").lz.pool("mean")
    expected = [toks.resid.sel(prompt=lz.prompt_hash(text), role="user").mean("token") for text in CHATS]
    np.testing.assert_allclose(pooled.transpose("prompt", ...).values, [values.values for values in expected])
    assert not {"role", "turn", "generated"} & set(pooled.coords)
    assert not {"role", "turn", "generated"} & set(toks.resid.lz.padded().coords)
    frame = toks.resid.sel(role="user").unstack("token")
    assert frame.sizes["prompt"] == 3


def test_batches_bring_roles_along(toks: xr.Dataset) -> None:
    labels = ["role", "turn", "generated", "position", "prompt"]
    ((_, found),) = toks.resid.lz.batches(shuffle=False, labels=labels, where=lz.mask_tokens(toks, role=["user", "assistant"]))
    chosen = toks.sel(role=["user", "assistant"])
    for name in labels:
        assert found[name].tolist() == chosen[name].values.tolist(), name


def test_probes_learn_from_tokens_of_a_role(toks: xr.Dataset) -> None:
    probes = lz.fit_tokens(toks.resid, toks.role == "user", probe="mass_mean", where=lz.mask_tokens(toks, role=["user", "assistant"]))
    scored = lz.score_tokens(probes, toks.resid)
    assert of(scored) == all_tokens()
    assert of(scored.sel(role="assistant")) == of(toks.sel(role="assistant"))
