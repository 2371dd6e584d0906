"""A fresh process serves a native model soon: it loads what it needs and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint

SPARED = {
    *("transformers", "huggingface_hub", "jinja2", "requests", "httpx"),  # of other models, of the hub, of chats
    *("triton", "sympy", "torch._dynamo", "torch._inductor", "torchvision"),  # of compilers
    *("typer", "rich", "zmq", "matplotlib"),  # of the command and the service
}


def fresh(code: str, *arguments: str, cwd: Path) -> list[str]:
    """The words that a fresh interpreter prints."""
    left_out = ("TRITON_INTERPRET", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | {"PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_native_model_is_served_without_modules_that_it_has_no_use_for(tmp_path: Path) -> None:
    """Importing transformers, Triton or sympy takes longer than all that a first token needs."""
    make_checkpoint(tmp_path / "model")
    code = """
import sys
import torch
before = set(sys.modules)
from pagefork import LLM, SamplingParams
for model in ("demo", sys.argv[1]):
    [output] = LLM(model).generate([[5, 6, 7]], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 1
print(*sys.modules.keys() - before)
"""
    loaded = set(fresh(code, str(tmp_path / "model"), cwd=tmp_path))
    assert "pagefork.models.decoder" in loaded
    assert SPARED & loaded == set()


def test_the_command_starts_without_what_only_its_service_needs(tmp_path: Path) -> None:
    loaded = set(fresh("import sys, pagefork.cli; print(*sys.modules)", cwd=tmp_path))
    assert {"zmq", "rich", "matplotlib", "torch"} & loaded == set()


@pytest.mark.parametrize("collecting", [True, False])
def test_importing_leaves_garbage_collection_as_it_was(collecting: bool, tmp_path: Path) -> None:
    code = f"import gc; gc.{'enable' if collecting else 'disable'}(); from pagefork import SamplingParams; print(gc.isenabled())"
    assert fresh(code, cwd=tmp_path) == [str(collecting)]
