"""What a model's attention looks like, learned by running it on a few tokens and listening."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface

from pagefork.scheduler.errors import ModelError

MaskFunction = Callable[[Any, Any, Tensor, Tensor], Any]

IMPLEMENTATION = "pagefork_probe"
_OPTIONS = {"scaling", "softcap", "s_aux", "sliding_window"}  # what our attention understands
_IDLE = {"dropout", "position_ids", "output_attentions", "use_cache", "return_dict"}  # what it need not


@dataclass(frozen=True, slots=True)
class Layer:
    """One call of the attention function."""

    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    window: int | None


@dataclass(slots=True)
class Listener:
    """Takes the place of a step's attention and notes how it is called."""

    max_len: int
    layers: list[Layer] = field(default_factory=list)
    windows: dict[MaskFunction, int | None] = field(default_factory=dict)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        """query, key, value: [1, heads, tokens, size]. The values, repeated for all query heads: [1, tokens, heads, size].

        Raises ModelError for attention of another kind than that over a paged cache.
        """
        (_, heads, tokens, size), (_, kv_heads, keys, key_size), value_size = query.shape, key.shape, value.shape[3]
        if (keys, key_size) != (tokens, size) or value.shape[1:3] != key.shape[1:3] or heads % kv_heads:
            raise ModelError(
                f"its queries {list(query.shape)}, keys {list(key.shape)} and values {list(value.shape)} do not go together"
            )
        if foreign := sorted(name for name in options.keys() - _OPTIONS - _IDLE if options[name] is not None):
            raise ModelError(f"its attention takes {', '.join(foreign)}")
        self.layers.append(Layer(heads, kv_heads, size, value_size, self._window(mask, options)))
        return value.repeat_interleave(heads // kv_heads, 1).transpose(1, 2).contiguous()

    def _window(self, mask: Tensor | None, options: dict[str, Any]) -> int | None:
        if mask is None:
            window = options.get("sliding_window")
            return window if window is not None and window < self.max_len else None
        sees: MaskFunction | None = getattr(mask, "sees", None)
        if sees is None or mask.shape[2] != mask.shape[3]:
            raise ModelError("it changes the attention mask that transformers makes")
        if sees not in self.windows:
            self.windows[sees] = window_of(sees, self.max_len, mask.device)
        return self.windows[sees]


def window_of(sees: MaskFunction, max_len: int, device: torch.device | str = "cpu") -> int | None:
    """How many tokens a token sees, itself included; None for all. Raises ModelError where that is no window."""

    keys = torch.arange(max_len, device=device)

    def seen(position: int) -> int:
        row = torch.as_tensor(sees(keys[0], keys[0], keys[position], keys)).expand(max_len)
        count = int(row[: position + 1].sum())
        if count == 0 or not row[position + 1 - count : position + 1].all() or row[position + 1 :].any():
            raise ModelError("its tokens see others than those before them")
        return count

    window = seen(max_len - 1)
    for position in {0, window - 1, min(window, max_len - 1), max_len // 2, max_len * 2 // 3, max(0, max_len - 2)}:
        if seen(position) != min(window, position + 1):
            raise ModelError("its attention goes by chunks, not by a sliding window")
    return window if window < max_len else None


class _Mask(Tensor):
    """A mask that hides nothing and carries its definition, which slices keep and all else loses."""

    sees: MaskFunction

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if func is Tensor.__getitem__ and hasattr(args[0], "sees"):
            result.sees = args[0].sees
        return result


def _mask(mask_function: MaskFunction, q_length: int, kv_length: int, dtype: torch.dtype, device: Any, **_: Any) -> Tensor:
    mask = torch.zeros(1, 1, q_length, kv_length, dtype=dtype, device=device).as_subclass(_Mask)
    mask.sees = mask_function
    return mask


AttentionMaskInterface.register(IMPLEMENTATION, _mask)
