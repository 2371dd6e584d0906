"""Pagefork: an LLM serving engine whose sequences fork.

Importing it is cheap: torch is imported with the first name that needs it.
"""

from __future__ import annotations

import gc
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagefork.async_engine import AsyncLLMEngine as AsyncLLMEngine
    from pagefork.client.async_client import AsyncClient as AsyncClient
    from pagefork.client.client import Client as Client
    from pagefork.config import EngineConfig as EngineConfig
    from pagefork.core import LLMEngine as LLMEngine
    from pagefork.llm import LLM as LLM
    from pagefork.outputs import CompletionOutput as CompletionOutput
    from pagefork.outputs import EngineStats as EngineStats
    from pagefork.outputs import Logprob as Logprob
    from pagefork.outputs import RequestMetrics as RequestMetrics
    from pagefork.outputs import RequestOutput as RequestOutput
    from pagefork.scheduler.accounting import Trace as Trace
    from pagefork.scheduler.errors import BlockAccountingError as BlockAccountingError
    from pagefork.scheduler.errors import ConfigError as ConfigError
    from pagefork.scheduler.errors import EngineDeadError as EngineDeadError
    from pagefork.scheduler.errors import EngineMisuseError as EngineMisuseError
    from pagefork.scheduler.errors import InvalidRequestError as InvalidRequestError
    from pagefork.scheduler.errors import KVExhaustedError as KVExhaustedError
    from pagefork.scheduler.errors import ModelError as ModelError
    from pagefork.scheduler.errors import NoTokenError as NoTokenError
    from pagefork.scheduler.errors import NumericError as NumericError
    from pagefork.scheduler.errors import PageforkError as PageforkError
    from pagefork.scheduler.errors import ParameterError as ParameterError
    from pagefork.scheduler.errors import ServiceError as ServiceError
    from pagefork.scheduler.errors import StepFailedError as StepFailedError
    from pagefork.scheduler.errors import ValueFunctionError as ValueFunctionError
    from pagefork.scheduler.params import SamplingParams as SamplingParams
    from pagefork.scheduler.search_params import BeamSearchParams as BeamSearchParams
    from pagefork.scheduler.search_params import ContrastiveSearchParams as ContrastiveSearchParams
    from pagefork.scheduler.search_params import MCTSParams as MCTSParams
    from pagefork.scheduler.strategies.mcts import Leaf as Leaf

__version__ = "0.1.0"

_NAMES_OF = {
    "async_engine": ["AsyncLLMEngine"],
    "client.async_client": ["AsyncClient"],
    "client.client": ["Client"],
    "config": ["EngineConfig"],
    "core": ["LLMEngine"],
    "llm": ["LLM"],
    "outputs": ["CompletionOutput", "EngineStats", "Logprob", "RequestMetrics", "RequestOutput"],
    "scheduler.accounting": ["Trace"],
    "scheduler.errors": [
        "BlockAccountingError",
        "ConfigError",
        "EngineDeadError",
        "EngineMisuseError",
        "InvalidRequestError",
        "KVExhaustedError",
        "ModelError",
        "NoTokenError",
        "NumericError",
        "PageforkError",
        "ParameterError",
        "ServiceError",
        "StepFailedError",
        "ValueFunctionError",
    ],
    "scheduler.params": ["SamplingParams"],
    "scheduler.search_params": ["BeamSearchParams", "ContrastiveSearchParams", "MCTSParams"],
    "scheduler.strategies.mcts": ["Leaf"],
}
_HOME = {name: module for module, names in _NAMES_OF.items() for name in names}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604

if not TYPE_CHECKING:  # a type checker would believe that every name exists

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        collects = gc.isenabled()
        gc.disable()  # modules are no garbage, and going through all that torch made takes as long as importing ours
        try:
            value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        finally:
            if collects:
                gc.enable()
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
