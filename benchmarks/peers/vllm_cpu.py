"""vLLM's build for CPUs, in one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from ctypes.util import find_library
from pathlib import Path
from typing import Any

from peers.checkpoint import with_tokenizer
from peers.protocol import TOP_P, Load, versions

LENGTH = 512  # most tokens of a sequence


def variables(prefix: Path) -> dict[str, str]:
    """What its process wants to find at its start, in an environment at `prefix`; libraries are loaded before all others."""
    wanted = [find_library("tcmalloc_minimal"), prefix / "lib/libiomp5.so"]
    return {
        "LD_PRELOAD": ":".join(str(library) for library in wanted if library),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_AOT_COMPILE": "0",  # what it compiles is then found again at the next start
        "VLLM_NO_USAGE_STATS": "1",
    }


class Vllm:
    """An engine in bfloat16, compiled."""

    def __init__(self, model: Path, note: str) -> None:
        from vllm import LLM

        self._llm = LLM(
            model=str(model),
            dtype="bfloat16",
            max_model_len=LENGTH,
            max_num_batched_tokens=2048,
            enable_prefix_caching=True,  # its beam search sends each beam again in every step
            max_logprobs=64,
        )
        self.settings = f"bfloat16, compiled, {note}"

    def prepare(self, load: Load) -> Callable[[], int]:
        from vllm import SamplingParams
        from vllm.sampling_params import BeamSearchParams

        prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in load.token_ids()]
        if load.beam is not None:
            search = BeamSearchParams(beam_width=load.beam, max_tokens=load.output, ignore_eos=True)

            def beams() -> int:
                found = self._llm.beam_search(prompts, search)
                return sum(len(output.sequences[0].tokens) - load.input for output in found)

            return beams
        params = SamplingParams(temperature=1.0, top_p=TOP_P, ignore_eos=True, max_tokens=load.output, detokenize=False)

        def run() -> int:
            return sum(len(output.outputs[0].token_ids) for output in self._llm.generate(prompts, params, use_tqdm=False))

        return run


def start(model: Path, variant: str, folder: Path) -> tuple[Vllm, dict[str, str]]:
    mapped = Path("/proc/self/maps").read_text()
    note = ", ".join(f"{'with' if name in mapped else 'WITHOUT'} {name}" for name in ("tcmalloc", "libiomp5"))
    return Vllm(with_tokenizer(model, folder), note), versions("vllm-cpu", "torch")
