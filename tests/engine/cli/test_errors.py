"""Usage errors: one line, exit code 2."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.cli import COMMAND, ENVIRONMENT, assert_refused, pagefork

from pagefork import __version__


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dtype", "float8", "x"],
        ["--max-tokens", "many", "x"],
        ["--logit-bias", "3", "x"],
        ["--beams", "x"],
        ["--top-k"],
    ],
)
def test_a_wrong_flag_is_refused_in_one_line_that_names_it_and_the_help(arguments: list[str]) -> None:
    assert_refused(pagefork("generate", *arguments), arguments[0], "--help")


def test_a_wrong_command_is_refused_in_one_line_that_names_it() -> None:
    assert_refused(pagefork("serf"), "serf", "--help")


def test_a_process_ends_with_the_exit_code_of_a_usage_error() -> None:
    done = subprocess.run([*COMMAND, "generate", "--beams"], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


INTERRUPT = """
import runpy, signal, sys
class AtTyper:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, AtTyper())
runpy.run_module("pagefork", run_name="__main__")
"""


def test_ctrl_c_while_the_command_is_imported_is_one_line() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", INTERRUPT], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "pagefork: interrupted\n")


@pytest.mark.parametrize("group", [[], ["bench"]])
def test_a_group_without_a_command_shows_its_help(group: list[str]) -> None:
    done = pagefork(*group)
    assert done.code == 2
    assert done.stderr == pagefork(*group, "--help").stdout


def test_version() -> None:
    assert pagefork("--version") == (0, f"pagefork {__version__}\n", "")
