"""`pagefork chat`, through a pipe and on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from support.cli import COMMAND, ENVIRONMENT, assert_refused, demo_with_template, pagefork
from transformers import AutoTokenizer

from pagefork import LLM, SamplingParams
from pagefork.cli.chat import _turn
from pagefork.cli.conversation import Conversation
from pagefork.demo import demo_path

TEMPLATE = (
    "{% for message in messages %}# {{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant: {% endif %}"
)
LENGTH = 12


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("chat") / "template.jinja"
    file.write_text(TEMPLATE)
    return str(file)


@pytest.fixture
def settings(template: str) -> list[str]:
    return ["--chat-template", template, "--temperature", "0", "--max-tokens", str(LENGTH), "--dtype", "float32", "--ignore-eos"]


def rendered(messages: list[dict[str, str]]) -> list[int]:
    """A conversation as transformers renders it."""
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    ids: Any = tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, add_generation_prompt=True, return_dict=False)
    return list(ids)


def talk(demo: LLM, questions: list[str], system: str | None = None) -> list[dict[str, str]]:
    """The messages of a conversation with greedy answers."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question in questions:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer(demo, messages)})
    return messages


def answer(demo: LLM, messages: list[dict[str, str]]) -> str:
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    return demo.generate([rendered(messages)], params, use_tqdm=False)[0].outputs[0].text


def expected_answers(demo: LLM, questions: list[str], system: str | None = None) -> list[str]:
    return [message["content"] for message in talk(demo, questions, system) if message["role"] == "assistant"]


def printed(answers: list[str]) -> str:
    return "".join(answer if answer.endswith("\n") else f"{answer}\n" for answer in answers)


def test_every_line_is_answered_with_the_whole_conversation_before_it(demo: LLM, settings: list[str]) -> None:
    questions = ["def add(a, b):", "import os", "class Queue:"]
    done = pagefork("chat", *settings, stdin="\n".join(questions))
    assert done == (0, printed(expected_answers(demo, questions)), "")


def test_the_template_of_the_model_is_used_unless_another_is_given(demo: LLM, settings: list[str], tmp_path: Path) -> None:
    model = ["--model", str(demo_with_template(tmp_path / "model", TEMPLATE.replace("#", "--")))]
    without = settings[2:]
    done = pagefork("chat", *without, *model, stdin="import os")
    given = pagefork("chat", *settings, *model, stdin="import os")
    assert (done.code, done.stderr, given.stdout) == (0, "", printed(expected_answers(demo, ["import os"])))
    assert done.stdout != given.stdout


def test_reset_forgets_and_system_changes_the_system_message(demo: LLM, settings: list[str]) -> None:
    done = pagefork("chat", *settings, "--system", "Be brief.", stdin="one\n\n/reset\none\n/reset\n/system\none\n/exit\nmore\n")
    told, silent = expected_answers(demo, ["one"], "Be brief."), expected_answers(demo, ["one"])
    assert told != silent
    assert done == (0, printed([*told, *told, *silent]), "")


def test_settings_that_are_not_given_are_those_of_the_models_generation_config(settings: list[str], tmp_path: Path) -> None:
    """Greedy by default, as generate() of transformers is; a flag wins over what the file says."""
    own = {"do_sample": True, "top_k": 1, "repetition_penalty": 3.0}
    silent, sampling = (demo_with_template(tmp_path / name, TEMPLATE) for name in ("silent", "sampling"))
    (sampling / "generation_config.json").write_text(json.dumps(own))
    rest = ["--max-tokens", str(LENGTH), "--dtype", "float32", "--ignore-eos"]

    def said(model: Path, *flags: str) -> str:
        done = pagefork("chat", "--model", str(model), *rest, *flags, stdin="import os\n")
        assert done.code == 0, done.stderr
        return done.stdout

    penalized = said(silent, "--temperature", "0", "--repetition-penalty", "3")
    assert said(silent) == said(silent, "--temperature", "0") != penalized
    assert said(sampling) == penalized != said(sampling, "--repetition-penalty", "1")


def test_a_message_may_begin_with_a_slash(demo: LLM, settings: list[str]) -> None:
    done = pagefork("chat", *settings, stdin="//usr/bin\n")
    assert done.stdout == printed(expected_answers(demo, ["/usr/bin"]))


def test_stats_count_the_cached_history(settings: list[str]) -> None:
    done = pagefork("chat", *settings, "--stats", "--block-size", "4", stdin="def add(a, b):\nimport os\n")
    first, second = (list(map(int, re.findall(r"\d+", line)[:3])) for line in done.stderr.splitlines())
    assert (first[1], first[2], second[2]) == (0, LENGTH, LENGTH)
    assert first[0] - 4 < second[1] < second[0]
    assert second[1] % 4 == 0


def test_a_conversation_that_outgrows_the_model_forgets_its_oldest_turns(demo: LLM, settings: list[str]) -> None:
    questions = ["def add(a, b):", "import os", "class Queue:", "import sys", "x = 1"]
    before = talk(demo, questions[:-1])
    last = {"role": "user", "content": questions[-1]}
    limit = len(rendered([*before, last])) + LENGTH - 1  # one token too few for the last answer
    done = pagefork("chat", *settings, "--max-model-len", str(limit), stdin="\n".join(questions))
    forgotten = int(done.stderr.rpartition("(")[2].removesuffix(")\n"))
    assert done.stderr.count("\n") == 1 and f"max_model_len={limit}" in done.stderr
    assert 0 < forgotten < 4
    shorter, longer = ([*before[2 * turns :], last] for turns in (forgotten, forgotten - 1))
    assert len(rendered(shorter)) <= limit // 2 < len(rendered(longer))
    assert done.stdout == printed([*expected_answers(demo, questions[:-1]), answer(demo, shorter)])


def test_control_characters_of_a_model_never_come_out(settings: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    [escape], [letter] = (tokenizer.encode(text, add_special_tokens=False) for text in ("\x1b", "x"))
    allowed = ["--allowed-token-ids", str(escape), "--allowed-token-ids", str(letter)]
    done = pagefork("chat", *settings, *allowed, "--temperature", "1000", stdin="hello\n")
    assert re.fullmatch(r"x+\n", done.stdout)
    assert len(done.stdout) < LENGTH + 1  # the rest were escapes


def test_without_a_template_the_error_says_what_to_do() -> None:
    assert_refused(pagefork("chat", stdin="hello"), "'demo'", "--chat-template")


@pytest.mark.parametrize(
    ("text", "named"),
    [("{% for %}", "template"), ("plain", "plain"), ("{{ raise_exception('no system here') }}", "no system here")],
)
def test_a_template_that_cannot_be_used_is_refused_before_the_first_message(text: str, named: str, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(text)
    assert_refused(pagefork("chat", "--chat-template", str(file), stdin=""), named)


def test_what_a_pipe_may_not_say_is_refused(settings: list[str], tmp_path: Path) -> None:
    assert_refused(pagefork("chat", *settings, stdin="/rest\n"), "/rest", "/help")
    assert_refused(pagefork("chat", *settings, stdin=b"\xff\n"), "UTF-8")
    assert_refused(pagefork("chat", *settings, "--max-model-len", "16", stdin="word " * 99), "max_model_len=16")
    assert_refused(pagefork("chat", "--n", "2"), "--n")
    (tmp_path / "latin").write_bytes(b"\xe9")
    assert_refused(pagefork("chat", "--chat-template", str(tmp_path / "latin")), "latin", "UTF-8")


def test_min_tokens_may_be_more_than_the_default_of_max_tokens_which_chat_does_not_have(settings: list[str]) -> None:
    unlimited = [*settings, "--max-tokens", "none", "--min-tokens", "20", "--max-model-len", "64", "--stats"]
    done = pagefork("chat", *unlimited, stdin="x\n")
    assert done.code == 0, done.stderr
    assert int(re.findall(r"(\d+) tokens in", done.stderr)[0]) > 20
    assert pagefork("chat", *settings[:4], "--min-tokens", "20", "--max-model-len", "64", stdin="x\n").code == 0
    assert_refused(pagefork("chat", *settings, "--min-tokens", "20"), "min_tokens=20", f"max_tokens={LENGTH}")


def test_a_pipe_is_read_as_utf8_whatever_the_locale(settings: list[str]) -> None:
    text = "caf\u00e9 \u2192\n"
    assert pagefork("chat", *settings, stdin=text, locale="ascii") == pagefork("chat", *settings, stdin=text)
    assert_refused(pagefork("chat", *settings, stdin=b"\xe9\n", locale="latin-1"), "UTF-8")


class Interrupted(io.StringIO):
    """A standard output during whose first write Ctrl-C comes."""

    def write(self, text: str) -> int:
        if not self.tell():
            super().write(text)
            raise KeyboardInterrupt
        return super().write(text)


@pytest.mark.parametrize("length", [1, LENGTH])
def test_in_a_script_ctrl_c_is_never_forgotten_not_even_at_the_last_token(
    length: int, demo: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    conversation = Conversation(demo.engine, params, None, TEMPLATE)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with redirect_stdout(Interrupted()), pytest.raises(KeyboardInterrupt):
        _turn(conversation, "import os", stats=False)
    assert conversation.interrupted
    conversation.ask("import sys", lambda text: None)
    assert not conversation.interrupted


# A terminal of its own, so that the bytes of Ctrl-C and Ctrl-D become signals and the end of input.
LAUNCH = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Terminal:
    """A command in a terminal, typed to and read from."""

    def __init__(self, *arguments: str) -> None:
        self._here, there = pty.openpty()
        environment = {**ENVIRONMENT, "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *COMMAND, *arguments], stdin=there, stdout=there, stderr=there, env=environment
        )
        os.close(there)

    def type(self, text: str) -> None:
        os.write(self._here, text.encode())

    def read_until(self, pattern: str, nudge: str = "") -> str:
        """What appears, up to a match. Fails after a minute without a new character; `nudge` is typed again in between."""
        shown = ""
        while not re.search(pattern, shown):
            ready: list[int] = []
            for _ in range(12):
                ready, _, _ = select.select([self._here], [], [], 5)
                if ready:
                    break
                self.type(nudge)
            assert ready, shown
            try:
                shown += os.read(self._here, 1024).decode(errors="replace")
            except OSError:  # how Linux ends a terminal whose other side is closed
                break
        assert re.search(pattern, shown), shown
        return shown

    def close(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            os.close(self._here)


def test_on_a_terminal_ctrl_c_stops_an_answer_which_is_remembered_and_ctrl_d_leaves(template: str) -> None:
    terminal = Terminal("chat", "--chat-template", template, "--ignore-eos", "--stats", "--seed", "1")
    terminal.read_until("/help lists the commands.*\n.*> ")
    terminal.type("import os\n")
    terminal.read_until(r"import os\r\n[^\n]*\n")  # the echo and a line of an answer that would go on for 1000 tokens
    terminal.type("\x03")
    stopped = re.search(r"\[(\d+) prompt tokens, .*; (\d+) tokens in .*, abort\]", terminal.read_until(r"abort\](.|\s)*> "))
    assert stopped and 0 < int(stopped[2]) < 900
    terminal.type("/rest\n")
    terminal.read_until(r"pagefork: there is no command /rest; /help lists them\r\n(.|\s)*> ")
    terminal.type("half a line")
    terminal.read_until("half a line")
    # A signal that comes right before the line editor waits for a key is seen with the next key only.
    terminal.type("\x03")
    terminal.read_until("> ", nudge="\x03")
    terminal.type("def\n")
    terminal.read_until(r"def\r\n[^\n]*\n")
    terminal.type("\x03")
    again = re.search(r"\[(\d+) prompt tokens, (\d+) of", terminal.read_until(r"abort\](.|\s)*> "))
    assert again and int(again[1]) > int(stopped[1]) + int(stopped[2]) / 2
    terminal.type("\x04")
    assert terminal.close() == 0


def test_in_a_pipe_ctrl_c_ends_everything(template: str) -> None:
    command = [*COMMAND, "chat", "--chat-template", template, "--ignore-eos"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=ENVIRONMENT) as process:
        assert process.stdin and process.stdout
        process.stdin.write(b"import os\nimport sys\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, b"pagefork: interrupted\n")
