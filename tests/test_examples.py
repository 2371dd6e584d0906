"""The examples run as they are, on the demo model, and show what they say."""

from __future__ import annotations

import ast
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

from support.serving_process import serving

from pagefork import LLM, SamplingParams
from pagefork.demo import demo_path

EXAMPLES = Path(__file__).parents[1] / "examples"
QUOTED = r"""('[^']*(?:\\'[^']*)*'|"[^"]*")"""


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def found(pattern: str, text: str) -> list[tuple[str, ...]]:
    """Groups of every line that matches, quoted ones evaluated."""
    groups = re.findall(f"^{pattern}$", text, re.MULTILINE)
    return [tuple(ast.literal_eval(g) if g[:1] in ("'", '"') else g for g in group) for group in groups]


def brackets_match(text: str) -> bool:
    rest = re.sub(r"[^()\[\]{}]", "", text)
    while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", rest)) != rest:
        rest = shorter
    return not rest


def test_every_example_is_tested() -> None:
    mine = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'run("{path.name}"' not in mine] == []


def test_offline_batch_gives_every_prompt_what_its_parameters_ask_for() -> None:
    shown = run("offline_batch.py")
    texts = found(rf"  (\d): {QUOTED}", shown)
    ends = found(r"     (\d+) tokens of mean log-prob (-\d+\.\d\d), (\w+)", shown)
    assert [index for index, _ in texts] == ["0", "0", "1", "2", "0", "0"]
    assert [count for count, _, _ in ends[:-1]] == ["24", "12", "12", "12", "12"]
    assert len({text for _, text in texts[1:4]}) == 3
    assert "\n" not in texts[5][1] and ends[5][2] == "stop"
    [(forks, tokens, steps)] = found(r"25 prompt tokens, (\d+) forks, (\d+) tokens in (\d+) steps", shown)
    assert int(forks) == (3 - 1) + (6 - 1)
    assert int(tokens) == 24 + 3 * 12 + 12 + int(ends[5][0])
    assert int(steps) == 24


def test_streaming_shows_deltas_that_add_up_to_the_text_of_each_request() -> None:
    shown = run("streaming.py", "--model", str(demo_path()))
    deltas = found(rf"step +(\d+)  (\w+) +{QUOTED}", shown)
    ends = {name: (reason, text) for name, reason, text in found(rf" +(\w+) ends: (\w+), {QUOTED}", shown)}
    assert {name: reason for name, (reason, _) in ends.items()} == {"first": "length", "endless": "abort", "late": "length"}
    for name, (_, text) in ends.items():
        assert text and "".join(delta for _, mine, delta in deltas if mine == name) == text
    assert [int(step) for step, name, _ in deltas if name == "late"] == list(range(6, 22))
    [(free, blocks)] = found(r"(\d+) of (\d+) cache blocks are free", shown)
    assert free == blocks


def test_the_service_streams_refuses_and_aborts_the_request_of_a_client_that_hangs_up() -> None:
    shown = run("service.py", "--self-test")
    clients = found(rf"([\w ]+): (\d+) lines, (\w+): {QUOTED}", shown)
    assert [(name, reason) for name, _, reason, _ in clients] == [
        *[("two outputs", "length")] * 2,
        ("one output", "length"),
        ("hung up", "None"),
    ]
    assert clients[0][3] != clients[1][3]
    assert int(clients[2][1]) > 1 and clients[2][3]
    assert clients[3][1] == "3"
    assert "refused: SamplingParams: max_tokens=-1" in shown
    [(tokens, free, blocks)] = found(r"(\d+) tokens generated; (\d+) of (\d+) cache blocks are free", shown)
    assert free == blocks and 3 * 12 + 3 <= int(tokens) < 900


def test_the_service_outlives_what_clients_do_to_a_line_and_answers_one_that_closes_its_writing_side() -> None:
    command = [sys.executable, str(EXAMPLES / "service.py"), "--port", "0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env={**os.environ, "PYTHONSAFEPATH": "1"}, stdout=pipe, stderr=pipe, text=True) as service:
        assert service.stdout is not None
        address = ("127.0.0.1", int(service.stdout.readline().split()[-1]))
        try:
            reset = socket.create_connection(address, timeout=60)
            reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            reset.send(b"{")
            reset.close()
            socket.create_connection(address, timeout=60).close()
            with socket.create_connection(address, timeout=60) as endless:
                endless.sendall(b"x" * (2 << 20 | 1))
                assert b"limit" in endless.recv(1024)
            with socket.create_connection(address, timeout=60) as half:
                half.sendall(b'{"prompt": "import os", "params": {"max_tokens": 4, "ignore_eos": true}}')
                half.shutdown(socket.SHUT_WR)
                assert b'"finish_reason":"length"' in half.makefile("rb").read()
        finally:
            service.send_signal(signal.SIGINT)
            _, error = service.communicate(timeout=60)
    assert (service.returncode, error) == (0, "")


def test_logits_processors_write_only_digits_and_only_brackets_that_match() -> None:
    lines = found(rf"(\w+): {QUOTED}, (matched|not matched)", run("logits_processor.py"))
    texts = {kind: [text for name, text, _ in lines if name == kind] for kind in ("free", "digits", "brackets")}
    assert [len(kind) for kind in texts.values()] == [4, 4, 4]
    assert all(re.fullmatch(r"PORT = \d{4,}", text) for text in texts["digits"])
    assert all(brackets_match(text) for text in texts["brackets"])
    assert not all(brackets_match(text) for text in texts["free"])
    assert all((verdict == "matched") == brackets_match(text) for _, text, verdict in lines)


def test_searches_run_in_one_batch_and_tree_search_balances_its_brackets() -> None:
    shown = run("search.py")
    names = [name for name, _, _ in found(r"([\w ]+): (\d+) tokens computed, (\d+) forks, \d+% of blocks saved", shown)]
    assert names == ["best of 8", "beam", "diverse beam", "contrastive", "tree search"]
    assert [index for index, _ in found(rf"  (\d): {QUOTED}.*", shown)] == ["0", "1", "0", "1", "0", "1", "0", "0"]
    tree = ast.literal_eval(shown.split("tree search")[1].splitlines()[1].strip()[3:])
    assert brackets_match("(" + tree)
    [(free, blocks)] = found(r"\d+ tokens in \d+ steps; (\d+) of (\d+) blocks are free", shown)
    assert free == blocks


def test_the_bare_client_needs_two_packages_and_shows_what_the_engine_in_process_writes(demo: LLM) -> None:
    prompt = "def read_lines(path):\n"
    [expected] = demo.generate(prompt, SamplingParams(temperature=0, max_tokens=100), use_tqdm=False)
    with serving() as served:
        shown = run("bare_client.py", served.endpoint, prompt)
        assert run("bare_client.py").startswith("def main(")
    [output] = expected.outputs
    assert shown == f"{prompt}{output.text}\n[{output.finish_reason}]\n"
    tree = ast.parse((EXAMPLES / "bare_client.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported - sys.stdlib_module_names == {"msgspec", "zmq"}
