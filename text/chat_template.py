"""A checkpoint's chat template: messages to the prompt that the model was trained on.

Templates are Jinja programs written by strangers: they run in Jinja's sandbox, with the few globals that Hugging Face gives
them. Compiled once; rendering is safe from threads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..common.errors import InvalidRequest, ModelLoadError
from .tokenizer import named_tokens, read_json_object

_CONTINUE_MARK = "PILOTFISH_CONTINUES_HERE "


class ChatTemplate:
    """Renders conversations.

    `source` is the Jinja text, None for a model without a template; `variables` are given to every rendering
    (bos_token and its like).
    """

    def __init__(self, source: str | None, variables: Mapping[str, str]) -> None:
        self._variables = dict(variables)
        try:
            self._template = None if source is None else _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelLoadError(f"the chat template is not valid Jinja: {error} (line {error.lineno})") from error

    @classmethod
    def from_directory(cls, path: str | Path) -> ChatTemplate:
        """The template of a checkpoint: chat_template.jinja, else the "default" one of tokenizer_config.json.

        Raises:
            ModelLoadError: a file is damaged or the template does not compile.
        """
        directory = Path(path)
        config = read_json_object(directory / "tokenizer_config.json")
        return cls(_find_source(directory, config), named_tokens(config))

    @property
    def exists(self) -> bool:
        return self._template is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt of a conversation. Encode it with add_special_tokens=False: the template has put them in.

        Args:
            messages: objects with `role` and `content`; content is a string or a list of {"type": "text", "text": ...} parts.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: end inside the last message, which must be the assistant's: the model goes on with it.

        Raises:
            InvalidRequest: the model has no template, a message is malformed, or the template refuses the conversation.
        """
        if self._template is None:
            raise InvalidRequest("this model has no chat template: use generate (/v1/completions) with a prompt instead")
        conversation = [_checked(message, index) for index, message in enumerate(messages)]
        if not conversation:
            raise InvalidRequest("messages must hold at least one message")
        if not continue_final_message:
            return self._render(conversation, add_generation_prompt=add_generation_prompt)
        final = conversation[-1]
        if final["role"] != "assistant":
            raise InvalidRequest(f"continue_final_message needs a last message of role 'assistant', not {final['role']!r}")
        marked = self._render(
            [*conversation[:-1], {**final, "content": final["content"] + _CONTINUE_MARK}], add_generation_prompt=False
        )
        cut = marked.rfind(_CONTINUE_MARK.strip())
        if cut < 0:
            raise InvalidRequest("continue_final_message: this model's chat template leaves the last message out of the prompt")
        # A template that trims messages trims the mark's own space: the message before it would have been trimmed too.
        return marked[:cut] if marked.startswith(_CONTINUE_MARK, cut) else marked[:cut].rstrip()

    def _render(self, conversation: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        assert self._template is not None
        try:
            return self._template.render(
                messages=conversation,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}") from error


def _checked(message: Any, index: int) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"messages[{index}] must be an object with role and content, not {message!r}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"messages[{index}].role must be a non-empty string, not {role!r}")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part_text(part, index) for part in content)
    if not isinstance(content, str):
        raise InvalidRequest(f"messages[{index}].content must be a string or a list of text parts, not {content!r}")
    return {"role": role, "content": content}


def _part_text(part: Any, index: int) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise InvalidRequest(f"messages[{index}].content has a part of type {kind!r}; this model takes text parts only")
    return text


def _find_source(directory: Path, config: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, named
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, Mapping):
        if "default" not in template:
            raise ModelLoadError(f"{directory} has chat templates {sorted(template)}, but none of them is 'default'")
        template = template["default"]
    return template


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks the assistant's words for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes HTML, which no model expects."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
