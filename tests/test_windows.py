"""The plan: every token with a predecessor is scored once, by one rank, with all the context its window has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slotfast.errors import InputError
from slotfast.windows import Plan

PLANS = st.builds(
    lambda predictions, seq_len, stride: Plan(predictions, seq_len, min(stride, seq_len)),
    st.integers(0, 3000),
    st.integers(1, 300),
    st.integers(1, 300),
)


@given(PLANS)
def test_every_prediction_is_scored_once_and_in_order(plan):
    scored = [
        window.start + position for window in map(plan.__getitem__, range(len(plan))) for position in window.scored
    ]
    assert scored == list(range(plan.predictions))


@given(PLANS)
def test_context_is_what_earlier_windows_scored(plan):
    done = 0
    for index in range(len(plan)):
        window = plan[index]
        assert window.start + window.context_end == done
        assert len(window.context) in (0, plan.seq_len - plan.stride)
        assert 0 < len(window.scored) and window.scored_end <= plan.seq_len
        done = window.start + window.scored_end


@given(PLANS, st.integers(1, 9))
def test_ranks_share_the_windows(plan, world):
    ranges = [plan.owned(rank, world) for rank in range(world)]
    assert [index for owned in ranges for index in owned] == list(range(len(plan)))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
    for rank, owned in enumerate(ranges):
        assert all(plan.owner(index, world) == rank for index in owned)


def test_the_contest_stream_has_969057_windows():
    # Its 62,021,632 scored tokens of SP1024; the published loops run 31 more windows, which only rescore the tail
    assert len(Plan(62_021_632, 2048, 64)) == 969_057


@pytest.mark.parametrize(("seq_len", "stride"), [(0, 1), (8, 0), (8, 9)])
def test_impossible_sizes_are_refused(seq_len, stride):
    with pytest.raises(InputError, match="expected"):
        Plan(10, seq_len, stride)
