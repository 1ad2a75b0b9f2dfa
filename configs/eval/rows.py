"""Reads the data of the tasks in this folder, wherever the harness runs."""

import json
from pathlib import Path
from typing import Any

import datasets


def _read(name: str) -> dict[str, datasets.Dataset]:
    path = Path(__file__).parent / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


def docs_sentence(**_: Any) -> dict[str, datasets.Dataset]:
    """The rows of docs_sentence.jsonl."""
    return _read("docs_sentence")


def docs_last_word(**_: Any) -> dict[str, datasets.Dataset]:
    """The rows of docs_last_word.jsonl."""
    return _read("docs_last_word")


def minimal_pairs(**_: Any) -> dict[str, datasets.Dataset]:
    """The rows of minimal_pairs.jsonl."""
    return _read("minimal_pairs")
