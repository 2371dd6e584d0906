"""Runs one peer: python -P serve.py PEER VARIANT MODEL FOLDER.

PEER is a file beside this one, VARIANT its precision, MODEL a checkpoint directory and FOLDER where converted models are
kept. This folder's parent comes last in the module path, so that `ctranslate2` is the package and `peers.ctranslate2` ours.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from peers.protocol import serve


def main() -> None:
    peer, variant, model, folder = sys.argv[1:]
    serve(lambda: import_module(f"peers.{peer}").start(Path(model), variant, Path(folder)))


if __name__ == "__main__":
    main()
