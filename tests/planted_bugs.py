"""Do the tests find bugs? Plants one-line bugs in a copy of the scheduler and its strategies, one at a time, and runs the tests.

    python tests/planted_bugs.py [NAME ...]

Prints what caught each bug, and the score; exits with 1 if one was missed. Takes some minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TESTS = ["test_scheduler.py", "test_sharing.py", "test_block_pool.py", "test_seeded.py", "test_wide.py", "test_beam.py"]
TESTS += ["test_contrastive.py", "test_tree.py", "test_mcts.py", "test_state_machine.py"]


class Bug(NamedTuple):
    """`old` becomes `new` in a file of scheduler/."""

    file: str
    old: str
    new: str


BUGS = {
    "a fork's block is counted one short": Bug(
        "kv_manager.py", "self.pool.retain(self.table.blocks(dst))", "self.pool.retain(self.table.blocks(dst)[1:])"
    ),
    "all forks write in place: no copy on write": Bug(
        "kv_manager.py",
        "copy[in_place[np.unique(block[in_place], return_index=True)[1]]] = False",
        "copy[:] = False",
    ),
    "in-place write to a published tail": Bug(
        "kv_manager.py", "(pool.uid[block] != 0) | (pool.refs[block] > 1)", "(pool.refs[block] > 1)"
    ),
    "a block is published before it is full": Bug(
        "kv_manager.py",
        "int(table.computed[seq]) // size, len(group.trunk)",
        "-(-int(table.computed[seq]) // size), len(group.trunk)",
    ),
}


def main() -> None:
    chosen = [name for name in BUGS if not sys.argv[1:] or name in sys.argv[1:]]
    missed = []
    for name in chosen:
        found = caught(BUGS[name])
        print(f"{'caught' if found else 'MISSED':<7} {name}{f': {found}' if found else ''}", flush=True)
        missed += [] if found else [name]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} planted bugs caught")
    sys.exit(bool(missed))


def caught(bug: Bug) -> str | None:
    """The first test that fails with the bug."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "pagefork"
        shutil.copytree(ROOT / "scheduler", package / "scheduler")
        (package / "__init__.py").touch()
        path = package / "scheduler" / bug.file
        source = path.read_text()
        if source.count(bug.old) != 1:
            raise SystemExit(f"{bug.file} has {source.count(bug.old)} places that read {bug.old!r}: plant the bug elsewhere")
        path.write_text(source.replace(bug.old, bug.new))
        tests = [str(ROOT / "tests/scheduler" / name) for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--noconftest", *tests]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": folder}, capture_output=True, text=True, timeout=900, check=False
        )
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if done.returncode and not failed:
            raise SystemExit(done.stdout + done.stderr)
        return failed[0].split(" - ")[0].split("::")[-1] if failed else None


if __name__ == "__main__":
    main()
