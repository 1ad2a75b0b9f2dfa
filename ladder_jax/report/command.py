"""Runs the command `ladder-jax report`: from folders of runs to a page and a table."""

from dataclasses import dataclass, field
from pathlib import Path

from ladder_jax import files
from ladder_jax.arguments import POSITIONAL
from ladder_jax.config import ConfigError


@dataclass(frozen=True)
class Arguments:
    """Writes a page about runs: loss, speed, what happened to them, how they differ.
    Prints their results as a table in Markdown."""

    runs: tuple[str, ...] = field(metadata=POSITIONAL)
    """The folders of the runs (train.out)."""
    out: str = "report.html"
    """The file to write: one HTML file that loads nothing."""
    plan: bool = False
    """Compile the step for the chips that the runs had, and show its predicted time
    beside the measured one. Takes minutes, and the [plan] extra."""


def run(arguments: Arguments) -> str:
    """Writes the page, and returns the text to print.

    Raises ConfigError where a folder is no run's, or its rows cannot be read.
    """
    from ladder_jax import identity
    from ladder_jax.report import page, prediction, runs, table

    names = runs.names(arguments.runs)
    found = [runs.load(path, name) for path, name in zip(arguments.runs, names)]
    predictions = [
        prediction.text(prediction.predict(run, arguments.plan)) for run in found
    ]
    out = Path(arguments.out).expanduser()
    if not out.absolute().parent.is_dir():
        raise ConfigError(
            f"out={arguments.out!r} is not accepted: its folder does not exist"
        )
    files.write_text(out, page.page(found, predictions, identity.now()))
    different = table.differences(found)
    texts = [table.results(found).markdown()]
    texts += [different.markdown()] if different else []
    return "\n\n".join([*texts, f"done: {arguments.out}"])
