"""Served engines on the demo model, each with a runtime directory of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pagefork import EngineConfig
from pagefork.limits import Limits
from pagefork.server.config import ServiceConfig
from pagefork.server.launch import Served

# Long enough for a machine that does much else, short enough to wait for.
TIMING = {"ping": 0.3, "lease": 1.5, "grace": 0.5, "stall": 1.5, "keep": 2.0}
GONE_WITHIN = TIMING["lease"] + TIMING["grace"] + 2.0  # seconds, with slack
ENGINE: dict[str, Any] = {"model": "demo", "dtype": "float32", "num_blocks": 400, "max_num_seqs": 32, "max_model_len": 512}
LIMITS = Limits(
    max_sessions=200, max_requests=100, max_reserved_tokens=4000, max_text_bytes=300, max_n=3, max_beam_width=4,
    max_num_simulations=5, max_tree_depth=4, max_rollout_tokens=3, max_leaf_batch_size=2, max_candidates=4, max_stop=2,
    max_stop_bytes=8, max_listed=3, max_logprobs=2,
)  # fmt: skip


def configured(engine: dict[str, Any] | None = None, limits: Limits | None = None, **settings: Any) -> ServiceConfig:
    usual: dict[str, Any] = {"timing": TIMING, "drain_timeout": 20.0, "log_level": "error"}
    return ServiceConfig(engine=EngineConfig(**ENGINE | (engine or {})), limits=limits or Limits(), **usual | settings)


@contextmanager
def serving(config: ServiceConfig | None = None) -> Iterator[Served]:
    """A served engine; nothing of it is left."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        Path(folder).chmod(0o700)
        patch.setenv("PAGEFORK_RUNTIME_DIR", folder)
        with Served(config or configured()) as served:
            yield served
