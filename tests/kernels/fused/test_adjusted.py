"""Adjusted values are those of the pipeline by the book, bit by bit, and records of groups are those of adjusted rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import logits as book
from support.adjusting import entries, values
from support.sampling import random_spec

from pagefork.kernels import adjusted_stats as module
from pagefork.kernels.adjusted import adjusted_rows
from pagefork.kernels.adjusted_stats import adjust_stats
from pagefork.kernels.distribution import Scale
from pagefork.kernels.entries import ENTRY, Entry
from pagefork.kernels.group_stats import GroupStats, group_stats
from pagefork.kernels.token_cells import State
from pagefork.kernels.token_table import TokenTable, mark, new_table

VOCAB = 97


def marked(specs: list[dict[str, Any]], histories: list[list[int]], vocab: int, device: torch.device) -> TokenTable:
    """A table with what the specs list and the histories hold; n-grams and words by the book."""
    table = new_table(len(specs), 256, vocab, device)
    marks = list[tuple[int, int, int, float, int]]()
    for slot, (spec, history) in enumerate(zip(specs, histories, strict=True)):
        marks += [(slot, token, State.END, 0, 0) for token in spec.get("end_ids", ())]
        marks += [(slot, token, State.ALLOWED, 0, 0) for token in spec.get("allowed_ids") or ()]
        marks += [(slot, token, State.PROMPT, 0, 0) for token in history[: spec["prompt_len"]]]
        marks += [(slot, token, 1, 0, 0) for token in history[spec["prompt_len"] :]]
        marks += [(slot, token, 0, bias, 0) for token, bias in spec.get("logit_bias", ())]
        passing = {name: value for name, value in spec.items() if name in ("bad_words", "no_repeat_ngram_size")}
        marks += [(slot, token, 0, 0, len(history)) for token in book.banned(history, vocab, 0, passing)]
    types = (np.int32, np.int64, np.int32, np.float32, np.int32)
    columns = (np.array(column, kind) for column, kind in zip(zip(*marks, strict=True), types, strict=True))
    mark(table, *(torch.from_numpy(column).to(device) for column in columns))
    return table


CASES: dict[str, dict[str, Any]] = {
    "prompt and output": {"repetition_penalty": 1.3},
    "output only": {"frequency_penalty": 0.3, "presence_penalty": 0.7},
    "all penalties": {"repetition_penalty": 0.7, "frequency_penalty": -0.3, "presence_penalty": 0.1},
    "prompt only": {"repetition_penalty": 1.3, "frequency_penalty": 0.3, "prompt_len": 12},
    "bias on penalised tokens": {"repetition_penalty": 1.7, "logit_bias": ((1, 3.3), (2, -4.1), (96, 100.0))},
    "bias alone": {"logit_bias": ((0, 3.3), (64, -4.1))},
    "allowed": {"allowed_ids": (1, 3, 70), "repetition_penalty": 1.2, "logit_bias": ((3, 1.0), (4, 2.0))},
    "no end yet": {"min_tokens": 9, "end_ids": (0, 65)},
    "an end is due": {"min_tokens": 8, "end_ids": (0, 65), "presence_penalty": 0.5},
    "n-grams": {"no_repeat_ngram_size": 2, "frequency_penalty": 0.5},
    "words": {"bad_words": ((4,), (1, 5), (2, 1, 6))},
    "nothing": {},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_the_book(dtype: torch.dtype, device: torch.device) -> None:
    rng = np.random.default_rng(3)
    specs = [{"prompt_len": 4, **spec} for spec in CASES.values()]
    histories = [[*rng.integers(0, 6, 9).tolist(), 80, 2, 1] for _ in specs]
    logits = (3 * torch.randn(len(specs), VOCAB, generator=torch.Generator().manual_seed(1))).to(device, dtype)
    given = entries(specs, range(len(specs)), [len(history) for history in histories], device)
    found = values(logits, given, marked(specs, histories, VOCAB, device))
    for p, (spec, history) in enumerate(zip(specs, histories, strict=True)):
        expected = book.adjusted(logits[p].float().cpu().numpy(), history, spec["prompt_len"], spec)
        assert (found[p].cpu().numpy() == expected).all(), list(CASES)[p]


@pytest.mark.parametrize("seed", range(3))
def test_random_mixtures_are_those_of_the_book_and_of_the_reference(seed: int, device: torch.device) -> None:
    rng = np.random.default_rng(seed)
    histories = [rng.integers(0, 6, rng.integers(1, 15)).tolist() for _ in range(12)]
    specs = [random_spec(rng, history) for history in histories]
    logits = torch.from_numpy(3 * rng.normal(size=(12, VOCAB)).astype(np.float32))
    table = marked(specs, histories, VOCAB, device)
    given = entries(specs, range(12), [len(history) for history in histories], device)
    found = values(logits.to(device), given, table).cpu()
    for p, (spec, history) in enumerate(zip(specs, histories, strict=True)):
        assert (found[p].numpy() == book.adjusted(logits[p].numpy(), history, spec["prompt_len"], spec)).all(), spec
    assert torch.equal(found, adjusted_rows(logits, given.cpu(), TokenTable(*(part.cpu() for part in table))))


def crowd(vocab: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, TokenTable]:
    """Logits, entries and a table with up to some hundred tokens in a slot; entry 2 is not adjusted."""
    rng = np.random.default_rng(vocab)
    histories = [rng.integers(0, vocab, size).tolist() for size in (1, 100, 60, 7, 40)]
    shared = {"prompt_len": 1, "repetition_penalty": 1.4, "frequency_penalty": 0.6, "presence_penalty": -0.4}
    specs: list[dict[str, Any]] = [{**shared, "temperature": 0.5 + p / 4} for p in range(5)]
    specs[3]["allowed_ids"] = tuple(rng.integers(0, vocab, 40).tolist())
    logits = (5 * torch.randn(4, vocab, generator=torch.Generator().manual_seed(vocab))).to(device, torch.bfloat16)
    logits[1, : vocab // 2] = -torch.inf
    given = entries(specs, range(5), [len(history) for history in histories], device, [0, 1, 2, 3, 0])
    given[2, ENTRY.fields["flags"][1] // 4] &= ~int(Entry.ADJUSTED)  # type: ignore[index]
    return logits, given, marked(specs, histories, vocab, device)


def alike(found: GroupStats, expected: GroupStats) -> bool:
    """The same but for the last bits of exp."""
    return torch.equal(found.top, expected.top) and bool(((found.mass - expected.mass).abs() <= 64).all())


@pytest.mark.parametrize("direct", [0, module.DIRECT])
@pytest.mark.parametrize("vocab", [1, 64, 65, 999])
def test_records_are_those_of_adjusted_rows(
    vocab: int, direct: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DIRECT", direct)
    logits, given, table = crowd(vocab, device)
    found = group_stats(logits, given, True)
    before = GroupStats(*(part.clone() for part in found))
    adjust_stats(found, logits, given, table)
    adjusted = adjusted_rows(logits.float().cpu()[[0, 1, 2, 3, 0]], given.cpu(), TokenTable(*(part.cpu() for part in table)))
    rows = given.clone()
    rows[:, 0] = torch.arange(5)
    rows[:, 1] = int(Entry.OWN)
    expected = group_stats(adjusted.to(device), rows, True)
    assert torch.equal(found.top[0], before.top[0]) and torch.equal(found.mass[0], before.mass[0])
    assert alike(GroupStats(found.top[1:], found.mass[1:]), GroupStats(expected.top[1:], expected.mass[1:]))


def test_no_bound_no_batch_and_no_pass_over_cells_changes_a_record(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, given, table = crowd(1500, device)
    together, through_cells = (group_stats(logits, given, True) for _ in range(2))
    adjust_stats(together, logits, given, table)
    monkeypatch.setattr(module, "DIRECT", 0)
    adjust_stats(through_cells, logits, given, table)
    monkeypatch.undo()
    assert all(torch.equal(one, other) for one, other in zip(together, through_cells, strict=True))
    most = int(table.touched_count.max())
    for p in range(5):
        alone = group_stats(logits, given[p : p + 1], True)
        adjust_stats(alone, logits, given[p : p + 1], table, most=most)
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(one[:, 0], all_of_them[:, p])
    assert most > 2 * module.TILE


def test_tops_of_adjusted_log_probs_stand_where_the_table_touches(device: torch.device) -> None:
    logits, given, table = crowd(999, device)
    model = torch.log_softmax(logits.double(), -1)[[0, 1, 2, 3, 0]]
    top = logits[[0, 1, 2, 3, 0]].amax(-1).float()
    scale = Scale(top > 0, top, torch.ones_like(top), model.amax(-1), top)
    found = group_stats(logits, given, True)
    before = GroupStats(*(part.clone() for part in found))
    adjust_stats(found, logits, given, table, log_probs=scale)
    rows = values(logits, given, table, scale)
    expected = torch.nn.functional.pad(rows, (0, -999 % 64), value=-torch.inf).view(5, -1, 64).amax(-1)
    touched = torch.zeros(5, 16, dtype=torch.bool, device=device)
    for p in (0, 1, 3, 4):
        touched[p, table.touched[p, : int(table.touched_count[p])].long()] = True
    assert torch.equal(found.top[1], torch.where(touched, expected, before.top[1]))
    assert torch.equal(found.mass, before.mass) and torch.equal(found.top[0], before.top[0])
    cpu = TokenTable(*(part.cpu() for part in table))
    # Log-probs are those of the model, rounded once, before anything applies.
    assert torch.equal(
        rows.cpu(),
        adjusted_rows(
            ((logits.float()[[0, 1, 2, 3, 0]] - top[:, None]).double() + scale.log_scale[:, None]).float().cpu(), given.cpu(), cpu
        ),
    )


def test_a_group_that_many_cells_change_is_listed_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of a group lie anywhere: several programs raise it, and lower other tokens of it in between."""
    rng = np.random.default_rng(2)
    vocab, groups = 1024, 16
    logits = torch.from_numpy(rng.normal(size=(1, vocab)).astype(np.float32)).to(device)
    bias = np.full(vocab, -1.0, np.float32)
    bias[np.arange(groups).repeat(4) * 64 + rng.integers(0, 64, 4 * groups)] = 9.0
    table = new_table(1, 4 * module.BLOCK, vocab, device)
    token = torch.from_numpy(np.union1d(np.flatnonzero(bias > 0), np.arange(0, vocab, 5)).astype(np.int32)).to(device)
    slot = torch.zeros_like(token)
    mark(table, slot, token, slot, torch.from_numpy(bias).to(device)[token.long()])
    given = entries([{"prompt_len": 0, "temperature": 0.7}], [0], [1], device)
    found, through_cells = (group_stats(logits, given, True) for _ in range(2))
    adjust_stats(found, logits, given, table)
    monkeypatch.setattr(module, "DIRECT", 0)
    adjust_stats(through_cells, logits, given, table)
    assert all(torch.equal(one, other) for one, other in zip(found, through_cells, strict=True))


@pytest.mark.parametrize("direct", [0, module.DIRECT])
@pytest.mark.parametrize("bias", [1.0, -1.0])
def test_a_bad_row_stays_bad_whatever_is_banned(
    bias: float, direct: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is bad by a token that is banned, one by a token that is biased, one by a neighbour of either."""
    monkeypatch.setattr(module, "DIRECT", direct)
    logits = torch.zeros(6, VOCAB, device=device)
    bad = torch.tensor([70, 71, 72]).repeat(2)
    logits[torch.arange(6), bad] = torch.tensor([torch.nan, torch.inf], device=device).repeat_interleave(3)
    specs: list[dict[str, Any]] = [{"prompt_len": 1, "bad_words": ((70,),), "logit_bias": ((71, bias),)}] * 6
    given = entries(specs, range(6), [1] * 6, device)
    found = group_stats(logits, given, True)
    assert (found.top[0].amax(-1) == torch.inf).all()
    expected = GroupStats(*(part.clone().cpu() for part in found))
    table = marked(specs, [[5]] * 6, VOCAB, device)
    adjust_stats(found, logits, given, table)
    assert torch.equal(found.top[1].cpu(), torch.tensor([[0.0, torch.inf]]).expand(6, 2))
    module._reference(expected, logits.cpu(), given.cpu(), TokenTable(*(part.cpu() for part in table)), None)
    assert torch.equal(found.top.cpu(), expected.top)


def test_tokens_are_found_round_the_end_of_the_table(device: torch.device) -> None:
    """Seven whose search begins at the last but one of 16 cells."""
    vocab = 500
    tokens = [token for token in range(vocab) if (token * 2654435769 % 2**32) * 16 >> 32 == 14][:7]
    table = new_table(1, 16, vocab, device)
    token = torch.tensor(tokens, dtype=torch.int32, device=device)
    slot = torch.zeros_like(token)
    mark(table, slot, token, slot, token.float() + 1)
    given = entries([{"prompt_len": 0}], [0], [1], device)
    found = values(torch.zeros(1, vocab, device=device), given, table)
    expected = torch.zeros(1, vocab)
    expected[0, tokens] = torch.tensor(tokens) + 1.0
    assert torch.equal(found.cpu(), expected)


def test_wrong_shapes_are_refused(device: torch.device) -> None:
    logits, given, table = crowd(999, device)
    with pytest.raises(ValueError, match="records and table"):
        adjust_stats(group_stats(logits, given, False), logits, given, table)
    with pytest.raises(ValueError, match="records and table"):
        adjust_stats(group_stats(logits, given, True), logits, given, new_table(5, 16, 64, device))
