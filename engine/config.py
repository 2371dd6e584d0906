"""The engine's settings: copied and resolved once, then frozen."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta

from pagefork.scheduler.errors import ConfigError

FOREIGN_NAMES = {
    "gpu_memory_utilization": "kv_cache_memory (bytes) or num_blocks",
    "tensor_parallel_size": "nothing yet: one device",
    "trust_remote_code": "nothing: remote code is never run",
    "num_gpu_blocks_override": "num_blocks",
    "max_batch_size": "max_num_seqs",
    "torch_dtype": "dtype",
    "kv_cache_memory_bytes": "kv_cache_memory",
}


class _ConfigMeta(msgspec.StructMeta):
    def __call__(cls, *args: Any, **fields: Any) -> Any:
        for name in fields:
            if name not in cls.__struct_fields__:
                known = (
                    f"here it is called {FOREIGN_NAMES[name]}"
                    if name in FOREIGN_NAMES
                    else f"it has {', '.join(cls.__struct_fields__)}"
                )
                raise ConfigError(f"EngineConfig has no setting {name!r}; {known}")
        try:
            return super().__call__(*args, **fields)
        except TypeError as error:
            raise ConfigError(f"EngineConfig: {error}") from None


Positive = Annotated[int, Meta(ge=1)]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=_ConfigMeta):
    """Settings of an LLMEngine. Raises ConfigError (a ValueError) for an unknown name or a value out of range."""

    model: Annotated[str, Meta(min_length=1, description='"demo", a directory, or a hub id')]
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_model_len: (
        Annotated[
            Positive, Meta(description="Prompt plus output tokens of one sequence; None: what the model and the cache allow")
        ]
        | None
    ) = None
    block_size: Annotated[int, Meta(ge=1, le=256, description="Tokens per cache block")] = 16
    num_blocks: Annotated[int, Meta(ge=2, description="Cache blocks; wins over kv_cache_memory")] | None = None
    kv_cache_memory: Annotated[Positive, Meta(description="Bytes for the cache; None: from free memory")] | None = None
    max_num_seqs: Annotated[Positive, Meta(description="Sequences that run at once")] = 256
    max_num_batched_tokens: Annotated[int, Meta(ge=2, description="Tokens computed in one step")] = 2048
    enable_prefix_caching: bool = True
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for name in self.__struct_fields__:
            try:
                msgspec.convert(getattr(self, name), hints[name])
            except msgspec.ValidationError as error:
                raise ConfigError(f"{name}={getattr(self, name)!r} is refused: {error}") from None
