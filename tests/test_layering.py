"""The layers: scheduler below, kernels beside it, engine above both; read off the imports of every file."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE_OF = {"engine": "pagefork", "kernels": "pagefork.kernels", "scheduler": "pagefork.scheduler"}
FILES = sorted(path for folder in PACKAGE_OF for path in (ROOT / folder).rglob("*.py"))
# Decoding strategies have names in their own files, in the parameters that ask for them, and where users meet them, such as
# the fields of a body over HTTP; generation_config.json is a file of transformers with names of its own.
NAMES_STRATEGIES = [
    *("scheduler/strategies/", "scheduler/params.py", "scheduler/search_params.py"),
    *(
        "engine/__init__.py",
        "engine/cli/",
        "engine/demo/",
        "engine/generation_config.py",
        "engine/limits.py",
        "engine/http/fields.py",
    ),
]
# Whose packages are optional: files that begin so, and the extra that brings what they import.
EXTRA_OF = {"engine/http/": "http", "engine/cli/serving_": "bench"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> list[str]:
    """The dotted name of a file's module, and for an __init__.py with that last."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return [*PACKAGE_OF[folder].split("."), *rest]


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module_of(path)[: -node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{name}.{alias.name}" for alias in node.names)


def foreign(folder: str, allowed: set[str]) -> list[str]:
    """Imports in a folder of neither the standard library, nor the allowed packages, nor the folder's own modules."""
    own = PACKAGE_OF[folder]
    return [
        f"{relative(path)} imports {name}"
        for path in FILES
        if path.is_relative_to(ROOT / folder)
        for name in imports(path)
        if name.split(".")[0] not in allowed | sys.stdlib_module_names and not f"{name}.".startswith(f"{own}.")
    ]


def test_scheduler_imports_only_the_standard_library_numpy_and_msgspec() -> None:
    assert foreign("scheduler", {"numpy", "msgspec"}) == []


def test_kernels_import_only_the_standard_library_numpy_torch_and_triton() -> None:
    assert foreign("kernels", {"numpy", "torch", "triton"}) == []


def test_engine_imports_only_what_the_package_declares() -> None:
    """Some files may import what an extra of theirs brings besides."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = (names(project["dependencies"]) - {"pyzmq"}) | {"zmq"}
    for prefix, extra in EXTRA_OF.items():
        more = names(project["optional-dependencies"][extra])
        assert [line for line in foreign("engine", allowed | more) if line.startswith(prefix)] == []
    assert [line for line in foreign("engine", allowed) if not line.startswith((*EXTRA_OF,))] == []


def names(requirements: list[str]) -> set[str]:
    """What requirements are imported as."""
    return {re.match(r"[\w-]+", entry)[0].replace("-", "_") for entry in requirements}  # type: ignore[index]


def test_no_file_imports_our_folders_by_their_bare_names() -> None:
    assert [(relative(path), name) for path in FILES for name in imports(path) if name.split(".")[0] in PACKAGE_OF] == []


def words(path: Path) -> Iterator[str]:
    """Identifiers and strings of a file; comments and docstrings may explain what they like."""
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(value := getattr(node, field, None), str):
                yield value


def test_no_strategy_is_named_outside_its_file() -> None:
    """A kernel may be named after the strategy that it was made for."""
    checked = [path for path in FILES if not relative(path).startswith(("kernels/", *NAMES_STRATEGIES))]
    strategy = re.compile(r"(?<!^pagefork\.kernels\.)(beam|contrastive|mcts)", re.IGNORECASE)
    assert [(relative(path), word) for path in checked for word in words(path) if strategy.search(word)] == []
