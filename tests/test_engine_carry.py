"""Iterations that carry pieces of prompts: the same tokens, where it saves time."""

from types import SimpleNamespace

import pytest
from engines import carry_always, check, check_pages, finish, submit_all
from helpers import make_engine, make_requests

from ladder_jax.config import ConfigError, Decode
from ladder_jax.serve import carrying
from ladder_jax.serve.capacity import Capacity

pytestmark = pytest.mark.usefixtures("fast_compiler")

REQUESTS = make_requests(12, longest=30)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(loop="fixed", steps_per_call=8),
        dict(tensor=2, pipelined=False),
        dict(kv_dtype="int8", unroll_layers=False, fit_shapes=True),
    ],
)
def test_an_iteration_that_carries_a_piece_changes_no_token(options):
    engine = make_engine(carry_tokens=16, page_size=4, **options)
    carry_always(engine)
    submitted = submit_all(engine, REQUESTS)
    while engine.step(wait=True):
        check_pages(engine)
    assert engine.counters.carried >= 5 and not engine.counters.failures
    alone = make_engine(page_size=4, **options | dict(fit_shapes=False))
    for request, prompt, wants in submitted:
        assert request.tokens == alone.submit(prompt, **wants).result().tokens


def test_long_prompts_are_carried_piece_by_piece_and_cancelled_ones_leave_nothing():
    engine = make_engine(carry_tokens=16, page_size=4)
    carry_always(engine)
    first = submit_all(engine, [([5, 6], dict(max_tokens=50))])
    for _ in range(2):
        engine.step()
    prompts = [[i] * 40 for i in range(3)]
    submitted = submit_all(engine, [(p, dict(max_tokens=9)) for p in prompts])
    for _ in range(2):
        engine.step()
    submitted.pop(0)[0].cancel()
    finish(engine)
    assert engine.counters.carried >= 6
    check(engine, first + submitted)


def test_what_carries_is_compiled_by_warm_up():
    engine = make_engine(carry_tokens=9, page_size=4, fit_shapes=True)
    engine.warm_up()
    compiled, most = engine.programs.compiled()
    assert compiled <= most
    widths = engine.capacity.widths
    assert most == make_engine(fit_shapes=True).capacity.most_programs() + len(widths)
    # 9 tokens are padded to the smallest piece.
    assert set(engine.programs.carry_saves) == {(width, 16) for width in widths}
    carry_always(engine)
    check(engine, [(r.result(), p, o) for r, p, o in submit_all(engine, REQUESTS)])
    assert engine.counters.carried
    assert engine.programs.compiled()[0] == compiled


def test_a_piece_that_would_save_no_time_has_a_call_of_its_own():
    engine = make_engine(carry_tokens=16, page_size=4)
    engine.programs.carry_saves = {(engine.capacity.slots, 16): -0.001}
    check(engine, [(r.result(), p, o) for r, p, o in submit_all(engine, REQUESTS)])
    assert engine.counters.prefill_calls and not engine.counters.carried


class FakePrograms:
    """Each run takes the seconds that a table says, by a clock of its own."""

    OWN = {16: 5.0, 32: 9.0, 64: 17.0}
    ALONE = {1: 4.0, 2: 6.0}
    CARRIED = {1: 12.0, 2: 16.0}

    def __init__(self):
        options = Decode(slots=2, prefill_budget=64, carry_tokens=30)
        self.capacity = Capacity(options, 64, 8, 2, 0, False, page_size=16)
        self.spec = SimpleNamespace(fixed_trip_count=False)
        self.state, self.width, self.now = None, 1, 0.0

    def reset(self):
        self.width = 1

    def reshape(self, width, length):
        self.width = width

    def run_padding(self, context, count, width):
        self.now += self.OWN[width]

    def run_chunk(self, cancelled, steps):
        self.now += steps * self.ALONE[self.width]

    def run_carry_padding(self):
        self.now += self.CARRIED[self.width]


def test_what_carrying_saves_is_two_passes_less_one(monkeypatch):
    programs = FakePrograms()
    clock = SimpleNamespace(perf_counter=lambda: programs.now)
    monkeypatch.setattr(carrying, "time", clock)
    monkeypatch.setattr(carrying, "_fill_slots", lambda programs: None)
    assert carrying.measure(programs) == {
        (1, 16): 4 + 5 - 12,
        (1, 32): 4 + 9 - 12,
        (2, 16): 6 + 5 - 16,
        (2, 32): 6 + 9 - 16,
    }


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(carry_tokens=-1), "decode.carry_tokens=-1 is not accepted: it must be f"),
        (dict(carry_tokens=17), "from 0 to decode.prefill_budget=16"),
        (dict(carry_tokens=8, speculate=2), "0 with decode.speculate"),
        (dict(carry_tokens=8, kv_layout="rows"), "set decode.kv_layout=pages"),
    ],
)
def test_where_nothing_can_be_carried_the_option_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_engine(**options)
