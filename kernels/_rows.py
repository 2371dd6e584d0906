"""Row by row, torch's element-wise functions give the same bits; cut inside of a row, not always.

They run in vectors, and what is left over at the end of a piece of work goes through another implementation, whose last
bits differ for functions such as silu. A piece is a whole row, unless threads share the elements out.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GRAIN = 32768  # elements from which torch takes a second thread, and so on (at::internal::GRAIN_SIZE)


def even_slices(x: Tensor) -> list[slice]:
    """Slices of the rows of x [T, n] such that threads share each of them out by whole rows. Mostly a single one."""
    rows, columns = x.shape
    if x.device.type != "cpu":
        return [slice(0, rows)]
    if columns > _GRAIN:  # a row alone is shared out: let all be
        return [slice(row, row + 1) for row in range(rows)]
    begin, out = 0, []
    while begin < rows:
        count = rows - begin
        while extra := count % min(torch.get_num_threads(), -(-count * columns // _GRAIN)):
            count -= extra
        out.append(slice(begin, begin + count))
        begin += count
    return out
