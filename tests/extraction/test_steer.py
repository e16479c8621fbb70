"""Steering against hooks written by hand on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xarray as xr
from tiny_models import tiny_model

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, UnknownArchitectureError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.model
KINDS = {"gpt2": "transformer.h", "llama": "model.layers", "gpt_neox": "gpt_neox.layers", "gemma2": "model.layers"}
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: tiny_model(kind, "AutoModelForCausalLM") for kind in KINDS}


def width(model: Any) -> int:
    return int(model.config.hidden_size)


def directions(hidden: int, layers: Any = (0, 1), **attrs: Any) -> xr.Dataset:
    rng = np.random.default_rng(3)
    coef = 5 * rng.standard_normal((len(layers), hidden))
    norms = ("layer", np.linspace(2, 3, len(layers)))
    return xr.Dataset({"coef": (("layer", "hidden"), coef), "mean_norm": norms}, {"layer": list(layers)}, attrs)


def logits(model: Any, ids: Any = IDS) -> Any:
    with torch.inference_mode():
        return model(input_ids=ids).logits


def by_hand(model: Any, kind: str, change: Callable[[int, Any], Any], ids: Any = IDS) -> Any:
    """The logits with hooks of the test's own on the blocks."""
    handles = []
    for layer, block in enumerate(model.get_submodule(KINDS[kind])):

        def hook(_module: Any, _args: Any, output: Any, layer: int = layer) -> Any:
            rows = change(layer, output[0] if isinstance(output, tuple) else output)
            return (rows, *output[1:]) if isinstance(output, tuple) else rows

        handles.append(block.register_forward_hook(hook))
    try:
        return logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()


def unit(data: xr.Dataset, layer: int) -> Any:
    row = data.coef.sel(layer=layer).values
    return torch.from_numpy(row / np.linalg.norm(row)).float()


@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_is_a_hook_by_hand(models: dict[str, Any], kind: str) -> None:
    model = models[kind]
    data = directions(width(model))
    plain = logits(model)
    changes: dict[str, Any] = {
        "add": lambda layer, rows: rows - 1.5 * unit(data, layer) if layer < 2 else rows,
        "ablate": lambda layer, rows: rows - (rows @ unit(data, layer))[..., None] * unit(data, layer) if layer < 2 else rows,
        "clamp": lambda layer, rows: rows + (-1.5 - (rows @ unit(data, layer)))[..., None] * unit(data, layer) if layer < 2 else rows,
    }
    for mode, change in changes.items():
        with lz.steer(model, data, strength=None if mode == "ablate" else -1.5, mode=mode):
            found = logits(model)
        torch.testing.assert_close(found, by_hand(model, kind, change), rtol=1e-5, atol=1e-5)
        assert float((found - plain).abs().max()) > 1e-3
    # Hooks are gone, and so are those of a context that an error ended.
    with pytest.raises(ZeroDivisionError), lz.steer(model, data, strength=1.0):
        raise ZeroDivisionError
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=0)


def test_what_ablation_leaves_has_nothing_along_the_direction(models: dict[str, Any]) -> None:
    model, seen = models["llama"], []
    data = directions(width(model), [1])
    with lz.steer(model, data, mode="ablate"):
        handle = model.model.layers[1].register_forward_hook(lambda *each: seen.append(each[2]))
        logits(model)
        handle.remove()
    rows = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert float((rows @ unit(data, 1)).abs().max()) < 1e-5 * float(rows.norm(dim=-1).max())


def test_strengths_in_mean_norms_and_chosen_layers(models: dict[str, Any]) -> None:
    model = models["llama"]
    data = directions(width(model), (0, 1))
    with lz.steer(model, data, strength=0.5, unit="mean_norm", layers=[1]):
        found = logits(model)
    expected = by_hand(model, "llama", lambda layer, rows: rows + 0.5 * 3.0 * unit(data, 1) if layer == 1 else rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with lz.steer(model, data.coef.sel(layer=0), strength=2.0):
        one = logits(model)
    expected = by_hand(model, "llama", lambda layer, rows: rows + 2.0 * unit(data, 0) if layer == 0 else rows)
    torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)
    with lz.steer(model, data.coef.sel(layer=0).drop_vars("layer"), strength=2.0, layers=0):
        torch.testing.assert_close(logits(model), one)


@pytest.mark.parametrize(("tokens", "places"), [(slice(1, 3), [1, 2]), (2, [2]), (-1, [4]), (slice(-2, None), [3, 4]), ("generated", [])])
def test_chosen_tokens(models: dict[str, Any], tokens: Any, places: list[int]) -> None:
    model = models["gpt2"]
    data = directions(width(model), [1])

    def change(layer: int, rows: Any) -> Any:
        rows = rows.clone()
        if layer == 1:
            rows[:, places] += 2.0 * unit(data, 1)
        return rows

    with lz.steer(model, data, strength=2.0, tokens=tokens):
        found = logits(model)
    torch.testing.assert_close(found, by_hand(model, "gpt2", change), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", ["all", "generated", -1, slice(2, 7)])
def test_generation_with_a_cache_is_that_without(models: dict[str, Any], tokens: Any) -> None:
    model = models["llama"]
    data = directions(width(model), [0, 2])
    ids = IDS[:1]
    with lz.steer(model, data, strength=3.0, tokens=tokens), torch.inference_mode():
        found = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    # Without a cache every pass has the whole text, and the test says itself which tokens were pushed.
    prompt = ids.shape[1]
    text = ids
    for step in range(6):
        pushed = {
            "all": range(text.shape[1]),
            "generated": range(prompt, text.shape[1]),
            -1: range(prompt - 1, text.shape[1]),
        }.get(tokens) if not isinstance(tokens, slice) else range(*tokens.indices(text.shape[1]))  # fmt: skip
        assert pushed is not None

        def change(layer: int, rows: Any, pushed: Any = list(pushed)) -> Any:  # noqa: B006
            rows = rows.clone()
            if layer in (0, 2):
                rows[:, pushed] += 3.0 * unit(data, layer)
            return rows

        expected = by_hand(model, "llama", change, text)[:, -1]
        torch.testing.assert_close(found.logits[step], expected, rtol=1e-4, atol=1e-4)
        text = torch.cat([text, expected.argmax(-1, keepdim=True)], dim=1)
    assert found.sequences.tolist() == text.tolist()


def test_contexts_are_nested_and_16_bits_stay_16_bits() -> None:
    model = tiny_model("llama", "AutoModelForCausalLM").to(torch.bfloat16)
    data = directions(width(model), [0])
    with lz.steer(model, data, strength=1.0), lz.steer(model, data, mode="ablate"):
        found = logits(model)
    with lz.steer(model, data, mode="ablate"):
        alone = logits(model)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, alone, rtol=0.1, atol=0.1)


def test_directions_that_were_fitted_steer(models: dict[str, Any]) -> None:
    model = models["llama"]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 40, width(model))).astype("float32")
    array = xr.DataArray(
        x, dims=("layer", "prompt", "hidden"), coords={"layer": [0, 1], "prompt": [f"p{i}" for i in range(40)]}, name="resid_mean"
    )
    fitted = lz.fit_directions(array, np.arange(40) % 2, "ridge")
    np.testing.assert_allclose(fitted.mean_norm, np.linalg.norm(x.astype(float), axis=-1).mean(axis=1))
    with lz.steer(model, fitted, strength=0.1, unit="mean_norm"):
        logits(model)


def test_what_cannot_be_steered_is_refused(models: dict[str, Any]) -> None:
    model = models["llama"]
    hidden, layers = width(model), model.config.num_hidden_layers
    good = directions(hidden)
    nan = good.assign(coef=good.coef.where(good.layer != 1))
    by_class = good.expand_dims({"class": ["a", "b", "c"]})
    for data, options, words in (
        (directions(hidden + 1), {}, f"directions are {hidden + 1} wide and the model is {hidden} wide: they are of another model"),
        (directions(hidden, [0, layers]), {}, f"the model has layers 0 to {layers - 1}, and directions are of layer {layers}"),
        (good, {"layers": [7]}, "there is no direction of layer 7"),
        (good, {"layers": []}, "no layer was named"),
        (nan, {}, "the direction of layer 1 is NaN or infinite"),
        (good * 0, {}, "the direction of layer 0 is zero"),
        (by_class, {}, "directions of 3 classes"),
        (directions(hidden, variable="attn_mean"), {}, "directions of 'attn_mean': only the residual stream"),
        (good, {"strength": None}, "mode='add' needs a strength"),
        (good, {"strength": np.inf}, "is no finite number"),
        (good, {"mode": "multiply"}, "mode='multiply' is unknown"),
        (good, {"unit": "sigma"}, "unit='sigma' is unknown"),
        (good, {"tokens": "some"}, "tokens='some' names no tokens"),
        (good.drop_vars("mean_norm"), {"unit": "mean_norm"}, "needs the variable 'mean_norm'"),
        (good.coef.isel(layer=0, drop=True), {}, "do not say of which layer they are"),
    ):  # fmt: skip
        given = {"strength": 1.0, **options}
        with pytest.raises(InvalidArgumentError, match=words), lz.steer(model, data, **given):  # type: ignore[arg-type]
            pass
        assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(InvalidTypeError, match="model is a loaded torch Module, not str"):
        lz.steer("gpt2", good, strength=1.0)  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="directions are what fit_directions"):
        lz.steer(model, np.ones(3), strength=1.0)  # type: ignore[arg-type]
    with pytest.raises(UnknownArchitectureError), lz.steer(torch.nn.Linear(3, 3), good, strength=1.0):
        pass
