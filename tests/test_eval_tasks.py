"""The data of the tasks in configs/eval: well formed, and what build.py writes."""

import collections
import json
import subprocess
import sys

import pytest
from helpers import ROOT

FOLDER = ROOT / "configs" / "eval"
NAMES = ("docs_sentence", "docs_last_word", "minimal_pairs")


def rows_of(name, folder=FOLDER):
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    script = str(FOLDER / "build.py")
    subprocess.run([sys.executable, script, str(folder)], check=True)
    return folder


def test_the_files_are_what_the_script_writes(built):
    is_same_python = sys.version_info[:2] == (3, 11)
    for name in NAMES:
        if name == "minimal_pairs" or is_same_python:
            assert rows_of(name) == rows_of(name, built), name
        assert len(rows_of(name, built)) >= 50  # with any Python
    assert sum((FOLDER / f"{name}.jsonl").stat().st_size for name in NAMES) < 200_000


def test_rows():
    labels = collections.Counter()
    for row in rows_of("docs_sentence"):
        labels[row["label"]] += 1
        assert len(set(row["choices"])) == 4 and row["context"].endswith((".", "?"))
        assert row["choices"][row["label"]] not in row["context"]
        assert row["choices"][row["label"]].endswith(".")
    assert set(labels) == {0, 1, 2, 3} and max(labels.values()) < 45
    for row in rows_of("docs_last_word"):
        assert row["word"] in row["context"]
        assert row["context"] == row["context"].strip()
    kinds = collections.Counter(row["kind"] for row in rows_of("minimal_pairs"))
    assert len(kinds) == 10 and set(kinds.values()) == {10}
    for row in rows_of("minimal_pairs"):
        assert row["good"] != row["bad"] and "|" not in row["good"] + row["bad"]
        assert "  " not in row["good"] + row["bad"]


def test_every_row_is_there_once():
    for name in NAMES:
        rows = [json.dumps(row) for row in rows_of(name)]
        assert len(set(rows)) == len(rows)
