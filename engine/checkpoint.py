"""Where a model's files are: the demo, a directory, or the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from pagefork.scheduler.errors import ConfigError, ModelError

from .demo import demo_path
from .json_file import read_json

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# "*" matches "/" as well. What lies in folders (original/, onnx/) and Mistral's own format are the same weights once more.
_FILES = [
    "*.json",
    "*.safetensors",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
]
_UNREAD = ["*/*.json", "*/*.safetensors", "*/*.model", "consolidated*"]


def locate(model: str, revision: str | None = None) -> Path:
    """The directory of a checkpoint. "demo" is the built-in model, a directory wins over a hub id of the same name.

    A hub id is downloaded to the hub's cache, weights in safetensors only; `revision` is a branch, a tag or a commit.
    HF_HUB_OFFLINE, HF_HUB_CACHE, HF_HOME and HF_TOKEN are honoured. Raises ModelError when there is no such directory, or
    the hub and its cache don't have it as a whole; ConfigError for an empty revision, or one of something that has none.
    """
    if revision == "":
        raise ConfigError("revision is empty; give a branch, a tag or a commit, or None for the default branch")
    path = demo_path() if model == "demo" else _directory(model)
    if path is not None:
        if revision is not None:
            raise ConfigError(f"revision={revision!r} belongs to a hub id; model {model!r} is a directory")
        return path
    if not _HUB_ID.fullmatch(model):
        raise ModelError(
            f"model {model!r}: there is no such directory (a hub id reads 'owner/name'; 'demo' is the built-in model)"
        )
    name = f"model {model!r}" + (f" at revision {revision!r}" if revision is not None else "")
    path = _download(model, revision, name)
    if lacking := _lacking(path):
        raise ModelError(
            f"{name}: its snapshot {path} lacks {lacking}. Either the download was interrupted (load it once while online), "
            "or the repository has no checkpoint in safetensors"
        )
    return path


def _directory(model: str) -> Path | None:
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"model {model!r} is no path: {error}") from None
    if exists:
        raise ModelError(f"model {model!r} is a file; give the directory that holds config.json and the safetensors files")
    return None


def _download(model: str, revision: str | None, name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_FILES, ignore_patterns=_UNREAD))
    except Exception as error:
        # Offline a snapshot counts as incomplete for any file that the repository has, needed or not.
        if part := getattr(error, "snapshot_path", None):
            return Path(part)
        raise ModelError(f"{name} is no directory, and {_reason(error, model)}") from error


def _reason(error: Exception, model: str) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "the hub shows it only to those who accepted its terms: do so there, and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such repository, or shows it only to its members (set HF_TOKEN)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has no such revision of it"
    if isinstance(error, errors.LocalEntryNotFoundError):
        cache = Path(constants.HF_HUB_CACHE)
        refs = cache / f"models--{model.replace('/', '--')}" / "refs"
        known = sorted(path.relative_to(refs).as_posix() for path in refs.rglob("*") if path.is_file())
        held = f"the hub's cache {cache} has " + (f"only its revisions {', '.join(known)}" if known else "nothing of it")
        return held + (" while HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ", and the hub can't be reached")
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _lacking(path: Path) -> str | None:
    """The first file without which the snapshot is no checkpoint; a link into nowhere is none."""
    index = path / "model.safetensors.index.json"
    needed = ["config.json"]
    if index.is_file() and not (path / "model.safetensors").is_file():
        shards = read_json(index).get("weight_map")
        needed += sorted({str(shard) for shard in shards.values()}) if isinstance(shards, dict) else []
    else:
        needed.append("model.safetensors")
    return next((file for file in needed if not (path / file).is_file()), None)
