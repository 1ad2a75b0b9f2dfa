"""Runs tasks of lm-evaluation-harness on a model, for `ladder-jax eval --tasks`."""

import contextlib
import functools
import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

from ladder_jax.config import ConfigError, near_matches, require, short_repr
from ladder_jax.evaluation.harness import LadderLM
from ladder_jax.loading import Loaded


def run(
    loaded: Loaded, tasks: tuple[str, ...], *, as_json: bool = False, **options: Any
) -> str:
    """Returns the results of tasks as a table, or as JSON.

    Args:
      loaded, tasks, options: see `evaluate`.
      as_json: whether to return JSON.
    """
    results = evaluate(loaded, tasks, **options)
    if as_json:
        kept = {name: results[name] for name in _KEPT if name in results}
        return json.dumps(kept, indent=2, default=str)
    from lm_eval.utils import make_table

    table = make_table(results).rstrip()
    if "groups" in results:
        table += "\n\n" + make_table(results, "groups").rstrip()
    return table


def accuracies(results: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """(accuracy, its standard error over the examples) of every task that has one.

    results: of `evaluate`. The error is nan where the harness gives none.
    """
    found = {}
    for task, values in results["results"].items():
        if "acc,none" in values:
            error = values.get("acc_stderr,none")
            error = float(error) if isinstance(error, int | float) else math.nan
            found[task] = float(values["acc,none"]), error
    return found


def evaluate(
    loaded: Loaded,
    tasks: tuple[str, ...],
    *,
    include_path: tuple[str, ...] = (),
    num_fewshot: int | None = None,
    limit: float | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    **model_options: Any,
) -> dict[str, Any]:
    """Returns the results of tasks, as lm_eval.simple_evaluate does.

    Args:
      loaded: the model.
      tasks: names of tasks, groups or tags; globs; or several with commas.
      include_path: folders of further tasks.
      num_fewshot, limit, apply_chat_template, system_instruction: see
        lm_eval.simple_evaluate.
      model_options: of LadderLM.
    Raises ConfigError for a task that there is not, or another mistake.
    """
    from lm_eval import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if num_fewshot is not None:
        require(num_fewshot >= 0, "num_fewshot", num_fewshot, "0 or more")
    if limit is not None:
        whole = float(limit).is_integer()
        accepted = "a whole number from 1, or a share below 1"
        require(limit > 0 and (limit < 1 or whole), "limit", limit, accepted)
        limit = int(limit) if limit >= 1 else limit
    manager = _manager(include_path)
    names = _match(tasks, manager)
    model = LadderLM(loaded, **model_options)
    if apply_chat_template:
        model.chat_template(True)  # raises ConfigError if there is none
    # Processes forked from JAX's threads could wait for ever.
    os.environ["DISABLE_MULTIPROC"] = "1"
    with contextlib.redirect_stdout(sys.stderr):  # the harness prints notes
        results = simple_evaluate(
            model=model,
            tasks=list(names),
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            system_instruction=system_instruction,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    assert results is not None  # this process is the only one
    return results


_KEPT = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")


def names_of(tasks: tuple[str, ...], include_path: tuple[str, ...]) -> list[str]:
    """The names of the tasks that `evaluate` would run with these arguments."""
    return _match(tasks, _manager(include_path))


@functools.cache  # the harness reads thousands of files
def _manager(include_path: tuple[str, ...]) -> Any:
    """The tasks of the harness and of these folders."""
    from lm_eval.tasks import TaskManager

    for folder in include_path:
        require(Path(folder).is_dir(), "include_path", folder, "a folder")
    return TaskManager(include_path=list(include_path) or None)


def _match(tasks: tuple[str, ...], manager: Any) -> list[str]:
    """Returns the names of the tasks; ConfigError for one that there is not."""
    words = [word for text in tasks for word in text.split(",") if word]
    require(words, "tasks", tasks, "names of tasks")
    names: list[str] = []
    for word in words:
        found = manager.match_tasks([word])
        if not found:
            near = near_matches(word, manager.all_tasks)
            hint = f" (perhaps {' or '.join(near)})" if near else ""
            raise ConfigError(
                f"tasks={short_repr(word)} is not accepted: it must be a task of "
                f"lm-evaluation-harness or of --include-path{hint}"
            )
        names += [name for name in found if name not in names]
    return names
