"""The linear layers of a model of transformers, multiplied by the engine's own product where that is faster or smaller."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pagefork.kernels.linear import Linear, linear_backend


class Stand(nn.Module):
    """Stands in for a linear layer and computes what it does; after `pack`, by a weight that is laid out once.

    It has no `weight`, so that a model which reads the weights of its layers is found out before they are packed.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer: tuple[nn.Module, ...] = (layer,)  # hidden in a tuple: no submodule of this one
        self._product: Linear | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._product is None:
            out: Tensor = self._layer[0](x)
            return out
        rows = x.reshape(-1, x.shape[-1])
        return self._product(rows).view(*x.shape[:-1], self._product.out_features)

    def pack(self, quantization: str | None) -> None:
        """Lays the weight out and lets the layer go, so that weights are held twice one at a time."""
        (layer,) = self._layer
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
        self._product = Linear(weight.t() if isinstance(layer, Conv1D) else weight, bias, quantization=quantization)
        self._layer = ()

    @property
    def held(self) -> tuple[Tensor, ...]:
        """What the packed weight takes."""
        return () if self._product is None else self._product.held


def stand_in(
    model: nn.Module, dtype: torch.dtype, device: torch.device, quantization: str | None
) -> list[tuple[nn.Module, str, nn.Module]]:
    """Replaces linear layers by a Stand each: (parent, name, layer) of each, none where packing gains nothing."""
    if quantization is None and linear_backend(dtype, device) == "torch":
        return []
    found = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) in (nn.Linear, Conv1D) and layer.weight.dtype == dtype
    ]
    stands: dict[nn.Module, Stand] = {}
    for parent, name, layer in found:
        setattr(parent, name, stands.setdefault(layer, Stand(layer)))
    return found


def put_back(replaced: list[tuple[nn.Module, str, nn.Module]]) -> None:
    """Undoes `stand_in`."""
    for parent, name, layer in replaced:
        setattr(parent, name, layer)


def pack(model: nn.Module, quantization: str | None) -> None:
    """Packs all that stands in."""
    for module in list(model.modules()):
        if isinstance(module, Stand):
            module.pack(quantization)


def weights_memory(model: nn.Module) -> int:
    """Bytes of all weights, packed or not, each once."""
    packed = [tensor for module in model.modules() if isinstance(module, Stand) for tensor in module.held]
    return sum({id(tensor): tensor.nbytes for tensor in (*model.parameters(), *packed)}.values())
