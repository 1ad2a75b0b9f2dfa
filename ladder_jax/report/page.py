"""The page of a report: one HTML file that loads nothing, for screens of any width."""

import html
from collections.abc import Callable, Iterable, Sequence

from ladder_jax.report import table
from ladder_jax.report.charts import Chart, Line, Mark, draw
from ladder_jax.report.runs import Row, Run, events, hours

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c1e21; --soft: #656b73;
  --grid: #e4e6e9; --c0: #1f6fb4; --c1: #d1600a; --c2: #1d8348; --c3: #a61e4d;
  --c4: #6741d9; --c5: #7d5a13; --c6: #0b7285; --c7: #555; --bad: #c92a2a; }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --ink: #e6e7e9;
  --soft: #9aa1a9; --grid: #2d3136; --c0: #6cb2f0; --c1: #ffa04d; --c2: #6fd08c;
  --c3: #f783ac; --c4: #b197fc; --c5: #e0b354; --c6: #66d9e8; --c7: #bbb;
  --bad: #ff8787; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1180px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; } h2 { font-size: 17px; margin: 28px 0 8px; }
p, li { overflow-wrap: anywhere; }
.soft, figcaption { color: var(--soft); font-size: 13px; }
.charts { display: grid; gap: 20px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; min-width: 0; } figcaption { color: var(--ink); font-weight: 600; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 12px; font-family: inherit; }
.grid { stroke: var(--grid); fill: none; }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.rollback { stroke: var(--bad); stroke-width: 1.2; }
.start { stroke: var(--soft); stroke-dasharray: 2 4; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; }
pre { overflow-x: auto; padding: 10px; border: 1px solid var(--grid); font-size: 12px; }
.key span { display: inline-block; margin-right: 16px; }
.key i { display: inline-block; width: 18px; height: 3px; margin-right: 6px;
  vertical-align: middle; }
button { font: inherit; padding: 4px 12px; }
""" + "\n".join(
    f".run{n} {{ stroke: var(--c{n}); }} circle.run{n} {{ fill: var(--c{n}); }} "
    f".key .run{n} {{ background: var(--c{n}); }}"
    for n in range(8)
)
COPY = """
for (const button of document.querySelectorAll("button")) button.onclick = () => {
  const text = document.getElementById(button.dataset.of);
  getSelection().selectAllChildren(text);
  document.execCommand("copy");
  button.textContent = "copied";
};
"""


def page(runs: Sequence[Run], predictions: Sequence[str], now: str) -> str:
    """The whole page.

    Args:
      runs: in the order of their colours.
      predictions: a sentence for each run.
      now: the time, for the reader.
    """
    title = "Report: " + ", ".join(run.name for run in runs)
    results, different = table.results(runs), table.differences(runs)
    happened = [
        (run.name, f"step {event.step}: {event.text}")
        for run in runs
        for event in sorted(events(run), key=lambda event: event.step)
    ]
    has_marks = any(_marks(run, _axis(1)) for run in runs)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">made {html.escape(now)} by ladder-jax report</p>',
        _key(runs),
        _tables(runs, results, different),
        "<h2>Charts</h2>",
        f'<p class="soft">{MARKS}</p>' if has_marks else "",
        f'<div class="charts">{"".join(_figures(runs))}</div>',
        "<h2>Time of a step</h2>",
        _list(zip([run.name for run in runs], predictions)),
        "<h2>What happened</h2>",
        _list(happened) or "<p>No start, rollback or skipped step is recorded.</p>",
    ]
    body = "\n".join(filter(None, parts))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>{COPY}</script>\n</body>\n</html>\n"
    )


MARKS = "Dotted lines are restarts, red lines are returns to a checkpoint (rollbacks)."
Axis = Callable[[Row], float]


def _axis(per_step: int | None) -> Axis:
    return lambda row: row["step"] * (per_step or 1)


def _figures(runs: Sequence[Run]) -> list[str]:
    """The charts that have something to draw, with their captions."""
    in_tokens = all(run.tokens_per_step for run in runs)
    label = "tokens" if in_tokens else "step (no run.json says the tokens of a step)"
    axes = [_axis(run.tokens_per_step if in_tokens else 1) for run in runs]
    charts = [
        _chart(runs, axes, "loss", "Training loss, nats a token", label),
        _over_hours(runs),
        _chart(runs, axes, "held_out_loss", "Held-out loss, nats a token", label),
        _chart(runs, axes, "tokens_per_s", "Throughput, tokens/s", label),
        _chart(runs, axes, "mfu", "MFU", label, percent=True),
        _chart(runs, axes, "gradient_norm", "Gradient norm", label, log=True),
        _chart(runs, axes, "learning_rate", "Learning rate", label),
        _chart(runs, axes, "skipped_steps", "Skipped steps, all so far", label),
    ]
    drawn = [(chart.title, draw(chart)) for chart in charts]
    figures = [
        f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"
        for title, svg in drawn
        if svg
    ]
    if not charts[1].lines:
        figures.append('<p class="soft">No loss over time: rows have no time.</p>')
    return figures


def _chart(
    runs: Sequence[Run],
    axes: Sequence[Axis],
    name: str,
    title: str,
    label: str,
    log: bool = False,
    percent: bool = False,
) -> Chart:
    """The chart of one value of the rows, over steps or tokens."""
    lines, marks = [], []
    scale = 100 if percent else 1
    for number, (run, axis) in enumerate(zip(runs, axes)):
        points = [
            (axis(row), value * scale)
            for row, value in run.values(name)
            if value > 0 or not log
        ]
        lines.append(Line(number, points))
        marks += _marks(run, axis)
    return Chart(title, label, lines, marks, log, percent)


def _over_hours(runs: Sequence[Run]) -> Chart:
    """The loss over time; without lines where a run's rows have no time."""
    lines, longest = [], max((hours(run) or [0.0])[-1] for run in runs)
    unit, scale = ("hours", 1) if longest >= 1 else ("minutes", 60)
    for number, run in enumerate(runs):
        elapsed = hours(run)
        if elapsed is not None:
            pairs = zip(elapsed, run.rows)
            points = [(x * scale, row["loss"]) for x, row in pairs if "loss" in row]
            lines.append(Line(number, points))
    return Chart("Training loss over time, nats a token", unit, lines)


def _marks(run: Run, axis: Axis) -> list[Mark]:
    """The restarts and rollbacks of a run."""
    return [
        Mark(axis({"step": event.step}), event.kind)
        for event in events(run)
        if event.kind == "rollback" or (event.kind == "start" and event.step)
    ]


def _key(runs: Sequence[Run]) -> str:
    """Which colour is which run."""
    names = "".join(
        f'<span><i class="run{number % 8}"></i>{html.escape(run.name)}</span>'
        for number, run in enumerate(runs)
    )
    return f'<p class="key">{names}</p>'


def _tables(
    runs: Sequence[Run], results: table.Table, different: table.Table | None
) -> str:
    """The tables, and the same as Markdown to paste."""
    markdown = results.markdown()
    parts = ["<h2>Results</h2>", _html(results)]
    if different is not None:
        parts += ["<h2>Fields of the configuration that differ</h2>", _html(different)]
        markdown += "\n\n" + different.markdown()
    elif len(runs) > 1:
        parts.append("<p>No field of the configuration differs.</p>")
    return "\n".join(
        [
            *parts,
            "<details><summary>As Markdown</summary>",
            '<p><button data-of="markdown">copy</button></p>',
            f'<pre id="markdown" tabindex="0">{html.escape(markdown)}</pre></details>',
        ]
    )


def _html(shown: table.Table) -> str:
    """A table as HTML, which scrolls where it is wider than the screen."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in shown.header)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in shown.rows
    )
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _list(items: Iterable[tuple[str, str]]) -> str:
    """(name, text) pairs as a list; "" where there are none."""
    lines = [
        f"<li><b>{html.escape(name)}</b>: {html.escape(text)}</li>"
        for name, text in items
    ]
    return f"<ul>{''.join(lines)}</ul>" if lines else ""
