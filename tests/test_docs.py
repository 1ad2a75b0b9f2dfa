"""docs/: links resolve, the log has its form, and adding.md names code that exists."""

import ast
import csv
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
LOG = (ROOT / "docs" / "log.md").read_text()
OVERLAP = (ROOT / "docs" / "overlap.md").read_text()
ADDING = (ROOT / "docs" / "adding.md").read_text()


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.S)


def anchors(page: Path) -> set[str]:
    """The anchors that a Markdown viewer makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_resolves(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}"


def test_every_picture_is_shown():
    shown = {
        (page.parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", page.read_text())
    }
    there = {path.resolve() for path in (ROOT / "docs").rglob("*.png")}
    assert there == shown


# The log.

ENTRIES = re.split(r"^## (?=\d{4}-\d\d-\d\d: )", LOG, flags=re.M)[1:]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.splitlines()[0])
def test_every_log_entry_has_the_four_parts_in_order(entry):
    parts = re.findall(r"^\*\*(Question|Command|Result|Decision)\.\*\*", entry, re.M)
    assert parts == ["Question", "Command", "Result", "Decision"]


def test_the_logs_contents_list_every_entry_once():
    contents = LOG.split("## Contents")[1].split("\n## ")[0]
    listed = re.findall(r"^- \[(.*)\]\(#", contents, re.M)
    titles = [entry.splitlines()[0].partition(": ")[2] for entry in ENTRIES]
    assert sorted(listed) == sorted(titles)


def test_log_entries_are_newest_first():
    dates = [entry[:10] for entry in ENTRIES]
    assert dates == sorted(dates, reverse=True)


# adding.md: rows `| file | names | what to do |`.

ROWS = re.findall(r"^\| `([\w/.]+)` \| (.*?) ?\|", ADDING, re.M)
SITES = [(file, name) for file, names in ROWS for name in re.findall(r"`(.*?)`", names)]


@functools.cache
def names_of(file: str) -> set[str]:
    """Every function, class, method, field and assigned name of a Python file."""
    names = set()

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names.add(prefix + child.name)
                visit(child, f"{prefix}{child.name}.")
                continue
            if isinstance(child, ast.Assign | ast.AnnAssign):
                targets = getattr(child, "targets", None) or [child.target]
                for target in targets:
                    for leaf in ast.walk(target):
                        if isinstance(leaf, ast.Name):
                            names.add(prefix + leaf.id)
            visit(child, prefix)

    visit(ast.parse((ROOT / file).read_text()), "")
    return names


def test_every_file_of_adding_exists():
    assert len(ROWS) > 20, "docs/adding.md has lost its tables"
    missing = sorted({file for file, _ in ROWS if not (ROOT / file).is_file()})
    assert not missing, f"docs/adding.md names files that do not exist: {missing}"


@pytest.mark.parametrize("file, name", SITES, ids=map(" ".join, SITES))
def test_every_site_of_adding_exists(file, name):
    assert name in names_of(file), f"{file} has no {name}, which docs/adding.md names"


# The summaries of the plans.

RECIPES = {"8B": "llama3_8b", "70B": "llama3_70b"}


def speed_up(recipe: str, target: str, workload: str, batch: int) -> str:
    """Standard's step over ladder's in docs/overlap/plans.csv, as a page shows it."""
    with (ROOT / "docs" / "overlap" / "plans.csv").open() as file:
        steps = {
            row["schedule"]: float(row["step_us"])
            for row in csv.DictReader(file)
            if (row["recipe"], row["target"]) == (recipe, target)
            and (row["workload"], row["batch"]) == (workload, str(batch))
            and row["mesh_reduction"] == "auto"
            and row["all_reduce_us"] == "0"
        }
    return f"{steps['standard'] / steps['ladder']:.2f}"


def cells(line: str) -> list[str]:
    return [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]


def test_the_summary_of_overlap_is_the_csvs():
    rows = re.findall(r"^\| (?:8B|70B) \| .*$", OVERLAP, re.M)
    assert len(rows) == 8
    for size, target, *shown in map(cells, rows):
        plans = [("decode", 1), ("decode", 16), ("decode", 64), ("train", 1)]
        expected = [speed_up(RECIPES[size], target, *plan) for plan in plans]
        row = f"| {size} | {target} | {' | '.join(expected)} |"
        assert shown[:4] == expected, f"docs/overlap.md: its summary needs {row}"


def test_the_modelled_table_of_readme_is_the_csvs():
    table = (ROOT / "README.md").read_text().split("**Modelled**")[1]
    rows = re.findall(r"^\| (?:h100|v\d\w):.*$", table, re.M)
    assert len(rows) == 4
    for target, *_, shown in map(cells, rows):
        assert shown == speed_up("llama3_8b", target, "train", 1), target


def test_every_file_of_make_test_fast_exists():
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    names = re.search(r"^FAST := (.*)$", makefile, re.M)[1].split()
    missing = [n for n in names if not (ROOT / "tests" / f"test_{n}.py").is_file()]
    assert not missing, f"Makefile's FAST names {missing}"
