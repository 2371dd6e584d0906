"""The package: what it exports, what it imports, and what its wheel holds."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import pagefork
from pagefork.demo import demo_path

ROOT = Path(__file__).parents[1]
FOLDERS = {"engine": "pagefork", "kernels": "pagefork/kernels", "scheduler": "pagefork/scheduler"}
PUBLIC = {
    *("LLM", "LLMEngine", "AsyncLLMEngine", "Client", "AsyncClient", "EngineConfig", "SamplingParams"),
    *("RequestOutput", "CompletionOutput", "Logprob", "RequestMetrics", "EngineStats", "Trace", "Leaf"),
    *("PageforkError", "InvalidRequestError", "ParameterError", "ConfigError", "ModelError"),
    *(
        "ServiceError",
        "KVExhaustedError",
        "NoTokenError",
        "NumericError",
        "StepFailedError",
        "EngineDeadError",
        "EngineMisuseError",
    ),
    *("BlockAccountingError", "ValueFunctionError", "BeamSearchParams", "ContrastiveSearchParams", "MCTSParams"),
    "__version__",
}


def python(code: str, cwd: Path, **variables: str) -> str:
    """What a fresh interpreter prints."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", **variables}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def package_files(suffix: str) -> set[str]:
    """Paths inside the package of our files with a suffix."""
    return {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in FOLDERS.items()
        for path in (ROOT / folder).rglob(f"*{suffix}")
    }


def test_importing_the_package_and_its_command_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = "import sys, pagefork, pagefork.cli; pagefork.EngineConfig; pagefork.RequestOutput; print(*sys.modules)"
    assert not {"torch", "transformers", "tokenizers", "safetensors"} & set(python(code, tmp_path).split())


def test_every_module_imports_and_none_under_a_bare_name(tmp_path: Path) -> None:
    files = sorted(package_files(".py") - {"pagefork/__main__.py"})
    modules = [file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in files]
    loaded = python(f"import sys, {', '.join(modules)}; print(*sys.modules)", tmp_path).split()
    assert set(modules) <= set(loaded)
    assert not {"engine", "kernels", "scheduler"} & set(loaded)


def test_the_public_names_are_these_and_all_resolve() -> None:
    assert set(pagefork.__all__) == PUBLIC
    assert {name for name in PUBLIC if not hasattr(pagefork, name)} == set()
    assert set(dir(pagefork)) >= PUBLIC
    with pytest.raises(AttributeError, match="Engin"):
        pagefork.Engin  # type: ignore[attr-defined]  # noqa: B018


def test_a_type_checker_sees_the_public_names() -> None:
    tree = ast.parse((ROOT / "engine/__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"]
    assert {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names} == PUBLIC - {
        "__version__"
    }


def test_the_version_is_semantic_and_that_of_the_installed_package() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", pagefork.__version__)
    assert importlib.metadata.version("pagefork") == pagefork.__version__


def test_the_package_list_names_every_folder_with_modules() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(declared) == {str(Path(file).parent).replace("/", ".") for file in package_files(".py")}


def test_the_demo_checkpoint_is_whole() -> None:
    with safe_open(demo_path() / "model.safetensors", "numpy") as weights:
        parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118 (not a dict)
    assert f"{parameters:,} parameters" in (demo_path() / "README.md").read_text()
    assert json.loads((demo_path() / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, where no file of an earlier build can slip in."""
    source = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [built] = (source / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_claims_one_name(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    assert {name for name in held if name.endswith(".py")} == package_files(".py")
    assert held >= set().union(*map(package_files, (".typed", ".json", ".safetensors", ".html")))
    assert {name.split("/")[0] for name in held} == {"pagefork", f"pagefork-{pagefork.__version__}.dist-info"}


def test_the_wheel_runs_from_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(site)
    empty.mkdir()
    assert python("import pagefork; print(pagefork.__file__)", empty, PYTHONPATH=str(site)).startswith(str(site))
    run = "import sys, runpy; sys.argv[1:] = {}; runpy.run_module('pagefork', run_name='__main__')"
    assert python(run.format(["--version"]), empty, PYTHONPATH=str(site)) == f"pagefork {pagefork.__version__}\n"
    arguments = ["generate", "--json", "--max-tokens", "4", "--ignore-eos", "import os"]
    output = json.loads(python(run.format(arguments), empty, PYTHONPATH=str(site)))
    assert len(output["outputs"][0]["token_ids"]) == 4


def test_the_tables_of_the_documents_say_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "docs/tables.py"), "--check"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run here")
def test_without_a_gpu_an_engine_loads_no_triton(tmp_path: Path) -> None:
    """It would cost time, and its library reports at exit what threads that still run hold of it."""
    code = "import sys; from pagefork import LLM; LLM('demo').generate('a', use_tqdm=False); print('triton' in sys.modules)"
    assert python(code, tmp_path) == "False\n"
