"""A checkpoint loaded by transformers: from safetensors alone, complete, and without a word on stderr."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from pagefork.json_file import read_json
from pagefork.scheduler.errors import ModelError

from .weights import INDEX, SINGLE, Weights, some

_BUFFERS = ("BOOL", "U8", "I32", "I64")  # masks and counters that older checkpoints hold


def load_pretrained_config(directory: Path, architecture: str) -> PretrainedConfig:
    """The configuration as transformers understands it. Raises ModelError."""
    try:
        with quiet():
            config = cast(
                "PretrainedConfig", AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            )
    except Exception as error:
        raise ModelError(f"the configuration of this {architecture} is refused by transformers: {first_line(error)}") from error
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    if architecture not in ((expected,) if isinstance(expected, str) else expected):
        raise ModelError(f"config.json names {architecture}, but its model_type {config.model_type!r} is another's")
    return config


def load_pretrained(directory: Path, architecture: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model with its weights, in eval mode. Raises ModelError for weights that are missing, left over or do not fit."""
    with Weights(directory) as weights:
        weights.check_stored(weights.shapes, also=_BUFFERS)
        integers = {name: stored for name, stored in weights.dtypes.items() if stored in _BUFFERS}
    if not (directory / SINGLE).is_file() and not isinstance(read_json(directory / INDEX).get("metadata"), dict):
        raise ModelError(f'{directory / INDEX} lacks metadata, which transformers asks for; add "metadata": {{}} to it')
    config = load_pretrained_config(directory, architecture)
    model_class: Any = getattr(transformers, architecture)
    try:
        with quiet():
            model, info = model_class.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                attn_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # told below, by name
                output_loading_info=True,
            )
    except Exception as error:
        raise ModelError(f"{architecture} can't be loaded by transformers: {first_line(error)}") from error
    left = [name for name in info["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq")]
    if info["missing_keys"]:
        raise ModelError(f"the checkpoint lacks {some(sorted(info['missing_keys']))}")
    if left:
        raise ModelError(f"the checkpoint has weights that the model does not: {some(sorted(left))}")
    if wrong := sorted(f"{name} is {list(given)}, not {list(shape)}" for name, given, shape in info["mismatched_keys"]):
        raise ModelError(f"weights do not fit config.json: {some(wrong)}")
    _check_integers(model, integers)
    return cast("PreTrainedModel", model.to(device).eval().requires_grad_(False))


def _check_integers(model: Any, stored: dict[str, str]) -> None:
    """Raises ModelError for a weight that is stored in integers; only buffers and what loading passes over may be."""
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    buffers = [name for name, _ in model.named_buffers()]
    passed = re.compile("|".join([r"(^|\.)position_ids$", *(model._keys_to_ignore_on_load_unexpected or ())]))
    for name, kind in stored.items():
        if _is_among(name, parameters) or not (_is_among(name, buffers) or passed.search(name)):
            raise ModelError(f"{name} is stored as {kind}; weights are floating point, quantized ones are not supported")


def _is_among(name: str, names: Iterable[str]) -> bool:
    """Whether one of the names is this one; either may lack the prefix that a model puts before its decoder's names."""
    return any(f".{known}".endswith(f".{name}") or f".{name}".endswith(f".{known}") for known in names)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of transformers, and its progress bar only where somebody watches."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    if isinstance(error, KeyError):
        return f"there is no {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
