"""Docs: their commands parse, their Python runs, the file tree is complete."""

import importlib
import re
import shlex
import tomllib

import pytest
import tiny
from helpers import ROOT

from ladder_jax import cli, generating, tokenizing
from ladder_jax.config import from_recipe
from ladder_jax.convert import command as convert
from ladder_jax.evaluation import command as evaluation
from ladder_jax.report import command as report
from ladder_jax.server import command as server

pytestmark = pytest.mark.usefixtures("fast_compiler")

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = ("tutorial", "evaluation", "serving", "runs")
DOCS += [ROOT / "docs" / f"{name}.md" for name in PAGES]
COMMANDS = [
    shlex.split(line, comments=True)
    for path in DOCS
    for block in re.findall(r"```sh\n(.*?)```", path.read_text(), re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.split()[:1] and line.split()[0].endswith("ladder-jax")
]
KINDS = {
    "train": cli.TrainArguments,
    "generate": generating.Arguments,
    "eval": evaluation.Arguments,
    "tokenizer": cli.TokenizerArguments,
    "plan": cli.PlanArguments,
    "inspect": cli.InspectArguments,
    "serve": server.Arguments,
    "report": report.Arguments,
}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_parses_as_the_program_parses_it(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, arguments = words[1], words[2:]
    if arguments == ["--help"]:
        return
    if command == "train":
        default = cli.TrainArguments(from_recipe(arguments[0]))
        parsed = cli.parse(KINDS[command], arguments[1:], command, default)
        assert parsed.config.train.out.startswith("runs/")
    elif command == "tokenize":
        default = tokenizing.Arguments(from_recipe(arguments[0]))
        assert cli.parse(tokenizing.Arguments, arguments[1:], command, default)
    elif command == "bench":
        job = importlib.import_module(f"ladder_jax.bench.{arguments[0]}")
        assert cli.parse(job.Arguments, arguments[1:], command)
    elif command == "convert":
        assert cli.parse(convert.KINDS[arguments[0]], arguments[1:], command)
    else:
        assert cli.parse(KINDS[command], arguments, command)


EXAMPLES = [
    (path.name, number, block)
    for path in DOCS
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", path.read_text(), re.S)
    )
    if "import ladder_jax" in block
]


@pytest.mark.parametrize(
    "page, number, code", EXAMPLES, ids=[f"{page}-{n}" for page, n, _ in EXAMPLES]
)
def test_every_python_example_runs(page, number, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in set(re.findall(r'load\("([^"]*)"\)', code)):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        tiny.write_run(folder)
    exec(compile(code, f"{page}, example {number}", "exec"), {})
    assert capsys.readouterr().out.strip(), "it prints nothing"


def listed_files() -> set[str]:
    """The paths below `ladder_jax/` that the tree under "## Files" lists."""
    tree = re.search(r"## Files\n.*?\n```\n(.*?)```", ARCHITECTURE, re.S)
    assert tree, "docs/architecture.md has no file tree under '## Files'"
    folders, files = [], set()
    for line in tree[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        elif folders and folders[0] == "ladder_jax/":
            files.add("".join(folders[1:]) + name)
    return files


def test_the_file_tree_has_one_line_for_every_file():
    package = ROOT / "ladder_jax"
    files = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        # A room's own line stands for its __init__.py.
        if path.name != "__init__.py" or path.parent == package
    }
    missing, extra = sorted(files - listed_files()), sorted(listed_files() - files)
    assert not missing, f"the tree of docs/architecture.md does not list {missing}"
    assert not extra, f"the tree lists files that do not exist: {extra}"


def test_every_make_target_exists():
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M)
    for path in DOCS:
        text = path.read_text()
        named = re.findall(r"^make ([a-z0-9-]+)", text, re.M)
        named += re.findall(r"`make ([a-z0-9-]+)`", text)
        assert set(named) <= set(targets), path.name


def test_every_extra_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for path in [*DOCS, *sorted((ROOT / "docs").rglob("*.md"))]:
        named = re.findall(r"(?:-e '\.|ladder_jax)\[([\w,]+)\]", path.read_text())
        extras = {extra for names in named for extra in names.split(",")}
        assert extras <= set(project["optional-dependencies"]), path.name


def test_the_license_is_the_one_that_the_package_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    assert "Apache License\n" in (ROOT / "LICENSE").read_text()
