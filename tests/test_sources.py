"""Sources: every kind of file is read; what is wrong is counted, or told in a line."""

import bz2
import codecs
import gzip
import json
import lzma
import os
import socket
import sys

import pytest
from helpers import write_files
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax.config import ConfigError
from ladder_jax.data import sources
from ladder_jax.data.formats import Part


def read(source, text_field="text"):
    """(documents, tally) of all files of a source."""
    tally, source = sources.Tally(), str(source)
    return [
        text
        for path in sources.files(source, tally)
        for text in sources.read(source, Part(path), text_field, tally)
    ], tally


def parquet_bytes(tmp_path, columns):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), tmp_path / "made")
    return (tmp_path / "made").read_bytes()


def test_every_kind_of_file_and_all_that_can_be_wrong(tmp_path):
    rows = [
        {"text": "row é one"},
        {"text": "row two \ud800"},
        {"other": "x"},
        {"text": 3},
        ["text"],
        {"text": "  "},
    ]
    folder = write_files(
        tmp_path / "in",
        {
            "plain.md": b"\xef\xbb\xbfcaf\xc3\xa9 \xff",
            "empty.txt": "",
            "image.png": b"\x89PNG\0\0",
            ".hidden": "secret",
            "rows.jsonl": "\n".join(
                [*map(json.dumps, rows), "{broken", "", "[" * 100_000]
            ),
            "rows.ndjson.gz": gzip.compress(b'{"text": "zipped \xff row"}\n'),
            "bad.txt.gz": b"\x1f\x8bnonsense",
            "table.parquet": parquet_bytes(
                tmp_path, {"text": ["cell one", None, "cell two"]}
            ),
            "other.parquet": parquet_bytes(tmp_path, {"words": ["left out"]}),
            "broken.parquet": "PAR1",
        },
    )
    (folder / "deeper").mkdir()
    (folder / "deeper" / "file.txt").write_text("deeper")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    texts, tally = read(folder)
    assert sorted(texts) == sorted(
        [
            "café \ufffd",
            "row é one",
            "row two \ufffd",
            "zipped \ufffd row",
            "cell one",
            "cell two",
            "deeper",
        ]
    )
    assert tally.left_out == {
        "unreadable files": 3,
        "files that are not text": 1,
        "empty documents": 2,
        "rows that are not JSON": 2,
        "rows without a text field 'text'": 5,
    }
    assert tally.repaired == 3
    assert tally.read >= sum(
        path.stat().st_size
        for path in folder.glob("*.*")
        if path.exists() and path.name != ".hidden"
    )


def test_a_source_can_be_a_glob_and_the_text_another_field(tmp_path):
    lines = "".join(json.dumps({"body": f"line {i}"}) + "\n" for i in range(20))
    folder = write_files(tmp_path / "in", {"a.jsonl": lines, "b.txt": "not this"})
    assert read(folder / "*.jsonl", "body")[0] == [f"line {i}" for i in range(20)]


def test_nothing_is_left_out_of_good_files(tmp_path):
    cells = [f"cell {i}" for i in range(9)]
    folder = write_files(
        tmp_path / "in", {"table.parquet": parquet_bytes(tmp_path, {"text": cells})}
    )
    texts, tally = read(folder)
    assert texts == cells and not +tally.left_out and not tally.repaired


@pytest.mark.parametrize(
    "source, message",
    [
        ("nowhere", "does not exist"),
        ("nowhere/*.txt", "matches no file"),
        ("empty", "has no files"),
    ],
)
def test_a_source_that_does_not_exist_is_an_error(tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError,
        match=f"data.source='.*{source.replace('*', '.')}' {message}: it must be",
    ) as error:
        read(tmp_path / source)
    assert "\n" not in str(error.value)


def test_without_pyarrow_parquet_says_what_to_install(tmp_path, monkeypatch):
    folder = write_files(tmp_path / "in", {"a.parquet": "PAR1"})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match=r"needs pyarrow: pip install 'ladder_jax\[parquet\]'$"
    ):
        read(folder)


def test_builtin_lays_docstrings_out_as_help_does(tmp_path):
    module = (
        write_files(
            tmp_path,
            {
                "made.py": '''"""About the module."""
if True:
    class Outer(Base):
        """About the class."""
        def method(self, x: int = 3):
            """About the method.

            More of it.
            """
        def silent(self):
            pass
'''
            },
        )
        / "made.py"
    )
    assert list(sources.read("builtin", Part(module), "text", sources.Tally())) == [
        """About the module.

class Outer(Base)
    About the class.

    method(self, x: int=3)
        About the method.

        More of it.
"""
    ]


def test_builtin_has_the_library_and_not_its_tests():
    files = sources.files("builtin", sources.Tally())
    assert {"topics.py", "argparse.py"} <= {path.name for path in files} and len(
        files
    ) > 300
    assert not any(path.parts[-2] in ("test", "tests") for path in files)
    topics = next(path for path in files if path.name == "topics.py")
    tally = sources.Tally()
    texts = list(sources.read("builtin", Part(topics), "text", tally))
    assert (
        len(texts) > 50
        and any('The "assert" statement' in text for text in texts)
        and not +tally.left_out
    )


# ------------------------------------------------------------------ formats by content

ROWS = [{"text": f"row {i}", "url": "http://example.org"} for i in range(5)]
ROW_TEXTS = [row["text"] for row in ROWS]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(content):
    return pytest.importorskip("pyarrow").Codec("zstd").compress(content, asbytes=True)


COMPRESSIONS = {
    "plain": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd,
}
any_compression = pytest.mark.parametrize("compression", COMPRESSIONS)


@any_compression
@pytest.mark.parametrize("name", ["a", "a.json", "a.JSON.GZ", "a.txt", "A.JSONL.ZST"])
def test_json_lines_are_read_by_their_content(tmp_path, name, compression):
    write_files(tmp_path / "in", {name: COMPRESSIONS[compression](JSON_LINES)})
    texts, tally = read(tmp_path / "in")
    assert texts == ROW_TEXTS
    assert not tally.left_out and not tally.noted


any_text = st.text(st.characters(codec="utf-8"))
any_row = st.fixed_dictionaries(
    {"url": any_text}, optional={"text": any_text | st.none() | st.integers()}
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(any_row, min_size=1),
    end=st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]),
    start=st.sampled_from(["", "\ufeff", "\n"]),
    ascii=st.booleans(),
)
def test_json_lines_give_the_same_documents_under_any_name(
    tmp_path_factory, rows, end, start, ascii
):
    """U+2028, U+0085 and others inside of a string end no line."""
    lines = [json.dumps(row, ensure_ascii=ascii) for row in rows]
    content = start + end.join(lines) + end
    expected = [
        row["text"]
        for row in rows
        if isinstance(row.get("text"), str) and row["text"].strip()
    ]
    for name in ("a.jsonl", "a.json", "a"):
        texts, tally = read(write_files(tmp_path_factory.mktemp("in"), {name: content}))
        assert texts == expected
        assert tally.left_out.total() == len(rows) - len(expected)
        assert "rows that are not JSON" not in tally.left_out


@any_compression
def test_text_is_read_by_its_content(tmp_path, compression):
    text = "A text.\nWith { and }.\n"
    for name in ("a", "a.gz", "a.zst", "a.json"):
        write_files(tmp_path / "in", {name: COMPRESSIONS[compression](text.encode())})
    texts, tally = read(tmp_path / "in")
    assert texts == [text] * 4
    assert not tally.left_out and not tally.noted


def test_parquet_is_read_by_its_content_and_its_name_in_any_case(tmp_path):
    content = parquet_bytes(tmp_path, {"text": ["cell"]})
    text = "PAR1 is Parquet's magic number, and here it is twice, at both ends. PAR1."
    folder = write_files(tmp_path / "in", {"a": content, "b.PARQUET": content})
    write_files(folder, {"c.txt": text})
    assert read(folder)[0] == ["cell", "cell", text]


def test_json_lines_without_the_text_field_do_not_become_text(tmp_path):
    folder = write_files(tmp_path / "in", {"a.json": JSON_LINES, "b.txt": "text"})
    texts, tally = read(folder, "body")
    assert texts == ["text"]
    assert tally.left_out == {"rows without a text field 'body'": 5}


@pytest.mark.parametrize("broken", range(5))
def test_a_broken_row_does_not_turn_json_lines_into_text(tmp_path, broken):
    lines = [json.dumps(row) for row in ROWS]
    lines[broken] = lines[broken][:-3]
    folder = write_files(tmp_path / "in", {"a.json": "\n".join(lines)})
    texts, tally = read(folder)
    assert texts == ROW_TEXTS[:broken] + ROW_TEXTS[broken + 1 :]
    assert tally.left_out == {"rows that are not JSON": 1}


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        json.dumps(ROWS[0], indent=2),
        '{"text": "cut off',
    ],
)
def test_other_json_is_read_as_text_and_the_tally_says_so(tmp_path, content):
    folder = write_files(tmp_path / "in", {"a.json": content})
    texts, tally = read(folder)
    assert texts == [content]
    assert list(tally.noted.values()) == [1]
    assert "look like JSON" in list(tally.noted)[0]


@pytest.mark.parametrize("compression", list(COMPRESSIONS)[1:])
def test_a_compressed_file_that_was_cut_is_unreadable(tmp_path, compression):
    content = COMPRESSIONS[compression](JSON_LINES * 100)
    write_files(tmp_path / "in", {"a.jsonl": content[: len(content) // 2]})
    _, tally = read(tmp_path / "in")
    assert tally.left_out == {"unreadable files": 1}


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python reads it itself")
def test_zstandard_without_pyarrow_says_what_it_needs(tmp_path, monkeypatch):
    folder = write_files(tmp_path / "in", {"a.jsonl.zst": zstd(JSON_LINES)})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = r"a.jsonl.zst' is compressed with Zstandard, which needs Python 3.14 or "
    with pytest.raises(ConfigError, match=message):
        read(folder)


# ------------------------------------------------------------------ characters

plain_characters = st.characters(exclude_characters="\0\ufeff", codec="utf-8")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@settings(max_examples=30, deadline=None)
@given(text=st.text(plain_characters))
def test_unicode_of_every_width_is_read(tmp_path_factory, encoding, text):
    text = f"a {text}"
    folder = tmp_path_factory.mktemp("in")
    rows = json.dumps({"text": text}, ensure_ascii=False)
    write_files(folder, {"a.txt": text.encode(encoding)})
    write_files(folder, {"b.txt": rows.encode(encoding)})
    texts, tally = read(folder)
    assert texts == [text, text]
    assert not tally.left_out and not tally.repaired


def test_big_endian_utf_16_with_a_byte_order_mark_is_read(tmp_path):
    content = codecs.BOM_UTF16_BE + "naïve 東".encode("utf-16-be")
    assert read(write_files(tmp_path / "in", {"a.txt": content}))[0] == ["naïve 東"]


def test_damage_in_utf_16_is_repaired_or_the_file_is_not_text(tmp_path):
    cut = ("text " * 50).encode("utf-16")[:-1]
    noise = codecs.BOM_UTF16_LE + b"\x00\xd8" * 50
    folder = write_files(tmp_path / "in", {"a.txt": cut, "b.txt": noise})
    texts, tally = read(folder)
    assert texts == ["text " * 49 + "text\ufffd"]
    assert tally.repaired == 1
    assert tally.left_out == {"files that are not text": 1}


def test_a_nul_in_a_text_costs_nothing_and_a_binary_file_is_left_out(tmp_path):
    text = "a long text with a stray \0 in it, " * 3 + "and more of it" * 20
    rows = "\n".join([json.dumps({"text": "a\0b"}), "\0", json.dumps({"text": "c"})])
    folder = write_files(
        tmp_path / "in",
        {"a.txt": text, "b.jsonl": rows, "c.bin": bytes(range(256)) * 9},
    )
    texts, tally = read(folder)
    assert texts == [text, "a\0b", "c"]
    assert tally.left_out == {
        "rows that are not JSON": 1,
        "files that are not text": 1,
    }


# ------------------------------------------------------------------ Parquet columns


def text_columns():
    pyarrow = pytest.importorskip("pyarrow")
    cells = ["é one", None, "two"]
    raw = [cell and cell.encode() for cell in cells]
    return {
        "string": pyarrow.array(cells),
        "large_string": pyarrow.array(cells, pyarrow.large_string()),
        "string_view": pyarrow.array(cells, pyarrow.string_view()),
        "dictionary": pyarrow.array(cells).dictionary_encode(),
        "binary": pyarrow.array(raw),
        "large_binary": pyarrow.array(raw, pyarrow.large_binary()),
        "binary_view": pyarrow.array(raw, pyarrow.binary_view()),
        "json": pyarrow.array(cells).cast(pyarrow.json_()),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "string",
        "large_string",
        "string_view",
        "dictionary",
        "binary",
        "large_binary",
        "binary_view",
        "json",
    ],
)
def test_every_string_type_of_parquet_is_read(tmp_path, kind):
    content = parquet_bytes(tmp_path, {"id": [1, 2, 3], "text": text_columns()[kind]})
    texts, tally = read(write_files(tmp_path / "in", {"a.parquet": content}))
    assert texts == ["é one", "two"]
    assert +tally.left_out == {"rows without a text field 'text'": 1}


def test_rows_of_parquet_with_two_text_columns_are_left_out(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    cells, folder = pyarrow.array(["one", "two"]), tmp_path / "in"
    folder.mkdir()
    for name, columns in {
        "other": ["text", "x", "x"],
        "text": ["text", "text"],
    }.items():
        table = pyarrow.Table.from_arrays([cells] * len(columns), columns)
        parquet.write_table(table, folder / f"{name}.parquet")
    texts, tally = read(folder)
    assert texts == ["one", "two"]
    assert +tally.left_out == {"rows with 2 columns named 'text'": 2}


def test_rows_of_parquet_whose_text_is_of_another_type_are_left_out(tmp_path):
    content = parquet_bytes(tmp_path, {"text": [[1], [2]]})
    texts, tally = read(write_files(tmp_path / "in", {"a.parquet": content}))
    assert texts == []
    assert tally.left_out == {"rows without a text field 'text'": 2}


# ------------------------------------------------------------------ which files


def test_what_is_not_a_regular_file_is_never_opened(tmp_path):
    folder = write_files(tmp_path / "in", {"a.txt": "text"})
    os.mkfifo(folder / "fifo")
    (folder / "device.txt").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
        for source in (folder, folder / "*"):
            texts, tally = read(source)
            assert texts == ["text"]
            assert tally.left_out == {"FIFOs, sockets and devices": 3}
    for name in ("fifo", "device.txt"):
        with pytest.raises(
            ConfigError, match=f"{name}' is not a file that can be read"
        ):
            read(folder / name)


def test_links_to_folders_are_counted_and_not_followed(tmp_path):
    folder = write_files(tmp_path / "in", {"a.txt": "text"})
    (folder / "back").symlink_to(folder)
    texts, tally = read(folder)
    assert texts == ["text"]
    assert tally.left_out == {"links to folders": 1}


def write_outputs(folder):
    """What training writes into `train.out` and `data.token_cache`, both `folder`."""
    cache = f"tokens-{'0123456789abcdef' * 2}"
    for name in (
        "checkpoints/10/_CHECKPOINT_METADATA",
        "checkpoints/10/model/d/part",
        "metrics.jsonl",
        "run.json",
        "loss.png",
        "tensorboard/events.out",
        "profile/plugins/trace.json",
        f"{cache}/about.json",
        f"{cache}.k2_x/ids.bin",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "an output"}')


@pytest.mark.parametrize("glob", ["", "**/*", "*/**/*.*"])
@pytest.mark.parametrize("out", [".", "deep/run"])
def test_what_training_wrote_does_not_become_text(tmp_path, glob, out):
    names = ["a/a.txt", "deep/b.txt", "profile/c.txt", "checkpoints/d.txt"]
    if out == ".":  # the folders of a run are left out whole
        names = names[:2]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    expected = sorted(names)
    assert read(tmp_path / glob)[0] == expected
    write_outputs(tmp_path / out)
    texts, tally = read(tmp_path / glob)
    assert texts == expected
    assert list(tally.left_out) == ["files and folders that ladder_jax wrote"]


def test_a_checkpoint_without_its_run_does_not_become_text(tmp_path):
    write_outputs(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    files = sources.files(str(tmp_path), sources.Tally())
    folders = {path.relative_to(tmp_path).parts[0] for path in files}
    assert folders == {"run.json", "loss.png", "tensorboard", "profile"}


def test_the_user_s_folders_of_these_names_are_read(tmp_path):
    for name in ("profile/a.txt", "checkpoints/b.txt", "tokens-of-love/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    assert len(read(tmp_path)[0]) == 3
