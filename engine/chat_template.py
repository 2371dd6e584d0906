"""Conversations to text: the Jinja chat template of a checkpoint, rendered as transformers renders it.

A template is code that came with the checkpoint. It runs in the sandbox of transformers, which keeps it from Python and from
files; it doesn't bound time or memory, so render only templates of checkpoints that you chose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pagefork.scheduler.errors import InvalidRequestError, ModelError

from .json_file import JsonObject, read_json

_RESERVED = {"self", "messages", "conversations", "return_assistant_tokens_mask"}


class ChatTemplate:
    """The chat templates of a checkpoint by name ("default", "tool_use", ...), and the special tokens that they refer to."""

    def __init__(self, templates: dict[str, str], special_tokens: dict[str, str]) -> None:
        self.templates = templates
        self.special_tokens = special_tokens

    @classmethod
    def load(cls, directory: Path) -> ChatTemplate:
        """From chat_template.jinja and additional_chat_templates/, else from tokenizer_config.json; there may be none.

        Raises ModelError when a file can't be read or holds something else.
        """
        config = _read(directory / "tokenizer_config.json")
        tokens = _special_tokens(config)
        if "added_tokens_decoder" not in config:
            tokens |= _special_tokens(_read(directory / "special_tokens_map.json"))
        files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
        if (single := directory / "chat_template.jinja").is_file():
            files["default"] = single
        try:
            templates = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"a chat template in {directory} can't be read: {error}") from None
        return cls(templates or _templates(config.get("chat_template"), directory), tokens)

    def render(
        self,
        messages: list[dict[str, Any]],
        /,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> str:
        """The text of one conversation, special tokens included.

        messages: [{"role": ..., "content": ...}, ...]; content is a text or a list of {"type": "text", "text": ...}, which
        become the lines of one text where the template takes only texts. chat_template: the name of one of the checkpoint's
        templates, or a template; None: "tool_use" for tools where there is one, else "default". add_generation_prompt: end
        with the header of the model's turn. continue_final_message: end within the last message instead. tools: JSON
        schemas; an empty list is none. template_kwargs: further variables of the template.

        Raises InvalidRequestError when the conversation or an argument is refused, by us or by the template; ModelError when
        the checkpoint's template is no valid one.
        """
        checked = _checked(messages)
        _check_arguments(checked, add_generation_prompt, continue_final_message, tools, template_kwargs)
        source, own = self._source(chat_template, bool(tools))
        variables = {**self.special_tokens, **template_kwargs, "tools": tools or None}
        variables |= {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        if not _takes_parts(source, own, checked, variables):
            checked = [_joined(message) for message in checked]
        return _render(source, own, checked, variables)

    def _source(self, given: str | None, with_tools: bool) -> tuple[str, bool]:
        """The template to use, and whether it is the checkpoint's."""
        names = ", ".join(self.templates) or "none"
        if given is None:
            name = "tool_use" if with_tools and "tool_use" in self.templates else "default"
            if name not in self.templates:
                raise InvalidRequestError(f"the checkpoint has no {name} chat template (it has: {names}); pass chat_template")
            return self.templates[name], True
        if not isinstance(given, str):
            raise InvalidRequestError(f"chat_template must be a text, got {type(given).__name__}")
        if given in self.templates:
            return self.templates[given], True
        if "{{" not in given and "{%" not in given:
            raise InvalidRequestError(f"chat_template={given!r} is neither a Jinja template nor one of the checkpoint's: {names}")
        return given, False


def _render(source: str, own: bool, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
    # Its sandbox is hardened with every release; importing it takes half a second, which only conversations pay.
    from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    refusal = ModelError if own else InvalidRequestError
    try:
        rendered: Any = render_jinja_template(conversations=[messages], chat_template=source, **variables)
    except TemplateSyntaxError as error:
        raise refusal(f"the chat template is no valid Jinja template: {error} (line {error.lineno})") from error
    except SecurityError as error:
        raise refusal(f"the chat template does what the sandbox forbids: {error}") from error
    except Exception as error:
        reason = str(error) if isinstance(error, TemplateError | ValueError) else f"{type(error).__name__}: {error}"
        raise InvalidRequestError(f"the chat template refuses the conversation: {reason}") from error
    [text], _ = rendered  # and where the model's own turns are
    if not text:
        raise InvalidRequestError("the chat template turns the conversation into an empty text")
    return str(text)


def _takes_parts(source: str, own: bool, messages: list[dict[str, Any]], variables: dict[str, Any]) -> bool:
    """Whether the template reads content that is a list of parts, where there is any, instead of failing or printing the list."""
    lists = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    try:
        text = _render(source, own, messages, variables | {"continue_final_message": False}) if lists else ""
    except InvalidRequestError:
        return False
    return not any(str(parts) in text for parts in lists)


def _check_arguments(
    messages: list[dict[str, Any]], begin: object, go_on: object, tools: object, variables: dict[str, Any]
) -> None:
    if not isinstance(begin, bool) or not isinstance(go_on, bool):
        raise InvalidRequestError(f"add_generation_prompt={begin!r} and continue_final_message={go_on!r} must be True or False")
    if go_on and begin:
        raise InvalidRequestError("continue_final_message needs add_generation_prompt=False: a turn goes on or a new one begins")
    if go_on and not messages[-1].get("content"):
        raise InvalidRequestError("continue_final_message: the last message has no content to go on with")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InvalidRequestError("tools must be a list of JSON schemas (objects)")
    if taken := sorted(_RESERVED & variables.keys()):
        raise InvalidRequestError(f"variables of a chat template can't be called {' or '.join(taken)}")


def _checked(messages: Any) -> list[dict[str, Any]]:
    """The messages without keys that are None, or an error that names the first that is no message."""
    if not isinstance(messages, list | tuple):
        raise InvalidRequestError(f"messages must be a list of objects with role and content, got {type(messages).__name__}")
    if not messages:
        raise InvalidRequestError("messages is empty; a conversation has at least one message")
    return [_message(f"messages[{at}]", message) for at, message in enumerate(messages)]


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequestError(f"{where} must be an object with role and content, got {type(message).__name__}")
    if not isinstance(role := message.get("role"), str):
        raise InvalidRequestError(f"{where} needs a role (a text, as 'user'), got {role!r}")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            _check_part(where, part)
    elif not isinstance(content, str) and (content is not None or not message.get("tool_calls")):
        raise InvalidRequestError(f"{where} needs content: a text or a list of text parts, got {content!r}")
    return {key: value for key, value in message.items() if value is not None}


def _check_part(where: str, part: Any) -> None:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise InvalidRequestError(f"{where} holds content of type {kind!r}; only {{'type': 'text', 'text': ...}} is supported")
    if not isinstance(part.get("text"), str):
        raise InvalidRequestError(f"{where} has a text part without a text: {part!r}")


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its text parts as the lines of one text."""
    content = message.get("content")
    return message | {"content": "\n".join(part["text"] for part in content)} if isinstance(content, list) else message


def _read(path: Path) -> JsonObject:
    return read_json(path) if path.is_file() else {}


def _special_tokens(config: JsonObject) -> dict[str, str]:
    """Entries like bos_token; the token is a text or an object with its content."""
    named = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in named.items() if key.endswith("_token") and isinstance(value, str)}


def _templates(value: Any, directory: Path) -> dict[str, str]:
    """What tokenizer_config.json has as chat_template: nothing, one, or a list of named ones."""
    if value is None:
        return {}
    named = {"default": value}
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        named = {entry.get("name"): entry.get("template") for entry in value}
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in named.items()):
        raise ModelError(
            f"chat_template in {directory / 'tokenizer_config.json'} must be a text or a list of objects with name and template"
        )
    return named
