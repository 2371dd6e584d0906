"""Every configuration of the Triton kernels compiles ahead of time and spills no registers; docs/kernels.md has its numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import triton

from pagefork.kernels import token_table
from pagefork.kernels._triton import INTERPRETED, tl

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))
import compiled  # noqa: E402

pytestmark = pytest.mark.skipif(tl is None or INTERPRETED, reason="needs Triton's compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled stays out of the user's home."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("module", compiled.modules())
def test_the_largest_of_every_kind_spills_nothing_and_takes_what_the_table_says(module: str) -> None:
    """Of every choice of flags the largest sizes."""
    document = (DOCS / "kernels.md").read_text()
    rows = {}
    for variant in compiled.largest(module):
        found = compiled.footprints(variant)
        rows[compiled.row(module, variant, found)] = max(footprint.stack for footprint in found.values())
    assert not [row for row, stack in rows.items() if stack]
    if f"Triton {triton.__version__} " in document:  # another compiler takes other numbers
        assert not [row for row in rows if row not in document], "run `make tables`"


def test_one_compilation_serves_every_count_and_every_place_in_an_upload() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = token_table._mark_kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    table, upload = token_table.new_table(2, 16, 100, torch.device("cpu")), torch.zeros(64, dtype=torch.int32)
    found = set()
    for begin, count in ((0, 16), (1, 1), (4, 17)):
        rows = [upload[begin + i * count :] for i in range(5)]
        found.add(str(bind(*table, *rows, count, 16, 2, HAS_BIAS=True, HAS_BAN=True, BLOCK=32)[1]))
    assert len(found) == 1


@pytest.mark.long
@pytest.mark.parametrize("capability", compiled.CAPABILITIES)
@pytest.mark.parametrize("module", compiled.modules())
def test_nothing_spills(module: str, capability: int) -> None:
    launched = [variant for variant in compiled.variants(module) if capability >= variant.least]
    found = [(variant, compiled.footprint(variant, capability)) for variant in launched]
    assert not [compiled.row(module, variant, {capability: taken}) for variant, taken in found if taken.stack]
