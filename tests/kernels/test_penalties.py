"""Penalties computed from histories equal penalties computed from dense counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import logits as book
from transformers import RepetitionPenaltyLogitsProcessor

from pagefork.kernels import apply_penalties

ROWS, VOCAB, COLUMNS = 24, 50, 40


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of both signs (zero and -inf too), histories with repeats, lengths and prompt lengths with the extremes."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, VOCAB, generator=generator) * 3
    logits[:, 5], logits[:, 6] = 0.0, -torch.inf
    tokens = torch.randint(0, 12, (ROWS, COLUMNS), generator=generator, dtype=torch.int32)
    length = torch.randint(0, COLUMNS + 1, (ROWS,), generator=generator)
    length[:3] = torch.tensor([0, 1, COLUMNS])
    prompt = (length * torch.rand(ROWS, generator=generator)).long()
    prompt[3], prompt[4] = length[3], 0
    return logits, tokens, length, prompt


def test_penalties_equal_the_definition_with_dense_counts() -> None:
    logits, tokens, length, prompt = case()
    rng = np.random.default_rng(0)
    repetition, frequency, presence = (
        rng.choice(values, ROWS) for values in ([1.0, 0.5, 1.3], [0.0, 0.7, -2.0], [0.0, 0.0, 1.5])
    )
    found = apply_penalties(logits, tokens, length, prompt, *map(torch.from_numpy, (repetition, frequency, presence)))
    for row in range(ROWS):
        history = tokens[row, : length[row]].numpy()
        seen, count = np.bincount(history, minlength=VOCAB), np.bincount(history[prompt[row] :], minlength=VOCAB)
        x = logits[row].double().numpy()
        x = np.where(seen > 0, np.where(x > 0, x / repetition[row], x * repetition[row]), x)
        x = x - frequency[row] * count - presence[row] * (count > 0)
        np.testing.assert_allclose(found[row].numpy(), x, rtol=3e-7, atol=1e-6)
        spec = {"repetition_penalty": repetition[row], "frequency_penalty": frequency[row], "presence_penalty": presence[row]}
        assert (found[row].numpy() == book.adjusted(logits[row].numpy(), history.tolist(), int(prompt[row]), spec)).all()


def test_repetition_equals_hugging_face() -> None:
    logits, tokens, _, prompt = case(1)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(tokens.long(), logits)  # type: ignore[no-untyped-call]
    assert torch.equal(apply_penalties(logits, tokens, torch.full((ROWS,), COLUMNS), prompt, repetition=1.7), expected)


def test_what_lies_past_the_length_never_counts() -> None:
    logits, tokens, length, prompt = case(2)
    expected = apply_penalties(logits, tokens, length, prompt, 1.5, 0.5, 0.5)
    stale = torch.where(torch.arange(COLUMNS) < length[:, None], tokens, -999_999)
    assert torch.equal(apply_penalties(logits, stale, length, prompt, 1.5, 0.5, 0.5), expected)
    assert torch.equal(apply_penalties(logits, tokens, torch.zeros_like(length), prompt, 1.5, 0.5, 0.5), logits)


def test_prompt_tokens_are_repeated_but_not_frequent() -> None:
    logits, tokens, length, _ = case(3)
    assert torch.equal(apply_penalties(logits, tokens, length, length, frequency=2.0, presence=2.0), logits)
    assert not torch.equal(apply_penalties(logits, tokens, length, length, repetition=1.1), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_input_is_not_modified_unless_it_is_the_output(dtype: torch.dtype) -> None:
    logits, tokens, length, prompt = case(4)
    logits = logits.to(dtype)
    before = logits.clone()
    found = apply_penalties(logits, tokens, length, prompt, 1.2, 0.3, 0.1)
    assert found.dtype == torch.float32
    assert torch.equal(logits, before)
    same = logits.float()
    assert apply_penalties(same, tokens, length, prompt, 1.2, 0.3, 0.1, out=same) is same
    assert torch.equal(same, found)


def test_errors_name_what_is_allowed() -> None:
    logits, tokens, length, prompt = case(5)
    with pytest.raises(ValueError, match="repetition penalty=0 is refused: it must be finite and > 0"):
        apply_penalties(logits, tokens, length, prompt, repetition=0)
    with pytest.raises(ValueError, match="presence penalty=inf"):
        apply_penalties(logits, tokens, length, prompt, presence=torch.inf)
    with pytest.raises(ValueError, match=rf"shape \[{ROWS}, L\]"):
        apply_penalties(logits, tokens[1:], length, prompt)
    with pytest.raises(ValueError, match=rf"length must be in \[0, {COLUMNS}\], not in \[1, {COLUMNS + 1}\]"):
        apply_penalties(logits, tokens, length + 1, prompt)
    with pytest.raises(ValueError, match="out must be float32"):
        apply_penalties(logits, tokens, length, prompt, out=torch.empty(1, 1))
