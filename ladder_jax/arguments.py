"""Parses a command line into a typed dataclass, and writes the help text from it.

A field `name` is the option `--name`; the fields of a section are `--section.name`. The
help of a field is the string below it in the source, or the comment above it.
"""

import ast
import dataclasses
import functools
import inspect
import os
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from ladder_jax.config import (
    RENAMED_FIELDS,
    ConfigError,
    describe,
    field_types,
    near_matches,
    require,
)

# Metadata of a field: its value is a word without an option before it. If its type is a
# tuple, it is the last such field, and takes all such words.
POSITIONAL = {"positional": True}
# Metadata of a field that is a dataclass: its fields are options without a prefix.
FLAT = {"flat": True}
# Metadata of a field: its value if its option has none.
BARE = "bare"
# Metadata of a field: LADDER_JAX_NAME in the environment is its default.
ENVIRONMENT = {"environment": True}
REQUIRED = dataclasses.MISSING
# Where the help of an option begins, in characters.
HELP_COLUMN = 30


class Option(NamedTuple):
    """A field that the command line can set."""

    path: tuple[str, ...]  # names of fields, from the outermost dataclass inwards
    flag: str  # such as --train.global-batch
    hint: Any  # its type
    default: Any  # REQUIRED where there is none
    help: str
    section: type  # the dataclass that it is a field of
    positional: bool
    bare: str | None  # the value if the option has none; None: it needs one


def parse(
    cls: type, words: list[str], command: str, default: Any = None, first: str = ""
) -> Any:
    """Parses a command line into an instance of the dataclass `cls`.

    Args:
      cls: the dataclass.
      words: the command line, after the command.
      command: its name, such as "bench train", for messages and the usage line.
      default: an instance, with the values of the options that `words` lacks. None: the
        defaults of the dataclass.
      first: an argument that the caller has already taken from `words`, such as RECIPE,
        for the usage line.
    Prints the help text and raises SystemExit(0) where a word is -h or --help. Raises
    ConfigError, one line, on a mistake.
    """
    try:
        options = list(_options(cls, default))
        values = _read(options, words)
    except ConfigError as error:
        raise ConfigError(f"{error} (see ladder-jax {command} --help)") from None
    if values is None:
        print(help_text(cls, options, command, first))
        raise SystemExit(0)
    return _build(cls, values)


def _options(
    cls: Any, default: Any, path: tuple[str, ...] = (), prefix: str = ""
) -> Iterator[Option]:
    """Every field of `cls` and of the dataclasses in it, in the order of the source."""
    hints, texts = field_types(cls), field_texts(cls)
    for field in dataclasses.fields(cls):
        name, value = field.name, field.default
        if field.default_factory is not REQUIRED:
            value = field.default_factory()
        if default is not None:
            value = getattr(default, name)
        variable = f"LADDER_JAX_{name.upper()}"
        if field.metadata.get("environment") and os.environ.get(variable):
            value = read_value(os.environ[variable], hints[name], variable)
        if dataclasses.is_dataclass(hints[name]):
            inner = "" if field.metadata == FLAT else f"{prefix}{name}."
            value = None if value is REQUIRED else value
            yield from _options(hints[name], value, (*path, name), inner)
        else:
            yield Option(
                (*path, name),
                f"--{prefix}{name}".replace("_", "-"),
                hints[name],
                value,
                texts.get(name, ""),
                cls,
                field.metadata == POSITIONAL,
                field.metadata.get(BARE),
            )


def _read(options: list[Option], words: list[str]) -> dict[tuple[str, ...], Any] | None:
    """The value of every option, by its path; None where a word is -h or --help."""
    flags = {option.flag: option for option in options if not option.positional}
    negations = {
        _negated(flag): option for flag, option in flags.items() if option.hint is bool
    }
    positionals = [option for option in options if option.positional]
    values = {option.path: option.default for option in options}
    given: dict[tuple[str, ...], list[str]] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if word in ("-h", "--help"):
            return None
        if not word.startswith("--"):
            if not positionals:
                raise ConfigError(f"unexpected argument {word!r}")
            option = positionals[0]
            if typing.get_origin(option.hint) is tuple:  # it takes all words
                before = given.setdefault(option.path, [])
                before.append(word)
                values[option.path] = _value(option, before)
            else:
                values[option.path] = read_value(word, option.hint, _label(option))
                del positionals[0]
        elif flag in negations and not equals:
            values[negations[flag].path] = False
        elif flag not in flags:
            raise ConfigError(_unknown(flag, [*flags, *negations]))
        else:
            option = flags[flag]
            texts = [value] if equals else _take_values(option, words)
            values[option.path] = _value(option, texts)
    for option in options:
        if values[option.path] is REQUIRED:
            text = f" ({option.help.rstrip('.')})" if option.help else ""
            raise ConfigError(f"missing argument: {_label(option)}{text}")
    return values


def _take_values(option: Option, words: list[str]) -> list[str]:
    """Removes the values of `option` from the front of `words`, and returns them."""
    takes_many = typing.get_origin(option.hint) is tuple
    if option.hint is bool:
        if words and words[0].lower() in ("true", "false"):
            return [words.pop(0)]
        return ["true"]
    values: list[str] = []
    while words and not words[0].startswith("--") and (takes_many or not values):
        values.append(words.pop(0))
    if not values and option.bare is not None:
        return [option.bare]
    if not values and not takes_many:
        raise ConfigError(f"{option.flag} takes a value")
    return values


def _value(option: Option, texts: list[str]) -> Any:
    """The value that these words of the command line give to `option`."""
    if typing.get_origin(option.hint) is tuple:
        inner = typing.get_args(option.hint)[0]
        return tuple(read_value(text, inner, option.flag) for text in texts)
    return read_value(texts[0], option.hint, option.flag)


def read_value(text: str, hint: Any, name: str) -> Any:
    """Converts `text` to type `hint`. Raises ConfigError about `name` if it cannot."""
    for kind in _alternatives(hint):
        if kind is type(None) and text.lower() == "none":
            return None
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if typing.get_origin(kind) is Literal and text in typing.get_args(kind):
            return text
        try:
            if kind is int:
                # 3e9 is a whole number too.
                return int(float(text)) if _is_whole_float(text) else int(text)
            if kind is float:
                return float(text)
        except ValueError:
            continue
        if kind is str:
            return text
    require(False, name, text, describe(hint))


def _is_whole_float(text: str) -> bool:
    return "e" in text.lower() and float(text).is_integer()


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union, None first; any other `hint` alone."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return (hint,)
    return tuple(sorted(typing.get_args(hint), key=lambda t: t is not type(None)))


def _unknown(flag: str, known: list[str]) -> str:
    """The message about a flag that is not an option, with its new name or with the
    nearest names."""
    old = flag.removeprefix("--").replace("-", "_")
    section = old.partition(".")[0]
    if old in RENAMED_FIELDS:
        new = f"--{section}.{RENAMED_FIELDS[old]}".replace("_", "-")
        return f"{flag} is now {new}"
    decode = RENAMED_FIELDS.get(f"decode.{old}", "").replace("_", "-")
    if decode and f"--{decode}" in known:
        return f"{flag} is now --{decode}"
    near = near_matches(flag, known)
    hint = f": perhaps {' or '.join(near)}" if near else ""
    return f"{flag} is not an option{hint}"


def _negated(flag: str) -> str:
    """--resume -> --no-resume; --train.tensorboard -> --train.no-tensorboard."""
    prefix, dot, name = flag.removeprefix("--").rpartition(".")
    return f"--{prefix}{dot}no-{name}"


def _label(option: Option) -> str:
    return option.path[-1].upper() if option.positional else option.flag


def _build(
    cls: Any, values: dict[tuple[str, ...], Any], path: tuple[str, ...] = ()
) -> Any:
    """An instance of `cls` with the values whose paths begin with `path`."""
    fields = {}
    for name, hint in field_types(cls).items():
        field_path = (*path, name)
        if dataclasses.is_dataclass(hint):
            fields[name] = _build(hint, values, field_path)
        else:
            fields[name] = values[field_path]
    return cls(**fields)


# ---------------------------------------------------------------- help


def help_text(cls: type, options: list[Option], command: str, first: str = "") -> str:
    """The help of a command: usage, purpose, and the options section by section."""
    width = min(shutil.get_terminal_size().columns, 100)
    positionals = [_label(option) for option in options if option.positional]
    placeholders = [*filter(None, [first]), *positionals]
    usage = " ".join([f"usage: ladder-jax {command}", *placeholders, "[OPTIONS]"])
    lines = [usage, "", *_wrap(_docstring(cls), width)]
    sections = dict.fromkeys([cls, *(option.section for option in options)])
    for section in sections:
        title = "Options" if section is cls else _docstring(section).rstrip(".")
        lines += ["", *_wrap(f"{title}:", width)]
        for option in options:
            if option.section is section:
                lines += _option_lines(option, width)
    return "\n".join(lines)


def kinds_text(command: str, kinds: dict[str, type]) -> str:
    """The help of a command whose first argument says which job it does: `kinds` has
    the dataclass of each job's arguments."""
    width = min(shutil.get_terminal_size().columns, 100)
    column = max(map(len, kinds)) + 4
    lines = [f"usage: ladder-jax {command} {'|'.join(kinds)} [OPTIONS]", ""]
    for name, kind in kinds.items():
        first, *more = _wrap(_docstring(kind), width, " " * column)
        lines += [f"  {name:{column - 2}}{first.strip()}", *more]
    lines += ["", f"See ladder-jax {command} {next(iter(kinds))} --help, and so on."]
    return "\n".join(lines)


def _option_lines(option: Option, width: int) -> list[str]:
    """An option in a left column, its help and default in a right one."""
    head = f"  {_label(option)}"
    if option.hint is bool:
        head += f" | {_negated(option.flag)}" if option.default else ""
    elif not option.positional:
        value = metavar(option.hint)
        head += f" {value}" if option.bare is None else f" [{value}]"
    text = " ".join(filter(None, [option.help, _default(option)]))
    lines = _wrap(text, width, " " * HELP_COLUMN) or [""]
    if len(head) + 2 > HELP_COLUMN:
        return [head, *filter(None, lines)]
    return [f"{head:{HELP_COLUMN}}{lines[0].strip()}".rstrip(), *lines[1:]]


def _default(option: Option) -> str:
    """The text about an option's default in the help."""
    value = option.default
    if value is REQUIRED:
        return "(required)"
    if option.hint is bool:
        return "(default: on)" if value else ""
    if value is None or "default" in option.help:
        return ""
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f"(default: {value})" if value != "" else "(default: empty)"


def metavar(hint: Any) -> str:
    """The placeholder of a value in the help: INT, TEXT, {cosine,wsd,constant}, ..."""
    if typing.get_origin(hint) is tuple:
        return f"[{metavar(typing.get_args(hint)[0])} ...]"
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    names = {int: "INT", float: "FLOAT", str: "TEXT", type(None): "None"}
    return "|".join(names.get(t) or metavar(t) for t in reversed(_alternatives(hint)))


def _wrap(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _docstring(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "")


@functools.cache
def field_texts(cls: type) -> dict[str, str]:
    """The help text of each field of a dataclass that has one, read from the source.

    Fields of its base classes are among them."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            texts |= _own_field_texts(base)
    return texts


def _own_field_texts(cls: type) -> dict[str, str]:
    """`field_texts` without those of base classes."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except OSError:  # no source is installed
        return {}
    lines = source.splitlines()
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]  # a class
    texts = {}
    for node, after in zip(body, [*body[1:], None]):
        if not isinstance(node, ast.AnnAssign):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            comment = [str(after.value.value)]
        else:
            start = node.lineno - 1
            while lines[start - 1].lstrip().startswith("#"):
                start -= 1
            comment = [line.strip(" #") for line in lines[start : node.lineno - 1]]
        if text := " ".join(" ".join(comment).split()):
            texts[ast.unparse(node.target)] = text
    return texts
