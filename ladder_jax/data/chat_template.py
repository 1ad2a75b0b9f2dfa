"""Chat templates: the Jinja program of a tokenizer that makes text of a conversation.

The environment is that of transformers: a sandbox, in which a template finds
`raise_exception`, `strftime_now`, `tojson`, loop controls and `{% generation %}`
blocks, which mark what the assistant wrote. So a template gives the same text here and
there.
"""

import datetime
import functools
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ladder_jax.config import ConfigError
from ladder_jax.data.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]

# They mark a generation block in the output. No message contains them: they are not
# Unicode text.
_START, _STOP = "\ud800", "\ud801"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MOST_REASON = 100  # characters of a template's own message

# Templates for tokenizers that have none. The first one is ChatML, for a vocabulary
# with its markers. The second one needs no special token but eos.
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
PLAIN = """\
{%- for message in messages %}
{{- '### ' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{{- '\\n' }}
{%- else %}
{{- message['content'] + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '### assistant\\n' }}
{%- endif %}
"""


class Refused(ValueError):
    """A template does not accept a conversation; the message says why, in one line."""


class Text(NamedTuple):
    """The output of a template."""

    text: str
    spans: list[tuple[int, int]]  # characters of each generation block: start, stop


class ChatTemplate:
    """The chat template of a tokenizer, or a default if the tokenizer has none.

    Args:
      tokenizer: with the template, and the names of the special tokens in it.
      now: the time that the template sees. None: the time of each call.

    Attributes:
      source: the template.
      marks_assistant: whether it has generation blocks.
      reads_time: whether it calls `strftime_now`.

    Raises:
      ConfigError: if jinja2 is not installed, or the template is not valid.
    """

    def __init__(
        self, tokenizer: Tokenizer, now: datetime.datetime | None = None
    ) -> None:
        self.source = tokenizer.chat_template or default_template(tokenizer)
        self.marks_assistant = bool(_GENERATION.search(self.source))
        self.reads_time = "strftime_now" in self.source
        self._now = now
        self._names = {
            f"{kind}_token": name for kind, name in tokenizer.special.names.items()
        }
        self._template = self._compile()

    def _compile(self) -> Any:
        environment, template_error = _environment()
        try:
            template = environment.from_string(self.source)
        except template_error as error:
            line = getattr(error, "lineno", None)
            where = f" (line {line})" if line else ""
            raise ConfigError(
                "the tokenizer's chat template is not a valid Jinja template: "
                f"{_one_line(error)}{where}"
            ) from None
        template.globals["strftime_now"] = self._strftime_now
        return template

    def _strftime_now(self, form: str) -> str:
        return (self._now or datetime.datetime.now()).strftime(form)

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> Text:
        """Returns the text of a conversation.

        Args:
          messages: each has "role" and "content".
          add_generation_prompt: whether the text ends where an answer begins.

        Raises:
          Refused: if the template raises an exception.
        """
        try:
            marked = self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._names,
            )
        except Exception as error:  # a template may fail in any way, as programs do
            raise Refused(_one_line(error)) from None
        return _without_marks(marked)


def check_template(tokenizer: Tokenizer) -> None:
    """Raises ConfigError, one line, where a tokenizer's template is not valid.

    Without jinja2 nothing is checked: who only converts weights need not have it.
    """
    if tokenizer.chat_template and importlib.util.find_spec("jinja2"):
        ChatTemplate(tokenizer)


def default_template(tokenizer: Tokenizer) -> str:
    """Returns CHATML if the tokenizer has its markers as special tokens, else PLAIN."""
    markers = tokenizer.encode_rendered(["<|im_start|>", "<|im_end|>"])
    are_special = [
        len(marker.ids) == 1 and tokenizer.token_bytes(marker.ids[0], None) is None
        for marker in markers
    ]
    return CHATML if all(are_special) else PLAIN


def _without_marks(marked: str) -> Text:
    """Removes the marks of generation blocks; returns where they were."""
    if _START not in marked:
        return Text(marked, [])
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    length = start = depth = 0
    for part in re.split(f"([{_START}{_STOP}])", marked):
        if part == _START:
            start = start if depth else length
            depth += 1
        elif part == _STOP:
            depth -= 1
            if not depth:
                spans.append((start, length))
        else:
            parts.append(part)
            length += len(part)
    return Text("".join(parts), spans)


def _one_line(error: Exception) -> str:
    """Returns the message of an exception on one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MOST_REASON else f"{text[:_MOST_REASON]}..."


@functools.cache
def _environment() -> tuple[Any, type[Exception]]:
    """Returns the Jinja environment of all templates, and the class of its errors."""
    try:
        import jinja2
        from jinja2 import ext, nodes, parser, sandbox
    except ImportError:
        raise ConfigError(
            "chat templates need jinja2: pip install 'ladder_jax[hf]'"
        ) from None

    class Generation(ext.Extension):
        """{% generation %} ... {% endgeneration %}: what the assistant wrote."""

        tags = {"generation"}

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_mark")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return _START + caller() + _STOP

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Jinja's own tojson escapes characters of HTML."""
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, ext.loopcontrols],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment, jinja2.TemplateError
