"""OpenVINO GenAI's continuous batching."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
from peers.checkpoint import with_tokenizer
from peers.protocol import TOP_K, TOP_P, Load, converted, versions

CACHE = 2  # GiB of keys and values
BATCH = 2048  # tokens of a step


class OpenVino:
    """A pipeline of one precision; a variant like `int8-bf16` names that of the weights first."""

    def __init__(self, path: Path, precision: str) -> None:
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.cache_size, scheduling.max_num_batched_tokens, scheduling.max_num_seqs = CACHE, BATCH, 256
        scheduling.dynamic_split_fuse, scheduling.enable_prefix_caching = True, False
        hints = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(path), scheduling, "CPU", hints)
        self.settings = f"precision hint and KV cache {precision}, top_k {TOP_K} beside top_p, batch {BATCH}"

    def prepare(self, load: Load) -> Callable[[], int]:
        prompts = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in load.token_ids()]
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = load.output
        if load.beam is None:
            config.ignore_eos = True
            config.do_sample, config.top_p, config.top_k = True, TOP_P, TOP_K
        else:  # which takes no ignore_eos
            config.set_eos_token_id(0)
            config.min_new_tokens = load.output
            config.num_beams, config.num_return_sequences = load.beam, 1

        def run() -> int:
            results = self._pipeline.generate(prompts, [config] * len(prompts))
            return sum(len(result.m_generation_ids[0]) for result in results)

        return run


def convert(model: Path, weights: str, folder: Path, path: Path) -> None:
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig, OVWeightQuantizationConfig

    given = OVConfig(dtype="fp16")
    if weights == "int8":
        given = OVConfig(quantization_config=OVWeightQuantizationConfig(bits=8))
    main_export(str(with_tokenizer(model, folder)), path, task="text-generation-with-past", ov_config=given)


def start(model: Path, variant: str, folder: Path) -> tuple[OpenVino, dict[str, str]]:
    weights, precision = variant.split("-") if "-" in variant else ("fp16", variant)
    path = converted(folder, f"openvino-{weights}", lambda draft: convert(model, weights, folder, draft))
    return OpenVino(path, precision), versions("openvino", "openvino-genai", "optimum-intel")
