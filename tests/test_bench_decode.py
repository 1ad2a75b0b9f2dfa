"""`ladder-jax bench decode`: its workloads and figures by hand, and a tiny run."""

import json
import re
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from ladder_jax.bench import decode, decode_runs, latency, plots
from ladder_jax.bench.decode_loads import Load, read_loads
from ladder_jax.bench.sizes import DECODE_SIZES
from ladder_jax.bench.workloads import WORKLOADS, Arrival, arriving, make_workload
from ladder_jax.config import ConfigError, Model
from ladder_jax.serve.counters import Counters, TracedChunk

# ---------------------------------------------------------------- workloads

PLAIN = dict(requests=50, prompt=4, outputs=(8, 16), length=256, vocabulary=100)


@pytest.mark.parametrize("kind", WORKLOADS)
def test_a_workload_is_the_same_for_the_same_seed_alone(kind):
    first = make_workload(kind, **PLAIN, seed=3)
    assert first == make_workload(kind, **PLAIN, seed=3)
    assert first != make_workload(kind, **PLAIN, seed=4)
    assert len(first) == 50 and {one.seconds for one in first} == {0.0}
    assert all(0 <= token < 100 for one in first for token in one.prompt)


def test_requests_arrive_as_far_apart_as_the_load_says():
    requests = make_workload("uniform", **PLAIN)
    constant = arriving(requests, "constant", 0.5)
    assert [one.seconds for one in constant] == [n / 2 for n in range(50)]
    random = arriving(requests, "poisson", 0.5, seed=1)
    assert random == arriving(requests, "poisson", 0.5, seed=1)
    assert random != arriving(requests, "poisson", 0.5, seed=2)
    assert [one.prompt for one in random] == [one.prompt for one in requests]
    seconds = [one.seconds for one in random]
    assert seconds[0] == 0 and seconds[-1] == pytest.approx(49 / 2)
    gaps = np.diff(seconds)
    assert (gaps > 0).all() and gaps.std() > 0.2
    assert {one.seconds for one in arriving(requests, "poisson", 0.0)} == {0.0}


def lengths_of(kind, **changes):
    """(prompt, output) tokens of the requests, as two arrays."""
    requests = make_workload(kind, **PLAIN | changes)
    return np.array([(len(one.prompt), one.max_tokens) for one in requests]).T


def test_lengths_are_as_long_as_the_workload_says():
    prompts, tokens = lengths_of("uniform")
    assert set(prompts) == {4} and set(tokens) == set(range(8, 17))
    prompts, tokens = lengths_of("sharegpt", requests=4000, length=2048)
    assert prompts.max() <= 1024
    assert 145 < prompts.mean() < 170 and 310 < tokens.mean() < 345
    prompts, tokens = lengths_of("sharegpt", length=64)
    assert 1 <= prompts.min() and prompts.max() <= 32
    assert 1 <= tokens.min() and tokens.max() <= 32


@pytest.mark.parametrize(
    "kind, prompts, outputs",
    [
        ("long-short", (32, 64), (4, 16)),
        ("short-long", (2, 8), (64, 128)),
        ("shared", (58, 64), (16, 64)),
    ],
)
def test_lengths_are_shares_of_the_longest(kind, prompts, outputs):
    drawn = lengths_of(kind, requests=1000, prompt=64, outputs=(1, 128))
    for lengths, (least, most) in zip(drawn, (prompts, outputs)):
        assert (lengths.min(), lengths.max()) == (least, most)
    assert lengths_of(kind, prompt=1, outputs=(1, 1)).tolist() == [[1] * 50] * 2


def test_shared_prompts_begin_with_a_thousand_tokens_or_as_many_as_fit():
    for prompt, size in ((64, 56), (2048, 1000)):
        requests = make_workload("shared", **PLAIN | dict(prompt=prompt))
        prompts = [one.prompt for one in requests]
        assert len({prompt[:size] for prompt in prompts}) == 1
        assert len({prompt[size:] for prompt in prompts}) > 40
        questions = [len(prompt) - size for prompt in prompts]
        assert min(questions) >= prompt // 32 and max(questions) <= prompt // 8


def test_an_unknown_workload_is_named():
    with pytest.raises(ConfigError, match="workload='bursts' is not accepted"):
        make_workload("bursts", **PLAIN)


# ---------------------------------------------------------------- loads


def test_loads_are_what_the_words_say_and_the_saturated_one_is_first():
    assert read_loads(["0.8", "saturated"], [], ["per-token"]) == [
        Load("saturated", "saturated"),
        Load("0.8", "poisson", share=0.8),
    ]
    assert read_loads(["constant"], [20, 500], ["ours"]) == [
        Load("constant 20 ms", "constant", gap=0.02),
        Load("constant 500 ms", "constant", gap=0.5),
    ]


@pytest.mark.parametrize(
    "words, policies, message",
    [
        (["saturated", "bursts"], [], "load='bursts' is not accepted: it must be sat"),
        (["saturated", "-1"], [], "load='-1' is not accepted: it must be saturated,"),
        (["0.8"], [], "load='0.8' is not accepted: it must be beside saturated"),
        (["saturated", "0.8"], ["ours"], "with the policy per-token"),
    ],
)
def test_a_load_that_cannot_be_measured_is_an_error(words, policies, message):
    with pytest.raises(ConfigError) as error:
        read_loads(words, [500.0], policies)
    assert message in str(error.value)


class InstantEngine:
    """Ends every request at its submission."""

    def submit(self, prompt, max_tokens, **options):
        return SimpleNamespace(finish="length", prompt=prompt)

    def step(self):
        return False


@pytest.mark.parametrize(
    "saturated, seconds, requests_per_s",
    [
        (960.0, 4.0, 6.0),  # requests wait for slots
        (1600.0, 4.0, 10.0),
        # All have their first token at once, and no other: a rate that says nothing.
        (16.0, 0.5, 8.0),
    ],
)
def test_the_capacity_is_the_larger_rate_of_saturated_load_and_of_the_whole_run(
    monkeypatch, saturated, seconds, requests_per_s
):
    loads = read_loads(["saturated", "0.5"], [], ["per-token"])
    arguments = decode.Arguments(
        workload="uniform", requests=4, least=160, most=160, slots=8
    )
    model_config = SimpleNamespace(vocab_size=100)
    bench = SimpleNamespace(
        arguments=arguments, model_config=model_config, length=256, scale=1.0
    )
    arrivals = []

    def run_load(bench, engines, requests, is_saturated):
        arrivals.append([one.seconds for one in requests])
        figures = dict(saturated_tokens_per_s=saturated, makespan_s=seconds)
        return {name: decode_runs.Turn(figures, [], []) for name in engines}

    monkeypatch.setattr(decode_runs, "run_load", run_load)
    decode_runs.compare(bench, {"per-token": InstantEngine()}, "uniform", loads)
    assert arrivals[0] == [0.0] * 4
    # Three gaps between four requests.
    assert arrivals[1][-1] == pytest.approx(3 / (0.5 * requests_per_s))


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
    TracedChunk(1.0, np.array([[7, -1], [7, 8]]), length=8, pages=9),
    TracedChunk(2.0, np.array([[8]]), length=16, pages=4),
    TracedChunk(3.0, np.array([[9, -1], [-1, -1], [9, -1]]), length=8, pages=5),
]


def test_occupancy_ends_when_the_last_request_is_admitted():
    # Request 9 comes in the fourth iteration: 5 tokens in 2 + 2 + 1 + 2 slots.
    occupancy = latency.occupancy_until_last_admission
    assert occupancy(HISTORY) == 5 / 7
    assert occupancy(HISTORY[:2]) == 3 / 4
    assert occupancy([TracedChunk(0.0, np.zeros((0, 2), int), 8, 0)]) == 0


ROWS = latency.Cache(10, page_size=0, pairs=2, staging_size=3, prefix_bytes=7)
PAGES = ROWS._replace(page_size=4)


def test_bytes_read_over_bytes_alive_are_those_by_hand():
    prompts = {7: 3, 8: 7, 9: 1}
    # In turn: 7 has 4 tokens; 5, and 8 has 8; 9; 9 has 2; nothing; 9 has 3.
    alive = 4 + 5 + 8 + 9 + 2 + 3
    rows = 2 * 8 * 2 + 16 + 2 * 8 * 3
    assert latency.read_over_alive(HISTORY, prompts, ROWS) == rows / alive
    # Whole pages of 4 tokens, and always two of them: 1, 2 + 2, 3, 1, 0, 1.
    pages = (2 + 4 + 4 + 2 + 0 + 2) * 4
    assert latency.read_over_alive(HISTORY, prompts, PAGES) == pages / alive


def test_the_most_bytes_held_are_rows_allocated_or_pages_in_use():
    assert latency.peak_bytes(HISTORY, ROWS) == (1 + 3) * 16 * 10 + 7
    assert latency.peak_bytes(HISTORY, PAGES) == 9 * 4 * 10


def test_the_table_has_a_line_a_run_and_says_what_its_columns_are():
    figures = measured() | dict(of_bare=0.9, of_matmul=0.25)
    names = dict(workload="shared", load="0.8")
    traced = dict(
        occupancy_until_last_admission=0.985, kv_mib=1.25, kv_read_over_alive=1.1
    )
    rows = [
        names | dict(policy="concurrent") | figures | dict(occupancy=None),
        names | dict(policy="ours") | figures | traced,
    ]
    head, concurrent, ours = latency.result_table(rows).splitlines()
    assert head.split()[:4] == ["workload", "load", "policy", "tokens/s"]
    assert concurrent.split()[:4] == ["shared", "0.8", "concurrent", "1"]
    assert concurrent.split()[-10:-6] == ["-"] * 4
    assert ours.split()[-10:-6] == ["75.0%", "98.5%", "1.2", "1.10"]
    assert ours.split()[-6:-2] == ["90.0%", "25.0%", "50%", "2.0000"]
    for column in ("occupancy", "until last", "KV MiB", "read/alive", "accepted"):
        assert f"\n{column}: " in "\n" + latency.HEAD or f"; {column}: " in latency.HEAD
        assert column in head


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
    """Few policies, few short requests: the whole benchmark and all of its outputs."""
    monkeypatch.setitem(DECODE_SIZES, "smallest", SMALLEST)
    out = tmp_path / "results.json"
    arguments = decode.Arguments(
        size="smallest",
        workload="shared",
        load=("0.9", "saturated"),
        requests=5,
        prompt=48,
        most=16,
        slots=2,
        chunk=4,
        policies=("per-token", "ours", "speculate"),
        json=str(out),
        plots=str(tmp_path / "plots"),
    )
    results = decode.run(arguments)
    assert json.loads(out.read_text()) == json.loads(json.dumps(results))
    of_kind = results["workloads"]["shared"]
    assert list(of_kind) == ["saturated", "0.9"]
    for of_load in of_kind.values():
        assert list(of_load) == ["per-token", "ours", "speculate"]
        for policy, figures in of_load.items():
            assert figures["goodput"] <= 1 and figures["tokens_per_s"] > 0
            assert figures["of_bare_of_rounds"] == [figures["of_bare"]]
            assert 0 < figures["occupancy"] <= 1
            assert 0 < figures["occupancy_until_last_admission"] <= 1
            assert figures["kv_layout"] == "rows"
            has_drafted = figures["accepted"] is not None
            assert policy == "speculate" or not has_drafted
            assert has_drafted or figures["kv_read_over_alive"] > 1
            assert has_drafted or figures["tokens_per_iteration"] == 1
            # At most two slots and two rows of staging, of 64 tokens, and prefixes.
            has_prefixes = policy != "per-token"
            most = (4 * 64 + has_prefixes * 8 * 48) * 2 * SMALLEST.head_dim * 4
            assert 0 < figures["kv_mib"] * 2**20 <= most
            assert bool(figures["prefix_tokens"]) == has_prefixes
            assert figures["prefix_tokens"] % 32 == 0
        assert of_load["speculate"]["tokens_per_iteration"] >= 1
    printed = capsys.readouterr().out
    assert results["machine"]["cpu"] in printed and "batching can gain" in printed
    assert "a prefix cache for ours, speculate\n" in printed and latency.HEAD in printed
    assert len(re.findall(r"^shared +(saturated|0\.9) ", printed, re.M)) == 2 * 3
    pictures = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert "latency_shared_0.9.png" in pictures and len(pictures) == 2 * 4
    assert "occupancy_shared_saturated_ours.png" in pictures


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(size="huge"), "size='huge' is not accepted: it must be one of tiny"),
        (dict(workload="uniform,x"), "workload='x' is not accepted"),
        (dict(dtype="float16"), "dtype='float16' is not accepted"),
        (dict(slots=0), "slots=0 is not accepted: it must be 1 or more"),
        (
            dict(load=("0.8",)),
            "load='0.8' is not accepted: it must be beside saturated",
        ),
        (
            dict(workload="uniform", least=9, most=8),
            "most=8 is not accepted: it must be at least least=9",
        ),
    ],
)
def test_the_benchmark_refuses_wrong_arguments(changes, message):
    with pytest.raises(ConfigError) as error:
        decode.run(decode.Arguments(**changes))
    assert message in str(error.value)
