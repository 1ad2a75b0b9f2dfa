"""Sources: every kind of file is read, and what is wrong in one is counted or explained in one line."""

import gzip
import json
import sys

import pytest

from ladder_jax.data import sources


def read(source, text_field="text"):
    """(documents, tally) of all files of a source."""
    tally, source = sources.Tally(), str(source)
    return [
        text
        for path in sources.files(source)
        for text in sources.read(source, path, text_field, tally)
    ], tally


def write_files(folder, contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    return folder


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


def test_a_glob_and_another_field(tmp_path):
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
def test_sources_that_are_not_there(tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError,
        match=f"data.source='.*{source.replace('*', '.')}' {message}: it must be",
    ) as error:
        read(tmp_path / source)
    assert "\n" not in str(error.value)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
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
    assert list(sources.read("builtin", module, "text", sources.Tally())) == [
        """About the module.

class Outer(Base)
    About the class.

    method(self, x: int=3)
        About the method.

        More of it.
"""
    ]


def test_builtin_has_the_library_and_not_its_tests():
    files = sources.files("builtin")
    assert {"topics.py", "argparse.py"} <= {path.name for path in files} and len(
        files
    ) > 300
    assert not any(path.parts[-2] in ("test", "tests") for path in files)
    topics = next(path for path in files if path.name == "topics.py")
    tally = sources.Tally()
    texts = list(sources.read("builtin", topics, "text", tally))
    assert (
        len(texts) > 50
        and any('The "assert" statement' in text for text in texts)
        and not +tally.left_out
    )
