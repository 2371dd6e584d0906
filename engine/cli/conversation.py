"""A conversation with a model, as `pagefork chat` has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pagefork.cli.errors import warn
from pagefork.core import LLMEngine
from pagefork.outputs import RequestOutput
from pagefork.scheduler.errors import InvalidRequestError
from pagefork.scheduler.params import CommonParams

Message = dict[str, Any]


class Conversation:
    """The turns so far, each a question and its answer, and the system message before them.

    When they outgrow max_model_len the oldest turns are forgotten, until half of it is free: the next
    turns then begin alike again, and the prefix cache has what they begin with.
    """

    def __init__(self, engine: LLMEngine, params: CommonParams, system: str | None, template: str | None) -> None:
        if engine.tokenizer is None or (template is None and engine.tokenizer.chat_template is None):
            raise InvalidRequestError(
                f"model={engine.config.model!r} has no chat template: give a Jinja file with --chat-template, "
                "or let `pagefork generate` complete texts"
            )
        self.system = system
        self.interrupted = False  # whether Ctrl-C came during the last answer, be it at its last token
        self._engine, self._tokenizer = engine, engine.tokenizer
        self._params, self._template = params, template
        self._turns: list[list[Message]] = []
        self._asked = 0
        self._ids([], "Hello")  # a template that refuses a system message does so before the first question

    def reset(self) -> None:
        """Forget all turns."""
        self._turns = []

    def ask(self, question: str, show: Callable[[str], None]) -> RequestOutput:
        """The answer, given to `show` piece by piece, and remembered.

        Ctrl-C ends the answer, and what came of it is kept. Raises the error of a request that is refused or fails; the
        turns are what they were then.
        """
        self.interrupted = False
        prompt, turns = self._fitted(question)
        self._asked += 1
        self._engine.add_request(f"chat-{self._asked}", prompt, self._params)
        output = self._answer(f"chat-{self._asked}", show)
        if output.error is not None:
            raise output.error
        if output.outputs[0].token_ids:
            answer = {"role": "assistant", "content": output.outputs[0].text}
            self._turns = [*turns, [{"role": "user", "content": question}, answer]]
        return output

    def _answer(self, request_id: str, show: Callable[[str], None]) -> RequestOutput:
        outputs: list[RequestOutput] = []
        shown = 0
        try:
            while self._engine.has_unfinished_requests():
                outputs = self._engine.step() or outputs
                text = outputs[-1].outputs[0].text if outputs else ""
                begin, shown = shown, len(text)
                show(text[begin:])
        except KeyboardInterrupt:
            self.interrupted = True
            self._engine.abort_request(request_id)
            outputs = self._engine.step() or outputs
            show(outputs[-1].outputs[0].text[shown:])
        return outputs[-1]

    def _fitted(self, question: str) -> tuple[list[int], list[list[Message]]]:
        """The prompt, and the turns that it remembers."""
        limit, turns = self._engine.max_model_len, self._turns
        room = min(self._params.max_tokens or limit // 4, limit // 2)
        ids = self._ids(turns, question)
        if len(ids) + room > limit:
            while turns and len(ids) > limit // 2:
                turns = turns[1:]
                ids = self._ids(turns, question)
            if forgotten := len(self._turns) - len(turns):
                warn(f"max_model_len={limit} leaves no room for an answer: the oldest turns are forgotten ({forgotten})")
        return ids, turns

    def _ids(self, turns: list[list[Message]], question: str) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*system, *(message for turn in turns for message in turn), {"role": "user", "content": question}]
        return self._tokenizer.render_chat(messages, chat_template=self._template)
