"""What a result is worth depends on what it was measured with."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pagefork import __version__


def machine_facts() -> dict[str, Any]:
    """The processor, the versions, and the command that was run."""
    import torch

    return {
        **host_facts(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def host_facts() -> dict[str, Any]:
    """The same, of a process that computes nothing: without torch."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["pagefork", *sys.argv[1:]]),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "python": platform.python_version(),
        "pagefork": __version__,
    }


def _cpu_name() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
