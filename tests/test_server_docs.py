"""docs/serving.md: its examples run, its tables have every field, path and metric."""

import json
import re
import shlex

import pytest
import served
from helpers import ROOT

from ladder_jax.server.app import create_app
from ladder_jax.server.protocol import ChatRequest, CompletionRequest

TEXT = (ROOT / "docs" / "serving.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def server():
    with served.serve(served.shared_engine()) as running:
        yield running


def section(title):
    return re.split(r"^## ", TEXT.split(f"## {title}\n")[1], flags=re.M)[0]


def rows(title):
    """The cells of the rows of a section's tables, without their heads."""
    lines = re.findall(r"^\|(.*)\|$", section(title), re.M)[2:]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def names(cell):
    return re.findall(r"`([^`]*)`", cell)


def test_every_curl_runs(server):
    commands = re.findall(r"^curl .*?'\}?'?$|^curl [^\n]*(?:\n  [^\n]*)*", TEXT, re.M)
    assert commands
    for command in commands:
        words = shlex.split(command)
        url, body = words[1], json.loads(words[words.index("-d") + 1])
        assert words[words.index("-H") + 1] == "Content-Type: application/json"
        events = server.events(url.removeprefix(ADDRESS), body)
        assert events[-1]["choices"][0]["finish_reason"]


def test_every_python_example_runs(server, capsys):
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        assert ADDRESS in code
        exec(compile(code.replace(ADDRESS, server.url), "serving.md", "exec"), {})
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("column, cls", [(1, CompletionRequest), (2, ChatRequest)])
def test_the_table_has_every_field(column, cls):
    listed = [name for row in rows("Fields") if row[column] for name in names(row[0])]
    assert sorted(listed) == sorted(cls.model_fields)


def test_the_table_has_every_path():
    listed = {name for row in rows("Paths") for name in names(row[0])}
    paths = set(create_app(writer=served.Log()).openapi()["paths"])
    assert "/v1/models/{model}" in paths
    own = {"/", "/state", "/metrics", "/openapi.json"}  # the document leaves them out
    assert listed == own | {path.replace("{model}", "NAME") for path in paths}


def test_the_table_has_every_metric(server):
    listed = {name for row in rows("Metrics") for name in names(row[0])}
    text = server.http.get("/metrics").text
    there = set(re.findall(r"^# HELP (\S+)", text, re.M))
    assert listed == {name for name in there if not name.endswith("_created")}


def test_the_table_of_errors_has_every_status():
    listed = {status for row in rows("Errors") for status in row[0].split(", ")}
    document = create_app(writer=served.Log()).openapi()
    statuses = {
        status
        for path in document["paths"].values()
        for operation in path.values()
        for status in operation["responses"]
    }
    # Of requests that reach no path.
    assert listed == (statuses - {"200"}) | {"405", "431"}
