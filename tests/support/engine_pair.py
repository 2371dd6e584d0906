"""Two engines of which one reads logits by the fused kernels and one in torch: what both generate must be the same.

The layers of both run in torch: tests of read-outs need not wait for those in the interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from pagefork import LLM, CompletionOutput, RequestOutput
from pagefork.scheduler.params import CommonParams
from support.kernels import torch_layers, torch_reads


class Pair:
    """Two engines on one device."""

    def __init__(self, device: torch.device, **settings: Any) -> None:
        settings = {"dtype": "float32", "num_blocks": 200, "max_num_seqs": 40, "device": device.type, **settings}
        settings["cuda_graphs"] = False
        with torch_layers():
            self.fused = LLM("demo", **settings)
            with torch_reads():
                self.torch = LLM("demo", **settings)

    def agree(self, prompts: Sequence[str], params: Sequence[CommonParams]) -> list[RequestOutput]:
        """What both generate, the same to the token."""
        with torch_layers():
            found, expected = (llm.generate(list(prompts), list(params), use_tqdm=False) for llm in (self.fused, self.torch))
        for one, other in zip(found, expected, strict=True):
            assert one.error is None and other.error is None
            assert [shown(output) for output in one.outputs] == [shown(output) for output in other.outputs]
            for output, same in zip(one.outputs, other.outputs, strict=True):
                assert_close(output.logprobs, same.logprobs)
            assert_close(one.prompt_logprobs, other.prompt_logprobs)
        return found


def shown(output: CompletionOutput) -> tuple[list[int], str, str | None]:
    return output.token_ids, output.text, output.finish_reason


def assert_close(found: Sequence[Any] | None, expected: Sequence[Any] | None) -> None:
    """Per position, the log-probs of tokens: the same tokens in the same order, and ranks."""
    assert (found is None) == (expected is None)
    for one, other in zip(found or (), expected or (), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert [(token, entry.rank) for token, entry in one.items()] == [
                (token, entry.rank) for token, entry in other.items()
            ]
            pairs = zip(one.values(), other.values(), strict=True)
            assert all(math.isclose(a.logprob, b.logprob, rel_tol=0, abs_tol=2e-5) for a, b in pairs)
