"""What the extension of vLLM's workers finds in blocks that are built as vLLM builds them, and whose rows it says they are.

vLLM itself is in ``tests/engines``. Here its two kinds of model runners are small ones of the same form, since one kind needs a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402 — needs torch

from lmprobe_zarr.extraction.models.vllm_worker import REQUEST_ARGUMENT, Extension  # noqa: E402

pytestmark = pytest.mark.model

WIDTH, DEPTH, VOCABULARY = 8, 3, 40
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11]]


class Norm(nn.Module):
    """Adds a second tensor first, and writes into both, as vLLM's kernels do."""

    def __init__(self, adds: bool = True) -> None:
        super().__init__()
        self.adds = adds

    def forward(self, x: Any, residual: Any = None) -> Any:
        if residual is None:
            return torch.tanh(x)
        if not self.adds:
            return torch.tanh(x), residual
        residual.add_(x)
        x.copy_(torch.tanh(residual))
        return x, residual


class RowLinear(nn.Module):
    """Returns its product and no bias, as vLLM's linear layers do."""

    def __init__(self, given: int, returned: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(returned, given) * 0.5)

    def forward(self, x: Any) -> Any:
        return x @ self.weight.T, None


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj = RowLinear(WIDTH, 3 * WIDTH), RowLinear(3 * WIDTH, WIDTH)

    def forward(self, positions: Any, hidden_states: Any) -> Any:
        qkv, _ = self.qkv_proj(hidden_states)
        return self.o_proj(torch.sin(qkv + positions[:, None]))[0]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = RowLinear(WIDTH, 12), RowLinear(12, WIDTH)

    def forward(self, x: Any) -> Any:
        return self.down_proj(torch.cos(self.gate_up_proj(x)[0]))[0]


class Block(nn.Module):
    """Hands on what its MLP gave and the stream without it."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm, self.self_attn, self.mlp = Norm(), Norm(), Attention(), Mlp()

    def forward(self, positions: Any, hidden_states: Any, residual: Any) -> Any:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class ParallelBlock(Block):
    """Hands on the stream, and beside it what the stream was: the two are not to be added."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = Norm(adds=False)

    def forward(self, positions: Any, hidden_states: Any, residual: Any) -> Any:
        residual = hidden_states
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
        return residual + self.self_attn(positions=positions, hidden_states=hidden_states) + self.mlp(hidden_states), residual


class ScaledBlock(Block):
    """Changes the stream in a way that what its modules return does not explain."""

    def forward(self, positions: Any, hidden_states: Any, residual: Any) -> Any:
        hidden_states, residual = super().forward(positions, hidden_states, residual)
        return hidden_states * torch.linspace(0.5, 2, WIDTH), residual


class OneTensorBlock(Block):
    """Hands on the stream alone, of which one block is not explained by what its modules return."""

    number = 0

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.linspace(0.5, 2, WIDTH) if OneTensorBlock.number % DEPTH == 1 else 1.0
        OneTensorBlock.number += 1

    def forward(self, positions: Any, hidden_states: Any, residual: Any) -> Any:
        middle = hidden_states + self.self_attn(positions=positions, hidden_states=self.input_layernorm(hidden_states))
        return middle + self.mlp(self.post_attention_layernorm(middle)) * self.factor


class Model(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(kind() for _ in range(DEPTH))
        self.norm = Norm(adds=kind is not ParallelBlock)

    def forward(self, input_ids: Any, positions: Any) -> Any:
        hidden_states, residual = self.embed(input_ids), None
        for layer in self.layers:
            returned = layer(positions, hidden_states, residual)
            hidden_states, residual = returned if isinstance(returned, tuple) else (returned, None)
        normed = self.norm(hidden_states, residual)
        return normed[0] if isinstance(normed, tuple) else normed


class Runner:
    """What both kinds of vLLM's model runners have."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def get_model(self) -> nn.Module:
        return self.model

    def execute_model(self, scheduled: Any, dummy_run: bool = False) -> None:
        with torch.inference_mode():
            self.run(scheduled)

    def run(self, scheduled: Any) -> None:
        raise NotImplementedError


class FirstRunner(Runner):
    """Keeps the requests of a pass in ``input_batch``, among others that are not in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.input_batch = SimpleNamespace(req_ids=[], num_reqs=0)
        self.query_start_loc = SimpleNamespace(np=np.zeros(9, np.int32))
        self.input_ids = SimpleNamespace(gpu=torch.zeros(99, dtype=torch.int32))

    def run(self, scheduled: Any) -> None:
        counts = [len(ids) for _, _, ids in scheduled.pieces]
        self.input_batch.req_ids, self.input_batch.num_reqs = [name for name, _, _ in scheduled.pieces], len(counts)
        self.query_start_loc.np[: len(counts) + 1] = np.cumsum([0, *counts])
        self.input_ids.gpu[: sum(counts)] = torch.tensor([i for _, _, ids in scheduled.pieces for i in ids])
        positions = torch.tensor([first + i for _, first, ids in scheduled.pieces for i in range(len(ids))])
        self.model(input_ids=self.input_ids.gpu[: sum(counts)], positions=positions)


class SecondRunner(Runner):
    """Makes the requests of a pass in ``prepare_inputs``."""

    def prepare_inputs(self, scheduled: Any) -> Any:
        return SimpleNamespace(
            req_ids=[name for name, _, _ in scheduled.pieces],
            num_scheduled_tokens=np.array([len(ids) for _, _, ids in scheduled.pieces], np.int32),
            input_ids=torch.tensor([i for _, _, ids in scheduled.pieces for i in ids], dtype=torch.int32),
            positions=torch.tensor([first + i for _, first, ids in scheduled.pieces for i in range(len(ids))]),
        )

    def run(self, scheduled: Any) -> None:
        batch = self.prepare_inputs(scheduled)
        self.model(input_ids=batch.input_ids, positions=batch.positions)


class Worker(Extension):
    def __init__(self, runner: Runner) -> None:
        self.model_runner, self.rank, self.device = runner, 0, "cpu"
        model_config = SimpleNamespace(
            get_total_num_hidden_layers=lambda: DEPTH, enforce_eager=True, dtype=torch.float32, quantization=None, max_model_len=64
        )  # fmt: skip
        self.vllm_config = SimpleNamespace(
            model_config=model_config,
            cache_config=SimpleNamespace(enable_prefix_caching=False, cache_dtype="auto"),
            compilation_config=SimpleNamespace(static_forward_context={}, mode=0),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=5),
        )

    def step(self, *pieces: tuple[int, int, int], begun: tuple[int, ...] = ()) -> None:
        """One pass over pieces (prompt, first, count), of which these prompts are new."""
        new = [SimpleNamespace(req_id=f"{i}-abcd", sampling_params=SimpleNamespace(extra_args={REQUEST_ARGUMENT: i})) for i in begun]
        listed = [(f"{i}-abcd", first, PROMPTS[i][first : first + count]) for i, first, count in pieces]
        self.model_runner.execute_model(SimpleNamespace(scheduled_new_reqs=new, pieces=listed))


def started(kind: type[nn.Module], runner: type[Runner] = FirstRunner, **paths: str) -> tuple[Worker, dict[str, Any]]:
    """A worker whose extension has looked for the sites, and what it found."""
    worker = Worker(runner(Model(kind)))
    assert worker.lmprobe_zarr_start()["path"] == "layers"
    worker.lmprobe_zarr_trace(list(paths.values()))
    worker.step((2, 0, 5))
    return worker, worker.lmprobe_zarr_places(paths)


def streams(model: Any, ids: list[int]) -> dict[str, Any]:
    """The values of every site, computed as the blocks are written down: (layer, token, …)."""
    found: dict[str, list[Any]] = {name: [] for name in ("resid", "attn", "mlp", "heads", "neurons", "resid_mid")}
    positions, stream = torch.arange(len(ids)), model.embed(torch.tensor(ids))
    for layer in model.layers:
        normed = torch.tanh(stream)
        heads = torch.sin(layer.self_attn.qkv_proj(normed)[0] + positions[:, None])
        attn = layer.self_attn.o_proj(heads)[0]
        middle = stream + attn
        neurons = torch.cos(layer.mlp.gate_up_proj(normed if isinstance(layer, ParallelBlock) else torch.tanh(middle))[0])
        mlp = layer.mlp.down_proj(neurons)[0]
        stream = middle + mlp
        for name, values in zip(found, (stream, attn, mlp, heads, neurons, middle), strict=True):
            found[name].append(values.detach().numpy())
    return {name: np.stack(values) for name, values in found.items()}


@pytest.mark.parametrize("runner", [FirstRunner, SecondRunner])
@pytest.mark.parametrize("kind", [Block, ParallelBlock])
def test_rows_of_all_sites_are_those_of_each_prompt(kind: type[nn.Module], runner: type[Runner]) -> None:
    worker, found = started(kind, runner, z="self_attn.qkv_proj", last="/norm")
    sites = [site for site in ("resid", "attn", "mlp", "heads", "neurons", "resid_mid") if site in found["places"]]
    assert ("resid_mid" in sites) == (kind is Block)  # parallel blocks have no stream between attention and MLP
    layers_of: dict[str, list[int | None]] = {**{site: [0, 1, 2] for site in sites}, "z": [1], "embed": [None], "last": [None]}
    worker.lmprobe_zarr_begin(
        {"lengths": [3, 1, 5], "layers_of": layers_of, "poolings": ["mean"], "parts": {"all": None}, "keep_tokens": True}
    )  # fmt: skip
    worker.step((2, 0, 3), (1, 0, 1), begun=(2, 1))
    worker.step((0, 0, 3), (2, 3, 2), begun=(0,))
    answer = worker.lmprobe_zarr_take()
    assert (answer["problem"], answer["seen"]) == ("", [3, 1, 5])
    assert np.frombuffer(answer["token_ids"], np.int64).tolist() == [i for ids in PROMPTS for i in ids]
    tokens = {
        name: np.frombuffer(held["values"], held["dtype"]).reshape(held["shape"]) for name, held in answer["arrays"]["tokens"].items()
    }
    model: Any = worker.model_runner.model
    expected = [streams(model, ids) for ids in PROMPTS]
    for site in sites:
        assert np.allclose(tokens[site], np.concatenate([each[site] for each in expected], axis=1), atol=1e-5), site
    assert tokens["z"].shape == (1, 9, 3 * WIDTH)
    assert tokens["embed"].shape == tokens["last"].shape == (9, WIDTH)
    held = answer["arrays"]["prompts"]["resid_mean"]
    means = np.frombuffer(held["values"], held["dtype"]).reshape(held["shape"])
    assert np.allclose(means, np.stack([each["resid"].mean(axis=1) for each in expected], axis=1), atol=1e-5)


def test_blocks_whose_change_is_not_explained_are_refused() -> None:
    _, found = started(ScaledBlock)
    assert found == {
        "problem": "its blocks return two tensors, and what its modules add does not explain the difference that layer 0 makes"
    }  # fmt: skip


def test_what_one_block_adds_and_is_not_known_is_a_site_of_no_layer() -> None:
    _, found = started(OneTensorBlock)
    assert {"resid", "embed"} <= set(found["places"])
    assert found["places"]["resid"]["layers"] == [0, 1, 2]
    assert "mlp" not in found["places"]


def test_a_pass_without_requests_is_not_taken() -> None:
    worker, _ = started(Block, SecondRunner)
    wish = {"lengths": [3], "layers_of": {"resid": [0]}, "poolings": [], "parts": {}, "keep_tokens": True}
    worker.lmprobe_zarr_begin(wish)
    worker.model_runner.execute_model(SimpleNamespace(scheduled_new_reqs=[], pieces=[("warm", 0, [1, 2])]), dummy_run=True)
    assert worker.lmprobe_zarr_take()["seen"] == [0]
