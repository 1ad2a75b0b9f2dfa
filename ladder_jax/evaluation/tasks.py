"""Runs tasks of lm-evaluation-harness on a model, for `ladder-jax eval --tasks`."""

import contextlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from ladder_jax.config import ConfigError, near_matches, require, short_repr
from ladder_jax.evaluation.harness import LadderLM
from ladder_jax.loading import Loaded


def run(
    loaded: Loaded,
    tasks: tuple[str, ...],
    *,
    include_path: tuple[str, ...] = (),
    num_fewshot: int | None = None,
    limit: float | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    as_json: bool = False,
    **model_options: Any,
) -> str:
    """Returns the results of tasks as a table, or as JSON.

    Args:
      loaded: the model.
      tasks: names of tasks, groups or tags; globs; or several with commas.
      include_path: folders of further tasks.
      num_fewshot, limit, apply_chat_template, system_instruction: see
        lm_eval.simple_evaluate.
      as_json: whether to return JSON.
      model_options: of LadderLM.
    Raises ConfigError for a task that there is not, or another mistake.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if num_fewshot is not None:
        require(num_fewshot >= 0, "num_fewshot", num_fewshot, "0 or more")
    if limit is not None:
        whole = float(limit).is_integer()
        accepted = "a whole number from 1, or a share below 1"
        require(limit > 0 and (limit < 1 or whole), "limit", limit, accepted)
        limit = int(limit) if limit >= 1 else limit
    for folder in include_path:
        require(Path(folder).is_dir(), "include_path", folder, "a folder")
    manager = TaskManager(include_path=list(include_path) or None)
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
    if as_json:
        kept = {name: results[name] for name in _KEPT if name in results}
        return json.dumps(kept, indent=2, default=str)
    table = make_table(results).rstrip()
    if "groups" in results:
        table += "\n\n" + make_table(results, "groups").rstrip()
    return table


_KEPT = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")


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
