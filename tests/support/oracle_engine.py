"""An LLMEngine whose model is the oracle: its blocks hold token ids, and each token is a hash of all that was read."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from pagefork import EngineConfig, LLMEngine, RequestOutput
from pagefork.admission import Admission
from pagefork.asking import Asking
from pagefork.output_processor import Pieces
from pagefork.overlap import StepRunner
from pagefork.scheduler.params import CommonParams
from pagefork.scheduler.plan import Plan
from pagefork.scheduler.scheduler import Scheduler
from pagefork.tokenizer import Tokenizer
from support.oracle import VOCAB, OracleRunner

MAX_LEN = 120
END = VOCAB - 1  # the model's end token


class _NoProcessors:
    def register(self, number: int, prompt_len: int, processors: Any) -> None:
        raise AssertionError("the oracle calls no logits processors")

    def forget(self, number: int) -> None:
        assert not number


class _Runner(OracleRunner):
    """Fails as a whole where it is told to."""

    processors = _NoProcessors()
    breaks = False  # the next step raises

    def submit(self, plan: Plan) -> None:
        super().submit(plan)
        if self.breaks:
            self.breaks = False
            raise RuntimeError("the step broke")

    def reset(self) -> None:
        self.results.clear()


class OracleEngine(LLMEngine):
    """LLMEngine's own steps, admission and outputs; a block pool small enough for preemptions.

    around: what makes of the oracle a runner whose submit() returns before the step is computed, where steps overlap.
    """

    def __init__(
        self, num_blocks: int = 60, slots: int = 12, budget: int = 32, around: Callable[[Any], StepRunner] | None = None
    ) -> None:
        self.config = EngineConfig(model="demo")
        self.max_model_len = MAX_LEN
        self.tokenizer = letters()
        self.runner = _Runner(num_blocks, 4, slots, max_len=MAX_LEN + 1, budget=budget)
        self._runner = around(self.runner) if around else self.runner
        self._scheduler = Scheduler(num_blocks, 4, slots, budget, lag=int(around is not None))
        config: Any = SimpleNamespace(vocab_size=VOCAB, eos_token_ids=(END,))
        self._admission = Admission(config, None, self.tokenizer, MAX_LEN, 0, has_hidden_states=True, value_functions={})
        self.prompts = self._admission.prompts
        self._asking = Asking()
        self._pieces = Pieces(self.tokenizer)
        self._processors = {}
        self._undelivered = []
        self._owner = None
        self._stepping = False

    def assert_idle(self) -> None:
        """Every block is free or cached, no sequence, slot or request is left."""
        scheduler = self._scheduler
        scheduler.check()
        assert not scheduler.has_unfinished and not scheduler.in_flight and not self._processors
        assert scheduler.kv.pool.free == scheduler.num_blocks - 1
        assert scheduler.residents.slots.free == scheduler.max_num_seqs
        assert len(scheduler.kv.table) == 0


@cache
def letters() -> Tokenizer:
    """A character for each token, but that "é" and "日" take two and three: text lags behind tokens."""
    alphabet = [*"abcdefghijklmnop ", "Ã", "©", "æ", "Ĺ", "¥", "."]  # byte-level spellings of é (2) and 日 (3)
    assert len(alphabet) == VOCAB
    backend = Backend(
        models.BPE(vocab={piece: at for at, piece in enumerate(["Ġ" if p == " " else p for p in alphabet])}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def alone(prompt: str | list[int], params: CommonParams) -> RequestOutput:
    """What a request gets that has an engine to itself."""
    key = repr((prompt, params))
    if key not in _found:
        engine = OracleEngine(num_blocks=400, slots=64, budget=256)
        engine.add_request("alone", prompt, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    _found[key] = output
    return _found[key]


_found: dict[str, RequestOutput] = {}
