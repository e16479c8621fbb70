"""Folders that SAELens and dictionary_learning wrote, against what these packages themselves encode with them; and damaged ones.

``tests/support/make_autoencoders.py`` has written ``tests/data``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoded import LATENTS, encoded_by_hand, random_sae

import lmprobe_zarr as lz
from lmprobe_zarr import safetensors_file
from lmprobe_zarr.errors import CorruptFileError, InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.latents.encoder import Encoder

DATA = Path(__file__).parents[1] / "data"
LENS, DICTIONARY = DATA / "sae-lens-6.54.12", DATA / "dictionary-learning-0.1.0"
TRUTH = np.load(DATA / "autoencoders-truth.npz")
BLOCK_1 = {"site": "resid", "layer": 1}


def latents_of(sae: lz.SparseAutoencoder, rows: Any) -> Any:
    """All latents of rows, from the values and indices that would be stored."""
    values, indices = Encoder(sae, k=sae.num_latents, threshold=0, dtype=np.float64).encode(rows)
    found = np.zeros((len(rows), sae.num_latents))
    at, column = np.nonzero(indices >= 0)
    found[at, indices[at, column]] = values[at, column]
    return found


@pytest.mark.parametrize(
    ("folder", "architecture", "where"),
    [
        ("standard", "relu", BLOCK_1), ("pre", "relu", BLOCK_1), ("topk", "topk", BLOCK_1), ("topk_rescaled", "topk", BLOCK_1),
        ("jumprelu", "jumprelu", {"site": "mlp", "layer": 1}), ("gated", "gated", BLOCK_1), ("batchtopk", "jumprelu", BLOCK_1),
        ("before_6", "topk", BLOCK_1),
    ],
)  # fmt: skip
def test_folders_of_saelens_encode_as_saelens_does(folder: str, architecture: str, where: dict[str, Any]) -> None:
    sae = lz.load_sae(LENS / folder)
    assert (sae.architecture, {"site": sae.site, "layer": sae.layer}, sae.model) == (architecture, where, "gpt2")
    right = TRUTH[f"lens_{folder}"]
    found = latents_of(sae, TRUTH["rows"])
    assert ((found > 0) == (right > 0)).all()
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


@pytest.mark.model
@pytest.mark.parametrize(
    ("folder", "architecture"),
    [
        ("AutoEncoder", "relu"), ("AutoEncoderNew", "relu"), ("GatedAutoEncoder", "gated"), ("AutoEncoderTopK", "topk"),
        ("BatchTopKSAE", "jumprelu"), ("MatryoshkaBatchTopKSAE", "jumprelu"), ("JumpReluAutoEncoder", "jumprelu"),
    ],
)  # fmt: skip
def test_folders_of_dictionary_learning_encode_as_it_does(folder: str, architecture: str) -> None:
    pytest.importorskip("torch")
    sae = lz.load_sae(str(DICTIONARY / folder))
    assert (sae.architecture, sae.site, sae.layer, sae.model) == (architecture, "resid", 1, "gpt2")
    found, right = latents_of(sae, TRUTH["rows"]), TRUTH[f"dictionary_{folder}"]
    assert ((found > 0) == (right > 0)).all()
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


def test_rows_that_were_centred_or_scaled_are_so_again() -> None:
    rows = TRUTH["rows"].astype(np.float64)
    centred = lz.load_sae(LENS / "centred")
    assert centred.normalisation == "centred"
    np.testing.assert_allclose(latents_of(centred, rows + 7), latents_of(centred, rows), rtol=1e-5, atol=1e-6)
    # SAELens itself takes rows that were centred by TransformerLens.
    by_saelens = lz.SparseAutoencoder(encoder=centred.encoder, encoder_bias=centred.encoder_bias, input_bias=centred.input_bias)
    given = rows - rows.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(latents_of(centred, rows), latents_of(by_saelens, given), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(latents_of(by_saelens, rows), TRUTH["lens_centred"], rtol=1e-5, atol=1e-6)
    with pytest.raises(InvalidArgumentError, match=r"which is not in the folder\. Give load_sae\(…, input_scale=…\)"):
        lz.load_sae(LENS / "by_average")
    scaled = lz.load_sae(LENS / "by_average", input_scale=0.5)
    # With the rows scaled beforehand SAELens gives this.
    np.testing.assert_allclose(latents_of(scaled, 2 * rows), TRUTH["lens_by_average"], rtol=1e-5, atol=1e-6)
    with pytest.raises(InvalidArgumentError, match="takes no input_scale"):
        lz.load_sae(LENS / "standard", input_scale=0.5)


@pytest.mark.parametrize(
    ("hook", "site", "layer"),
    [
        ("blocks.3.hook_resid_pre", "resid", 2), ("blocks.0.hook_resid_pre", "embed", None), ("blocks.3.hook_resid_mid", "resid_mid", 3),
        ("blocks.3.hook_attn_out", "attn", 3), ("blocks.3.attn.hook_z", "heads", 3), ("blocks.3.mlp.hook_post", "neurons", 3),
        ("blocks.3.hook_mlp_in", None, 3), ("ln_final.hook_normalized", None, None), (None, None, None),
    ],
)  # fmt: skip
def test_hooks_of_transformer_lens_are_sites(hook: Any, site: Any, layer: Any, tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda config: config["metadata"].update(hook_name=hook))
    assert (lz.load_sae(folder).site, lz.load_sae(folder).layer) == (site, layer)


def test_a_folder_is_encoded_with_by_its_path(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts")
    rows = TRUTH["rows"]
    lz.write_activations(store, model="gpt2", prompts=["a", "b"], activations={"resid": {1: [rows[:20], rows[20:]]}})
    found = lz.encode(store.tokens().resid, LENS / "topk", progress=False)
    assert found.sizes == {"token": 50, "latents_k": 5}, "as many as TopK keeps"
    right = np.sort(TRUTH["lens_topk"], axis=1)[:, ::-1][:, :5]
    np.testing.assert_allclose(found.latents_values.values, right, rtol=1e-5, atol=1e-6)


# -- bad input -------------------------------------------------------------------------------------------------------------


def changed(tmp_path: Path, change: Callable[[dict[str, Any]], Any], folder: str = "standard") -> Path:
    """A copy of a folder of SAELens with another configuration."""
    shutil.copytree(LENS / folder, tmp_path / folder)
    config = json.loads((tmp_path / folder / "cfg.json").read_text())
    change(config)
    (tmp_path / folder / "cfg.json").write_text(json.dumps(config))
    return tmp_path / folder


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"normalize_activations": "covariance_whitening"}, "this package computes none, constant_norm_rescale, layer_norm"),
        ({"normalize_activations": "new"}, "normalize_activations='new'"),
        ({"architecture": "temporal"}, "architecture 'temporal'"),
        ({"architecture": None}, "architecture None"),
        ({"metadata": {"hook_head_index": 3}}, "of one attention head"),
        ({"normalize_activations": "constant_norm_rescale", "metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": True}}},
         "of centred rows"),
    ],
)  # fmt: skip
def test_what_is_not_computed_here_is_refused(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        lz.load_sae(changed(tmp_path, lambda config: config.update(change)))


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="is no folder of an autoencoder"):
        lz.load_sae(tmp_path)
    with pytest.raises(InvalidTypeError, match="give the path of a folder"):
        lz.load_sae(5)  # type: ignore[arg-type]
    with pytest.raises(CorruptFileError, match="k='5', which is no whole number"):
        lz.load_sae(changed(tmp_path, lambda config: config.update(k="5"), "topk"))
    folder = changed(tmp_path, lambda config: config.update(architecture="gated"))
    with pytest.raises(CorruptFileError, match="lack 'b_mag'"):
        lz.load_sae(folder)
    for text, match in (("[]", "JSON list"), ("{", "is no JSON"), ('{"metadata": {}, "architecture": "topk"}', "k=None")):
        (folder / "cfg.json").write_text(text)
        with pytest.raises(CorruptFileError, match=match):
            lz.load_sae(folder)
    whole = (LENS / "standard" / "sae_weights.safetensors").read_bytes()
    (folder / "cfg.json").write_text((LENS / "standard" / "cfg.json").read_text())
    for data in (whole[:-1], whole + b"x", whole[:4], b""):
        (folder / "sae_weights.safetensors").write_bytes(data)
        with pytest.raises(CorruptFileError, match="is damaged"):
            lz.load_sae(folder)
    odd = {"W_enc": (np.ones((4, 6), np.float32), "float32"), "b_enc": (np.ones(5, np.float32), "float32"),
           "b_dec": (np.ones(4, np.float32), "float32")}  # fmt: skip
    (folder / "sae_weights.safetensors").write_bytes(b"".join(map(bytes, safetensors_file.encode(odd))))
    with pytest.raises(CorruptFileError, match=r"holds no autoencoder: encoder_bias has shape \(5,\)"):
        lz.load_sae(folder)
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(CorruptFileError, match="is missing"):
        lz.load_sae(folder)


def test_weights_in_bfloat16_are_read_exactly(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda config: config.update(dtype="bfloat16"))
    values = np.array([[1.5, -2.0], [0.25, 3.0]], np.float32)
    tensors = {"W_enc": (values, "bfloat16"), "b_enc": (values[0], "bfloat16"), "b_dec": (values[1], "bfloat16")}
    (folder / "sae_weights.safetensors").write_bytes(b"".join(map(bytes, safetensors_file.encode(tensors))))
    np.testing.assert_array_equal(lz.load_sae(folder).encoder, values)


@pytest.mark.model
def test_damaged_folders_of_dictionary_learning_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = tmp_path / "TopK"
    shutil.copytree(DICTIONARY / "AutoEncoderTopK", folder)
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(InvalidArgumentError, match="input_scale is for folders of SAELens"):
        lz.load_sae(folder, input_scale=2.0)
    for change, kind, match in (
        ({"dict_class": "IdentityDict"}, InvalidArgumentError, "dict_class 'IdentityDict'"),
        ({"k": None}, CorruptFileError, "k=None"),
        ({"dict_class": "GatedAutoEncoder"}, CorruptFileError, "lack 'decoder_bias'"),
    ):
        (folder / "config.json").write_text(json.dumps({"trainer": {**config["trainer"], **change}}))
        with pytest.raises(kind, match=match):
            lz.load_sae(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CorruptFileError, match="has no trainer"):
        lz.load_sae(folder)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"step": 3, "ae": {}}, folder / "ae.pt")
    with pytest.raises(InvalidArgumentError, match="a backup from the middle of a training"):
        lz.load_sae(folder)
    (folder / "ae.pt").write_bytes(b"no torch file")
    with pytest.raises(CorruptFileError, match="is damaged, or holds more than tensors"):
        lz.load_sae(folder)


@pytest.mark.model
def test_tensors_are_weights(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    sae = random_sae()
    of_torch = lz.SparseAutoencoder(
        encoder=torch.tensor(sae.encoder), encoder_bias=torch.nn.Parameter(torch.tensor(sae.encoder_bias)), input_bias=sae.input_bias
    )
    assert of_torch.sha256 == sae.sha256
    half = lz.SparseAutoencoder(encoder=torch.tensor(sae.encoder).bfloat16())
    np.testing.assert_array_equal(half.encoder, torch.tensor(sae.encoder).bfloat16().float().numpy())
    rows = np.random.default_rng(0).normal(size=(5, sae.width))
    np.testing.assert_allclose(latents_of(of_torch, rows), encoded_by_hand(sae, rows), rtol=1e-6)
    assert half.num_latents == LATENTS
