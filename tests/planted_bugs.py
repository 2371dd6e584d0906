"""Do the tests find bugs? Plants one-line bugs in copies of the package, and runs the tests on each.

    python tests/planted_bugs.py [WORD ...]

Prints which test caught each bug (of those whose names hold a WORD), and the score; exits with 1 if one was missed. Takes
minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SECONDS = 300  # that the tests of one bug may take


class Bug(NamedTuple):
    """`old` becomes `new` in a file of scheduler/ or engine/; `tests` are to find that: files of tests, or a test of one.

    part: scheduler or engine; its tests are those of tests/scheduler/ or tests/engine/. Or fused: a file of engine/, and tests of
    tests/engine/fused/, in Triton's interpreter.
    """

    file: str
    old: str
    new: str
    tests: str
    part: str = "scheduler"


SHARING = "block_pool sharing scheduler"
SEARCHES = "lockstep beam contrastive mcts state_machine"

BUGS = {
    # Blocks
    "a fork's block is counted one short": Bug(
        "kv_manager.py", "self.pool.retain(self.table.blocks(dst))", "self.pool.retain(self.table.blocks(dst)[1:])", SHARING
    ),
    "a block that is held twice is counted once": Bug(
        "block_pool.py", "np.add.at(self.refs, blocks, _ONE)", "self.refs[blocks] += _ONE", SHARING
    ),
    "what was released last is evicted first": Bug(
        "block_pool.py", "self._cached.popitem(last=False)", "self._cached.popitem(last=True)", SHARING
    ),
    "an evicted block can still be found": Bug("block_pool.py", "                self.forget(block)\n", "", SHARING),
    "all forks write in place": Bug(
        "kv_manager.py", "copy[in_place[np.unique(block[in_place], return_index=True)[1]]] = False", "copy[:] = False", SHARING
    ),
    "a published block is written in place": Bug(
        "kv_manager.py", "(pool.uid[block] != 0) | (pool.refs[block] > 1)", "(pool.refs[block] > 1)", f"{SHARING} state_machine"
    ),
    "a block is published before it is full": Bug(
        "kv_manager.py",
        "begin, full = int(table.published[seq]), int(table.computed[seq]) // size",
        "begin, full = int(table.published[seq]), -(-int(table.computed[seq]) // size)",
        SHARING,
    ),
    "the source of a copy is a destination of the same plan": Bug(
        "kv_manager.py",
        "blocks = pool.allocate(needs.total)",
        "pool.release(needs.block[needs.copy]); blocks = pool.allocate(needs.total); pool.retain(needs.block[needs.copy])",
        f"{SHARING} lockstep beam",
    ),
    "the runner is not told of a block that was replaced": Bug(
        "kv_manager.py",
        "table.outdated[seqs] = np.minimum(table.outdated[seqs], index)",
        "table.outdated[seqs] = np.minimum(table.outdated[seqs], index + 1)",
        f"{SHARING} state_machine",
    ),
    # Prefix cache
    "what follows a block that was evicted is found after the next one in its place": Bug(
        "prefix_cache.py", "        uid = next(self._uids)\n", "        uid = 10**6 + block\n", f"{SHARING} state_machine seeded"
    ),
    "salts do not separate": Bug(
        "prefix_cache.py", "if salt not in self._roots:", "salt = ''\n        if salt not in self._roots:", SHARING
    ),
    "a prompt that is cached as a whole leaves nothing to compute": Bug(
        "residents.py", "min(common, shortest - 1) //", "min(common, shortest) //", SHARING
    ),
    "the block after the common ones is taken for one of them": Bug(
        "kv_manager.py", "return full if same.all() else int(np.argmin(same))", "return full", f"{SHARING} {SEARCHES}"
    ),
    # Slots
    "a slot that is used again is closed in the same plan": Bug(
        "slots.py", "        self._closed[slots] = False\n", "", f"scheduler {SEARCHES}"
    ),
    "a fork that ended meanwhile is made": Bug(
        "slots.py", "keep = self._stands(seqs, births) & ~np", "keep = ~np", f"{SEARCHES} scheduler"
    ),
    "what ended before its slot was open is opened": Bug(
        "slots.py",
        "found: Bools = (self._table.birth[seqs] == births) & (self._table.slot[seqs] >= 0)",
        "found: Bools = self._table.birth[seqs] == births",
        SEARCHES,
    ),
    "a slot is a source before its state is there": Bug(
        "slots.py", "(sources >= 0) & ~self._fresh[sources]", "sources >= 0", "state_machine"
    ),
    # Steps
    "a part of a generation is acted on": Bug("scheduler.py", "if group.expect:", "if group.expect < 0:", SEARCHES),
    "reads count for whoever has the id by then": Bug(
        "scheduler.py",
        "valid = table.birth[flight.read] == flight.read_births",
        "valid = np.ones(len(flight.read), np.bool_)",
        f"scheduler seeded {SEARCHES}",
    ),
    "what was computed before an eviction counts": Bug(
        "residents.py", " & (table.era[flight.seqs] == flight.eras)", "", f"failures {SEARCHES} seeded"
    ),
    "a group comes back while its reads are out": Bug(
        "residents.py", "if group.flights or (", "if (", f"failures {SEARCHES} seeded"
    ),
    "values are taken that nobody waits for": Bug(
        "scheduler.py", "if group is None or not group.asked:", "if group is None:", SEARCHES
    ),
    "an Ask stays out when it was answered": Bug("scheduler.py", "        group.asked = False\n", "", SEARCHES),
    "the blocks of a request without usable logits stay in the cache": Bug(
        "scheduler.py", "        if why is None:\n            self.kv.unpublish(group)\n", "", "failures"
    ),
    "a log-prob of the prompt is that of the token before": Bug(
        "scoring.py", "target.append(prompt[begin + 1 : end + 1])", "target.append(prompt[begin:end])", "scoring"
    ),
    "a prompt is scored twice after a preemption": Bug(
        "scoring.py", "begin = max(start, group.scored)", "begin = start", "scoring state_machine"
    ),
    "searches wait while the next step is planned without them": Bug(
        "scheduler.py", "if not self._flights or self._flights[-1].pipelined else 0", "", "ahead"
    ),
    # Edits and reads
    "a Finish is lost": Bug(
        "edits.py",
        "group.unfinished.discard(edit.index)\n                update.events.append(edit)",
        "group.unfinished.discard(edit.index)",
        "scheduler",
    ),
    "a fork draws from the stream of its source": Bug(
        "edits.py", "table.stream[dst[fresh]] = streams[fresh]", "table.stream[dst[fresh]] = table.stream[src[fresh]]", "sharing"
    ),
    "forks get their slots before others give theirs": Bug(
        "edits.py",
        "if self._reads:\n            self._release()\n        for slots, dst in forks:",
        "[self._slots.fork(*fork) for fork in forks]\n        self._release()\n        for slots, dst in ():",
        SEARCHES,
    ),
    "what was read and not grown keeps its slot": Bug("edits.py", "np.flatnonzero(idle)", "np.flatnonzero(idle)[:0]", SEARCHES),
    "merged parents of all groups are numbered as one": Bug("reading.py", "- part.begin, -1)", ", -1)", SEARCHES),
    "merged parents of a second part are numbered like the first": Bug(
        "reading.py", "part.parent < 0, -1, part.parent + begin)", "part.parent < 0, -1, part.parent)", SEARCHES
    ),
    # Coming back
    "blocks are taken that are not computed yet": Bug(
        "resuming.py", ">= waiting.blocks * size", ">= 0", f"resuming {SEARCHES}"
    ),
    "one shared block too few": Bug(
        "resuming.py", "first[which][found], count", "first[which][found], count - 1", f"resuming {SEARCHES}"
    ),
    # Strategies
    "parents are swapped": Bug("strategies/beam.py", "for beam in parents]", "for beam in sorted(parents)]", "beam"),
    "a pool holds one too many": Bug(
        "strategies/_hypotheses.py", "-hypothesis.score)[: self.width]", "-hypothesis.score)[: self.width + 1]", "beam"
    ),
    "groups do not hear of each other": Bug(
        "strategies/beam.py", "taken += search.chosen", "taken += []", "beam"
    ),
    "candidates that were not chosen are kept": Bug("strategies/contrastive.py", "Drop(lost)]", "Drop(lost[1:])]", "contrastive"),
    "similarity counts as much as probability": Bug(
        "strategies/contrastive.py", "np.float32(1 - alpha) * candidates.p", "candidates.p", "contrastive"
    ),
    "no virtual loss": Bug("strategies/_tree.py", "(1 + visits + child.pending)", "(1 + visits)", "tree mcts state_machine"),
    "one level too deep": Bug("strategies/_tree.py", "and node.length < limit", "and node.length <= limit", "tree mcts"),
    "running leaves are shed": Bug(
        "strategies/mcts.py",
        "if node.seq >= 0 and node.seq not in self._flying",
        "if node.seq >= 0",
        "mcts.py::test_nodes_are_shed_leaves_before_inner_nodes_and_the_least_visited_first",  # others go on for ever
    ),
    "all rollouts of a wave draw the same": Bug("strategies/mcts.py", "first + i for i", "first for i", "mcts state_machine"),
    "a tree that is not reused keeps its visits": Bug(
        "strategies/_tree.py", "child.visits, child.total, child.value = 1, child.own, child.own", "pass", "tree mcts"
    ),
}  # fmt: skip


SIMULATION = "server/simulation::test_every_request_has_one_end_and_gets_what_it_gets_alone_whatever_happens"

SERVICE_SOUND = Bug("server/service.py", "def receive(self", "def accept(self", "server/service_sessions", "engine")
SERVICE_BUGS = {
    # What is sent
    "one token more than there is credit for": Bug(
        "server/requests.py", "exchange.delivery.upto = credit.upto", "exchange.delivery.upto = credit.upto + 1", SIMULATION
    ),
    "a Finished that can't be sent is forgotten": Bug(
        "server/courier.py",
        "if not line.push(self._finished(exchange)):",
        "if line.push(self._finished(exchange)) and False:",
        SIMULATION,
    ),
    "Deltas that can't be sent are forgotten": Bug(
        "server/courier.py", "exchange.delivery.unsend(delta)", "del delta", SIMULATION
    ),
    "what a client has does not count when it comes back": Bug(
        "server/delivery.py", "cursor.tokens, cursor.characters = has.tokens, has.characters", "pass", SIMULATION
    ),
    "a new connection is sent what the old one was not": Bug(
        "server/sessions.py", "exchange.delivery.paused = True", "exchange.delivery.paused = False", SIMULATION
    ),
    # Who may
    "another body may have a rid that is taken": Bug(
        "server/requests.py", "elif known.digest == digest:", "elif known.digest:", "server/service_requests"
    ),
    "a session is whoever's names it": Bug(
        "server/sessions.py", "if session is not None and session.principal != principal:", "if session is None:", SIMULATION
    ),
    "any token will do": Bug(
        "server/sessions.py",
        "return hmac.compare_digest(hello.token.encode(), self._token.encode())",
        "return True",
        "server/service_sessions",
    ),
    "prefixes are shared between principals": Bug(
        "server/requests.py", "salt=session.principal", 'salt=""', "server/service_requests"
    ),
    # Who is gone
    "a lease never ends": Bug(
        "server/sessions.py", "silent = session.heard + self._timing.lease", "silent = session.heard + 1e9", SIMULATION
    ),
    "a grace never ends": Bug(
        "server/sessions.py", "elif now >= session.detached + self._timing.grace:", "elif now < 0:", SIMULATION
    ),
    "a client may take nothing for ever": Bug(
        "server/requests.py",
        "if now < exchange.blocked + self._stall:",
        "if now < exchange.blocked + 1e9:",
        "server/service_ends",
    ),
    "requests of a client that is gone go on": Bug(
        "server/requests.py",
        "                self._life.discard(exchange)\n            self.ledger.drop",
        "            self.ledger.drop",
        "server/service_sessions",
    ),
    "bad messages close nobody": Bug(
        "server/session.py",
        "return session.bad_frames >= _BAD_FRAMES",
        "return session.bad_frames < 0",
        "server/service_sessions",
    ),
    # What is kept
    "reserved tokens are given back late": Bug(
        "server/ledger.py",
        'through with it."""\n        self.count(exchange, 0)\n',
        'through with it."""\n',
        "server/service_requests",
    ),
    "terminals are kept for ever": Bug("server/ledger.py", "now + self._keep", "now + 1e9", "server/service_ends"),
    "terminals are not kept": Bug("server/ledger.py", "now + self._keep", "now - self._keep", "server/service_ends"),
    # Ends
    "draining takes in new requests": Bug("server/requests.py", "if self.draining:", "if not self:", "server/service_ends"),
    "draining forgets requests that wait": Bug(
        "server/service.py",
        "if self._requests.ledger.active:\n                self._agenda",
        "if False:\n                self._agenda",
        SIMULATION,
    ),
    "an abort that overtakes its prompt is forgotten": Bug(
        "server/gate.py", "self._aborted.add(ticket.request_id)", "pass", "server/gate"
    ),
    # The client
    "a client does not see that its session is gone": Bug(
        "client/link.py", "if not message.resumed:", "if not message:", "client/client_state"
    ),
    "a client asks for all of it again": Bug("client/request.py", "Have(*self._have.get(index, (0, 0)))", "Have()", SIMULATION),
    "a client takes what does not follow": Bug(
        "client/request.py", "if part.start != tokens:", "if part.start < 0:", "client/client_state"
    ),
    "a client sends no Abort once it is back": Bug(
        "client/state.py",
        "        if request.aborted:\n            self.send(Abort(rid=request.rid))\n",
        "",
        "client/client_state",
    ),
    # The gateway
    "a call goes on when its client has left": Bug(
        "http/answers.py",
        "asyncio.wait({worker, left, stopping}",
        "asyncio.wait({worker, stopping}",
        "http/leaving::test_a_client_that_leaves_frees_the_blocks_of_all_its_requests",
    ),
    "a stream that failed says that it is done": Bug(
        "http/answers.py",
        'await send(_event(refusal.body()) | {"more_body": False})',
        'await send(_event(refusal.body())); await send({"type": "http.response.body", "body": _DONE, "more_body": False})',
        "http/process::test_what_is_open_when_the_time_to_drain_is_over_is_told_so",
    ),
    "a stream is read faster than its client reads": Bug(
        "http/running.py",
        "asyncio.Queue(_AHEAD)",
        "asyncio.Queue()",
        "http/leaving::test_a_slow_reader_holds_up_its_own_outputs_only",
    ),
    "choices of several prompts are mixed up in a stream": Bug(
        "http/running.py",
        "first = at * self._call.choices",
        "first = at",
        "http/openai_client::test_a_stream_adds_up_to_the_whole_answer",
    ),
    "the usage counts the first prompt alone": Bug(
        "http/running.py",
        "prompt = sum(len(output.prompt_token_ids) for output in outputs)",
        "prompt = len(outputs[0].prompt_token_ids)",
        "http/openai_client::test_completions_are_those_of_the_engine",
    ),
    "any API key will do": Bug(
        "http/guard.py",
        " or not hmac.compare_digest(key.strip().encode(), self._key)",
        "",
        "http/refusals::test_every_route_but_health_takes_the_key",
    ),
    "any Host will do": Bug(
        "http/guard.py",
        'if "*" not in self._hosts and (',
        'if "*" in self._hosts and (',
        "http/refusals::test_the_host_has_to_be_one_of_this_server",
    ),
    # Overlap
    "results are left where nothing can be planned": Bug(
        "core.py",
        "(0 if plan is None else scheduler.ahead)",
        "scheduler.ahead",
        "overlap::test_a_step_returns_the_outputs_of_the_one_before_it",
    ),
    "an engine is idle while a step is computed": Bug(
        "core.py",
        "self._scheduler.has_unfinished or self._scheduler.in_flight > 0 or",
        "self._scheduler.has_unfinished or",
        "overlap::test_an_output_that_ends_unforeseen_is_out_before_the_step_that_was_begun_in_vain_is_over",
    ),
    "processors are forgotten while a step may call them": Bug(
        "overlap.py",
        "self._worker.put(partial(self._processors.forget, number))",
        "self._processors.forget(number)",
        "threaded_runner::test_processors_stay_known_until_the_plans_that_may_name_them_are_computed",
    ),
    "a thread takes all cores": Bug(
        "overlap.py",
        "torch.set_num_threads(threads)",
        "pass",
        "threaded_runner::test_the_thread_computes_with_as_many_of_torchs_threads_as_its_user",
    ),
}

GRAPHS_SOUND = Bug("graph.py", "def run(self", "def ran(self", "graph_steps", "fused")
GRAPH_BUGS = {
    "what the host is told of block tables stays there": Bug(
        "block_tables.py", "self.device.view(-1)[sent[0]] = sent[1].int()", "pass", "graph_steps"
    ),
    "the padding of a graph draws for a slot": Bug(
        "fused_draw.py", "np.full(size, nobody, np.int32)", "np.full(size, nobody - 1, np.int32)", "graph_steps"
    ),
    "a graph draws for the next position": Bug(
        "graph.py", "plan.rows.start[probes[0].at])", "plan.rows.start[probes[0].at] + 1)", "graph_steps"
    ),
    "what was read is fetched when the next step has overwritten it": Bug(
        "pending.py",
        "_Leaving(packed(self._columns, device)) if fused_on(device) else None",
        "None",
        "overlapped_graphs",
    ),
    "graphs write no hidden states": Bug(
        "models/decoder.py",
        "        cache.write_hidden(hidden[: len(batch.blocks)], batch.blocks, batch.offsets)\n",
        "",
        "graph_steps",
    ),
}  # fmt: skip


def main() -> None:
    words = sys.argv[1:]
    everything = BUGS | {name: bug._replace(part="engine") for name, bug in SERVICE_BUGS.items()}
    everything |= {name: bug._replace(part="fused") for name, bug in GRAPH_BUGS.items()}
    chosen = {name: bug for name, bug in everything.items() if not words or any(word in name for word in words)}
    for bug in chosen.values():
        planted(bug)
    for sound in (Bug("scheduler.py", "def schedule(self)", "def plan(self)", "scheduler"), SERVICE_SOUND, GRAPHS_SOUND):
        check_the_tests(sound, [bug for bug in chosen.values() if bug.part == sound.part])
    missed = 0
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = pool.map(caught, chosen.values())
        for name, by in zip(chosen, found, strict=True):
            print(f"{'MISSED' if by is None else 'caught'}  {name}{f': {by}' if by else ''}", flush=True)  # noqa: T201
            missed += by is None
    print(f"{len(chosen) - missed} of {len(chosen)} planted bugs caught")  # noqa: T201
    sys.exit(bool(missed))


def check_the_tests(fatal: Bug, bugs: list[Bug]) -> None:
    """Those of `bugs` pass as the code is, and are tests of the copy: with a fatal change, some fail."""
    if not bugs:
        return
    tests = " ".join(sorted({name for bug in bugs for name in bug.tests.split()}))
    if (broken := caught(fatal._replace(new=fatal.old, tests=tests))) is not None:
        raise SystemExit(f"{broken} fails with no bug planted")
    if caught(fatal) is None:
        raise SystemExit(f"the tests pass although {fatal.file} can't work: it is not the copy that they test")


def caught(bug: Bug) -> str | None:
    """The first test that fails with the bug."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "pagefork"  # it is found before the installed one
        if bug.part != "scheduler":
            shutil.copytree(ROOT / "engine", package, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
            place = package
        else:
            package.mkdir()
            (package / "__init__.py").touch()  # it has no engine
            place = package / "scheduler"
        shutil.copytree(ROOT / "scheduler", package / "scheduler", ignore=shutil.ignore_patterns("__pycache__"))
        (place / bug.file).write_text(planted(bug))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
        command += ["--noconftest"] if bug.part == "scheduler" else []  # a conftest imports the engine
        command += [_path(bug.part, name) for name in bug.tests.split()]
        environment = {"PYTHONPATH": folder, "HYPOTHESIS_STORAGE_DIRECTORY": folder, "OMP_NUM_THREADS": "1"}
        environment |= {"TRITON_INTERPRET": "1"} if bug.part == "fused" else {}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return f"hang: {SECONDS} s"
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED tests", "ERROR tests"))]
        if done.returncode and not failed:
            raise SystemExit(done.stdout + done.stderr)
        return failed[0].split(" - ")[0].split("::")[-1] if failed else None


def _path(part: str, name: str) -> str:
    """Of the file that holds the tests `name`, or of the one test `name::test`."""
    file, colons, test = name.partition("::")
    folder, _, stem = file.removesuffix(".py").rpartition("/")
    return str(ROOT / "tests" / ("engine/fused" if part == "fused" else part) / folder / f"test_{stem}.py") + colons + test


def planted(bug: Bug) -> str:
    """The file with the bug."""
    source = (ROOT / ("engine" if bug.part == "fused" else bug.part) / bug.file).read_text()
    if source.count(bug.old) != 1:
        raise SystemExit(f"{bug.file} has {source.count(bug.old)} places that read {bug.old!r}: plant the bug elsewhere")
    return source.replace(bug.old, bug.new)


if __name__ == "__main__":
    main()
