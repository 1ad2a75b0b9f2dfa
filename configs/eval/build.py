"""Writes the data of the tasks in this folder: python configs/eval/build.py [FOLDER]

docs_sentence and docs_last_word come from Python's own documentation
(`pydoc_data.topics`), and so depend on the version of Python; the files that are kept
here are of Python 3.11. minimal_pairs comes from minimal_pairs.txt.
"""

import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

HERE = Path(__file__).parent
SENTENCE_END = re.compile(r'(?<=[.?!])\s+(?=[A-Z"“])')
Row = dict[str, object]


def paragraphs() -> Iterator[tuple[str, list[str]]]:
    """Yields (topic, sentences) of every paragraph of prose, once."""
    seen = set()
    for topic in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[topic]):
            is_indented = block.startswith((" ", "*", "[", "-")) or "\n " in block
            text = " ".join(block.split())
            letters = sum(c.isalpha() or c in " ,." for c in text)
            if is_indented or letters < 0.9 * len(text) or not text.endswith("."):
                continue
            if "::" in text or text in seen:
                continue
            seen.add(text)
            yield topic, SENTENCE_END.split(text)


def pick(numbers: random.Random, items: list[str]) -> str:
    """Draws one of `items`; every version of Python draws the same."""
    return items[int(numbers.random() * len(items))]


def docs_sentence(count: int = 150) -> Iterator[Row]:
    """Which of four sentences ends the paragraph? The others end other paragraphs."""
    usable = [
        (topic, sentences)
        for topic, sentences in paragraphs()
        if len(sentences) >= 3 and 40 <= len(sentences[-1]) <= 200
    ]
    numbers = random.Random(0)
    for topic, sentences in spread(usable, count):
        right = sentences[-1]
        choices = [right]
        near = [
            other[-1]
            for other_topic, other in usable
            if other_topic != topic and 0.7 < len(other[-1]) / len(right) < 1.4
        ]
        while len(choices) < 4:
            wrong = pick(numbers, near)
            if wrong not in choices:
                choices.append(wrong)
        label = int(numbers.random() * 4)
        choices[0], choices[label] = choices[label], choices[0]
        context = end_of(" ".join(sentences[:-1]), 600)
        yield dict(context=context, choices=choices, label=label)


def docs_last_word(count: int = 200) -> Iterator[Row]:
    """The last word of a sentence, which the text before has, too."""
    usable = []
    for _, sentences in paragraphs():
        for last in range(len(sentences), 0, -1):  # one of a paragraph
            context, _, word = " ".join(sentences[:last])[:-1].rpartition(" ")
            context = end_of(context, 500)
            appears = re.search(rf"\b{re.escape(word)}\b", context)
            if len(word) >= 4 and word.isalpha() and appears:
                if (context, word) not in usable:
                    usable.append((context, word))
                break
    for context, word in spread(usable, count):
        yield dict(context=context, word=word)


def minimal_pairs() -> Iterator[Row]:
    """A right sentence and a wrong one, which differ in one place."""
    kind = ""
    for line in (HERE / "minimal_pairs.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("= "):
            kind = line.removeprefix("= ")
        elif line and not line.startswith("#"):
            before, right, wrong, after = re.fullmatch(
                r"(.*)\[(.*)\|(.*)\](.*)", line
            ).groups()
            yield dict(
                kind=kind, good=before + right + after, bad=before + wrong + after
            )


def end_of(text: str, most: int) -> str:
    """Returns the last `most` characters of a text, or less: whole words."""
    return text if len(text) <= most else text[-most:].partition(" ")[2]


def spread(items: list, count: int) -> list:
    """Returns at most `count` of `items`, evenly spaced."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def write(folder: Path, name: str, rows: Iterable[Row]) -> None:
    """Writes rows as JSON Lines."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{name}: {len(lines)} rows")


def main(folder: Path) -> None:
    """Writes the three files into `folder`."""
    write(folder, "docs_sentence", docs_sentence())
    write(folder, "docs_last_word", docs_last_word())
    write(folder, "minimal_pairs", minimal_pairs())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else HERE)
