"""The engine's settings: copied and resolved once, then frozen."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from pagefork.scheduler.checking import Checked
from pagefork.scheduler.errors import ConfigError, PageforkError

FOREIGN_NAMES = {
    name: f"here it is called {ours}"
    for name, ours in {
        "gpu_memory_utilization": "kv_cache_memory (bytes) or num_blocks",
        "num_gpu_blocks_override": "num_blocks",
        "max_batch_size": "max_num_seqs",
        "torch_dtype": "dtype",
        "kv_cache_memory_bytes": "kv_cache_memory",
    }.items()
} | {
    "tensor_parallel_size": "a model runs on one device",
    "trust_remote_code": "remote code is never run",
}


Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]


class EngineConfig(Checked, frozen=True, kw_only=True):
    """Settings of an LLMEngine. Raises ConfigError (a ValueError) for an unknown name or a value out of range."""

    model: Annotated[str, Meta(min_length=1, description='"demo", a directory, or a hub id')]
    revision: Annotated[str | None, Meta(description="Branch, tag or commit of a hub id")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(description="Of weights, activations and cache; auto: the checkpoint's"),
    ] = "auto"
    quantization: (
        Annotated[
            Literal["int8"],
            Meta(description="Hold the weights of linear layers and of the head in 8 bits, on a CPU; None: in the dtype"),
        ]
        | None
    ) = None
    model_impl: Annotated[
        Literal["auto", "native", "transformers"],
        Meta(description="Whose modelling code runs; auto: ours for the families it covers, else that of transformers"),
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], Meta(description="auto: a CUDA device where there is one")] = "auto"
    max_model_len: (
        Annotated[
            Positive, Meta(description="Prompt plus output tokens of one sequence; None: what the model and the cache allow")
        ]
        | None
    ) = None
    block_size: Annotated[int, Meta(ge=1, le=256, description="Tokens per cache block")] = 16
    num_blocks: Annotated[int, Meta(ge=2, lt=2**31, description="Cache blocks; wins over kv_cache_memory")] | None = None
    kv_cache_memory: Annotated[Positive, Meta(description="Bytes for the cache; None: from free memory")] | None = None
    hidden_states: Annotated[
        Literal["auto"] | bool,
        Meta(
            description="Keep the last hidden states in the cache, for searches that compare them; "
            "auto: where that takes at most a fifth of the memory of keys and values"
        ),
    ] = "auto"
    max_num_seqs: Annotated[int, Meta(ge=1, le=1 << 20, description="Sequences that run at once")] = 256
    max_num_batched_tokens: Annotated[int, Meta(ge=2, lt=2**31, description="Tokens computed in one step")] = 2048
    enable_prefix_caching: Annotated[
        bool, Meta(description="Keep computed blocks, so that equal beginnings are not computed again")
    ] = True
    scheduling_policy: Annotated[
        Literal["fcfs", "priority"], Meta(description="Who runs first: who came first, or the lowest priority value")
    ] = "fcfs"
    batch_invariant: Annotated[
        bool | None,
        Meta(
            description="Bit-identical logits of a sequence in any batch, chunked, resumed or on a prefix hit; "
            "None: where that costs nothing, natively on a CPU"
        ),
    ] = None
    cuda_graphs: Annotated[
        bool | None,
        Meta(description="Replay decoding steps from captured CUDA graphs; None: for native models on a GPU"),
    ] = None
    overlap: Annotated[
        bool | None,
        Meta(description="Plan a step while the one before it is computed, where its tokens are not needed; None: on a GPU"),
    ] = None
    num_threads: (
        Annotated[
            int,
            Meta(
                ge=1,
                le=4096,
                description="CPU threads, process-wide; None: all, or one for a model so small that a second would only wait",
            ),
        ]
        | None
    ) = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1, description="Where requests without a seed get theirs from")] = 0

    error: ClassVar[type[PageforkError]] = ConfigError
    foreign: ClassVar[dict[str, str]] = FOREIGN_NAMES
    noun: ClassVar[str] = "setting"

    def __post_init__(self) -> None:
        self.check_fields()
