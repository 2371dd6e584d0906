"""Which causal language models of the installed transformers does Pagefork serve, and are their tokens the same?

Every architecture of MODEL_FOR_CAUSAL_LM_MAPPING_NAMES gets a small config, random weights and a checkpoint, which
Pagefork loads with model_impl="transformers". Greedy tokens of several prompts in one batch, computed in chunks of 16
tokens over the paged cache, are compared with those of `generate` in float32. The outcomes:

    equal            served; all tokens are those of `generate`
    differs          served with other tokens
    refused          not served; the reason is Pagefork's message
    failed           loading or generating crashed, took too long or raised something else
    no small config  transformers does not build the architecture from sizes that are merely small

    python benchmarks/architectures.py [NAME ...] [--jobs 2] [--time-limit 60]

Without names it takes all of them and writes a JSON. An architecture has a process of its own.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pagefork import LLM, SamplingParams
from pagefork.scheduler.errors import ModelError

sys.path.insert(0, str(Path(__file__).parent))
from shared import ROOT, facts

FORKS = multiprocessing.get_context("forkserver")
OUTCOMES = ("equal", "differs", "refused", "failed", "no small config")
LENGTHS = (1, 15, 17, 100)
TOKENS = 12
CHUNK = 16
VOCABULARY = 331
MOST_PARAMETERS = 20_000_000  # a model with more has sizes that SIZES does not name
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers")
# What attributes of a config become; those that it lacks or leaves open (None) mostly stay as they are.
SIZES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    512: "max_position_embeddings n_positions n_ctx max_seq_len",
    96: "intermediate_size intermediate_size_mlp dense_intermediate_size feed_forward_size ffn_dim decoder_ffn_dim "
    "encoder_ffn_dim d_inner dim_ff",
    64: "hidden_size n_embd d_model emb_dim embedding_size word_embed_proj_dim attention_hidden_size lru_width",
    48: "moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size ffn_hidden_size",
    40: "sliding_window",
    32: "q_lora_rank kv_lora_rank qk_head_dim mamba_d_head index_head_dim",
    16: "head_dim attention_head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim "
    "kv_channels state_size mamba_d_state",
    8: "hidden_size_per_layer_input laurel_rank rotary_dim",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads linear_num_value_heads mamba_n_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts",
    2: "num_key_value_heads kv_n_heads linear_num_key_heads index_n_heads encoder_layers num_encoder_layers "
    "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k n_group eos_token_id sep_token_id",
    1: "bos_token_id decoder_start_token_id n_shared_experts topk_group first_k_dense_replace max_window_layers mamba_n_groups",
    0: "pad_token_id num_nextn_predict_layers",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
WINDOWED = ["sliding_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What SIZES does not make small, and defaults that leave open what the architecture needs.
OVERRIDES: dict[str, dict[str, Any]] = {
    "CohereCompassForCausalLM": {"layer_types": WINDOWED, "rope_parameters": dict.fromkeys(WINDOWED, ROPE)},
    "DbrxForCausalLM": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2},
    "Dots1ForCausalLM": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 128},
    "Gemma4ForCausalLM": {"global_head_dim": 32, "num_kv_shared_layers": 2},
    "Gemma4UnifiedForCausalLM": {"global_head_dim": 32},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "window_size": 40},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"head_dim": 32},
    "MiniMaxM3VLForCausalLM": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "MoshiForCausalLM": {"sliding_window": 512},  # it has a window in its cache alone, as long as its longest sequence
    "ReformerModelWithLMHead": {"axial_pos_embds": False},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}


def small_settings(config: PretrainedConfig) -> dict[str, Any]:
    """What makes a config of this class small: two layers of every kind that it has, sizes from SMALL."""
    given = config.to_dict()
    settings: dict[str, Any] = {name: value for name, value in SMALL.items() if given.get(name) is not None}
    if "head_dim" in given:
        settings["head_dim"] = SMALL["head_dim"]
    if "num_key_value_heads" in given and given["num_key_value_heads"] in (None, given.get("num_attention_heads")):
        settings["num_key_value_heads"] = SMALL["num_attention_heads"]
    layers = next((name for name in LAYERS if isinstance(given.get(name), int)), None)
    if layers:
        lists = {
            name: value
            for name, value in given.items()
            if isinstance(value, list) and len(value) == given[layers] and len(set(value)) < len(value)
        }  # of a value for each layer; those without repetition hold numbers of layers
        kinds = list(dict.fromkeys(zip(*lists.values(), strict=True))) or [()]
        settings[layers] = 2 * len(kinds)
        for name, values in zip(lists, zip(*kinds, strict=True), strict=True):
            settings[name] = [SMALL.get(name, value) for value in values * 2]
        if given.get("num_kv_shared_layers"):
            settings["num_kv_shared_layers"] = len(kinds)
    for name in type(config).sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            settings[name] = {"model_type": part.model_type} | small_settings(part)
    return settings


def make_model(name: str) -> PreTrainedModel:
    """The architecture in small, with random weights far from their neutral values."""
    architecture = getattr(transformers, name)
    settings = small_settings(architecture.config_class()) | OVERRIDES.get(name, {})
    config = architecture.config_class(**settings)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in architecture(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"{parameters} parameters remain")
    torch.manual_seed(0)
    model: PreTrainedModel = architecture(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.2)
            else:
                weight.add_(0.1 * torch.randn_like(weight))
    return model


def generated(model: Any, prompt: list[int]) -> list[int]:
    """The tokens of transformers."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "pad_token_id": 0}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return list(map(int, output[0, len(prompt) :]))


def outcome_of(name: str) -> tuple[str, str | None]:
    """The outcome and its reason."""
    with tempfile.TemporaryDirectory() as path:
        try:
            model = make_model(name)
            model.save_pretrained(path)
        except Exception as error:  # noqa: BLE001 - whatever it raises is the outcome
            return "no small config", reason_of(error)
        try:
            llm = LLM(
                path, model_impl="transformers", dtype="float32", num_blocks=100, max_num_batched_tokens=CHUNK, num_threads=1
            )
        except ModelError as error:
            return "refused", str(error).replace(path, "the checkpoint")
        draw = np.random.default_rng(0)
        prompts = [draw.integers(3, VOCABULARY, length).tolist() for length in LENGTHS]
        params = SamplingParams(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS)
        found = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
        model.set_attn_implementation("eager")
        expected = [generated(model, prompt) for prompt in prompts]
        if found == expected:
            return "equal", None
        return "differs", f"prompts of {LENGTHS} tokens: {found} instead of {expected}"


def reason_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def answer(name: str, results: Connection) -> None:
    """Sends the outcome of one architecture; runs in a process of its own."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        results.send(outcome_of(name))
    except Exception as error:  # noqa: BLE001 - likewise
        results.send(("failed", reason_of(error)))


def ask(name: str, time_limit: float) -> tuple[str, str | None]:
    """The outcome of one architecture, whatever happens to its process."""
    receiving, sending = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=answer, args=(name, sending), daemon=True)
    process.start()
    sending.close()
    try:
        if receiving.poll(time_limit):
            outcome: tuple[str, str | None] = receiving.recv()
            process.join(5)
            return outcome
        return "failed", f"no answer in {time_limit:g} s"
    except EOFError:
        process.join()
        return "failed", f"the process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def outcomes(names: list[str], jobs: int, time_limit: float) -> Iterator[tuple[str, dict[str, str]]]:
    FORKS.set_forkserver_preload(["__main__", "pagefork.models.backed"])
    with ThreadPoolExecutor(jobs) as pool:
        for name, (outcome, reason) in zip(names, pool.map(lambda name: ask(name, time_limit), names), strict=True):
            print(f"{name:<40} {outcome:<16} {(reason or '')[:120]}", flush=True)
            yield name, {"outcome": outcome, **({"reason": reason} if reason else {})}


def main() -> None:
    every = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures to try without writing a file; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--time-limit", type=float, default=60, help="seconds for one architecture")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/architectures.json")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(every)):
        parser.error(f"no causal language model of transformers {transformers.__version__}: {', '.join(unknown)}")
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")

    start = time.perf_counter()
    architectures = dict(outcomes(args.names or every, args.jobs, args.time_limit))
    seconds = time.perf_counter() - start
    counts = collections.Counter(entry["outcome"] for entry in architectures.values())
    print(f"\n{len(architectures)} architectures in {seconds:.0f} s")
    for outcome in OUTCOMES:
        print(f"{outcome:<16} {counts[outcome]:4}")
    if args.names:
        return
    result = {
        **facts(),
        "seconds": round(seconds),
        "counts": {outcome: counts[outcome] for outcome in OUTCOMES},
        "architectures": architectures,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
