"""The strategy that CONTRIBUTING.md writes out runs, in one batch with others, and does what it says."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from pagefork import LLM, RequestOutput, SamplingParams

ROOT = Path(__file__).parents[1]
PROMPTS = ["x = ", "import ", "    return ", "for i in "]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("example") / "vote.py"
    path.write_text(block)
    spec = importlib.util.spec_from_file_location("vote", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_answer_that_was_sampled_most_often_is_the_output(example: ModuleType) -> None:
    llm = LLM("demo")
    fields = {"n": 12, "temperature": 0.5, "max_tokens": 2, "seed": 3}
    both = [example.VoteParams(**fields)] * len(PROMPTS) + [SamplingParams(**fields)] * len(PROMPTS)
    outputs = llm.generate(PROMPTS * 2, both, use_tqdm=False)
    for vote, sampled in zip(outputs[: len(PROMPTS)], outputs[len(PROMPTS) :], strict=True):
        check(vote, sampled)
    llm.engine.check()
    stats = llm.engine.stats()
    assert stats.free_blocks == stats.num_blocks


def check(vote: RequestOutput, sampled: RequestOutput) -> None:
    answers = Counter(tuple(output.token_ids) for output in sampled.outputs)
    [winner] = vote.outputs
    assert answers[tuple(winner.token_ids)] == max(answers.values())
    assert winner.score == max(answers.values()) / 12
    alike = next(output for output in sampled.outputs if output.token_ids == winner.token_ids)
    assert winner.cumulative_logprob == alike.cumulative_logprob
