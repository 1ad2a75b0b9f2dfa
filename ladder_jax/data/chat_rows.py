"""Rows of chat data as lists of messages: {"role": ..., "content": ...}.

Accepted rows:

- `messages`: a list of {role, content}, as OpenAI has it.
- `conversations`: a list of {from, value}, as ShareGPT has it, or of {role, content}.
  The row may have a `system` text.
- `prompt` and `completion` (or `response`): texts, or lists of messages.
- `instruction` and `output` (or `response`), as Alpaca has it; perhaps with `input` (or
  `context`), which follows the instruction after a blank line.

A list of messages may be the text of a JSON list. Content may be a list of parts of
type text, which are joined.
"""

import json
from collections.abc import Mapping
from typing import Any

from ladder_jax.data.formats import Tally
from ladder_jax.data.surrogates import without_surrogates

Message = dict[str, str]

LISTS = ("messages", "conversations")
# (question, its additional text, answer).
PAIRS = (
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("instruction", "input", "output"),
    ("instruction", "input", "response"),
    ("instruction", "context", "response"),
)
# Every field that is read.
FIELDS = tuple(
    dict.fromkeys(
        [*LISTS, "system", "tools", *(name for pair in PAIRS for name in pair if name)]
    )
)
ACCEPTED = (
    "rows with messages, conversations, prompt and completion, or instruction and "
    "output"
)

ROLES = ("system", "developer", "user", "assistant")
_ROLES_OF_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
_TOOL_FIELDS = ("tool_calls", "function_call", "tool_call_id")
# Some tools read them as: do not train on this message.
_FLAGS = ("weight", "train")

# Kinds of `Tally.left_out`; FLAGGED of `Tally.noted`.
NO_MESSAGES = "rows without messages"
NOT_MESSAGES = "conversations whose messages are not a list of objects"
NO_ROLE = f"conversations with a role that is not one of {', '.join(ROLES)}"
NOT_TEXT = "conversations with content that is not text"
PICTURES = "conversations with images or other parts that are not text"
EMPTY = "conversations with an empty message"
TOOLS = "conversations with tool calls"
FLAGGED = "conversations with a weight or train field of a message, which is not used"
NO_ANSWER = "conversations without an assistant message"


class Unusable(ValueError):
    """A row is no conversation that can be used; the message is a kind of row."""


def looks_like_chat(row: Any) -> bool:
    """Whether a row has the fields of one of the accepted forms."""
    return isinstance(row, dict) and _form(row) is not None


def _form(row: Mapping[str, Any]) -> tuple[str, str | None, str] | str | None:
    """Returns the field with the list, the fields of a pair, or None."""
    for name in LISTS:
        if row.get(name) is not None:
            return name
    for pair in PAIRS:
        question, _, answer = pair
        if row.get(question) is not None and row.get(answer) is not None:
            return pair
    return None


def to_messages(row: Any, tally: Tally) -> list[Message]:
    """Returns the messages of a row, at least one of them the assistant's.

    tally: counts the conversations in which surrogates became U+FFFD.

    Raises:
      Unusable: if the row has no messages, or some that are not accepted.
    """
    form = _form(row) if isinstance(row, dict) else None
    if form is None:
        raise Unusable(NO_MESSAGES)
    if row.get("tools"):
        raise Unusable(TOOLS)
    if isinstance(form, str):
        values = _parse_list(row[form])
        system = row.get("system")
        if isinstance(system, str) and system.strip() and isinstance(values, list):
            values = [dict(role="system", content=system), *values]
    else:
        values = _pair(row, *form)
    messages = check_messages(values, tally)
    if all(message["role"] != "assistant" for message in messages):
        raise Unusable(NO_ANSWER)
    return messages


def _parse_list(value: Any) -> Any:
    """Returns the list that `value` is, or is the JSON text of; else `value`."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _pair(row: dict[str, Any], question: str, more: str | None, answer: str) -> Any:
    """Returns the messages of a row of two texts, or of two lists of messages."""
    if isinstance(row[question], list) and isinstance(row[answer], list):
        return [*row[question], *row[answer]]
    asked, extra = row[question], row.get(more) if more else None
    if extra is not None and not isinstance(extra, str):
        raise Unusable(NOT_TEXT)
    if isinstance(asked, str) and extra and extra.strip():
        asked = f"{asked}\n\n{extra}"
    messages = [
        dict(role="user", content=asked),
        dict(role="assistant", content=row[answer]),
    ]
    system = row.get("system")
    if isinstance(system, str) and system.strip():
        messages = [dict(role="system", content=system), *messages]
    return messages


def check_messages(
    values: Any, tally: Tally, allow_empty: bool = False
) -> list[Message]:
    """Returns `values` as messages.

    Args:
      values: a list of messages in one of the accepted forms.
      tally: see `to_messages`.
      allow_empty: whether a message of the user or the assistant may be blank.

    Raises:
      Unusable: if one of them is not accepted.
    """
    is_list = isinstance(values, list) and all(isinstance(v, dict) for v in values)
    if not is_list:
        raise Unusable(NOT_MESSAGES)
    if not values:
        raise Unusable(NO_MESSAGES)
    messages = [_message(value) for value in values]
    speaks = (m["content"].strip() or m["role"] == "system" for m in messages)
    if not (allow_empty or all(speaks)):
        raise Unusable(EMPTY)
    if any(value.get(name) is not None for value in values for name in _FLAGS):
        tally.noted[FLAGGED] += 1
    repaired = [
        {key: without_surrogates(text) for key, text in message.items()}
        for message in messages
    ]
    tally.repaired += repaired != messages
    return repaired


def _message(value: Mapping[str, Any]) -> Message:
    """Returns one message. It keeps other fields that are text, for the template."""
    role = _either(value, "role", "from")
    content = _either(value, "content", "value")
    if role in _TOOL_ROLES or any(value.get(name) for name in _TOOL_FIELDS):
        raise Unusable(TOOLS)
    role = _ROLES_OF_SHAREGPT.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise Unusable(NO_ROLE)
    if isinstance(content, list):
        content = _joined(content)
    if not isinstance(content, str):
        raise Unusable(NOT_TEXT)
    others = {
        key: text
        for key, text in value.items()
        if isinstance(text, str) and key not in ("role", "content", "from", "value")
    }
    return dict(role=role, content=content, **others)


def _either(value: Mapping[str, Any], first: str, second: str) -> Any:
    """Returns the field `first`, or `second` if there is no `first`."""
    return value.get(second) if value.get(first) is None else value[first]


def _joined(parts: list[Any]) -> str:
    """Returns the text of a list of parts. Raises Unusable if one is not text."""
    texts = []
    for part in parts:
        if not isinstance(part, dict):
            raise Unusable(NOT_TEXT)
        text = part.get("text") if part.get("type") == "text" else None
        if not isinstance(text, str):
            raise Unusable(PICTURES)
        texts.append(text)
    return "".join(texts)
