"""Root-mean-square normalisation (Zhang and Sennrich 2019), with the residual addition before it.

    y = w * x / sqrt(mean(x²) + eps)

The mean and the quotient are computed in float32 and rounded to the dtype of x before the weight is applied, as in
transformers' Llama.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Normalises the last dimension of x.

    x: [..., n]; weight: broadcasts against x, last dimension n. With `residual` (the shape of x) that tensor becomes
    residual + x *in place*, and the sum is what is normalised. Returns a new tensor shaped like x; x is unchanged.
    Raises ValueError for shapes that do not fit.
    """
    n = x.shape[-1]
    if weight.shape[-1] != n:
        raise ValueError(f"the norm's weight has {weight.shape[-1]} values for vectors of {n}")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"the residual is shaped {list(residual.shape)}, what is added to it {list(x.shape)}")
        x = residual.add_(x)
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().mul_(1 / n).add_(eps).rsqrt_()
    # In place wherever `wide` is a copy: fresh memory costs more than the arithmetic.
    y = wide * scale if wide is x else wide.mul_(scale).to(x.dtype)
    return y.mul_(weight)
