"""Stop strings: the filter against a slow, obvious version, token by token."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ladder_jax.config import ConfigError
from ladder_jax.serve.stop_strings import StopStringFilter, check_stop


class Pieces:
    """A stream whose token i is the text `pieces[i]`; `rest` comes with the end."""

    def __init__(self, pieces, rest=""):
        self.pieces, self.rest = pieces, rest

    def push(self, token):
        return self.pieces[token]

    def flush(self):
        rest, self.rest = self.rest, ""
        return rest


def first_stop(text, stops):
    """Where the stop string that begins first begins in `text`, or None."""
    return min((text.index(stop) for stop in stops if stop in text), default=None)


def may_begin_a_stop(text, stops):
    return any(stop.startswith(text) for stop in stops)


# Few letters, so that stop strings occur, overlap and begin inside one another.
TEXTS = st.text("ab", max_size=4)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


@given(st.lists(TEXTS, max_size=8), TEXTS, STOPS)
@example(["aab", "a"], "", ["aabb", "ba"])
@example(["ab", "ab", "b"], "", ["ababb", "b"])
@example(["a", "a"], "b", ["aab"])
def test_text_ends_before_the_first_stop_string(pieces, rest, stops):
    text_filter = StopStringFilter(Pieces(pieces, rest), stops)
    certain, stopped = "", False
    for token in range(len(pieces)):
        text = "".join(pieces[: token + 1])
        new, now_stopped = text_filter.push(token)
        certain += new
        if not stopped and first_stop(text, stops) is not None:
            stopped, end = True, first_stop(text, stops)
            expected = text[:end]
        assert now_stopped == stopped, f"after {text!r}"
        if stopped:
            assert certain == expected, f"after {text!r}"
            continue
        held = text.removeprefix(certain)
        assert certain + held == text, f"after {text!r}"
        assert not held or may_begin_a_stop(held, stops), f"{held!r} held in vain"
        for start in range(len(text) - len(held)):
            ends = text[start:]
            assert not may_begin_a_stop(ends, stops), f"{ends!r} could be a stop"
    certain += text_filter.flush()
    if not stopped:
        text = "".join(pieces) + rest
        expected = text[: first_stop(text, stops)]
    assert certain == expected
    assert text_filter.flush() == ""


@given(st.lists(TEXTS, min_size=1, max_size=8), TEXTS, STOPS, st.integers(0, 8))
@example(["aa", "b", "b"], "", ["aab", "abb"], 2)
@example(["ab", "b"], "", ["ab", "abbb"], 1)
@example(["a", "b"], "", ["ab"], 1)
def test_a_stop_string_that_the_first_tokens_complete_does_not_count(
    pieces, rest, stops, min_tokens
):
    text_filter = StopStringFilter(Pieces(pieces, rest), stops, min_tokens)
    given_text, expected = "", None
    for token in range(len(pieces)):
        before, text = "".join(pieces[:token]), "".join(pieces[: token + 1])
        new, stopped = text_filter.push(token)
        given_text += new
        if token >= min_tokens or not min_tokens:
            expected = cut(before, text, stops)
        assert stopped == (expected is not None)
        if stopped:
            break
    else:
        text = "".join(pieces)
        if len(pieces) > min_tokens or not min_tokens:
            expected = cut(text, text + rest, stops)
        if expected is None:
            expected = text + rest
    assert given_text + text_filter.flush() == expected


def cut(before, text, stops):
    """`text` before the first stop string that is not complete in `before`, or None."""
    starts = [
        start
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start) and start + len(stop) > len(before)
    ]
    return text[: min(starts)] if starts else None


def test_text_after_a_stop_string_is_not_returned():
    text_filter = StopStringFilter(Pieces(["aXb", "c"], "d"), ["X"])
    assert text_filter.push(0) == ("a", True)
    assert text_filter.push(1) == ("", True)
    assert text_filter.flush() == ""


@pytest.mark.parametrize(
    "stop, strings",
    [((), ()), ([], ()), ("ab", ("ab",)), (["a", "b"], ("a", "b")), ({"a"}, ("a",))],
)
def test_stop_is_a_string_or_several(stop, strings):
    assert check_stop(stop) == strings


@pytest.mark.parametrize(
    "stop",
    [
        "",
        [""],
        [1],
        (10,),
        10,
        None,
        b"a",
        {"a": 1},
        itertools.repeat("a"),
        ["a"] * 257,
    ],
    ids=lambda stop: str(type(stop)),
)
def test_another_stop_is_refused(stop):
    with pytest.raises(ConfigError) as error:
        check_stop(stop)
    assert str(error.value).endswith(
        "it must be a non-empty string, or a list of at most 256 of them"
    )
