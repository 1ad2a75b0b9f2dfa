"""Conversations as token ids, and which of the ids a model learns to predict.

A conversation becomes text by the chat template of the tokenizer, and the text becomes
ids. The ids of the assistant's answers count in the loss, and so does the end of each
turn; the template says where they are:

- by its `{% generation %}` blocks, if it has some;
- otherwise by the text of the beginning of the conversation: an answer follows
  messages[:i] with the generation prompt, and ends where messages[:i + 1] end. This
  holds only if each of these texts begins with the one before it.
"""

import bisect
import datetime
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from ladder_jax.config import ConfigError, Data, short_repr
from ladder_jax.data import chat_rows, sources
from ladder_jax.data.chat_rows import Message, Unusable
from ladder_jax.data.chat_template import ChatTemplate, Refused
from ladder_jax.data.formats import Part, Tally
from ladder_jax.data.tokenizer import Rendered, Tokenizer

TrainOn = Literal["assistant", "all", "last"]
Span = tuple[int, int]  # a start and a stop, in characters or ids

# A template may print the date. In training it is always this one, so that a run gives
# the same numbers on another day.
TRAINING_DATE = datetime.datetime(2024, 7, 26)
# One call of the tokenizer has this many conversations.
_BATCH = 256

# Kinds of `Tally`.
CHANGED = (
    "conversations of which the chat template changes earlier turns "
    "(data.train_on='last' or 'all' may accept them)"
)
NO_TEXT = "conversations of which the chat template makes no text"
UNMARKED = "conversations in which the chat template marks no answer"
DATED = f"conversations with a date, which is {TRAINING_DATE:%d %b %Y} in training"


class Encoded(NamedTuple):
    """A conversation as ids."""

    ids: list[int]
    counted: list[bool]  # whether each id counts as a target; never the first one
    bytes: int  # of the text that the counted ids stand for, in UTF-8


class ChatEncoder:
    """Encodes conversations by the chat template of a tokenizer.

    Args:
      tokenizer: with a template; without one, see `chat_template.default_template`.
      now: the time that the template sees. None: the time of each call.

    Raises:
      ConfigError: if jinja2 is not installed, or the template is not valid.
    """

    def __init__(
        self, tokenizer: Tokenizer, now: datetime.datetime | None = None
    ) -> None:
        self.tokenizer, self.template = tokenizer, ChatTemplate(tokenizer, now)

    def prompt(self, messages: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Returns the ids after which the assistant's next answer follows.

        Args:
          messages: {"role", "content"} each; a text is one message of the user.

        Raises:
          ConfigError: if a message, or their order, is not accepted.
        """
        if isinstance(messages, str):
            messages = [dict(role="user", content=messages)]
        values = list(messages) if isinstance(messages, Sequence) else messages
        try:
            checked = chat_rows.check_messages(values, Tally(), allow_empty=True)
            text = self.template.render(checked, add_generation_prompt=True).text
        except Unusable as error:
            raise ConfigError(
                f"messages={short_repr(messages)} is not accepted ({error}): it must "
                "be a list of messages, each with a role and content that is text"
            ) from None
        except Refused as error:
            raise ConfigError(
                f"messages={short_repr(messages)} is not accepted by the chat template "
                f"of the tokenizer: {error}"
            ) from None
        [rendered] = self.tokenizer.encode_rendered([text])
        ids, _ = self._with_one_bos(rendered.ids, [False] * len(rendered.ids))
        return ids

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: the template's end of a turn, then eos_ids."""
        exchange = [
            dict(role="user", content="a"),
            dict(role="assistant", content="b"),
        ]
        ends: list[int] = []
        try:
            [encoded] = self.encode([self.find_answers(exchange, "last")])
        except Unusable:
            pass
        else:
            counted = [id for id, counts in zip(*encoded[:2]) if counts]
            ends = [id for id in counted[-1:] if self._ends_turn(id)]
        return tuple(dict.fromkeys([*ends, *self.tokenizer.eos_ids]))

    def find_answers(
        self, messages: Sequence[Message], train_on: TrainOn
    ) -> tuple[str, list[Span]]:
        """Returns the text of a conversation, and the characters that count in it.

        The text ends with the last answer: nothing is learnt from what follows it.

        Args:
          messages: at least one is the assistant's.
          train_on: see `config.Data`.

        Raises:
          Unusable: if the template does not accept the messages, or does not tell
            where the answers are.
        """
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        last = answers[-1]
        messages = messages[: last + 1]
        try:
            text, spans = self.template.render(messages)
            if not text.strip():
                raise Unusable(NO_TEXT)
            if train_on == "all":
                return text, [(0, len(text))]
            if self.template.marks_assistant:
                if train_on == "last" and last:
                    spans = spans[len(self.template.render(messages[:last]).spans) :]
                if not spans:
                    raise Unusable(UNMARKED)
                return text, spans
            chosen = answers[-1:] if train_on == "last" else answers
            return text, [self._answer(messages, i, text) for i in chosen]
        except Refused as error:
            raise Unusable(
                f"conversations that the chat template refuses: {error}"
            ) from None

    def _answer(self, messages: Sequence[Message], i: int, text: str) -> Span:
        """Returns where the answer messages[i] is in the text of all messages."""
        before = self.template.render(messages[:i], add_generation_prompt=True).text
        after = text
        if i + 1 < len(messages):
            after = self.template.render(messages[: i + 1]).text
        is_beginning = after.startswith(before) and text.startswith(after)
        if not is_beginning or len(after) == len(before):
            raise Unusable(CHANGED)
        return len(before), len(after)

    def encode(self, found: Sequence[tuple[str, list[Span]]]) -> list[Encoded]:
        """Returns the ids of each text that `find_answers` returned."""
        rendered = self.tokenizer.encode_rendered([text for text, _ in found])
        return [self._count(r, spans) for r, (_, spans) in zip(rendered, found)]

    def _count(self, rendered: Rendered, spans: list[Span]) -> Encoded:
        """Returns the ids of a text; those in the spans of characters count."""
        ids, counted = list(rendered.ids), [False] * len(rendered.ids)
        if not ids:  # a tokenizer without a token for these characters
            return Encoded(ids, counted, 0)
        for span in spans:
            start, stop = self._turn(ids, *_ids_of(span, rendered.offsets))
            counted[start:stop] = [True] * (stop - start)
            is_last = all(map(self._is_blank, ids[stop:]))
            if is_last and not self._ends_turn(ids[self._last(ids, start, stop)]):
                # The template does not end the last turn, so eos does.
                ids.append(self.tokenizer.eos)
                counted[start:] = [True] * (len(ids) - start)
        ids, counted = self._with_one_bos(ids, counted)
        counted[0] = False
        size = sum(self._size(id) for id, counts in zip(ids, counted) if counts)
        return Encoded(ids, counted, size)

    def _turn(self, ids: list[int], start: int, stop: int) -> Span:
        """Returns ids[start:stop], an answer, with the end of its turn alone.

        The beginning of a conversation may end in blanks after the end of the turn,
        which the model need not write. A generation block may end before it.
        """
        last = self._last(ids, start, stop)
        if self._ends_turn(ids[last]):
            return start, stop if self.template.marks_assistant else last + 1
        if stop < len(ids) and ids[stop] in self.tokenizer.eos_ids:
            return start, stop + 1
        return start, stop

    def _last(self, ids: list[int], start: int, stop: int) -> int:
        """Returns the position of the last of ids[start:stop] that is not blank."""
        last = stop - 1
        while last > start and self._is_blank(ids[last]):
            last -= 1
        return last

    def _ends_turn(self, id: int) -> bool:
        is_special = self.tokenizer.token_bytes(id, None) is None
        return is_special or id in self.tokenizer.eos_ids

    def _is_blank(self, id: int) -> bool:
        text = self.tokenizer.token_bytes(id, id)
        return text is not None and not text.strip() and not self._ends_turn(id)

    def _size(self, id: int) -> int:
        """The bytes of text that an id stands for, 0 for a special token."""
        return len(self.tokenizer.token_bytes(id, id) or b"")

    def _with_one_bos(
        self, ids: list[int], counted: list[bool]
    ) -> tuple[list[int], list[bool]]:
        """Returns the ids with one bos at the start, if template or tokenizer has one.

        Both may add it, or only one of them.
        """
        if "bos" not in self.tokenizer.special.names:
            return ids, counted
        bos, extra = self.tokenizer.bos, 0
        while ids[extra : extra + 2] == [bos, bos]:
            extra += 1
        if self.tokenizer.starts_with_bos and ids[:1] != [bos]:
            return [bos, *ids], [False, *counted]
        return ids[extra:], counted[extra:]


def _ids_of(span: Span, offsets: list[Span]) -> Span:
    """Returns which ids stand for one of the characters from span[0] to span[1]."""
    first = bisect.bisect_right(offsets, span[0], key=lambda offset: offset[1])
    # An id without a character of its own belongs to the one that follows.
    while first and offsets[first - 1] == (span[0], span[0]):
        first -= 1
    stop = bisect.bisect_left(offsets, span[1], key=lambda offset: offset[0])
    return first, max(first, stop)


# ------------------------------------------------------------------ a source


class Conversation(NamedTuple):
    """A conversation of a source."""

    messages: list[Message]
    encoded: Encoded


def read_messages(parts: Iterable[Part], tally: Tally) -> Iterator[list[Message]]:
    """Yields the messages of each conversation in parts of the files of a source.

    tally: counts the rows and files that are left out.
    """
    for part in parts:
        for row in sources.read_rows(part, chat_rows.FIELDS, tally):
            try:
                yield chat_rows.to_messages(row, tally)
            except Unusable as error:
                tally.left_out[str(error)] += 1


def read(
    data_config: Data, parts: Iterable[Part], tokenizer: Tokenizer, tally: Tally
) -> Iterator[Conversation]:
    """Yields the conversations of a source, encoded; each has a target that counts.

    Args:
      data_config: `train_on` says which ids count.
      parts: of the files of `data.source`.
      tokenizer: encodes them.
      tally: counts the rows and files that are left out.

    Raises:
      ConfigError: as in `ChatEncoder`, and if the tokenizer fails.
    """
    encoder = ChatEncoder(tokenizer, TRAINING_DATE)
    batch: list[list[Message]] = []
    found: list[tuple[str, list[Span]]] = []

    def encode() -> Iterator[Conversation]:
        for messages, encoded in zip(batch, encoder.encode(found)):
            if any(encoded.counted):
                tally.noted[DATED] += encoder.template.reads_time
                yield Conversation(messages, encoded)
            else:
                tally.left_out[UNMARKED] += 1
        batch.clear()
        found.clear()

    for messages in read_messages(parts, tally):
        try:
            found.append(encoder.find_answers(messages, data_config.train_on))
        except Unusable as error:
            tally.left_out[str(error)] += 1
            continue
        batch.append(messages)
        if len(batch) == _BATCH:
            yield from encode()
    yield from encode()
