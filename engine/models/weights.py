"""The safetensors files of a checkpoint: names and shapes first, then one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pagefork.json_file import read_json
from pagefork.progress import Bar
from pagefork.scheduler.errors import ModelError

Shape = tuple[int, ...]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_FOREIGN = {
    (".bin", ".pt", ".pth", ".ckpt"): "pickle files run code when they are opened and are never read; "
    "save the model again with model.save_pretrained(...), which writes safetensors",
    (".gguf",): "GGUF is not supported; use the original checkpoint",
}


class _Place(NamedTuple):
    """Where a weight lies: so many bytes from the beginning of a file."""

    file: FileIO
    offset: int


class Weights:
    """An open checkpoint, a context manager. Nothing but the files' headers is read before `take`.

    Raises ModelError for files that are missing, damaged, of another format, or outside the directory.
    """

    def __init__(self, directory: Path) -> None:
        self._files = ExitStack()
        self._places: dict[str, _Place] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}  # as transformers names them where it is one of ours, else as the file does
        self._bar: Bar | None = None
        owners = _shards(directory)
        try:
            for name in dict.fromkeys(owners.values()) if owners else [SINGLE]:
                self._open(directory / name, [key for key, owner in owners.items() if owner == name])
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, promised: list[str]) -> None:
        try:
            with safe_open(path, framework="pt", device="cpu") as checked:  # refuses what is damaged; does not tell offsets
                names = set(checked.keys())
            file = self._files.enter_context(FileIO(path))
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is damaged or can't be read: {error}") from None
        if lost := [name for name in promised if name not in names]:
            raise ModelError(f"{INDEX} says that {path.name} holds {some(lost)}, but it does not")
        for name in promised or names:
            entry = header[name]
            self._places[name] = _Place(file, 8 + size + entry["data_offsets"][0])
            self.shapes[name] = tuple(entry["shape"])
            self.dtypes[name] = _FLOATS.get(entry["dtype"], entry["dtype"])

    def check(self, expected: dict[str, Shape], ignored: Iterable[str] = ()) -> None:
        """Raises ModelError unless the checkpoint has exactly the expected names and shapes; `ignored` names may be there too."""
        if missing := sorted(expected.keys() - self.shapes.keys()):
            raise ModelError(f"the checkpoint lacks {some(missing)}")
        if left := sorted(self.shapes.keys() - expected.keys() - set(ignored)):
            raise ModelError(f"the checkpoint has weights that the model does not: {some(left)}")
        wrong = [
            f"{name} is {list(self.shapes[name])}, not {list(shape)}"
            for name, shape in expected.items()
            if self.shapes[name] != shape
        ]
        if wrong:
            raise ModelError(f"weights do not fit config.json: {some(wrong)}")
        self.check_stored(expected)

    def check_stored(self, names: Iterable[str], also: Iterable[str] = ()) -> None:
        """Raises ModelError for a weight that is no floating-point number of a size that models are trained in.

        `also` are other types that may occur, as files name them.
        """
        allowed = {*_FLOATS.values(), *also}
        for name in names:
            if self.dtypes[name] not in allowed:
                raise ModelError(
                    f"{name} is stored as {self.dtypes[name]}; supported are {', '.join(_FLOATS)}, quantized weights are not"
                )

    def take(self, names: Sequence[str], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Weights [n, ...] that differ in n only, one below the other, moved and cast; memory of their own. Progress shows
        on a terminal.

        They are read rather than mapped: straight to where they belong, and without a fault at every page of the file.
        Another device than the CPU gets them as they are stored and casts them, which takes memory for both only until the
        next are taken; the CPU never holds them in `dtype`.
        """
        kinds = {self.dtypes[name] for name in names}
        if len(kinds) > 1:
            return torch.cat([self.take([name], dtype, device) for name in names])
        counts = [self.shapes[name][0] for name in names]
        stored = torch.empty((sum(counts), *self.shapes[names[0]][1:]), dtype=getattr(torch, kinds.pop()))
        for name, rows in zip(names, stored.split(counts), strict=True):
            self._read(name, rows)
        return stored.to(device).to(dtype)

    def _read(self, name: str, rows: Tensor) -> None:
        """Fills `rows` with a weight."""
        if self._bar is None:
            self._bar = Bar(total=len(self.shapes), desc="Loading", unit="weight", disable=None, delay=0.5, leave=False)
        self._bar.update()
        file, offset = self._places[name]
        left = rows.reshape(-1).view(torch.uint8).numpy().data
        try:
            file.seek(offset)
            while left and (count := file.readinto(left)):  # the system reads at most 2 GiB at once
                left = left[count:]
        except OSError as error:
            raise ModelError(f"{name} can't be read: {error}") from None
        if left:
            raise ModelError(f"{name} can't be read: {file.name} has been cut since it was opened")

    def close(self) -> None:
        self._files.close()
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def weights_size(directory: Path, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint's weights in `dtype`. Raises ModelError as Weights does."""
    with Weights(directory) as weights:
        return sum(map(math.prod, weights.shapes.values())) * dtype.itemsize


def _shards(directory: Path) -> dict[str, str]:
    """Which file each weight is in; empty for a checkpoint of a single file."""
    if (directory / SINGLE).is_file():
        return {}
    if not (directory / INDEX).is_file():
        raise ModelError(_no_weights(directory))
    owners = read_json(directory / INDEX).get("weight_map")
    if not isinstance(owners, dict) or not owners or not all(isinstance(name, str) for name in owners.values()):
        raise ModelError(f"{directory / INDEX} has no weight_map from weights to files")
    for name in dict.fromkeys(owners.values()):
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(f"{INDEX} names {name!r}: a shard is a .safetensors file of the checkpoint's own directory")
        if not (directory / name).is_file():
            raise ModelError(f"{directory} lacks {name}, which {INDEX} names")
    return owners


def _no_weights(directory: Path) -> str:
    for endings, advice in _FOREIGN.items():
        if found := sorted(path.name for path in directory.iterdir() if path.suffix in endings):
            return f"{directory} has its weights in {some(found)}: {advice}"
    return f"{directory} has neither {SINGLE} nor {INDEX}"


def some(names: list[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
