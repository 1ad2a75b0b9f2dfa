"""A conversation with a model in a terminal: `ladder-jax generate ... --chat`."""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from ladder_jax.loading import Loaded

PROMPT = "> "


def converse(
    loaded: Loaded,
    questions: Iterable[str],
    options: dict[str, Any],
    *,
    system: str = "",
    out: TextIO | None = None,
) -> None:
    """Answers questions one after the other; each answer sees all that came before.

    Args:
      loaded: the model.
      questions: the user's turns; blank ones are skipped.
      options: of `Loaded.chat`.
      system: the system message, "" for none.
      out: gets the answers, token by token (default: stdout).
    Raises ConfigError if an option is not accepted, or the conversation is longer than
    the model's max_length.
    """
    messages = [dict(role="system", content=system)] if system else []
    for question in questions:
        if not question.strip():
            continue
        messages.append(dict(role="user", content=question))
        answer = ""
        for text in loaded.chat(messages, **options):
            print(text, end="", flush=True, file=out)
            answer += text
        print(flush=True, file=out)
        messages.append(dict(role="assistant", content=answer))


def typed_lines() -> Iterable[str]:
    """Yields the lines of stdin to its end; asks for each one in a terminal."""
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            print(PROMPT, end="", flush=True, file=sys.stderr)
        line = sys.stdin.readline()
        if not line:
            break
        yield line.removesuffix("\n")
    if is_terminal:
        print(file=sys.stderr)
