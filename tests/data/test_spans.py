"""Spans of the training period: of every log alike, and as many as its moments allow."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.data.batches import BatchBuilder
from twotower.data.encode import SPANS, entry_spans, find_span_starts
from twotower.data.schema import PAD_INT64, Feature, Split
from twotower.errors import UserError

from ..conftest import EVENTS

SECONDS = st.integers(-(2**33), 2**33)


@given(st.lists(SECONDS, min_size=1, max_size=300), st.lists(SECONDS, max_size=20))
def test_spans_are_in_order_share_the_events_and_take_any_time(events, others) -> None:
    starts = find_span_starts(np.array(events) * 1_000_000)
    assert starts == sorted(set(starts))
    assert len(starts) < SPANS
    counts = np.bincount(entry_spans(np.array([events]), starts)[0].astype(int))
    assert len(counts) == len(starts) + 1
    assert (counts > 0).all()
    # More than its share has a span only by its first moment's events.
    for span in np.flatnonzero(counts > -(-len(events) // SPANS)):
        first = starts[span - 1] if span else min(events)
        of_one = counts[span] - events.count(first)
        assert of_one <= -(-len(events) // SPANS)
    for time in others:
        assert entry_spans(np.array([[time]]), starts)[0, 0] == sum(s <= time for s in starts)
    assert entry_spans(np.array([[PAD_INT64]]), starts)[0, 0] == len(starts), "not known is now"


def test_a_log_of_any_size_has_spans_of_equal_shares() -> None:
    seconds = np.random.default_rng(0).permutation(3_000_000)
    counts = np.bincount(entry_spans(seconds[None], find_span_starts(seconds * 1_000_000))[0]
                         .astype(int))  # fmt: skip
    assert len(counts) == SPANS
    assert counts.max() < 1.05 * counts.min(), "a million of them are looked at"


def test_entries_are_of_the_spans_of_training_events_alone(make) -> None:
    history = Feature(
        name="history", kind="history", table="item_id", length=3, pooling="timed_sum"
    )  # fmt: skip
    data = make(EVENTS, query=[history], split=Split(validation=0.2, test=0.2))
    train = np.array(data.section(0))
    seconds = data.event_columns["time"] // 1_000_000
    starts = data.encoder.span_starts
    assert list(starts) == sorted(set(seconds[train]))[1:], "few moments: each is a span"
    spans = BatchBuilder(data).queries(np.arange(len(data.events))).dense["query.history_times"]
    for row, span in enumerate(spans.tolist()):
        user = data.event_columns["user"][row]
        line = slice(data.history_from[user], data.event_columns["history_to"][row])
        past = data.timeline_seconds[line][-3:]
        expected = [sum(s <= time for s in starts) for time in past]
        assert span == expected + [len(starts)] * (3 - len(past))
    assert seconds.max() > max(starts), "some of the test period's entries are behind all spans"


def test_lines_without_times_are_refused(make) -> None:
    timed = Feature(name="history", kind="history", table="item_id", pooling="timed_sum")
    with pytest.raises(UserError, match="has none: remove time_gaps, or choose another pooling"):
        make(EVENTS, query=[timed], format="user_lines", split=Split(kind="leave_last_out"))
    with pytest.raises(UserError, match="no times: remove time_gaps, or pooling timed_sum, from"):
        make(EVENTS, query=[timed], ordered=False)
