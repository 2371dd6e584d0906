"""Records what transformers 4.55.4 generates by contrastive search and by group beam search, into hf4.json beside this file.

It needs an environment of its own (Python 3.11): pip install transformers==4.55.4 torch. Run from the repository's root:

    PYTHONPATH=tests python tests/data/record_hf4.py

Models are small and random, or the demo model in float32. Every record has the arguments of `generate`, the prompt, and the
tokens after it; for contrastive search also the smallest distance between the best two scores of each token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from support.recorded import CONFIG, MODELS, PATH, digest, fill
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import utils

DEMO = Path(__file__).parents[2] / "engine" / "demo"
TEXTS = ["def f(", "import os\n", "class Queue:\n    def __init__(self", "for x in range(10):\n", '"""Reads a file', "x = "]
LENGTHS = (1, 5, 17, 40, 90)
CONTRASTIVE: list[dict[str, Any]] = [
    {"penalty_alpha": 0.6, "top_k": 5, "max_new_tokens": 40},
    {"penalty_alpha": 0.3, "top_k": 4, "max_new_tokens": 24},
    {"penalty_alpha": 0.1, "top_k": 8, "max_new_tokens": 24},
    {"penalty_alpha": 0.9, "top_k": 2, "max_new_tokens": 24},
    {"penalty_alpha": 0.6, "top_k": 16, "max_new_tokens": 12},
    {"penalty_alpha": 1.0, "top_k": 3, "max_new_tokens": 16},
    {"penalty_alpha": 0.6, "top_k": 5, "max_new_tokens": 1},
    {"penalty_alpha": 0.6, "top_k": 5, "max_new_tokens": 24, "repetition_penalty": 1.3},
    {"penalty_alpha": 0.2, "top_k": 4, "max_new_tokens": 24, "repetition_penalty": 0.8, "no_repeat_ngram_size": 3},
    {"penalty_alpha": 0.4, "top_k": 6, "max_new_tokens": 24, "no_repeat_ngram_size": 2},
]
BEAMS: list[dict[str, Any]] = [
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "max_new_tokens": 12},
    {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 1.0, "max_new_tokens": 12},
    {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 2.0, "max_new_tokens": 8},
    {"num_beams": 6, "num_beam_groups": 2, "diversity_penalty": 0.7, "max_new_tokens": 10, "length_penalty": 2.0},
    {"num_beams": 6, "num_beam_groups": 2, "diversity_penalty": 0.7, "max_new_tokens": 10, "length_penalty": -1.0},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "max_new_tokens": 10, "early_stopping": True},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "max_new_tokens": 12, "repetition_penalty": 1.3},
]

_gaps: list[float] = []
_rank: Any = vars(utils)["_ranking_fast"]


def _measuring(context: Any, hidden: Any, probs: Any, mask: Any, alpha: float, k: int) -> Any:
    """As what it replaces, and notes the distance between the best two scores."""
    cosine = torch.matmul(
        context / context.norm(dim=2, keepdim=True), (hidden / hidden.norm(dim=2, keepdim=True)).transpose(1, 2)
    )
    score = (1.0 - alpha) * probs.view(-1) - alpha * cosine.squeeze(-1).max(-1).values
    best = score.topk(2).values
    _gaps.append(float(best[0] - best[1]))
    return _rank(context, hidden, probs, mask, alpha, k)


def generate(model: Any, prompt: list[int], settings: dict[str, Any]) -> Any:
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **settings)


def contrastive(name: str, model: Any, prompt: list[int], settings: dict[str, Any]) -> dict[str, Any]:
    """One record. Where nothing is said of end tokens there are none: the model's own would end most runs early."""
    _gaps.clear()
    tokens = generate(model, prompt, {"eos_token_id": None, **settings})[0, len(prompt) :].tolist()
    return {"model": name, "prompt": prompt, "settings": settings, "tokens": tokens, "gap": float(f"{min(_gaps):.2e}")}


def beams(name: str, model: Any, prompt: list[int], settings: dict[str, Any]) -> dict[str, Any]:
    count = settings["num_beams"]
    found = generate(
        model, prompt, {**settings, "num_return_sequences": count, "return_dict_in_generate": True, "output_scores": True}
    )
    ends = settings.get("eos_token_id", model.config.eos_token_id)
    rows = [cut(row[len(prompt) :].tolist(), ends) for row in found.sequences]
    scores = [float(f"{score:.7g}") for score in found.sequences_scores.tolist()]
    return {"model": name, "prompt": prompt, "settings": settings, "outputs": rows, "scores": scores}


def cut(tokens: list[int], ends: int | list[int]) -> list[int]:
    """Tokens up to the first end token; what follows is padding."""
    ends = ends if isinstance(ends, list) else [ends]
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]


def models() -> dict[str, tuple[Any, list[list[int]]]]:
    """Models with their prompts."""
    found: dict[str, tuple[Any, list[list[int]]]] = {}
    for name, overrides in MODELS.items():
        model = LlamaForCausalLM(LlamaConfig(**CONFIG | overrides, rope_theta=10000.0)).eval()
        fill(model)
        rng = np.random.RandomState(len(name))
        found[name] = model, [rng.randint(3, model.config.vocab_size, length).tolist() for length in LENGTHS]
    model = LlamaForCausalLM.from_pretrained(DEMO, torch_dtype=torch.float32, rope_theta=10000.0).eval()
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    found["demo"] = model, [tokenizer.encode(text).ids for text in TEXTS]
    return found


def main() -> None:
    assert transformers.__version__ == "4.55.4", transformers.__version__
    vars(utils)["_ranking_fast"] = _measuring
    torch.set_num_threads(1)
    recorded: dict[str, Any] = {"transformers": transformers.__version__, "digests": {}, "contrastive": [], "beams": []}
    for name, (model, prompts) in models().items():
        recorded["digests"][name] = digest(model)
        for i, settings in enumerate(CONTRASTIVE):
            for prompt in prompts[i % 2 :: 2]:
                record = contrastive(name, model, prompt, settings)
                recorded["contrastive"].append(record)
                if len(record["tokens"]) < 20:
                    continue
                end = record["tokens"][9]  # so that it ends early, or has to go on where it would
                for more in ({}, {"min_new_tokens": 14}):
                    recorded["contrastive"].append(contrastive(name, model, prompt, {**settings, "eos_token_id": end, **more}))
        for i, settings in enumerate(BEAMS):
            for prompt in prompts[i % 2 :: 2]:
                record = beams(name, model, prompt, settings)
                ends = [row[len(row) // 2] for row in (record["outputs"][0], record["outputs"][-1])]  # so that beams end early
                more = [beams(name, model, prompt, {**settings, "eos_token_id": end}) for end in (ends[0], ends)]
                recorded["beams"] += [record, *more]
    lines = [
        f" {json.dumps(key)}: [\n"
        + ",\n".join("  " + json.dumps(record, separators=(",", ":")) for record in recorded[key])
        + "\n ]"
        for key in ("contrastive", "beams")
    ]
    head = ",\n".join(f" {json.dumps(key)}: {json.dumps(recorded[key])}" for key in ("transformers", "digests"))
    PATH.write_text("{\n" + ",\n".join([head, *lines]) + "\n}\n")


main()
