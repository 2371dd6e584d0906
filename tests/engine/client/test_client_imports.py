"""What a client's process loads, and what no module of ours may use."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
CODE_FROM_BYTES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def test_a_client_loads_neither_torch_nor_numpy_nor_a_tokenizer() -> None:
    code = "import sys; from pagefork import AsyncClient, BeamSearchParams, Client, SamplingParams; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    loaded = {module.split(".")[0] for module in done.stdout.split()}
    assert {"pagefork", "zmq", "msgspec"} <= loaded
    assert not {"torch", "transformers", "numpy", "tokenizers", "triton", "jinja2", "typer", "rich"} & loaded


def test_no_module_of_ours_makes_objects_of_bytes_that_may_name_code() -> None:
    found = []
    for path in (path for folder in ("engine", "kernels", "scheduler") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Attribute) and node.attr.endswith("_pyobj"):
                names = [node.attr]
            else:
                continue
            found += [(path.name, name) for name in names if name.split(".")[0] in CODE_FROM_BYTES or "pyobj" in name]
    assert found == []
