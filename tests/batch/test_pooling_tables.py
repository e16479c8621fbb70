from __future__ import annotations

import pytest

from lmprobe_zarr.batch.pooling import POOLINGS
from lmprobe_zarr.batch.stages import TRAINING, parse_stage

pytest.importorskip("torch")

from lmprobe_zarr.extraction.models.padded_pooling import POOL_PADDED


def test_every_pooling_is_computed_on_ragged_arrays_and_on_padded_tensors() -> None:
    assert POOLINGS == tuple(POOL_PADDED) == ("last_token", "first_token", "mean", "max", "min")


def test_every_pooling_is_a_stage_and_those_of_activations_can_be_trained_on() -> None:
    assert TRAINING == ("last_token", "first_token", "mean", "all")
    assert {name for name in POOLINGS if parse_stage(name).of == "activation"} == set(TRAINING) - {"all"}
