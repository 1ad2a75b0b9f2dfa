"""`ladder-jax report`: what the page and the table say is what the runs' files say."""

import dataclasses
import datetime
import json
import re
import sys
import types
import xml.etree.ElementTree as ET

import pytest
from axe_playwright_python.sync_playwright import Axe
from helpers import ROOT, write_rows
from page_server import executable
from playwright.sync_api import sync_playwright

from ladder_jax import cli, training
from ladder_jax.config import Config, Model, Train, to_dict
from ladder_jax.report import charts, prediction, runs, table
from ladder_jax.report.command import Arguments, run
from ladder_jax.train_programs import flops_per_step

BEGIN = 1_800_000_000
CONFIG = Config(Model(residual="ladder"), train=Train(global_batch=4, seq_len=50))


def start(seconds, step=0, whole=CONFIG, **devices):
    """An entry of run.json."""
    known = dict(kind="TPU v5 lite", chip="v5e", target="v5e:2x4", count=8)
    time = datetime.datetime.fromtimestamp(BEGIN + seconds, datetime.UTC)
    return dict(
        time=time.isoformat(),
        step=step,
        config=to_dict(whole),
        code=dict(commit="abcdef0123456789", changes="1", source="2"),
        devices=known | dict(peak_flops=1e12) | devices,
    )


def row(step, seconds, **values):
    return dict(step=step, time=BEGIN + seconds, **values)


ROWS = [
    row(1, 100, loss=5.0, gradient_norm=2.0, learning_rate=0.1),
    row(10, 200, loss=4.0, gradient_norm=1.0, tokens_per_s=1000.0, mfu=0.2),
    row(10, 210, held_out_loss=4.5, held_out_bits_per_byte=6.0, evaluation_s=1.0),
    row(20, 300, skipped_steps=2, tokens_per_s=3000.0, mfu=0.4),
    # It is started again at 1000 s, and goes back at 1200 s.
    row(30, 1100, loss=3.0, gradient_norm=9.0, tokens_per_s=2000.0, mfu=0.3),
    row(20, 1200, rollbacks=1, abandoned_steps=11),
    row(40, 1400, loss=2.5, gradient_norm=1.0, skipped_steps=3),
]
STARTS = [start(0), start(1000, 20)]


def write(folder, rows=ROWS, starts=STARTS):
    folder.mkdir(parents=True)
    write_rows(folder / "metrics.jsonl", rows)
    if starts:
        (folder / "run.json").write_text(json.dumps(dict(starts=starts)))
    return str(folder)


def cells(text):
    """The rows of the first table of Markdown, as dicts."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()]
    header, _, *rows = lines[: next(i for i, line in enumerate(lines) if len(line) < 2)]
    return [dict(zip(header, row)) for row in rows]


def test_the_table_is_what_the_files_say(tmp_path):
    other = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, residual="standard"),
        train=dataclasses.replace(CONFIG.train, out="elsewhere"),
    )
    path = write(tmp_path / "a")
    twin = write(tmp_path / "b", ROWS[:2], [start(50, whole=other)])
    text = run(Arguments((path, twin), str(tmp_path / "page.html")))
    first, second = cells(text)
    assert first == {
        "run": "a",
        "loss": "2.5000",
        "held-out loss": "4.5000",
        "steps": "40",
        "tokens": "8,000",
        # 300 s until the first end, 400 s from the restart on
        "hours": "0.19",
        "tokens/s": "2,000",
        "step": "100.0 ms",
        "MFU": "30.0%",
        "skipped": "3",
        "rollbacks": "1",
        "starts": "2",
        "devices": "8 x TPU v5 lite",
        "code": "abcdef0123+",
    }
    assert (second["held-out loss"], second["skipped"], second["hours"]) == (
        "-",
        "-",
        "0.04",
    )
    # Only fields that differ, and not the folder.
    assert "| model.residual | ladder | standard |" in text
    assert len(re.findall(r"^\| \w+\.\w+ \|", text, re.M)) == 1


def test_the_page_loads_nothing_and_shows_all_charts(tmp_path):
    name = tmp_path / "<b>&"
    run(Arguments((write(name), write(tmp_path / "b")), str(tmp_path / "page.html")))
    page = (tmp_path / "page.html").read_text()
    assert not re.findall(r"""(?:src|href|url\(|@import|https?:)""", page)
    assert "<b>&<" not in page and "&lt;b&gt;&amp;" in page
    assert page.count("<svg") == 8 and "prefers-color-scheme: dark" in page
    for text in (
        "step 20: went back to this step, rollback 1; steps lost: 11",
        "step 20: bad steps left out since the last report: 2",
        "started at ",
        "the model&#x27;s FLOPs take ",
        "--plan compiles the step for v5e:2x4",
    ):
        assert text in page, text
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ET.fromstring(svg)


def test_a_chart_places_points_between_its_ends():
    points = [(float(x), float(1 + x % 7)) for x in range(5000)]
    drawn = charts.draw(charts.Chart("y", "x", [charts.Line(0, points)]))
    [path] = re.findall(r'class="line run0" d="M(.*?)"', drawn)
    places = [tuple(map(float, pair.split())) for pair in path.split("L")]
    assert len(places) <= charts.MOST_POINTS + 2
    xs, ys = zip(*places)
    assert list(xs) == sorted(xs)
    assert charts.LEFT == min(xs) and max(xs) > charts.WIDTH - charts.RIGHT - 1
    assert charts.TOP < min(ys) < max(ys) < charts.HEIGHT - charts.BOTTOM
    assert charts.draw(charts.Chart("y", "x", [charts.Line(0, [])])) == ""
    flat = charts.Chart("y", "x", [charts.Line(0, [(0.0, 2.0)])], log=True)
    ET.fromstring(charts.draw(flat))


@pytest.mark.parametrize("low, high", [(0.003, 4e5), (0.8, 3.0), (2.1, 2.2)])
def test_ticks_are_round_numbers_inside(low, high):
    for log in (False, True):
        ticks = charts._ticks(low, high, log)
        assert all(low <= tick <= high for tick in ticks) and len(ticks) <= 13
        assert log or len(ticks) >= 3


def test_a_run_of_an_older_version_says_what_is_missing(tmp_path):
    rows = [{k: v for k, v in r.items() if k != "time"} for r in ROWS]
    path = write(tmp_path / "old", rows, None)
    text = run(Arguments((path,), str(tmp_path / "page.html")))
    assert cells(text)[0]["tokens"] == cells(text)[0]["hours"] == "-"
    page = (tmp_path / "page.html").read_text()
    assert "no run.json says on which devices it ran: no time is predicted" in page
    assert "rows have no time" in page and page.count("<svg") == 7


def test_what_is_predicted_is_computed_or_left_out(tmp_path):
    known = runs.load(write(tmp_path / "a"), "a")
    found = prediction.predict(known, plan=False)
    assert found.measured == 0.1 and found.planned is None
    assert found.at_peak == flops_per_step(CONFIG) / 1e12
    strange = dict(kind="new chip", chip=None, target=None, peak_flops=None)
    known = runs.load(write(tmp_path / "b", ROWS, [start(0, **strange)]), "b")
    found = prediction.predict(known, plan=True)
    assert found.at_peak is found.planned is None
    assert "the peak of new chip is not known" in prediction.text(found)
    assert "no target for 8 x new chip" in prediction.text(found)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "has no metrics.jsonl: give the folder of a run"),
        ("", "has no row with a loss yet"),
        ('{"step": 1, "held_out_loss": 2.0}\n', "has no row with a loss yet"),
        ('{"step": 1, "lo\n{"step": 2, "loss": 1}\n', "line 1, is not a row"),
        ('{"step": 1, "loss": "x"}\n', "step 1: loss='x' is not a number"),
        ('{"step": 1, "loss": NaN}\n', "step 1: loss=nan is not a number"),
    ],
)
def test_a_damaged_run_is_one_line(tmp_path, wrong, content, message):
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run/metrics.jsonl").write_text(content)
    assert message in wrong("report", tmp_path / "run", "--out", tmp_path / "p.html")
    assert not (tmp_path / "p.html").exists()


def test_other_mistakes(tmp_path, wrong):
    assert "missing argument: RUNS" in wrong("report")
    path = write(tmp_path / "run")
    out = tmp_path / "none" / "p.html"
    assert "its folder does not exist" in wrong("report", path, "--out", out)


def test_a_damaged_run_json_is_left_out(tmp_path):
    path = write(tmp_path / "run")
    (tmp_path / "run/run.json").write_text("{")
    assert runs.load(path, "run").starts == []


def test_trackers_take_the_rows_as_they_are(tmp_path, monkeypatch):
    """The example of docs/runs.md, with a module that checks what wandb would."""
    write(tmp_path / "runs/tutorial", ROWS, STARTS)
    logged, calls = [], []

    def log(data, step):
        assert all(type(value) in (int, float) for value in data.values())
        logged.append((data, step))

    fake = types.SimpleNamespace(
        init=lambda **options: calls.append(options["config"]),
        log=log,
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/runs.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(compile(example, "docs/runs.md", "exec"), {})
    assert logged == [(row, row["step"]) for row in ROWS]
    assert calls == [to_dict(CONFIG), "finish"]


# ---------------------------------------------------------------- the numbers of rows


def test_an_unknown_chip_has_tokens_per_s_and_no_mfu():
    device = types.SimpleNamespace(platform="tpu", device_kind="TPU v99")
    mesh = types.SimpleNamespace(
        devices=types.SimpleNamespace(flat=[device] * 8), size=8
    )
    speed = training.speed_of(CONFIG, mesh)
    assert speed.peak is None
    assert speed.rates(0.5) == dict(tokens_per_s=4 * 50 / 0.5)
    device.device_kind = "TPU v5 lite"
    rates = training.speed_of(CONFIG, mesh).rates(0.5)
    assert rates["mfu"] == pytest.approx(flops_per_step(CONFIG) / 0.5 / (8 * 197e12))


def test_names_are_the_shortest_that_differ():
    assert runs.names(["x/a", "x/b/"]) == ["a", "b"]
    assert runs.names(["x/a", "y/a"]) == ["x/a", "y/a"]
    assert runs.names(["x/a"]) == ["a"]


def test_help_and_several_positionals(capsys):
    with pytest.raises(SystemExit):
        cli.run(["report", "--help"])
    assert "usage: ladder-jax report RUNS [OPTIONS]" in capsys.readouterr().out
    parsed = cli.parse(Arguments, ["a", "--out", "x", "b"], "report")
    assert parsed.runs == ("a", "b") and parsed.out == "x"


def test_a_bar_in_a_name_does_not_end_a_cell():
    shown = table.Table(["a"], [["x|y\nz"]]).markdown()
    assert shown.splitlines()[-1] == "| x\\|y z |"


@pytest.mark.skipif(executable() is None, reason="there is no Chromium")
@pytest.mark.parametrize("width, mode", [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(tmp_path, width, mode):
    """It loads nothing, reports no error, fits a phone, and Axe finds no mistake."""
    pages = (write(tmp_path / "a"), write(tmp_path / "b"))
    run(Arguments(pages, str(tmp_path / "page.html")))
    problems, requests = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable(), args=["--no-sandbox"]
        )
        page = browser.new_page(
            viewport=dict(width=width, height=800), color_scheme=mode
        )
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((tmp_path / "page.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator("summary").click()
        page.locator("button").click()
        assert page.locator("button").inner_text() == "copied"
        selected = page.evaluate("getSelection().toString()")
        found = Axe().run(page)
        browser.close()
    assert "| run | loss |" in selected
    assert problems == [] and len(requests) == 1
    assert found.violations_count == 0, found.generate_report()
