"""The time that a run's step should take, beside the time that it took."""

from typing import NamedTuple

from ladder_jax.config import ConfigError
from ladder_jax.report.runs import Run
from ladder_jax.train_programs import flops_per_step


class Prediction(NamedTuple):
    """Seconds a step. None: not known, and `why` says why, for the reader."""

    measured: float | None
    # The time of the model's FLOPs at the peak of the devices: no step is shorter.
    at_peak: float | None
    planned: float | None  # by the planner, from the program that XLA compiles
    why: list[str]


def predict(run: Run, plan: bool) -> Prediction:
    """What is known of a run's step.

    plan: whether to compile the step for the run's devices, which takes minutes.
    """
    why, at_peak, planned = [], None, None
    devices, config = run.devices, run.config
    if config is None or not devices:
        why.append("no run.json says on which devices it ran: no time is predicted")
        return Prediction(run.step_seconds, None, None, why)
    if devices.get("peak_flops"):
        at_peak = flops_per_step(config) / devices["peak_flops"]
    else:
        why.append(
            f"the peak of {devices['kind']} is not known: no MFU and no shortest time "
            "(train.peak_tflops gives it)"
        )
    target = devices.get("target")
    if not target:
        why.append(f"the planner has no target for {devices['count']} x {_kind(run)}")
    elif not plan:
        why.append(f"--plan compiles the step for {target} and predicts its time")
    else:
        try:
            planned = _plan(run, target)
        except ConfigError as error:
            why.append(f"no plan for {target}: {error}")
    return Prediction(run.step_seconds, at_peak, planned, why)


def _kind(run: Run) -> str:
    return str(run.devices["kind"])


def _plan(run: Run, target: str) -> float:
    """Seconds of the run's step by the planner's model."""
    from ladder_jax.planner import planning

    assert run.config is not None
    train = run.config.train
    request = planning.make_request(
        run.config,
        target,
        "train",
        train.global_batch,
        recipe=run.name,
        context=train.seq_len,
    )
    return float(planning.plan_of(request).report["totals"]["step_us"]) / 1e6


def milliseconds(seconds: float) -> str:
    """0.0123 -> 12.3 ms, 0.00001 -> 0.01 ms."""
    number = seconds * 1000
    return f"{number:,.1f} ms" if number >= 10 else f"{number:.3g} ms"


def text(found: Prediction) -> str:
    """The prediction as a sentence."""
    parts = []
    for seconds, form in (
        (found.measured, "a step took {} (median)"),
        (found.at_peak, "the model's FLOPs take {} at the peak of the devices"),
        (found.planned, "the planner predicts {}"),
    ):
        if seconds is not None:
            parts.append(form.format(milliseconds(seconds)))
    return "; ".join([*parts, *found.why])
