"""Conversations: rendered as AutoTokenizer.apply_chat_template renders them, refused with a reason, answered by LLM.chat."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import edit_json, make_checkpoint
from support.tokenizers import backend, save
from transformers import AutoTokenizer

from pagefork import LLM, InvalidRequestError, ModelError, SamplingParams
from pagefork.tokenizer import Tokenizer

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
DATED = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|im_start|>system\\n\\nToday Date: " + date_string + "\\n\\n" + system_message + eos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n\\n' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n\\n' }}
{%- endif %}
"""
STRICT = """\
{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}
"""
TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1) %}
{%- for message in messages %}
    {%- if message.role == 'tool' and loop.index0 > 9 %}{% break %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content or [] %}{{ part.text }}{% endfor %}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool>' + call.function.name + ' ' + call.function.arguments | tojson(indent=2) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' if loop.index0 < ns.last or add_generation_prompt or close is not defined else '' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + ('<think>' if thinking else '') }}{% endif %}
"""
TEMPLATES = {"chatml": CHATML, "dated": DATED, "strict": STRICT, "tools": TOOLS}

USER = {"role": "user", "content": " the <lo> & 日本 😀 "}
ASSISTANT = {"role": "assistant", "content": "né 'ba'\n  "}
PARTS = {"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "lo ba"}]}
CALL = {"name": "weather", "arguments": {"place": "<Köln>", "days": 2}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]}
SCHEMA = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "about": "é <b> & 'q'"}}}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(backend("llama2"), tmp_path, bos_token="<s>", eos_token={"content": "</s>", "__type": "AddedToken"})


def both(directory: Path) -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer.load(directory)
    assert tokenizer is not None
    return tokenizer, AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    ("messages", "arguments"),
    [
        ([USER], {}),
        ([USER, ASSISTANT, USER], {"add_generation_prompt": False}),
        ([USER, ASSISTANT], {"add_generation_prompt": False, "continue_final_message": True}),
        ([USER], {"date_string": "1 Jan 2000", "thinking": True, "bos_token": "<|im_start|>"}),
        ([{"role": "system", "content": "lo"}, USER], {}),
        ([USER, ASSISTANT, USER, CALLING, {"role": "tool", "content": "22"}], {"tools": [SCHEMA]}),
        ([PARTS, ASSISTANT, PARTS], {"add_generation_prompt": False, "continue_final_message": True, "close": True}),
    ],
    ids=["one", "three", "continued", "variables", "system", "tools", "parts"],
)
def test_a_conversation_is_rendered_as_by_transformers(
    directory: Path, name: str, messages: list[Any], arguments: dict[str, Any]
) -> None:
    (directory / "chat_template.jinja").write_text(TEMPLATES[name])
    ours, theirs = both(directory)
    arguments = {"add_generation_prompt": True} | arguments
    if any(message is PARTS for message in messages) and name != "tools":
        # It takes texts only, which transformers leaves to the caller.
        flat = [message | {"content": "the\nlo ba"} if message is PARTS else message for message in messages]
    else:
        flat = messages
    try:
        expected = theirs.apply_chat_template(flat, return_dict=False, **arguments)
    except Exception as error:  # noqa: BLE001 (whatever it is, ours must say the same)
        with pytest.raises(InvalidRequestError, match="the chat template refuses the conversation") as caught:
            ours.render_chat(messages, **arguments)
        assert str(error) in str(caught.value)
    else:
        assert ours.render_chat(messages, **arguments) == expected
        assert ours.chat_text(messages, **arguments) == theirs.apply_chat_template(flat, tokenize=False, **arguments)


def test_the_strict_template_refuses_and_the_others_do_not(directory: Path) -> None:
    """So that the comparison above is one of texts, too."""
    for name, template in TEMPLATES.items():
        tokenizer = both(directory)[0]
        for messages in ([USER], [USER, ASSISTANT]):
            assert tokenizer.render_chat(messages, chat_template=template)
        if name == "strict":
            with pytest.raises(InvalidRequestError, match="roles must alternate"):
                tokenizer.render_chat([USER, USER], chat_template=template)
        else:
            assert tokenizer.render_chat([USER, USER], chat_template=template)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("place", ["config", "files", "both"])
def test_templates_are_found_where_transformers_finds_them(directory: Path, place: str, named: bool) -> None:
    entries = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOLS}]
    if place != "files":
        edit_json(directory / "tokenizer_config.json", chat_template=entries if named else CHATML)
    if place != "config":
        (directory / "chat_template.jinja").write_text(STRICT)
        (directory / "additional_chat_templates").mkdir()
        if named:
            (directory / "additional_chat_templates" / "tool_use.jinja").write_text(DATED)
    ours, theirs = both(directory)
    assert ours.chat_template is not None
    assert set(ours.chat_template.templates) == ({"default", "tool_use"} if named else {"default"})
    for tools in (None, [SCHEMA]):
        rendered = theirs.apply_chat_template([USER], tools=tools, return_dict=False, add_generation_prompt=True)
        assert ours.render_chat([USER], tools=tools) == rendered
    assert ours.chat_text([USER], tools=[]) == ours.chat_text([USER])
    if named:
        by_name = theirs.apply_chat_template([USER], chat_template="tool_use", tokenize=False, add_generation_prompt=True)
        assert ours.chat_text([USER], chat_template="tool_use") == by_name


def test_special_tokens_come_from_the_map_of_older_checkpoints(directory: Path) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    tokens = {"bos_token": {"content": "<|im_start|>", "lstrip": False}, "eos_token": "<|im_end|>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(tokens))
    ours, theirs = both(directory)
    arguments: dict[str, Any] = {"chat_template": STRICT, "add_generation_prompt": True}
    assert ours.chat_text([USER], **arguments) == theirs.apply_chat_template([USER], tokenize=False, **arguments)
    assert ours.chat_text([USER], **arguments).startswith("<|im_start|>")
    assert ours.eos_token_id == theirs.eos_token_id


HARMFUL = [
    ("{{ messages.__class__.__mro__ }}", "the sandbox forbids"),
    ("{{ raise_exception.__globals__['json'] }}", "the sandbox forbids"),
    ("{% set _ = messages.append(1) %}{{ 1 }}", "the sandbox forbids"),
    ("{% include '/etc/hostname' %}", "refuses the conversation"),
    ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
    ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
    ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ("{{ nobody.knows }}", "'nobody' is undefined"),
    ("{% if messages %}", "no valid Jinja template: .*line 1"),
    ("{% if not messages %}x{% endif %}", "an empty text"),
    ("tool_use", "chat_template='tool_use' is neither a Jinja template nor one of the checkpoint's: default"),
    (7, "chat_template must be a text, got int"),
]


@pytest.mark.parametrize(("template", "message"), HARMFUL)
def test_a_template_that_fails_or_reaches_out_is_refused(directory: Path, template: Any, message: str) -> None:
    (directory / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(InvalidRequestError, match=message):
        both(directory)[0].render_chat([USER], chat_template=template)


def test_a_checkpoint_with_a_broken_template_is_at_fault_itself(directory: Path) -> None:
    for template, message in [("{% for %}", "no valid Jinja"), ("{{ messages.__class__.__mro__ }}", "the sandbox forbids")]:
        (directory / "chat_template.jinja").write_text(template)
        with pytest.raises(ModelError, match=message):
            both(directory)[0].render_chat([PARTS])
    (directory / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match="can't be read"):
        Tokenizer.load(directory)
    (directory / "chat_template.jinja").unlink()
    for wrong in (5, [1], [{"name": "default"}], [{"template": "x"}]):
        edit_json(directory / "tokenizer_config.json", chat_template=wrong)
        with pytest.raises(ModelError, match="must be a text or a list of objects with name and template"):
            Tokenizer.load(directory)


IMAGE = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]}
BAD: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "messages is empty"),
    ("hello", {}, "messages must be a list of objects with role and content, got str"),
    (["hello"], {}, r"messages\[0\] must be an object with role and content, got str"),
    ([USER, {"content": "a"}], {}, r"messages\[1\] needs a role"),
    ([{"role": 5, "content": "a"}], {}, r"messages\[0\] needs a role .* got 5"),
    ([{"role": "user"}], {}, r"messages\[0\] needs content: .* got None"),
    ([{"role": "user", "content": 5}], {}, "got 5"),
    ([IMAGE], {}, r"messages\[0\] holds content of type 'image_url'; only"),
    ([{"role": "user", "content": ["a"]}], {}, "holds content of type 'str'"),
    ([{"role": "user", "content": [{"type": "text"}]}], {}, "has a text part without a text"),
    ([USER], {"continue_final_message": True}, "needs add_generation_prompt=False"),
    ([USER], {"add_generation_prompt": "yes"}, "add_generation_prompt='yes' and .* must be True or False"),
    ([CALLING], {"continue_final_message": True, "add_generation_prompt": False}, "the last message has no content"),
    ([USER], {"tools": {"a": 1}}, "tools must be a list of JSON schemas"),
    ([USER], {"tools": [print]}, "tools must be a list of JSON schemas"),
    ([USER], {"conversations": []}, "can't be called conversations"),
    ([{"role": "user", "content": "\ud800"}], {}, "lone surrogate"),
]


@pytest.mark.parametrize(("messages", "arguments", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_conversations_are_refused_by_name(directory: Path, messages: Any, arguments: dict[str, Any], message: str) -> None:
    (directory / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(InvalidRequestError, match=message):
        both(directory)[0].render_chat(messages, **arguments)


def test_messages_are_left_as_they_were(directory: Path) -> None:
    tokenizer = both(directory)[0]
    messages: list[dict[str, Any]] = [json.loads(json.dumps(message)) for message in (PARTS, CALLING, PARTS)]
    before = json.dumps(messages)
    tokenizer.render_chat(messages, chat_template=TOOLS, add_generation_prompt=False, continue_final_message=True)
    assert json.dumps(messages) == before


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tmp_path_factory.mktemp("chatty")
    make_checkpoint(path, vocab_size=600, num_hidden_layers=1)
    save(backend("llama2"), path, bos_token="<s>", eos_token="</s>", chat_template=CHATML)
    return LLM(str(path), num_blocks=64)


PARAMS = SamplingParams(temperature=0, max_tokens=6)


def test_chat_is_generate_for_the_rendered_prompt(chatty: LLM) -> None:
    tokenizer = chatty.engine.tokenizer
    assert tokenizer is not None
    conversations: list[Any] = [[USER], [USER, ASSISTANT, PARTS]]
    outputs = chatty.chat(conversations, PARAMS, use_tqdm=False)
    for output, conversation in zip(outputs, conversations, strict=True):
        assert output.prompt == tokenizer.chat_text(conversation)
        assert output.prompt_token_ids == tokenizer.render_chat(conversation)
        [alone] = chatty.generate([output.prompt_token_ids], PARAMS, use_tqdm=False)
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids
    [one] = chatty.chat(conversations[1], PARAMS, use_tqdm=False)
    assert one.prompt == outputs[1].prompt and one.outputs[0].text == outputs[1].outputs[0].text


def test_chat_hands_its_arguments_to_the_template(chatty: LLM) -> None:
    extra: dict[str, Any] = {"chat_template": TOOLS, "tools": [SCHEMA], "chat_template_kwargs": {"thinking": True}}
    [output] = chatty.chat([USER], PARAMS, use_tqdm=False, **extra)
    assert output.prompt is not None and output.prompt.endswith("assistant\n<think>") and "weather" in output.prompt
    go_on: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    [output] = chatty.chat([USER, ASSISTANT], PARAMS, use_tqdm=False, **go_on)
    assert output.prompt is not None and output.prompt.endswith("né 'ba'\n  ")


def test_chat_refuses_what_it_cannot_do(chatty: LLM, demo: LLM, tmp_path: Path) -> None:
    steps = chatty.engine.stats().steps
    for arguments, message in [
        ({"messages": []}, "messages is empty"),
        ({"messages": [[USER], []]}, "messages is empty"),
        ({"messages": [USER], "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs holds tools"),
        ({"messages": [USER], "chat_template_kwargs": {1: 2}}, "names its variables by texts, got 1"),
        ({"messages": [USER], "chat_template_kwargs": {"self": 1}}, "can't be called self"),
        ({"messages": [USER], "chat_template_kwargs": ["a"]}, "must be an object of variables, got list"),
        ({"messages": [USER], "sampling_params": [PARAMS, PARAMS]}, "2 sampling_params for 1 prompts"),
        ({"messages": [{"role": "user", "content": "lo " * 600}]}, "max_model_len"),
    ]:
        with pytest.raises(InvalidRequestError, match=message):
            chatty.chat(**arguments)  # type: ignore[arg-type]
    assert chatty.engine.stats().steps == steps and not chatty.engine.has_unfinished_requests()
    with pytest.raises(InvalidRequestError, match="no default chat template"):
        demo.chat([USER])
    make_checkpoint(tmp_path, num_hidden_layers=1)
    with pytest.raises(InvalidRequestError, match="no tokenizer, so it can't chat"):
        LLM(str(tmp_path), num_blocks=40).chat([USER])
    shutil.rmtree(tmp_path)
