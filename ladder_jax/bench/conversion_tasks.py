"""Accuracy on tasks of lm-evaluation-harness, for the conversion study."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from ladder_jax.bench.conversion_plan import Arguments
from ladder_jax.bench.conversion_report import ACCURACY, ERROR, accuracies
from ladder_jax.config import Config, Model
from ladder_jax.data.tokenizer import Tokenizer
from ladder_jax.evaluation import harness, tasks
from ladder_jax.loading import Loaded
from ladder_jax.model import Transformer

Scores = dict[str, float]


class Tasks:
    """The tasks that --tasks names, for models of one shape.

    Args:
      arguments: of the study.
      shape: of the models; their residual schedules may differ.
      tokenizer: theirs.
      mesh: of the devices.

    Raises ConfigError where the harness is not installed, or there is no such task.
    """

    def __init__(
        self,
        arguments: Arguments,
        shape: Model,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
    ) -> None:
        self.arguments, self.shape = arguments, shape
        self.tokenizer, self.mesh = tokenizer, mesh
        self._untrained: dict[str, Scores] = {}  # by the residual schedule
        if arguments.tasks:
            harness.require_installed()
            folder = (arguments.task_path,)
            self.names = tasks.names_of(arguments.tasks, folder)

    def remember(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes the scores of untrained models from rows that were measured before."""
        for row in rows:
            if int(row["tokens"]) == 0 and accuracies(row):
                names = [name for name in row if name.endswith((ACCURACY, ERROR))]
                scores = {name: row[name] for name in names}
                self._untrained[row["residual"]] = {
                    name: float(value)
                    for name, value in scores.items()
                    if value not in ("", None)
                }

    def scores(self, parameters: Transformer, residual: str, trained: bool) -> Scores:
        """Accuracy and its standard error on every task: {column: value}.

        Empty without tasks. Untrained models with the same residual schedule are equal:
        the first one is measured.
        """
        if not self.arguments.tasks:
            return {}
        if not trained and residual in self._untrained:
            return self._untrained[residual]
        model_config = dataclasses.replace(self.shape, residual=residual)
        results = tasks.evaluate(
            Loaded(parameters, Config(model_config), self.tokenizer, self.mesh),
            tuple(self.names),
            include_path=(self.arguments.task_path,),
            limit=self.arguments.task_limit,
            batch_tokens=min(self.arguments.batch * self.arguments.length, 8192),
        )
        scores: Scores = {}
        for task, (accuracy, error) in tasks.accuracies(results).items():
            scores |= {task + ACCURACY: accuracy, task + ERROR: error}
        if not trained:
            self._untrained[residual] = scores
        return scores
