"""The native library reads rows as torch does, with the same bits on all machines that fuse multiplication and addition."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.draws import cases

from pagefork.kernels import apply_top_k, apply_top_p, sample, top_logprobs
from pagefork.kernels import native_sampling as native
from pagefork.kernels.native import library, native_isa

pytestmark = pytest.mark.skipif(library() is None, reason="the native library is not built")
VOCAB = 5003
RNG = np.random.default_rng(5)
SHAPES = {
    "normal": RNG.normal(size=VOCAB),
    "narrow": 1000 + RNG.normal(size=VOCAB) * 1e-2,
    "few distinct values": RNG.integers(-3, 4, VOCAB).astype(float),
    "all equal": np.full(VOCAB, -3.25),
    "all but one equal": np.r_[np.full(VOCAB - 1, 2.0), 2.5],
    "zeros of both signs": np.where(RNG.random(VOCAB) < 0.5, 0.0, -0.0),
    "peaked": np.r_[RNG.normal(size=VOCAB - 5) - 20, RNG.normal(size=5)],
    "mostly banned": np.where(np.arange(VOCAB) % 100 > 0, -np.inf, RNG.normal(size=VOCAB)),
    "one token": np.where(np.arange(VOCAB) == 4000, -7.0, -np.inf),
    "subnormal": RNG.normal(size=VOCAB) * 1e-40,
    "wide": RNG.normal(size=VOCAB) * 1e37,
}


def drawn(dtype: torch.dtype) -> Any:
    logits, params = cases(VOCAB, 300, 17)
    return sample(logits.to(dtype), **{name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in params.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_reads_are_those_of_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exponentials differ in their last bits, which 1 draw in 100 may show."""
    found = drawn(dtype)
    best = top_logprobs(cases(VOCAB, 300, 17)[0].to(dtype), 20)
    monkeypatch.setattr(native, "takes", lambda logits: False)
    expected = drawn(dtype)
    same = found.token == expected.token
    assert same.sum() >= 297
    assert (found.logprob - expected.logprob)[same].abs().max() < 2e-5
    other = top_logprobs(cases(VOCAB, 300, 17)[0].to(dtype), 20)
    assert torch.equal(best.ids, other.ids) and (best.logprobs - other.logprobs).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_limits_are_exact_order_statistics(shape: str, dtype: torch.dtype) -> None:
    """Of counts; and of masses, for which float64 may differ by 1e-6."""
    logits = torch.from_numpy(SHAPES[shape])[None].to(dtype)
    values = logits[0].double().numpy()
    ordered = np.sort(values)[::-1]
    for k in (1, 2, 64, 129, 2000, VOCAB - 1):
        kept = apply_top_k(logits, k)[0].numpy()
        assert ((kept == -np.inf) == ((values < ordered[k - 1]) | (values == -np.inf))).all()
    weight = np.exp(values - ordered[0])
    weight /= weight.sum()
    for p in (1e-6, 0.3, 0.9, 0.999):
        kept = apply_top_p(logits, p)[0].numpy() > -np.inf
        least = values[kept].min()
        assert (kept == (values >= least)).all()
        assert weight[kept].sum() >= p - 1e-6 and weight[values > least].sum() < p + 1e-6


def run_by(isa: str, tmp_path: Path) -> tuple[str, list[np.ndarray]]:
    """What `drawn` finds in a process of its own."""
    out = tmp_path / f"{isa}.npz"
    program = (
        "import sys, numpy, test_native_sampling as test, torch\n"
        "found = [column.numpy() for dtype in (torch.float32, torch.bfloat16) for column in test.drawn(dtype)]\n"
        "numpy.savez(sys.argv[1], *found)\n"
        "print(test.native_isa())\n"
    )
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PAGEFORK_NATIVE": isa, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", program, str(out)], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    with np.load(out) as found:
        return done.stdout.strip(), list(found.values())


def test_instruction_sets_agree(tmp_path: Path) -> None:
    """To the bit where multiplication and addition are fused; else nearly always."""
    expected = [column.numpy() for dtype in (torch.float32, torch.bfloat16) for column in drawn(dtype)]
    ran, found = run_by("scalar", tmp_path)
    assert ran == "scalar"
    for token, logprob in ((0, 1), (3, 4)):
        same = found[token] == expected[token]
        assert same.sum() >= 297
        assert np.abs(found[logprob] - expected[logprob])[same].max() < 2e-5
    if str(native_isa()).startswith("avx512"):
        ran, found = run_by("avx2", tmp_path)
        assert ran == "avx2"
        assert all((a == b).all() for a, b in zip(found, expected, strict=True))
