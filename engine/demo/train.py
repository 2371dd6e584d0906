"""Train the demo model: a small Llama-architecture language model of Python source code.

The corpus is the standard library of the CPython that runs this script (PSF-2.0 licence), so the
recipe needs no download. It writes a Hugging Face checkpoint (config.json, model.safetensors in
bfloat16, tokenizer.json, generation_config.json) and prints the held-out loss in nats per token.

    python train.py OUT_DIR [--minutes 80]

Needs torch, transformers, tokenizers and safetensors. About 80 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SKIP = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo"}
END = "<|endoftext|>"
VOCAB, CONTEXT, BATCH = 4096, 1024, 4
PEAK_RATE, WARM_UP_STEPS = 3e-3, 50


def sources() -> list[str]:
    """Texts of the standard library's modules, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not SKIP & set(p.relative_to(root).parts))
    return [p.read_text(errors="ignore") for p in files]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, bos_token=END, pad_token=END)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents in one row [tokens], each after an end-of-text token."""
    end = tokenizer.eos_token_id
    return torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in [end, *ids]])


def new_model(end: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def new_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW; norms (one-dimensional parameters) are not decayed."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Mean loss in nats per token over the first 32 contexts of `ids`."""
    model.eval()
    rows = ids[: 32 * CONTEXT].view(-1, CONTEXT)
    total = 0.0
    for row in rows.split(8):
        with torch.autocast("cpu", torch.bfloat16):
            total += model(input_ids=row, labels=row).loss.item() * len(row)
    model.train()
    return total / len(rows)


def train(model: LlamaForCausalLM, train_ids: torch.Tensor, test_ids: torch.Tensor, minutes: float) -> int:
    """Train until the time is up; the learning rate follows the clock. Returns the number of steps."""
    optimizer = new_optimizer(model)
    start, step = time.monotonic(), 0
    while (used := (time.monotonic() - start) / (60 * minutes)) < 1:
        rate = PEAK_RATE * min(1, (step + 1) / WARM_UP_STEPS) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * used)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        at = torch.randint(len(train_ids) - CONTEXT, (BATCH,))
        batch = torch.stack([train_ids[i : i + CONTEXT] for i in at])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 200 == 0:
            held_out = held_out_loss(model, test_ids)
            print(f"step {step}  {used:.0%}  train {loss.item():.3f}  held out {held_out:.3f}", flush=True)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where to write the checkpoint")
    parser.add_argument("--minutes", type=float, default=80, help="how long to train (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)

    texts = sources()
    tokenizer = train_tokenizer(texts)
    held_out = encode(tokenizer, texts[::20])
    learn = encode(tokenizer, [text for i, text in enumerate(texts) if i % 20])
    print(f"{len(texts)} files, {len(learn):,} training tokens, {len(held_out):,} held out", flush=True)

    model = new_model(tokenizer.eos_token_id)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    steps = train(model, learn, held_out, args.minutes)
    print(f"held-out loss {held_out_loss(model, held_out):.4f} nats per token after {steps} steps")
    model.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
