"""`sample` gives through the kernels what it gives in torch, and looks at nothing on the device."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from pagefork.kernels import sample
from pagefork.kernels._triton import INTERPRETED
from pagefork.kernels.sample import Sample

COUNT, VOCAB = (12, 999) if INTERPRETED else (257, 128_256)


def in_torch(monkeypatch: pytest.MonkeyPatch, logits: torch.Tensor, **given: Any) -> Sample:
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["pagefork.kernels.sample"], "fused", lambda x: False)
        return sample(logits, **given)


def parameters(device: torch.device) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(1)
    given = {
        "temperature": rng.choice([0.0, 0.5, 1.0, 1.5], COUNT),
        "top_k": rng.choice([-1, 0, 5, 40, VOCAB + 1, 2**40], COUNT),
        "top_p": rng.choice([1.0, 0.9, 0.4], COUNT).astype(np.float32),
        "min_p": rng.choice([0.0, 0.05], COUNT),
        "seed": rng.integers(-(2**63), 2**63, COUNT),
        "stream": rng.integers(0, 2**63, COUNT),
        "position": rng.integers(0, 2**31, COUNT, np.int32),
    }
    return {name: torch.from_numpy(values).to(device) for name, values in given.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_per_parameter(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = (3 * torch.randn(COUNT, VOCAB, generator=torch.Generator().manual_seed(0))).to(device, dtype)
    logits[3, 5] = torch.nan
    given = parameters(device)
    expected = in_torch(monkeypatch, logits, **given)
    found = sample(logits, **given)  # type: ignore[arg-type]
    assert torch.equal(found.token, expected.token) and torch.equal(found.bad, expected.bad)
    assert (found.logprob - expected.logprob)[~found.bad].abs().max() < 2e-5


@pytest.mark.parametrize("given", [{}, {"temperature": 0.0}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01}])
def test_one_number_for_every_row(given: dict[str, float], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(VOCAB, 4, generator=torch.Generator().manual_seed(2)).to(device).t()  # rows that lie apart
    expected = in_torch(monkeypatch, logits, seed=3, **given)
    found = sample(logits, seed=3, **given)  # type: ignore[arg-type]
    assert torch.equal(found.token, expected.token)
    assert (found.logprob - expected.logprob).abs().max() < 2e-5


def test_no_rows_and_refusals(device: torch.device) -> None:
    assert sample(torch.zeros(0, 9, device=device), top_k=3).token.shape == (0,)
    for given in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": 1.5}, {"top_k": torch.zeros(3, 1)}):
        with pytest.raises(ValueError, match=r"temperature|top_"):
            sample(torch.zeros(3, 9, device=device), **given)  # type: ignore[arg-type]


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_nothing_waits_for_the_device(device: torch.device) -> None:
    logits, given = torch.randn(COUNT, VOCAB, device=device), parameters(device)
    sample(logits, **given)  # type: ignore[arg-type]
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(logits, **given)  # type: ignore[arg-type]
    finally:
        torch.cuda.set_sync_debug_mode("default")
