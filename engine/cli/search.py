"""One search with its trace: what `pagefork explain --strategy` prints, draws and writes."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from pagefork.cli.search_page import page
from pagefork.cli.search_tree import draw
from pagefork.core import LLMEngine
from pagefork.outputs import RequestOutput
from pagefork.scheduler.errors import InvalidRequestError
from pagefork.scheduler.params import CommonParams


class Shown(NamedTuple):
    """How much of a search is printed, how, and the file that a page is written to."""

    top: int
    depth: int
    json: bool
    html: Path | None


def show_search(engine: LLMEngine, prompt: str, params: CommonParams, shown: Shown) -> None:
    """Run a request and show how its outputs came about. Raises its error."""
    found = document(engine, params, traced(engine, prompt, params))
    if shown.html is not None:
        shown.html.write_text(page(found), encoding="utf-8", newline="\n")
    if shown.json:
        print(json_module.dumps(found))
    else:
        draw(found, shown.top, shown.depth)
        if shown.html is not None:
            print(f"The page is in {shown.html}.")


def traced(engine: LLMEngine, prompt: str, params: CommonParams) -> RequestOutput:
    """The output of a request that asked for its trace."""
    engine.add_request("explain", prompt, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.error is not None:
                raise output.error
    if output.trace is None:
        raise InvalidRequestError(f"{type(params).__name__} leaves no trace of a search")
    return output


def document(engine: LLMEngine, params: CommonParams, output: RequestOutput) -> dict[str, Any]:
    """What is shown, in types that JSON has: numbers that it lacks are None. `texts`: of every token that occurs, alone."""
    trace = output.trace
    assert trace is not None and engine.tokenizer is not None  # a text was encoded
    steps: list[dict[str, Any]] = [_plain(step) for step in trace.steps]
    tokens = {token for step in steps for token in step["token"] if token >= 0}
    tokens.update(token for completion in output.outputs for token in completion.token_ids)
    texts = {str(token): engine.tokenizer.decode([token], skip_special_tokens=False) for token in sorted(tokens)}
    settings = {name: getattr(params, name) for name in params.__struct_fields__ if name != "trace"}
    usual = type(params)()
    return {
        "strategy": trace.strategy,
        "model": engine.config.model,
        "prompt": output.prompt,
        "settings": _plain({name: value for name, value in settings.items() if value != getattr(usual, name)}),
        "outputs": [_plain(completion) for completion in output.outputs],
        "complete": trace.complete,
        "usage": _plain(trace.usage),
        "texts": texts,
        "steps": steps,
    }


def _plain(value: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value, enc_hook=_name))


def _name(function: Any) -> str:
    """What a value function was called, or what made it."""
    return str(getattr(function, "__qualname__", function)).partition(".")[0]
