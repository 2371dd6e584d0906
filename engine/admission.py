"""From what a user passes to a Request that the engine can run, or an error that says why not."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from pagefork.scheduler.endings import described
from pagefork.scheduler.errors import InvalidRequestError, ParameterError
from pagefork.scheduler.params import CommonParams, SamplingParams
from pagefork.scheduler.plan import Spec
from pagefork.scheduler.request import Request

from .models.config import ModelConfig
from .prompts import Prompt, PromptReader
from .text_rules import StopTexts
from .tokenizer import Tokenizer
from .value_functions import MakesValueFunction


class Admission:
    """Checks and translates requests for one model."""

    def __init__(
        self,
        config: ModelConfig,
        first_token: int | None,
        tokenizer: Tokenizer | None,
        max_model_len: int,
        seed: int,
        has_hidden_states: bool,
        value_functions: Mapping[str, MakesValueFunction],
    ) -> None:
        self._config = config
        self.prompts = PromptReader(tokenizer, first_token, config.vocab_size)
        # Where neither config.json nor generation_config.json names one, what the tokenizer calls the end is.
        ends = config.eos_token_ids or ((tokenizer.eos_token_id,) if tokenizer else ())
        self._model_ends = frozenset(token for token in ends if token is not None and 0 <= token < config.vocab_size)
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._seed = seed
        self._has_hidden_states = has_hidden_states
        self._value_functions = value_functions
        self._processors = itertools.count(1)

    def request(self, request_id: str, prompt: Prompt, params: CommonParams, priority: int = 0) -> Request:
        """A request for the scheduler. Raises InvalidRequestError (a ValueError)."""
        if not isinstance(request_id, str) or not request_id:
            raise InvalidRequestError(f"request_id={request_id!r} must be a text that is not empty")
        if not _is_unicode(request_id):
            raise InvalidRequestError(f"request_id={request_id!r} is not valid Unicode text: it holds a lone surrogate")
        if not isinstance(priority, int):
            raise InvalidRequestError(f"priority={priority!r} must be an integer; lower runs earlier")
        if not isinstance(params, CommonParams):
            raise InvalidRequestError(f"params must be SamplingParams or those of another strategy, got {type(params).__name__}")
        if params.needs_hidden_states and not self._has_hidden_states:
            raise ParameterError(
                f"{type(params).__name__} needs the hidden states of earlier tokens, which this engine doesn't keep: "
                "start it with hidden_states=True"
            )
        ids = self.prompts.read(prompt)
        if len(ids) >= self._max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(ids)} tokens; max_model_len={self._max_model_len} allows at most "
                f"{self._max_model_len - 1}, to leave room for an output"
            )
        room = self._max_model_len - len(ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        if params.min_tokens > max_tokens:
            raise InvalidRequestError(f"min_tokens={params.min_tokens}, but prompt and max_model_len leave room for {max_tokens}")
        self._check_ids(params)
        params = self._named(params, prompt, ids)
        model_end = frozenset() if params.ignore_eos else self._model_ends
        end_ids = model_end | frozenset(params.stop_token_ids)
        if params.min_tokens and params.allowed_token_ids and end_ids.issuperset(params.allowed_token_ids):
            raise ParameterError(
                f"min_tokens={params.min_tokens} bans end tokens, and allowed_token_ids has no other: {params.allowed_token_ids}"
            )
        return Request(
            id=request_id,
            prompt=np.array(ids, np.int32),
            params=params,
            spec=self._spec(request_id, len(ids), params, end_ids),
            limit=len(ids) + max_tokens,
            priority=priority,
            end_ids=end_ids,
            model_end_ids=model_end,
            rules=self._rules(params),
            prompt_logprobs=self._prompt_logprobs(params),
            extra={"vocab_size": self._config.vocab_size},
        )

    def _named(self, params: CommonParams, prompt: Prompt, ids: Sequence[int]) -> CommonParams:
        """Parameters that name a value function, with that function, made for the prompt's text."""
        name = getattr(params, "value_fn", None)
        if not isinstance(name, str):
            return params
        if name not in self._value_functions:
            raise ParameterError(f"the engine has no value function {name!r:.80}; it has {', '.join(self._value_functions)}")
        text = self.prompts.text(prompt, ids)
        try:
            made = self._value_functions[name](text)
        except BaseException as error:  # an exit of the user's ends his request and nothing else
            raise ParameterError(f"value function {name!r} can't be made for this prompt: {described(error)}") from error
        return params.replace(value_fn=made)

    def _check_ids(self, params: CommonParams) -> None:
        self.prompts.check_range("stop_token_ids", params.stop_token_ids)
        self.prompts.check_range("allowed_token_ids", params.allowed_token_ids or ())
        self.prompts.check_range("logit_bias", list(params.logit_bias or ()))
        if (params.needs_text or params.bad_words) and self._tokenizer is None:
            raise ParameterError("stop, bad_words, rank_by and value_fn need a tokenizer, which the checkpoint doesn't have")

    def _prompt_logprobs(self, params: CommonParams) -> int | None:
        """How many top log-probs to read at each prompt token; None: nothing."""
        asked = params.prompt_logprobs if isinstance(params, SamplingParams) else None
        vocab = self._config.vocab_size
        return None if asked is None else vocab if asked < 0 else min(asked, vocab)

    def _rules(self, params: CommonParams) -> StopTexts | None:
        if self._tokenizer is None or not params.needs_text:
            return None
        return StopTexts(self._tokenizer, params.stop, params.skip_special_tokens, params.include_stop_str_in_output)

    def _spec(self, request_id: str, prompt_len: int, params: CommonParams, end_ids: frozenset[int]) -> Spec:
        own = params.drawing()
        if own.get("seed") is None:
            own["seed"] = _mix(self._seed, request_id)
        return Spec(
            prompt_len=prompt_len,
            repetition_penalty=params.repetition_penalty,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            no_repeat_ngram_size=params.no_repeat_ngram_size,
            min_tokens=params.min_tokens,
            end_ids=tuple(sorted(end_ids)),
            allowed_ids=None if params.allowed_token_ids is None else tuple(params.allowed_token_ids),
            bad_words=self._bad_words(params.bad_words),
            logit_bias=tuple((params.logit_bias or {}).items()),
            rank=params.logprobs is not None,
            processors=next(self._processors) if params.logits_processors else 0,
            **own,
        )

    def _bad_words(self, words: list[str]) -> tuple[tuple[int, ...], ...]:
        """Each text as it is tokenised at the start and, where that differs, after a space."""
        if not words:
            return ()
        assert self._tokenizer is not None
        forms = [self._tokenizer.encode_plain(text) for word in words for text in (word, " " + word.lstrip())]
        for ids in forms:
            self.prompts.check_range("bad_words", ids)
        return tuple(dict.fromkeys(tuple(ids) for ids in forms if ids))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _mix(seed: int, request_id: str) -> int:
    """A seed of its own for every request, the same in every run."""
    digest = hashlib.blake2b(f"{seed}:{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
