"""A model's own defaults: the parameters of generation_config.json as transformers takes them, and the tokens that end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import edit_json, make_checkpoint
from support.tokenizers import backend, save
from transformers import GenerationConfig, PreTrainedModel

from pagefork import LLM, BeamSearchParams, ContrastiveSearchParams, ModelError, SamplingParams
from pagefork.generation_config import default_params
from pagefork.scheduler.params import CommonParams

PROMPT = [5, 6, 7]
FREE = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    path = tmp_path_factory.mktemp("reference")
    model = make_checkpoint(path, vocab_size=600, num_hidden_layers=1, eos_token_id=None, bos_token_id=None)
    save(backend("gemma"), path)
    return path, model


@pytest.mark.parametrize(
    "generation",
    [
        {},
        {"temperature": 0.6, "top_p": 0.9},
        {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        {"do_sample": True, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "temperature": 0.7},
        {"do_sample": True, "top_k": 0, "min_p": 0.1},
        {"do_sample": True, "top_k": None, "no_repeat_ngram_size": 3},
    ],
    ids=str,
)
def test_the_default_parameters_are_those_of_transformers(
    reference: tuple[Path, PreTrainedModel], generation: dict[str, Any]
) -> None:
    model: Any = reference[1]
    model.generation_config = GenerationConfig.from_dict(dict(generation))
    theirs, _ = model._prepare_generation_config(None)
    ours = default_params(generation)
    assert isinstance(ours, SamplingParams)
    assert ours.greedy == (not theirs.do_sample)
    assert ours.repetition_penalty == theirs.repetition_penalty
    assert ours.no_repeat_ngram_size == theirs.no_repeat_ngram_size
    if theirs.do_sample:
        assert (ours.temperature, ours.top_k, ours.top_p) == (theirs.temperature, theirs.top_k, theirs.top_p)
        assert ours.min_p == (theirs.min_p or 0.0)


KINDS: dict[str, type[CommonParams]] = {
    "greedy_search": SamplingParams,
    "sample": SamplingParams,
    "beam_search": BeamSearchParams,
    "group_beam_search": BeamSearchParams,
    "contrastive_search": ContrastiveSearchParams,
}


@pytest.mark.parametrize("do_sample", [None, False, True])
@pytest.mark.parametrize("num_beams", [None, 1, 4])
@pytest.mark.parametrize("others", [{}, {"penalty_alpha": 0.6, "top_k": 4}, {"penalty_alpha": 0.6, "top_k": 1}, {"top_k": 4}])
def test_the_kind_of_decoding_is_the_one_that_transformers_chooses(
    do_sample: bool | None, num_beams: int | None, others: dict[str, Any]
) -> None:
    given = {"do_sample": do_sample, "num_beams": num_beams, **others}
    mode = GenerationConfig(**given).get_generation_mode()
    if mode != "beam_sample":
        ours = default_params(given)
        assert type(ours) is KINDS[mode]
        assert getattr(ours, "greedy", None) == {"greedy_search": True, "sample": False}.get(mode)


def test_the_parameters_of_beam_search_are_taken_over(caplog: pytest.LogCaptureFixture) -> None:
    given: dict[str, Any] = {"length_penalty": 2.0, "early_stopping": "never", "diversity_penalty": 0.5, "num_beam_groups": 3}
    read = {"num_beams": 6, "num_return_sequences": 2, "max_new_tokens": 30, "repetition_penalty": 1.2, **given}
    expected = BeamSearchParams(beam_width=6, n=2, max_tokens=30, repetition_penalty=1.2, **given)
    assert default_params({**read, "temperature": 0.7, "top_k": 5}) == expected
    assert default_params({"num_beams": 2, "early_stopping": None}) == BeamSearchParams(beam_width=2)
    assert not caplog.records


def test_the_parameters_of_contrastive_search_are_taken_over(caplog: pytest.LogCaptureFixture) -> None:
    assert default_params({"penalty_alpha": 0.4, "top_k": 6, "max_new_tokens": 8, "num_beams": 1}) == ContrastiveSearchParams(
        alpha=0.4, top_k=6, max_tokens=8
    )
    assert default_params({"penalty_alpha": 0.4}) == ContrastiveSearchParams(alpha=0.4, top_k=50)
    assert not caplog.records


def test_beams_that_sample_are_sampled_without_beams_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    given = {"do_sample": True, "num_beams": 4, "num_return_sequences": 2, "penalty_alpha": 0.6}
    assert default_params(given) == SamplingParams(top_k=50, n=2)
    assert "num_beams, penalty_alpha, which" in caplog.text


def test_lengths_and_stop_texts_are_taken_over() -> None:
    given = {"max_new_tokens": 40, "min_new_tokens": 2, "stop_strings": ["\n", "END"], "max_length": 4096}
    params = default_params(given)
    assert (params.max_tokens, params.min_tokens, params.stop) == (40, 2, ["\n", "END"])
    assert default_params({"max_length": 4096}).max_tokens == SamplingParams().max_tokens
    assert default_params({"stop_strings": "END"}).stop == ["END"]
    assert default_params({"min_new_tokens": 20}).max_tokens == 20
    assert default_params({"min_new_tokens": 2}).max_tokens == SamplingParams().max_tokens
    assert default_params({"do_sample": True, "num_return_sequences": 3}) == SamplingParams(n=3, top_k=50)


def test_what_has_no_counterpart_is_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pagefork"):
        default_params({"num_beams": 1, "typical_p": 1.0, "bad_words_ids": None, "suppress_tokens": []})
        assert not caplog.records
        default_params({"num_beam_groups": 4, "typical_p": 0.9})
    assert "num_beam_groups, typical_p" in caplog.text
    lonely = {"min_length": 20, "token_healing": True, "remove_invalid_values": True, "num_return_sequences": 2}
    for name, value in lonely.items():
        caplog.clear()
        default_params({name: value})
        assert f"has {name}, which" in caplog.text


def test_defaults_out_of_range_are_the_models_fault() -> None:
    with pytest.raises(ModelError, match=r"generation_config.json gives no default parameters.*top_p"):
        default_params({"do_sample": True, "top_p": 3})
    for given in [{"num_beams": "4"}, {"num_beams": 0}, {"num_beams": 2, "num_return_sequences": 3}, {"penalty_alpha": 2}]:
        with pytest.raises(ModelError, match="gives no default parameters"):
            default_params(given)


def outputs_of(path: Path, params: CommonParams | None = FREE) -> Any:
    [output] = LLM(str(path), num_blocks=32, dtype="float32").generate([PROMPT], params, use_tqdm=False)
    return output.outputs[0]


@pytest.fixture
def checkpoint(reference: tuple[Path, PreTrainedModel], tmp_path: Path) -> tuple[Path, list[int], int]:
    """A copy to edit, its greedy tokens without any end token, and the place where one of those comes up first."""
    for file in reference[0].iterdir():
        (tmp_path / file.name).symlink_to(file)
    edit_copy(tmp_path, "generation_config.json")
    tokens = outputs_of(tmp_path).token_ids
    assert len(tokens) == 24
    at = max(index for index, token in enumerate(tokens[:16]) if token not in tokens[:index])
    assert at > 1
    return tmp_path, tokens, at


def edit_copy(path: Path, name: str, **changes: Any) -> None:
    """Changes keys of a linked JSON file, in a copy; None removes one."""
    text = (path / name).read_text() if (path / name).is_file() else "{}"
    (path / name).unlink(missing_ok=True)
    (path / name).write_text(text)
    edit_json(path / name, **changes)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("several", [False, True])
def test_an_end_token_of_the_model_ends_an_output(checkpoint: tuple[Path, list[int], int], name: str, several: bool) -> None:
    path, tokens, at = checkpoint
    edit_copy(path, name, eos_token_id=[599, tokens[at]] if several else tokens[at])
    output = outputs_of(path)
    assert output.token_ids == tokens[: at + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    assert outputs_of(path, FREE.replace(ignore_eos=True)).token_ids == tokens


def test_end_tokens_of_both_files_end_outputs(checkpoint: tuple[Path, list[int], int]) -> None:
    path, tokens, at = checkpoint
    edit_copy(path, "config.json", eos_token_id=tokens[at])
    edit_copy(path, "generation_config.json", eos_token_id=[tokens[0]])
    assert outputs_of(path).token_ids == tokens[:1]
    edit_copy(path, "generation_config.json", eos_token_id=[599])
    assert outputs_of(path).token_ids == tokens[: at + 1]


def test_where_no_config_names_an_end_token_the_tokenizer_does(checkpoint: tuple[Path, list[int], int]) -> None:
    path, tokens, at = checkpoint
    edit_copy(path, "tokenizer_config.json", eos_token=backend("gemma").id_to_token(tokens[at]))
    output = outputs_of(path)
    assert output.token_ids == tokens[: at + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    edit_copy(path, "generation_config.json", eos_token_id=599)
    assert outputs_of(path).token_ids == tokens


def test_the_default_parameters_sample_as_the_generation_config_says(checkpoint: tuple[Path, list[int], int]) -> None:
    path, tokens, _ = checkpoint
    assert outputs_of(path, None).token_ids == tokens[:16]
    edit_copy(path, "generation_config.json", do_sample=True, top_k=1, max_new_tokens=20)
    assert outputs_of(path, None).token_ids == tokens[:20]
    edit_copy(path, "generation_config.json", do_sample=True, top_k=50, temperature=50.0, max_new_tokens=20)
    assert outputs_of(path, None).token_ids != tokens[:20]
    assert LLM(str(path), num_blocks=32).default_params() == SamplingParams(top_k=50, temperature=50.0, max_tokens=20)
