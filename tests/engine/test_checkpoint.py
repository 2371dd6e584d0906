"""Where a model is found: directories, and the hub's cache as huggingface_hub lays it out. Nothing here asks the network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import utils as hub
from support.checkpoints import edit_json, make_checkpoint
from support.tokenizers import backend, save
from transformers import AutoModelForCausalLM

from pagefork import ConfigError, ModelError
from pagefork.checkpoint import _FILES, _UNREAD, locate
from pagefork.demo import demo_path

FIRST, SECOND = "1" * 40, "2" * 40


def add_snapshot(cache: Path, name: str, commit: str, files: Path, refs: tuple[str, ...] = (), without: str = "") -> None:
    """A snapshot in the hub's own layout: blobs by their hash, a folder of links for the commit, branches and tags in refs."""
    repo = cache / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    (repo / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    for file in files.iterdir():
        blob = repo / "blobs" / sha256(file.read_bytes()).hexdigest()
        if file.name != without:
            blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    for ref in refs:
        (repo / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repo / "refs" / ref).write_text(commit)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF_HOME with two revisions of a model with different weights, an interrupted download, and one without weights."""
    home = tmp_path_factory.mktemp("home")
    first, second = home / "first", home / "second"
    for path, layers in ((first, 1), (second, 2)):
        make_checkpoint(path, vocab_size=600, num_hidden_layers=layers, shard="100KB")
        save(backend("gemma"), path)
    assert (second / "model.safetensors.index.json").is_file()
    hub = home / "hub"
    add_snapshot(hub, "owner/two.kinds", FIRST, first, ("main", "refs/pr/1"))
    add_snapshot(hub, "owner/two.kinds", SECOND, second, ("v2",))
    lost = sorted(second.glob("*.safetensors"))[1].name
    add_snapshot(hub, "owner/interrupted", SECOND, second, ("main",), without=lost)
    add_snapshot(hub, "owner/begun", SECOND, second, ("other",), without="config.json")
    (home / "bare").mkdir()
    (home / "bare" / "config.json").write_text("{}")
    add_snapshot(hub, "owner/bare", FIRST, home / "bare", ("main",))
    (home / "odd").mkdir()
    for file in second.iterdir():
        (home / "odd" / file.name).write_bytes(file.read_bytes())
    edit_json(home / "odd" / "model.safetensors.index.json", weight_map=[1])
    add_snapshot(hub, "owner/odd", FIRST, home / "odd", ("main",))
    add_snapshot(hub, "single", FIRST, first, ("main",))
    add_snapshot(hub, "owner/here", FIRST, first, ("main",))
    (home / "work" / "owner" / "here").mkdir(parents=True)
    (home / "work" / "demo").mkdir()
    return home


LOCATE = """
import json, sys
from pagefork import PageforkError
from pagefork.checkpoint import locate
for model, revision in json.loads(sys.argv[1]):
    try:
        print(json.dumps(["", str(locate(model, revision))]))
    except PageforkError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""
GENERATE = """
import json, sys
from pagefork import LLM, SamplingParams
for revision in (None, "v2"):
    llm = LLM("owner/two.kinds", revision=revision, num_blocks=32)
    [output] = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    print(json.dumps(output.outputs[0].token_ids))
"""


def python(code: str, *arguments: Any, cwd: Path, **variables: str) -> list[Any]:
    """The JSON lines that a fresh interpreter prints; huggingface_hub reads its environment when it is imported."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment = inherited | {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"} | variables
    command = [sys.executable, "-c", code, *map(json.dumps, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


WANTED = [("owner/two.kinds", revision, FIRST) for revision in (None, "main", "refs/pr/1", FIRST)]
WANTED += [("owner/two.kinds", "v2", SECOND), ("owner/two.kinds", SECOND, SECOND), ("single", None, FIRST)]
WANTED += [("owner/odd", None, FIRST)]  # its weight_map is no table, which the loader will refuse
LACKING: list[tuple[str, str | None, list[str]]] = [
    ("owner/two.kinds", "v3", ["'owner/two.kinds' at revision 'v3'", "only its revisions main, refs/pr/1, v2", "OFFLINE"]),
    ("owner/two.kinds", "3" * 40, [f"at revision '{'3' * 40}'", "only its revisions"]),
    ("owner/nothing", None, ["'owner/nothing' is no directory", "has nothing of it", "OFFLINE"]),
    ("owner/interrupted", None, ["'owner/interrupted'", "lacks model-00002-of-", "interrupted"]),
    ("owner/begun", "other", ["at revision 'other'", "lacks config.json"]),
    ("owner/bare", "main", ["'owner/bare' at revision 'main'", "lacks model.safetensors", "no checkpoint in safetensors"]),
    ("owner/" + "a" * 120, None, ["is no directory"]),
    ("a..b/c--d", None, ["is no directory"]),
]
HERE = [("owner/here", None), ("owner/here", "v2"), ("demo", None)]


@pytest.fixture(scope="module")
def offline(home: Path) -> list[list[str]]:
    """What becomes of WANTED, LACKING and HERE, in this order, with HF_HUB_OFFLINE."""
    asked = [case[:2] for case in [*WANTED, *LACKING, *HERE]]
    return python(LOCATE, asked, cwd=home / "work", HF_HOME=str(home))


def test_a_hub_id_is_found_in_the_cache_by_branch_tag_and_commit(home: Path, offline: list[list[str]]) -> None:
    for (model, _, commit), (error, path) in zip(WANTED, offline, strict=False):
        assert not error and Path(path) == home / "hub" / f"models--{model.replace('/', '--')}" / "snapshots" / commit


@pytest.mark.parametrize("at", range(len(LACKING)), ids=[str(model)[:20] for model, *_ in LACKING])
def test_what_the_cache_lacks_is_an_error_that_names_id_and_revision(offline: list[list[str]], at: int) -> None:
    model, _, words = LACKING[at]
    error, message = offline[len(WANTED) + at]
    assert error == "ModelError" and model in message
    assert all(word in message for word in words), message


def test_a_directory_wins_over_a_hub_id_of_the_same_name_and_has_no_revision(offline: list[list[str]]) -> None:
    assert offline[-3:] == [
        ["", "owner/here"],
        ["ConfigError", "revision='v2' belongs to a hub id; model 'owner/here' is a directory"],
        ["", str(demo_path())],
    ]


def test_without_a_connection_the_cache_is_used(home: Path, tmp_path: Path) -> None:
    nobody = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(home / "hub")}
    asked = [["owner/two.kinds", None], ["owner/two.kinds", "v3"]]
    [(_, path), (error, message)] = python(LOCATE, asked, cwd=tmp_path, **nobody)
    assert Path(path).name == FIRST
    assert error == "ModelError" and "only its revisions main, refs/pr/1, v2, and the hub can't be reached" in message


def test_revisions_have_their_own_weights(home: Path, tmp_path: Path) -> None:
    tokens = python(GENERATE, cwd=tmp_path, HF_HOME=str(home))
    prompt = torch.tensor([[5, 6, 7]])
    for generated, name in zip(tokens, ("first", "second"), strict=True):
        model: Any = AutoModelForCausalLM.from_pretrained(home / name)
        expected = model.generate(prompt, do_sample=False, max_new_tokens=8, min_new_tokens=8, pad_token_id=0, eos_token_id=599)
        assert generated == expected[0, 3:].tolist()
    assert tokens[0] != tokens[1]


def test_of_a_repository_only_what_is_read_is_downloaded() -> None:
    read = [
        *("config.json", "generation_config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json"),
        *("model.safetensors.index.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json"),
        *("merges.txt", "vocab.txt", "spiece.model", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"),
    ]
    unread = [
        *("pytorch_model.bin", "model.gguf", "consolidated.safetensors", "consolidated.00.pth", "original/params.json"),
        *("original/consolidated.safetensors", "onnx/config.json", "onnx/model.onnx", "modeling_llama.py", "README.md"),
        *("original/tokenizer.model", "fp16/model.safetensors", "notes.txt", "examples/prompt.jinja", ".gitattributes"),
    ]
    assert set(hub.filter_repo_objects(read + unread, allow_patterns=_FILES, ignore_patterns=_UNREAD)) == set(read)


def test_a_directory_that_is_no_path_or_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    for model, message in [
        ("weights.safetensors", "is a file; give the directory"),
        (str(tmp_path / "nowhere"), "there is no such directory"),
        ("~nobody-of-this-name/model", "is no path|no such directory"),
        ("a" * 5000, "is no path"),
        ("owner/name/more", "there is no such directory .a hub id reads"),
        ("../owner", "there is no such directory"),
    ]:
        with pytest.raises(ModelError, match=message):
            locate(model)
    with pytest.raises(ConfigError, match="revision='main' belongs to a hub id; model 'demo' is a directory"):
        locate("demo", "main")
    for model in ("demo", "owner/name"):
        with pytest.raises(ConfigError, match="revision is empty"):
            locate(model, "")
    assert locate(str(tmp_path)) == tmp_path
