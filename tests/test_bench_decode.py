"""`ladder-jax bench decode`: its workloads and figures by hand, and a tiny run."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest

from ladder_jax.bench import decode, latency, plots
from ladder_jax.bench.sizes import DECODE_SIZES
from ladder_jax.bench.workloads import WORKLOADS, Arrival, make_workload
from ladder_jax.config import ConfigError, Model
from ladder_jax.serve.counters import Counters

# ---------------------------------------------------------------- workloads

PLAIN = dict(requests=50, prompt=4, outputs=(8, 16), length=256, vocabulary=100)


@pytest.mark.parametrize("kind", WORKLOADS)
def test_a_workload_is_the_same_for_the_same_seed_alone(kind):
    first = make_workload(kind, **PLAIN, gap=0.5, seed=3)
    assert first == make_workload(kind, **PLAIN, gap=0.5, seed=3)
    assert first != make_workload(kind, **PLAIN, gap=0.5, seed=4)
    assert len(first) == 50
    assert all(0 <= token < 100 for one in first for token in one.prompt)


def test_arrivals_are_as_far_apart_as_the_workload_says():
    seconds = {
        kind: [one.seconds for one in make_workload(kind, **PLAIN, gap=0.5)]
        for kind in WORKLOADS
    }
    assert seconds["saturated"] == seconds["sharegpt"] == [0.0] * 50
    assert seconds["constant"] == [n / 2 for n in range(50)]
    gaps = np.diff(seconds["poisson"])
    assert seconds["poisson"][0] == 0 and (gaps > 0).all()
    assert 0.3 < gaps.mean() < 0.8 and gaps.std() > 0.2


def test_lengths_are_as_long_as_the_workload_says():
    uniform = make_workload("saturated", **PLAIN)
    assert {len(one.prompt) for one in uniform} == {4}
    assert {one.max_tokens for one in uniform} == set(range(8, 17))
    chats = make_workload("sharegpt", **PLAIN | dict(requests=4000, length=2048))
    assert max(len(one.prompt) for one in chats) <= 1024
    assert 145 < np.mean([len(one.prompt) for one in chats]) < 170
    assert 310 < np.mean([one.max_tokens for one in chats]) < 345
    short = make_workload("sharegpt", **PLAIN | dict(length=64))
    assert all(1 <= len(one.prompt) <= 32 for one in short)
    assert all(1 <= one.max_tokens <= 32 for one in short)


def test_an_unknown_workload_is_named():
    with pytest.raises(ConfigError, match="workload='bursts' is not accepted"):
        make_workload("bursts", **PLAIN)


# ---------------------------------------------------------------- figures


@dataclass
class Served:
    """A finished request, as far as figures go."""

    submitted: float
    times: list[float]
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.tokens = [0] * len(self.times)


EARLY = Served(submitted=10.0, times=[11.0, 12.0, 13.0])
LATE = Served(submitted=12.0, times=[16.0, 18.0])
OBJECTIVE = latency.Objective(ttft=2.0, tpot=1.5)
ARRIVALS = [Arrival(0.0, (1,), 3), Arrival(2.0, (1,), 2)]


def measured(objective=OBJECTIVE, arrivals=ARRIVALS):
    counters = Counters()
    counters.syncs, counters.busy, counters.slot_iterations = 10, 3, 4
    return latency.measure([EARLY, LATE], arrivals, 8.0, counters, objective)


def test_percentiles_are_in_milliseconds():
    assert latency.percentiles([0.1] * 50 + [0.3] * 51) == {
        "p50": pytest.approx(300),
        "p90": pytest.approx(300),
        "p99": pytest.approx(300),
    }
    assert latency.percentiles([0.0, 1.0])["p90"] == pytest.approx(900)
    assert latency.percentiles([]) == {"p50": None, "p90": None, "p99": None}


def test_latencies_count_from_the_scheduled_arrival():
    assert latency.latencies_of([EARLY, LATE]) == latency.Latencies(
        ttft=[1.0, 4.0], tpot=[1.0, 2.0], itl=[1.0, 1.0, 2.0], e2e=[3.0, 6.0]
    )
    single = Served(submitted=1.0, times=[3.0])
    assert latency.latencies_of([single]).tpot == [0.0]


def test_the_figures_of_a_run_are_those_by_hand():
    figures = measured()
    assert figures["tokens_per_s"] == 5 / 8
    assert figures["makespan_s"] == 8.0
    assert figures["syncs_per_token"] == 2.0
    assert figures["occupancy"] == 0.75
    assert figures["ttft_ms"]["p50"] == pytest.approx(2500)
    assert figures["e2e_ms"]["p99"] == pytest.approx(5970)
    assert figures["goodput"] == 0.5


@pytest.mark.parametrize(
    "limits, good", [((4.0, 2.0), 1.0), ((4.0, 1.9), 0.5), ((0.9, 9.0), 0.0)]
)
def test_a_request_is_good_within_both_limits(limits, good):
    assert measured(latency.Objective(*limits))["goodput"] == good


def test_the_saturated_rate_ends_when_the_last_request_begins_to_decode():
    # LATE decodes its first token at 18; its token at 16 came from prefill.
    assert latency.saturated_rate([EARLY, LATE], start=8.0) == 5 / 10
    longer = Served(submitted=12.0, times=[16.0, 18.0, 20.0, 22.0])
    assert latency.saturated_rate([EARLY, longer], start=8.0) == 5 / 10
    assert measured()["saturated_tokens_per_s"] == 5 / 8


def test_a_request_with_other_tokens_than_it_should_have_is_an_error():
    with pytest.raises(ArithmeticError, match="a request has 2 tokens, not 3"):
        measured(arrivals=[ARRIVALS[0], Arrival(2.0, (1,), 3)])


# What two slots did in three chunks; the second is one slot wide.
HISTORY = [
    (1.0, np.array([[7, -1], [7, 8]])),
    (2.0, np.array([[8]])),
    (3.0, np.array([[9, -1], [-1, -1], [9, -1]])),
]


def test_saturated_occupancy_ends_when_the_last_request_is_admitted():
    # Request 9 comes in the fourth iteration: 5 tokens in 2 + 2 + 1 + 2 slots.
    assert latency.saturated_occupancy(HISTORY) == 5 / 7
    assert latency.saturated_occupancy(HISTORY[:2]) == 3 / 4
    assert latency.saturated_occupancy([(0.0, np.zeros((0, 2), int))]) == 0


def test_the_table_has_both_occupancies_and_says_what_they_are():
    figures = measured() | dict(of_bare=0.9, of_matmul=0.25)
    traced = figures | dict(occupancy_while_saturated=0.985)
    text = latency.result_table(
        "title", {"static": figures | dict(occupancy=None), "ours": traced}
    )
    title, head, static, ours = text.splitlines()
    assert title == "title"
    names = ["goodput", "occupancy", "saturated", "syncs/token"]
    assert head.split()[-6:] == [*names, "tokens/iteration", "accepted"]
    assert static.split()[-6:-2] == ["50%", "-", "-", "2.0000"]
    assert ours.split()[-6:-2] == ["50%", "75.0%", "98.5%", "2.0000"]
    assert ours.split()[:4] == ["ours", "1", "90.0%", "25.0%"]
    assert "until the last token" in latency.HEAD
    assert "until the last request is\nadmitted" in latency.HEAD


# ---------------------------------------------------------------- pictures


def test_each_request_has_a_color_and_narrow_chunks_leave_slots_out():
    assert plots.slot_colors(HISTORY).tolist() == [
        [0, plots.IDLE],
        [0, 1],
        [1, plots.NOT_COMPILED],
        [2, plots.IDLE],
        [plots.IDLE, plots.IDLE],
        [2, plots.IDLE],
    ]


def test_plots_are_readable_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import image

    occupancy = plots.draw_occupancy(tmp_path, "poisson 5 ms", "ours", HISTORY)
    latencies = latency.latencies_of([EARLY, LATE])
    curves = plots.draw_latencies(tmp_path, "a, b", {"ours": latencies})
    points = [plots.Point("4", 20.0, 80.0), plots.Point("50%", 30.0, 50.0)]
    pareto = plots.draw_pareto(tmp_path, "a, b", {"ours": points})
    assert occupancy.name == "occupancy_poisson_5_ms_ours.png"
    assert curves.name == "latency_a_b.png"
    assert pareto.name == "pareto_a_b.png"
    for path in (occupancy, curves, pareto):
        assert image.imread(path).ndim == 3


# ---------------------------------------------------------------- the benchmark


SMALLEST = Model(
    vocab_size=64, dim=16, layers=1, heads=1, kv_heads=1, head_dim=16, ffn_dim=32
)


@pytest.mark.usefixtures("fast_compiler")
def test_policies_serve_the_same_requests(tmp_path, capsys, monkeypatch):
    """Few policies, four short requests: the whole benchmark and all of its outputs."""
    monkeypatch.setitem(DECODE_SIZES, "smallest", SMALLEST)
    out = tmp_path / "results.json"
    arguments = decode.Arguments(
        size="smallest",
        requests=4,
        least=2,
        most=5,
        slots=2,
        chunk=4,
        policies=("static", "no-shuffle", "speculate"),
        json=str(out),
        plots=str(tmp_path / "plots"),
    )
    results = decode.run(arguments)
    assert json.loads(out.read_text()) == json.loads(json.dumps(results))
    figures = results["workloads"]["saturated"]
    assert list(figures) == ["static", "no-shuffle", "speculate"]
    assert figures["static"]["tokens_per_iteration"] == 1
    assert figures["speculate"]["tokens_per_iteration"] >= 1
    for policy in figures.values():
        assert policy["goodput"] <= 1 and policy["tokens_per_s"] > 0
        assert policy["of_bare_of_rounds"] == [policy["of_bare"]]
        assert 0 < policy["occupancy"] <= 1
    assert "occupancy_while_saturated" not in figures["static"]
    assert 0 < figures["no-shuffle"]["occupancy_while_saturated"] <= 1
    printed = capsys.readouterr().out
    assert results["machine"]["cpu"] in printed and "batching can gain" in printed
    assert latency.HEAD in printed
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "latency_saturated.png",
        "occupancy_saturated_no-shuffle.png",
        "occupancy_saturated_speculate.png",
    ]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(size="huge"), "size='huge' is not accepted: it must be one of tiny"),
        (dict(workload="saturated,x"), "workload='x' is not accepted"),
        (dict(dtype="float16"), "dtype='float16' is not accepted"),
        (dict(slots=0), "slots=0 is not accepted: it must be 1 or more"),
        (dict(least=9, most=8), "most=8 is not accepted: it must be at least least=9"),
    ],
)
def test_the_benchmark_refuses_wrong_arguments(changes, message):
    with pytest.raises(ConfigError) as error:
        decode.run(decode.Arguments(**changes))
    assert message in str(error.value)
