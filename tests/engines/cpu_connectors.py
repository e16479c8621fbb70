"""Connectors of vLLM and of hs-connectors that work on a CPU: vLLM loads them for `write_states.py`, in whose environment they are.

As shipped they copy through pinned memory on a CUDA stream. Here that one step is a plain copy; what is written, when, and with which lock
is theirs.
"""

from __future__ import annotations

import fcntl
import os
from functools import partial
from typing import Any

import torch
from hs_connectors.fp8_hidden_states_connector import FP8HiddenStatesConnector
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import ExampleHiddenStatesConnector, extract_from_kv_cache


class Done:
    """Stands for a CUDA event after which there is nothing to wait for."""

    def synchronize(self) -> None:
        """Wait for nothing."""

    def query(self) -> bool:
        """Whether it is over."""
        return True


class _OnCpu:
    def _submit_async_write(self, pending: Any) -> None:
        me: Any = self
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)
        slots = (torch.arange(me._block_size)[None] + blocks[:, None] * me._block_size).flatten()
        values = extract_from_kv_cache(me._kv_cache, slots, pending.token_ids.shape[0]).clone()
        lock = me._lock_fds.pop(pending.req_id, None)
        if lock is None and me.use_lock:
            lock = os.open(f"{pending.filename}.lock", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX)
        tensors = {"hidden_states": values, "token_ids": pending.token_ids.clone()}
        future = me._executor.submit(me._write_tensors, tensors, Done(), pending.filename, lock)
        me._req_copy_events[pending.req_id], me._req_futures[pending.req_id] = Done(), future
        future.add_done_callback(partial(me._on_write_done, pending.req_id))


class States(_OnCpu, ExampleHiddenStatesConnector):  # type: ignore[misc]
    """vLLM's own."""


class Fp8States(_OnCpu, FP8HiddenStatesConnector):  # type: ignore[misc]
    """That of hs-connectors, which writes 8 bits with scales."""
