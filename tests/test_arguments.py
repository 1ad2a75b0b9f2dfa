"""Command-line words become a typed dataclass, whatever the values look like."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax import config
from ladder_jax.arguments import FLAT, POSITIONAL, field_texts, parse
from ladder_jax.config import ConfigError


@dataclass(frozen=True)
class Arguments:
    """What a command does."""

    place: str = field(metadata=POSITIONAL)
    """Where it does it."""
    needed: int
    # How often
    # it does it.
    times: int | None = None
    rate: float = 1.0
    text: str = ""
    quiet: bool = False
    loud: bool = True
    sizes: tuple[int, ...] = (1, 2)
    data: config.Data = field(default_factory=config.Data)
    optimizer: config.Optimizer = field(default_factory=config.Optimizer, metadata=FLAT)


def read(*words: str) -> Arguments:
    return parse(Arguments, ["here", "--needed", "1", *words], "do")


def test_without_arguments_every_option_has_its_default():
    assert read() == Arguments("here", 1)


@pytest.mark.parametrize(
    "words, name, value",
    [
        ("--times 3", "times", 3),
        ("--times -3", "times", -3),
        ("--times=3", "times", 3),
        ("--times 3e9", "times", 3_000_000_000),
        ("--times None", "times", None),
        ("--rate -1e-4", "rate", -1e-4),
        ("--rate 2", "rate", 2.0),
        ("--text -x", "text", "-x"),
        ("--text=--quiet", "text", "--quiet"),
        ("--text None", "text", "None"),
        ("--text=", "text", ""),
        ("--quiet", "quiet", True),
        ("--quiet False", "quiet", False),
        ("--quiet=true", "quiet", True),
        ("--no-loud", "loud", False),
        ("--quiet --no-quiet", "quiet", False),
        ("--sizes 3 4 5", "sizes", (3, 4, 5)),
        ("--sizes", "sizes", ()),
        ("--times 1 --times 2", "times", 2),
    ],
)
def test_each_type_of_option_reads_its_values(words, name, value):
    arguments = read(*words.split(" "))
    assert getattr(arguments, name) == value
    assert type(getattr(arguments, name)) is type(value)


@given(st.text().filter(lambda text: not text.startswith("--")))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_value(text):
    assert read("--text", text).text == text
    assert read(f"--text={text}").text == text


def test_sections_have_a_prefix_unless_they_are_flat():
    arguments = read("--data.text-field", "body", "--clip_norm", "none")
    assert arguments.data == config.Data(text_field="body")
    assert arguments.optimizer == config.Optimizer(clip_norm=None)
    assert read("--data.text_field=body").data == arguments.data


def test_an_instance_gives_the_defaults():
    default = Arguments("there", 5, times=7, data=config.Data(source="books"))
    assert parse(Arguments, [], "do", default) == default
    assert parse(Arguments, ["--times", "8"], "do", default).data.source == "books"


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "missing argument: PLACE (Where it does it)"),
        (["here"], "missing argument: --needed"),
        (["here", "--needed"], "--needed takes a value"),
        (["here", "--needed", "--quiet"], "--needed takes a value"),
        (["here", "there"], "unexpected argument 'there'"),
        (
            ["here", "--needed", "1.5"],
            "--needed='1.5' is not accepted: it must be a whole number",
        ),
        (
            ["here", "--times", "x"],
            "--times='x' is not accepted: it must be a whole number or None",
        ),
        (
            ["here", "--rate", "fast"],
            "--rate='fast' is not accepted: it must be a finite number",
        ),
        (
            ["here", "--sizes", "1", "x"],
            "--sizes='x' is not accepted: it must be a whole number",
        ),
        (["here", "--tims", "1"], "--tims is not an option: perhaps --times"),
        (["here", "--data.cache", "x"], "--data.cache is now --data.token-cache"),
        (["here", "--nothing"], "--nothing is not an option"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_option(words, message):
    with pytest.raises(ConfigError) as error:
        parse(Arguments, words, "do")
    assert str(error.value) == f"{message} (see ladder-jax do --help)"


@dataclass(frozen=True)
class Other(Arguments):
    """What another command does."""

    place: str = field(metadata=POSITIONAL)
    """Where that one does it."""


def test_fields_of_a_base_class_keep_their_help():
    assert field_texts(Other) == {
        "place": "Where that one does it.",
        "times": "How often it does it.",
    }


def test_help_has_every_option_its_default_and_its_text(capsys):
    assert field_texts(Arguments) == {
        "place": "Where it does it.",
        "times": "How often it does it.",
    }
    with pytest.raises(SystemExit) as ended:
        parse(Arguments, ["--help"], "do")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "usage: ladder-jax do PLACE [OPTIONS] What a command does. Options: PLACE",
        "--needed INT (required)",
        "--times INT|None How often it does it.",
        "--rate FLOAT (default: 1.0)",
        "--text TEXT (default: empty)",
        "--loud | --no-loud",
        "--sizes [INT ...] (default: 1 2)",
        "Where text comes from and how it becomes tokens: --data.source TEXT",
        "--lr-schedule {cosine,wsd,constant}",
    ):
        assert part in text, part


def test_an_environment_variable_is_the_default_of_an_option(monkeypatch):
    from ladder_jax.hardware.distributed import Hosts

    monkeypatch.setenv("LADDER_JAX_PROCESSES", "4")
    monkeypatch.setenv("LADDER_JAX_DISTRIBUTED", "true")
    monkeypatch.setenv("LADDER_JAX_COORDINATOR", "")  # as if it was not set
    found = parse(Hosts, ["--process", "3"], "train")
    assert found == Hosts(distributed=True, processes=4, process=3)
    assert parse(Hosts, ["--processes", "2"], "train").processes == 2
    monkeypatch.setenv("LADDER_JAX_LOST_AFTER", "soon")
    with pytest.raises(ConfigError, match="LADDER_JAX_LOST_AFTER='soon' is not acc"):
        parse(Hosts, [], "train")
