"""A float64 replay of the whole pipeline on random rows and limits: the same tokens, the same support."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import logits as book
from support.draws import cases, entries, run

from pagefork.kernels._triton import INTERPRETED

VOCABS = [1, 2, 63, 64, 65, 999, 4097] + ([] if INTERPRETED else [32_000, 128_256, 262_144])
COUNT = 300 if INTERPRETED else 1000


@pytest.mark.parametrize("vocab", VOCABS)
def test_tokens_support_and_log_probs_are_those_of_float64(vocab: int, device: torch.device) -> None:
    """But for cases that float64 itself decides by less than 1e-6 of mass."""
    logits, params = cases(vocab, COUNT, vocab)
    found = run(logits.to(device), entries(params, device))
    support = found.processed.log_probs(logits.to(device)).isfinite().cpu().numpy()
    skipped = 0
    assert not found.bad.any()
    for i, row in enumerate(logits.numpy()):
        spec = {name: values[i].item() for name, values in params.items()}
        kept = book.kept(row, spec)
        token, margin = book.draw(kept.probs, book.uniform(spec["seed"], spec["stream"], spec["position"]))
        if spec["temperature"] < 1e-5:
            token, margin = int(np.argmax(row)), 1.0
        if min(kept.margin, margin) < 1e-6:
            skipped += 1
            continue
        assert int(found.token[i]) == token, (i, spec, margin)
        assert abs(float(found.logprob[i]) - np.log(kept.probs[token])) < 2e-5
        assert (support[i] == kept.mask).all(), (i, spec)
    assert skipped <= 1 + COUNT // 300
