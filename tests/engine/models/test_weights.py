"""Checkpoints are loaded whole or refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import edit_json, make_checkpoint
from support.feeding import Feeder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pagefork.models.registry import load_model, load_outline
from pagefork.models.weights import Weights
from pagefork.scheduler.errors import ModelError

CPU = torch.device("cpu")
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
Q = "model.layers.0.self_attn.q_proj.weight"


def load(path: Path) -> Tensor:
    """Logits of PROMPT by the model in a directory."""
    return Feeder(load_model(path, torch.float32, CPU)).feed([(0, 0, PROMPT)])[0]


def edit_weights(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(path / "model.safetensors")
    edit(weights)
    save_file(weights, path / "model.safetensors")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "whole")
    return tmp_path / "whole"


def test_shards_give_the_same_model_as_one_file(tmp_path: Path, whole: Path) -> None:
    make_checkpoint(tmp_path / "shards", shard="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert torch.equal(load(tmp_path / "shards"), load(whole))


def test_weights_are_copies_that_outlive_their_file(whole: Path) -> None:
    expected = load(whole)
    model = load_model(whole, torch.float32, CPU)
    file = whole / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(Feeder(model).feed([(0, 0, PROMPT)])[0], expected)


def test_weights_are_cast_to_the_dtype_asked_for(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, dtype=torch.float16)
    [logits] = Feeder(load_model(tmp_path, torch.bfloat16, CPU)).feed([(0, 0, PROMPT)])
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - load(tmp_path)).abs().max() < 0.1 * load(tmp_path).abs().max()


class Made(TorchDispatchMode):
    """Notes the device and the dtype of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.kinds.append((out.device.type, out.dtype))
        return out


def test_weights_are_cast_where_they_go_and_not_copied_on_their_way(whole: Path) -> None:
    """Another device casts as it stores, so the host makes no tensor but those of the mapped file."""
    with Weights(whole) as weights, Made() as made:
        taken = weights.take([Q], torch.bfloat16, torch.device("meta"))
    assert (taken.device.type, taken.dtype) == ("meta", torch.bfloat16)
    assert [kind for kind in made.kinds if kind[1] == torch.bfloat16] == [("meta", torch.bfloat16)]
    assert ("meta", torch.float32) in made.kinds


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_weights_taken_together_lie_below_each_other(whole: Path, stored: torch.dtype) -> None:
    """Whether they are stored alike or not, and in whatever order."""
    names = [Q.replace("q_proj", f"{part}_proj") for part in "vqk"]
    edit_weights(whole, lambda weights: weights.update({Q: weights[Q].to(stored)}))
    expected = torch.cat([load_file(whole / "model.safetensors")[name].to(torch.bfloat16) for name in names])
    with Weights(whole) as weights:
        assert torch.equal(weights.take(names, torch.bfloat16, CPU), expected)


def test_a_file_that_is_cut_while_it_is_read_is_refused(whole: Path) -> None:
    with Weights(whole) as weights:
        file = whole / "model.safetensors"
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(ModelError, match=r"can't be read: .*model\.safetensors has been cut"):
            [weights.take([name], torch.float32, CPU) for name in weights.shapes]


def test_harmless_left_overs_are_let_pass(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tie_word_embeddings=True)
    expected = load(tmp_path)

    def edit(weights: dict[str, Tensor]) -> None:
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    edit_weights(tmp_path, edit)
    assert torch.equal(load(tmp_path), expected)


def test_a_head_that_differs_from_tied_embeddings_counts_as_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make_checkpoint(tmp_path, tie_word_embeddings=True)
    edit_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": torch.randn(331, 64)}))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path)(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(load(tmp_path), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights: weights.pop(Q), rf"lacks {Q}"),
        (lambda weights: weights.pop("lm_head.weight"), "lacks lm_head.weight"),
        (lambda weights: weights.update(extra=torch.ones(1)), "does not: extra"),
        (lambda weights: weights.update({Q: torch.ones(64, 63)}), rf"{Q} is \[64, 63\], not \[64, 64\]"),
        (lambda weights: weights.update({Q: torch.ones(64, 64, dtype=torch.int8)}), rf"{Q} is stored as I8"),
        (lambda weights: weights.update({f"x{n}": torch.ones(1) for n in range(9)}), "x0, x1, x2, x3 and 5 more"),
    ],
)
def test_weights_that_do_not_fit_are_named(whole: Path, edit: Callable[[dict[str, Tensor]], object], message: str) -> None:
    edit_weights(whole, edit)
    with pytest.raises(ModelError, match=message):
        load(whole)


def test_a_bias_that_the_configuration_does_not_mention_is_a_left_over(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, attention_bias=True)
    edit_json(tmp_path / "config.json", attention_bias=False)
    with pytest.raises(ModelError, match=r"does not: .*bias.* and 4 more"):
        load(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 1000, -100])
def test_a_damaged_file_is_refused(whole: Path, kept: int) -> None:
    file = whole / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model.safetensors is damaged"):
        load(whole)


def test_directories_without_a_checkpoint_say_what_is_missing(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(ModelError, match="nowhere is no directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(tmp_path)
    (whole / "config.json").write_text("{ not json")
    with pytest.raises(ModelError, match=r"config\.json can't be read"):
        load_outline(whole)
    (whole / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="no JSON object"):
        load_outline(whole)
    (whole / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ModelError, match=r"config\.json can't be read"):
        load_outline(whole)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", r"pytorch_model.bin: pickle.*save_pretrained"),
        ("consolidated.00.pth", "consolidated.00.pth: pickle"),
        ("model-q4.gguf", "model-q4.gguf: GGUF"),
        ("notes.txt", "neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_other_formats_are_refused_by_name(whole: Path, name: str, message: str) -> None:
    (whole / "model.safetensors").rename(whole / name)
    with pytest.raises(ModelError, match=message):
        load(whole)


def test_a_gguf_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="GGUF"):
        load(tmp_path / "model.gguf")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "shards", shard="40KB")
    return tmp_path / "shards"


@pytest.mark.parametrize("name", ["../whole.safetensors", "/etc/passwd", "a\\b.safetensors", "weights.bin", "", ".."])
def test_shards_outside_the_directory_are_refused(shards: Path, name: str) -> None:
    index = shards / "model.safetensors.index.json"
    owners = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=owners | {Q: name})
    with pytest.raises(ModelError, match=r"a shard is a .safetensors file of the checkpoint's own directory"):
        load(shards)


def test_an_index_that_does_not_match_its_shards_is_refused(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    owners = json.loads(index.read_text())["weight_map"]
    other = next(file for file in owners.values() if file != owners[Q])
    edit_json(index, weight_map=owners | {Q: other})
    with pytest.raises(ModelError, match=f"says that {other} holds {Q}"):
        load(shards)
    edit_json(index, weight_map={})
    with pytest.raises(ModelError, match="no weight_map"):
        load(shards)
    edit_json(index, weight_map=owners)
    (shards / owners[Q]).unlink()
    with pytest.raises(ModelError, match=f"lacks {owners[Q]}"):
        load(shards)
