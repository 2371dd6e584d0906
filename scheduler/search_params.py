"""Parameters of the strategies that search: beam search, contrastive search and Monte Carlo tree search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from msgspec import Meta

from .errors import ParameterError
from .params import CommonParams, SamplingParams, Seed

_Width = Annotated[int, Meta(ge=1, lt=2**20)]


if TYPE_CHECKING:
    ValueFn = Callable[[list[Any]], Sequence[float]] | str | None
else:  # msgspec has no union of a function and a text
    ValueFn = Any


class BeamSearchParams(CommonParams, frozen=True, kw_only=True, tag="beam"):
    """Beam search: the most probable outputs that a search of this width finds.

    Scores are sums of log-probs over length ** length_penalty, length being the number of generated tokens. Bans, logit_bias
    and penalties, and logits_processors, work on log-probs, which are not normalised again, as in Hugging Face.

    Raises ParameterError (a ValueError) for anything that can't be honoured.
    """

    widened_by: ClassVar[str] = "beam_width"

    beam_width: Annotated[_Width, Meta(description="Sequences that are kept at each step; 1 is greedy")] = 4
    n: Annotated[int, Meta(ge=1, description="Outputs per prompt, the best first; at most beam_width")] = 1
    length_penalty: Annotated[
        float,
        Meta(description="Exponent of the length that a score is divided by: 0 none, 1 the mean, above 1 favours long ones"),
    ] = 1.0
    early_stopping: Annotated[
        bool | Literal["never"],
        Meta(
            description="Stop with beam_width finished ones; false: when a better one is unlikely; never: when none is possible"
        ),
    ] = False
    num_beam_groups: Annotated[_Width, Meta(description="Groups that search apart; divides beam_width")] = 1
    diversity_penalty: Annotated[
        float, Meta(ge=0, description="Subtracted from a token for every earlier group's beam that took it in this step")
    ] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n > self.beam_width:
            raise ParameterError(f"n={self.n} outputs are more than beam_width={self.beam_width} can give")
        if self.beam_width % self.num_beam_groups:
            raise ParameterError(f"num_beam_groups={self.num_beam_groups} does not divide beam_width={self.beam_width}")
        if self.diversity_penalty and self.num_beam_groups == 1:
            raise ParameterError(
                f"diversity_penalty={self.diversity_penalty} sets groups of beams apart, and num_beam_groups is 1: raise it"
            )

    @property
    def width(self) -> int:
        """Sequences that run at once."""
        return self.beam_width


class ContrastiveSearchParams(CommonParams, frozen=True, kw_only=True, tag="contrastive"):
    """Contrastive search (Su et al. 2022): probable tokens whose hidden states are unlike all earlier ones.

    Each token maximises (1 - alpha) * p - alpha * similarity over the top_k most probable ones. It needs the engine's pages
    of hidden states (hidden_states).

    Raises ParameterError (a ValueError) for anything that can't be honoured.
    """

    needs_hidden_states: ClassVar[bool] = True
    widened_by: ClassVar[str] = "top_k"

    top_k: Annotated[int, Meta(ge=1, lt=2**20, description="Candidates per token, each computed in a row of its own")] = 5
    alpha: Annotated[float, Meta(ge=0, le=1, description="Weight of the degeneration penalty; 0: greedy")] = 0.6
    momentum: Annotated[
        float,
        Meta(ge=0, lt=1, description="Smoothing of the confidence that the trace reports; the choice does not depend on it"),
    ] = 0.5
    window: (
        Annotated[int, Meta(ge=1, lt=2**31, description="Compare with the last so many positions only; None: with all")] | None
    ) = None
    adaptive: Annotated[
        bool, Meta(description="Choose alpha and the number of candidates, up to top_k, from the uncertainty at each token")
    ] = False

    @property
    def width(self) -> int:
        """Sequences that run at once."""
        return self.top_k


class MCTSParams(CommonParams, frozen=True, kw_only=True, tag="mcts"):
    """Monte Carlo tree search over tokens, guided by the model's probabilities and by values of what they lead to.

    value_fn takes a list of `Leaf` and returns one number for each, the higher the better. It is called in a thread of its
    own, once per wave of leaves. A text names one that the engine has: log_probability, brackets_balance, parses_as_python,
    or what it was given; over the wire there are only names. None: exp(mean log-prob of the generated tokens).

    Raises ParameterError (a ValueError) for anything that can't be honoured.
    """

    widened_by: ClassVar[str] = "n or leaf_batch_size"

    num_simulations: Annotated[int, Meta(ge=1, lt=2**20, description="Simulations per emitted token")] = 50
    c_puct: Annotated[float, Meta(ge=0, description="Weight of exploration against value")] = 1.0
    temperature: Annotated[float, Meta(ge=1e-5, description="Of the priors and of rollouts; below 1 sharper")] = 1.0
    top_k: Annotated[int, Meta(ge=1, lt=2**20, description="Children of a node: its most probable tokens")] = 10
    max_depth: Annotated[int, Meta(ge=1, lt=2**20, description="Depth below the root that is not expanded further")] = 5
    rollout_tokens: Annotated[int, Meta(ge=0, lt=2**20, description="Tokens sampled after a leaf before it is valued")] = 0
    leaf_batch_size: Annotated[int, Meta(ge=1, lt=2**20, description="Most leaves that are computed together")] = 8
    selection: Annotated[Literal["puct", "ucb1"], Meta(description="How a child is selected: with priors, or without")] = "puct"
    fpu: Annotated[Literal["parent", "zero"], Meta(description="Value of a child that was not visited: its parent's, or 0")] = (
        "parent"
    )
    value_fn: ValueFn = None
    value_timeout: Annotated[float, Meta(gt=0, le=1e6, description="Seconds that one call of value_fn may take")] = 60.0
    reuse_tree: Annotated[bool, Meta(description="Keep the subtree of the token that was chosen")] = True
    visit_temperature: Annotated[
        float, Meta(ge=0, description="0: the most visited token; above: drawn by visits ** (1 / visit_temperature)")
    ] = 0.0
    n: Annotated[int, Meta(ge=1, lt=2**20, description="Outputs per prompt, each from a tree of its own")] = 1
    seed: Seed = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.value_fn
        if not (given is None or isinstance(given, str) or callable(given)):
            raise ParameterError(f"MCTSParams: value_fn={given!r:.80} is refused: it is a function, or the name of one")
        if self.n > 1 and self.visit_temperature == 0:
            raise ParameterError(
                f"visit_temperature=0 takes the most visited token: all {self.n} outputs would be the same; raise it"
            )

    @property
    def needs_text(self) -> bool:
        """A leaf has a text."""
        return self.value_fn is not None or super().needs_text

    @property
    def width(self) -> int:
        """Sequences that run at once."""
        return self.n * min(self.leaf_batch_size, self.num_simulations)

    def drawing(self) -> dict[str, Any]:
        """The fields of a Spec that say how priors and draws come from logits."""
        return {"temperature": self.temperature, "seed": self.seed}


AnyParams = SamplingParams | BeamSearchParams | ContrastiveSearchParams | MCTSParams
