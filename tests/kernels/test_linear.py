"""Linear layers: right, and with the same bits for any number of rows."""

from __future__ import annotations

import pytest
import torch

from pagefork.kernels import native_linear
from pagefork.kernels.linear import MIN_ROWS, Linear, linear_backend
from pagefork.kernels.native import library

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_linear, "library", lambda: None)


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the native library, and without."""
    if request.param == "torch":
        without_library(monkeypatch)
    elif library() is None:
        pytest.skip("the native library is not built here")


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("out", "n"), [(96, 64), (33, 7), (1, 130)])
def test_equals_the_product_in_float64(out: int, n: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(out)
    weight, shift = torch.randn(out, n).to(dtype), torch.randn(out).to(dtype) if bias else None
    layer = Linear(weight.clone(), shift)
    assert (layer.out_features, layer.in_features) == (out, n)
    for rows in (1, 4, 50):
        x = torch.randn(rows, n).to(dtype)
        expected = x.double() @ weight.double().T + (0 if shift is None else shift.double())
        found = layer(x)
        assert found.dtype == dtype
        assert (found.double() - expected).abs().max() <= max(2 * torch.finfo(dtype).eps, 1e-6) * expected.abs().max()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "n"), [(576, 1536), (960, 576), (2048, 1024), (50, 70)])
def test_the_bits_of_a_row_do_not_depend_on_how_many_rows_there_are(out: int, n: int, dtype: torch.dtype) -> None:
    if linear_backend(dtype, CPU) == "torch":
        pytest.skip("plain torch promises nothing of the kind")
    torch.manual_seed(n)
    layer, x = Linear(torch.randn(out, n).to(dtype)), torch.randn(2048, n).to(dtype)
    whole = layer(x)
    for rows in [*range(2, 36), 48, 63, 64, 65, 100, 128, 129, 255, 300, 511, 513, 1025, 2047]:
        assert torch.equal(layer(x[:rows]), whole[:rows]), rows
    assert torch.equal(layer(x[7 : 7 + MIN_ROWS]), whole[7 : 7 + MIN_ROWS])


def test_strided_rows_are_taken_as_they_are() -> None:
    wide = torch.randn(9, 80)
    layer = Linear(torch.randn(5, 40))
    torch.testing.assert_close(layer(wide[::2, 40:]), layer(wide[::2, 40:].contiguous()))


def test_the_path_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if library() is not None:
        assert {linear_backend(torch.bfloat16, CPU, quantization) for quantization in (None, "int8")} == {"native"}
    assert linear_backend(torch.float16, CPU) == "torch"
    assert linear_backend(torch.bfloat16, torch.device("cuda")) == "torch"
    without_library(monkeypatch)
    packs = torch.backends.mkldnn.is_available()
    assert linear_backend(torch.float32, CPU) == ("onednn-packed" if packs else "torch")
    assert linear_backend(torch.float32, CPU, "int8") == "torch"


@pytest.mark.filterwarnings("ignore:TF32")
def test_without_onednn_plain_torch_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    without_library(monkeypatch)
    weight, x = torch.randn(12, 20), torch.randn(6, 20)
    with torch.backends.mkldnn.flags(enabled=False):
        assert linear_backend(torch.float32, CPU) == "torch"
        plain = Linear(weight)
    torch.testing.assert_close(plain(x), Linear(weight)(x))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3, 4, 5\]"):
        Linear(torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match=r"\[3\]"):
        Linear(torch.zeros(3, 4), torch.zeros(4))
    for x in (torch.zeros(2, 5), torch.zeros(4)):
        with pytest.raises(ValueError, match="rows, 4"):
            Linear(torch.zeros(3, 4))(x)
