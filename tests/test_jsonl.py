"""JSON Lines: where a line ends, and what becomes of a wrong one."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladder_jax.data.jsonl import parse_line, read_jsonl, read_lines


def test_a_line_ends_at_a_newline_alone():
    text = '"a\u2028b"\r\n"c\x85d"\n\n"e\x0bf\x0cg\x1ch"'
    lines = list(read_lines(io.BytesIO(text.encode())))
    assert [number for number, _ in lines] == [1, 2, 3, 4]
    assert [line.decode() for _, line in lines] == [
        '"a\u2028b"',
        '"c\x85d"',
        "",
        '"e\x0bf\x0cg\x1ch"',
    ]


@given(st.lists(st.text()), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_every_text_comes_back(texts, line_end, ends):
    lines = [json.dumps(text, ensure_ascii=False) for text in texts]
    content = line_end.join(lines) + (line_end if ends else "")
    file = io.BytesIO(content.encode("utf-8", "surrogatepass"))
    assert [value for _, value in read_jsonl(file)] == texts


def test_lines_are_read_as_a_stream():
    def endless():
        while True:
            yield b'{"a": 1}\n'

    class File:
        __iter__ = lambda self: endless()

    rows = read_jsonl(File())
    assert [next(rows) for _ in range(3)] == [(i, {"a": 1}) for i in (1, 2, 3)]


def test_a_wrong_line_is_an_error_with_its_number_and_the_others_are_read():
    file = io.BytesIO(b'\xef\xbb\xbf1\n{"a":\n\n  \n"\xff"\n' + b"[" * 10**5 + b"\n2\n")
    rows = list(read_jsonl(file))
    assert [number for number, _ in rows] == [1, 2, 5, 6, 7]
    assert rows[0][1] == 1 and rows[-1][1] == 2
    messages = [str(value) for _, value in rows[1:-1]]
    assert messages[0].startswith("it is not JSON: ")
    assert messages[1] == "it is not UTF-8 at byte 1"
    assert messages[2] == "it is not JSON: it is nested too deeply"
    assert all(type(value) is ValueError for _, value in rows[1:-1])


@pytest.mark.parametrize("line", [b"", b"{", b"1 2", b"\xff", b"[" * 10**5])
def test_the_message_of_a_wrong_line_is_one_line(line):
    with pytest.raises(ValueError) as error:
        parse_line(line)
    assert str(error.value) and "\n" not in str(error.value)
