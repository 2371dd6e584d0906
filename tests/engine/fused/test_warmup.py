"""Warming up launches kernels of the configurations that are compiled ahead of time, and an engine does not tell afterwards."""

from __future__ import annotations

from pathlib import Path

import torch
from support.checkpoints import make_checkpoint

from pagefork import LLM, BeamSearchParams, RequestOutput, SamplingParams
from pagefork.scheduler.params import CommonParams
from pagefork.warmup import warm_up

PARAMS: list[CommonParams] = [
    SamplingParams(max_tokens=3, temperature=0.9, top_p=0.9, seed=3, repetition_penalty=1.2),
    BeamSearchParams(beam_width=2, max_tokens=3),
]


def test_warming_up_launches_what_is_compiled_and_leaves_nothing_behind(device: torch.device, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, vocab_size=130, num_hidden_layers=1)

    def engine() -> LLM:
        return LLM(str(tmp_path), device=device.type, num_blocks=24, max_num_seqs=3, max_num_batched_tokens=12)

    def generated(llm: LLM) -> list[RequestOutput]:
        return llm.generate([[5, 6, 7], [8, 9]], PARAMS, use_tqdm=False)

    warmed = engine()
    built = warmed.engine._built
    warm_up(built.runner, built.cache, warmed.engine.config, built.max_model_len)
    marks = built.runner._sampler._state.marks
    assert marks is not None and (marks.row == -1).all()
    found, expected = ([[one.token_ids for one in output.outputs] for output in generated(llm)] for llm in (warmed, engine()))
    assert found == expected
    warmed.engine.check()
