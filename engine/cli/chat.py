"""`pagefork chat`: a conversation in the terminal, or one message per line of standard input."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pagefork.cli.errors import warn
from pagefork.cli.flags import Given
from pagefork.cli.generate import DEFAULT_ENGINE
from pagefork.cli.strategy import Preset, sampling_params
from pagefork.cli.text import decoded, one_line, printable
from pagefork.config import EngineConfig
from pagefork.scheduler.errors import InvalidRequestError, PageforkError
from pagefork.scheduler.params import PRESETS, SamplingParams

if TYPE_CHECKING:
    from pagefork.cli.conversation import Conversation
    from pagefork.outputs import RequestOutput

# The model's own, which only loading it tells.
DEFAULT_PARAMS = dict.fromkeys(
    ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")
)
NOT_SHOWN = {"n", "logprobs", "prompt_logprobs", "logprobs_mode", "trace"}
HELP = """\
/reset          forget the conversation
/system TEXT    change the system message; without a text there is none
/help           this list
/exit           leave, as Ctrl-D does
//...           a message that begins with a single slash
Ctrl-C stops an answer; what came of it is remembered."""


def chat(
    *,
    system: Annotated[str | None, typer.Option(help="The system message")] = None,
    chat_template: Annotated[Path | None, typer.Option(metavar="FILE", help="Jinja file used instead of the model's own")] = None,
    stats: Annotated[bool, typer.Option(help="After each answer, a line on stderr: tokens, cached tokens, seconds")] = False,
    preset: Preset = None,
    params: Annotated[Given, SamplingParams, NOT_SHOWN] = DEFAULT_PARAMS,
    engine: Annotated[Given, EngineConfig] = DEFAULT_ENGINE,
) -> None:
    """Talk with a model that has a chat template. Sampling settings that are not given are those of its generation_config.

    On a terminal /help lists the commands. Otherwise every line of standard input is a message or a command. When
    the conversation outgrows max_model_len its oldest turns are forgotten, with a line on stderr.
    """
    sampling_params(preset, {"max_tokens": None, **params})  # what can't be honoured is refused before the model is loaded
    config = EngineConfig(**{**DEFAULT_ENGINE, **engine})
    template = None if chat_template is None else decoded(chat_template.read_bytes(), str(chat_template))
    if sys.stdin is None:
        raise InvalidRequestError("chat reads standard input, which is closed")
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # a pipe or a file, whatever the locale
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    from pagefork import LLMEngine
    from pagefork.cli.conversation import Conversation

    loaded = LLMEngine(config)
    sampling = loaded.default_params().replace(**{"max_tokens": None, **PRESETS.get(preset or "", {}), **params})
    conversation = Conversation(loaded, sampling, system, template)
    if interactive:
        print("/help lists the commands, Ctrl-D leaves.")
    for line in _lines(interactive):
        if line == "/exit":
            break
        try:
            _turn(conversation, line, stats=stats)
        except PageforkError as error:
            if not interactive:
                raise
            warn(str(error))


def _lines(interactive: bool) -> Iterator[str]:
    """What the user says, without empty lines. Ctrl-C at the prompt takes a line back."""
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401 (input() then edits lines and remembers them)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            break
        except UnicodeDecodeError as error:
            raise InvalidRequestError(f"standard input is not UTF-8 text: {error.reason}") from None
        except KeyboardInterrupt:
            if not interactive:
                raise
            line = ""
            print()
        if line:
            yield line
    if interactive:
        print()


def _turn(conversation: Conversation, line: str, *, stats: bool) -> None:
    """Obey a command, or ask and show the answer."""
    command, _, rest = line.partition(" ")
    if command == "/help":
        print(HELP, file=sys.stderr)
    elif command == "/reset":
        conversation.reset()
    elif command == "/system":
        conversation.system = rest.strip() or None
    elif command.startswith("/") and not command.startswith("//"):
        raise InvalidRequestError(f"there is no command {one_line(command)}; /help lists them")
    else:
        output = conversation.ask(line.removeprefix("/") if line.startswith("//") else line, _show)
        if not output.outputs[0].text.endswith("\n"):
            print(flush=True)
        if stats:
            print(_stats(output), file=sys.stderr)
        if conversation.interrupted and not sys.stdin.isatty():
            raise KeyboardInterrupt  # a script is stopped as a whole


def _show(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def _stats(output: RequestOutput) -> str:
    metrics, answer = output.metrics, output.outputs[0]
    seconds = (metrics.finished_time or metrics.arrival_time) - metrics.arrival_time
    read = f"{len(output.prompt_token_ids)} prompt tokens, {metrics.cached_tokens} of them cached"
    return f"[{read}; {len(answer.token_ids)} tokens in {seconds:.2f} s, {answer.finish_reason}]"
