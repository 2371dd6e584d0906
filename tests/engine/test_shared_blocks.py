"""What the sequences of a request share is held once: the blocks in use are those of the tree of its tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.strategies import PROMPTS, STRATEGIES

from pagefork import LLM, BeamSearchParams, EngineConfig, LLMEngine, SamplingParams

SIZE = 4


def distinct(engine: LLMEngine) -> tuple[int, int]:
    """Full blocks of the tree of all live sequences' tokens, by what they and all before them hold; and begun blocks at most."""
    scheduler = engine._scheduler
    table = scheduler.kv.table
    full: set[bytes] = set()
    begun = 0
    for group in scheduler.residents.running.values():
        for seq in table.of(group.number).tolist():
            computed = int(table.computed[seq])
            tokens = group.history(seq, 0, computed).tobytes()
            full |= {tokens[: 4 * SIZE * (block + 1)] for block in range(computed // SIZE)}
            begun += computed % SIZE > 0
    return len(full), begun


@pytest.mark.parametrize("name", STRATEGIES)
def test_blocks_in_use_are_the_distinct_blocks_of_the_tree(name: str) -> None:
    engine = LLMEngine(EngineConfig(model="demo", dtype="float32", block_size=SIZE, num_blocks=800))
    engine.add_request("a", PROMPTS[0], STRATEGIES[name]())
    most = 0
    while engine.has_unfinished_requests():
        engine.step()
        stats = engine.stats()
        used = stats.num_blocks - stats.free_blocks
        full, begun = distinct(engine)
        assert full <= used <= full + begun
        most = max(most, used)
    assert most and engine.stats().free_blocks == stats.num_blocks


def test_the_best_of_8_hold_a_prompt_of_2048_tokens_once(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", max_position_embeddings=4096)
    llm = LLM(str(tmp_path), num_blocks=400, block_size=16)
    prompt = [3 + i * 7919 % 90 for i in range(2048)]
    llm.engine.add_request("a", prompt, SamplingParams(best_of=8, max_tokens=40, ignore_eos=True, seed=1))
    while llm.engine.has_unfinished_requests():
        [*outputs] = llm.engine.step()
        stats = llm.engine.stats()
        assert stats.num_blocks - stats.free_blocks <= 2048 // 16 + 8 * 3
    assert outputs[-1].metrics.blocks_copied == 0, "the prompt ends with a full block, which is never copied"
    assert outputs[-1].metrics.shared_block_ratio > 0.8


def test_live_sequences_are_those_of_running_groups() -> None:
    engine = LLMEngine(EngineConfig(model="demo", num_blocks=100, max_num_seqs=4))
    engine.add_request("a", "def f(", SamplingParams(n=3, max_tokens=4, ignore_eos=True, seed=1))
    engine.add_request("b", "def f(", BeamSearchParams(beam_width=4, max_tokens=4, ignore_eos=True))
    seen = [engine.stats().live_sequences]
    while engine.has_unfinished_requests():
        engine.step()
        seen.append(engine.stats().live_sequences)
    assert [count for count, before in zip(seen, [None, *seen], strict=False) if count != before] == [0, 3, 0, 4, 0]
