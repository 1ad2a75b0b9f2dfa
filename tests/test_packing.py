"""The pieces of prompts that one prefill call computes: they fit, and are in order."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax import decode_state, sampling
from ladder_jax.serve import packing

SIZES = [4, 8, 16]


@settings(max_examples=200, deadline=None)
@given(
    totals=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    budget=st.integers(1, 64),
)
def test_pieces_fit_the_budget_and_finish_every_prompt(totals, budget):
    done, calls = [0] * len(totals), 0
    while waiting := [
        (i, done[i], total) for i, total in enumerate(totals) if done[i] < total
    ]:
        chosen, width = packing.pick_pieces(waiting, SIZES, budget)
        if not chosen:
            assert budget < SIZES[0]
            return
        assert width in SIZES and width * packing.rows(len(chosen)) <= max(
            budget, SIZES[0]
        )
        assert [piece.staging_index for piece in chosen] == [
            index for index, _, _ in waiting[: len(chosen)]
        ]
        for piece in chosen:
            assert (
                piece.start == done[piece.staging_index] and 0 < piece.length <= width
            )
            done[piece.staging_index] = piece.stop
            assert piece.last == (
                done[piece.staging_index] == totals[piece.staging_index]
            )
        calls += 1
        assert calls <= sum(totals)


def test_a_call_takes_as_many_prompts_as_fit():
    waiting = [(index, 0, 4) for index in range(9)]
    assert [
        len(packing.pick_pieces(waiting, SIZES, budget)[0])
        for budget in (4, 16, 63, 64)
    ] == [1, 4, 4, 9]


def test_rows_of_padding_have_no_staging_index():
    row = decode_state.SlotState(
        *(np.zeros(1, np.int32),) * 9, sampling.make_params(None, 2, 32), None, None
    )
    pieces = [packing.Piece(5, 0, 3, False), packing.Piece(2, 2, 2, True)]
    prompts = [
        packing.Prompt(np.arange(10, 17, dtype=np.int32)),
        packing.Prompt(np.arange(20, 24, dtype=np.int32), generated=1),
    ]
    made = packing.pack(
        pieces, 4, 8, prompts, [row, row], staging_size=6, padding_id=99
    )
    assert made.tokens.tolist() == [[10, 11, 12, 0], [22, 23, 0, 0], [0] * 4, [0] * 4]
    assert made.staging_index.tolist() == [5, 2, 6, 6] and made.last.tolist() == [
        False,
        True,
        False,
        False,
    ]
    assert made.size.tolist() == [7, 4, 0, 0]
    assert made.generated.tolist() == [0, 1, 0, 0]
    assert made.start.tolist() == [0, 2, 0, 0] and made.length.tolist() == [3, 2, 0, 0]
    assert made.prompt[1].tolist() == [20, 21, 22, 23, 99, 99, 99, 99] and made.prompt[
        0
    ].tolist() == [10, 11, 12, 13, 14, 15, 16, 99]
    assert all(
        len(leaf) == 4 for leaf in (made.state.request, made.state.sampling.seed)
    )
