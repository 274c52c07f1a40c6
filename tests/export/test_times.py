"""The times of a history's entries: the same from the log, from a request and in the graph."""

import numpy as np
import pytest
import torch

from twotower.data.batches import BatchBuilder
from twotower.data.encode import SPANS
from twotower.data.schema import ENCODERS, OF_HISTORIES, Feature
from twotower.errors import UserError
from twotower.export.golden import raw_tensors, session

from ..conftest import EVENTS
from .bundles import timed_bundle

GAPS = [f"{kind}_times" for kind in ENCODERS]
SPANNED = "timed_sum_times"
NAMES = [SPANNED, *GAPS]
LATER_S = 10**9


def requests_of(data) -> list[dict]:
    requests = []
    for row in range(len(data.events)):
        user = int(data.event_columns["user"][row])
        line = slice(data.history_from[user], data.event_columns["history_to"][row])
        seconds = data.timeline_seconds[line]
        requests.append(data.raw_query(user, row, data.timeline[line], seconds))
    return requests


def test_log_request_and_graph_agree(make, tmp_path) -> None:
    data, model, bundle = timed_bundle(make, tmp_path)
    assert bundle.manifest.parity["scores"] < 1e-5
    assert [s.name for s in bundle.manifest.query] == [
        name for pooling in OF_HISTORIES for name in (pooling, f"{pooling}_times")
    ]
    assert any(g.features[NAMES[0]] for g in bundle.golden())
    requests = requests_of(data)
    trained = model.query_vectors(BatchBuilder(data).queries(np.arange(len(requests))))
    specs = bundle.manifest.query
    graph = session(bundle.path / "query.onnx")

    def served(rows) -> np.ndarray:
        eager = model.query_vectors(BatchBuilder(data).requests("query", rows)).detach().numpy()
        (got,) = graph.run(["vector"], raw_tensors(specs, rows))
        # Two blocks of fp32 at width 8.
        np.testing.assert_allclose(got, eager, atol=5e-6)
        return got

    as_logged = served(requests)
    np.testing.assert_allclose(as_logged, trained.detach().numpy(), atol=5e-6)
    # To gaps any origin of time will do; without times, and with one missing, histories are others.
    gaps_later = [r | {n: [t + LATER_S for t in r[n]] for n in GAPS} for r in requests]
    np.testing.assert_array_equal(served(gaps_later), as_logged)
    # To a sum, what comes after the training period is of its newest span, as what is not known.
    far = [r | {SPANNED: [t + LATER_S for t in r[SPANNED]]} for r in requests]
    not_known = [r | {SPANNED: [None] * len(r[SPANNED])} for r in requests]
    np.testing.assert_array_equal(served(far), served(not_known))
    several = np.array([len(r[SPANNED]) > 2 for r in requests])
    early = np.array([max(r[SPANNED], default=0) < data.encoder.span_starts[-1] for r in requests])
    assert (np.abs(served(far) - as_logged)[several & early].max(1) > 1e-4).all()
    unknown = served([r | {n: [None] * len(r[n]) for n in NAMES} for r in requests])
    partly = served([r | {n: [None, *r[n][1:]][: len(r[n])] for n in NAMES} for r in requests])
    for other in (unknown, partly):
        assert (np.abs(other - as_logged)[several].max(1) > 1e-4).all()
    assert (np.abs(unknown - partly)[several].max(1) > 1e-4).all()


def test_ages_of_items_from_before_the_log_are_not_known(make) -> None:
    users = {"user_id": [1, 2, 3], "before": [["d", "e"], None, ["a"]]}
    past = Feature(
        name="past", kind="history", table="item_id", length=3, column="before", pooling="hstu",
        time_gaps=True,
    )  # fmt: skip
    data = make(EVENTS, users=users, query=[past])
    batch = BatchBuilder(data).queries(np.arange(len(data.events)))
    ages = {
        int(time): age for time, age in
        zip(data.event_columns["time"] // 1_000_000, batch.dense["query.past_times"].tolist(),
            strict=True)
    }  # fmt: skip
    assert ages[10] == [-1, -1, -1], "nothing but what came before the log"
    assert ages[20] == [-1, -1, 0]
    assert ages[90] == [-1, 10, 0]
    assert ages[25] == [0, -1, -1], "one entry, then padding"
    assert ages[99] == [62, 57, 0]


@pytest.mark.parametrize(
    ("features", "words"),
    [([Feature(name="h", kind="history", table="item_id", time_gaps=True)],
      "time_gaps are for pooling transformer or hstu, got pooling mean"),
     ([Feature(name="h", kind="history", table="item_id", pooling="hstu", time_gaps=True),
       Feature(name="h_times", kind="id")],
      "'h_times' is the name of the times of the history 'h'"),
     ([Feature(name="h", kind="history", table="item_id", pooling="timed_sum", time_gaps=True)],
      "time_gaps are for pooling transformer or hstu, got pooling timed_sum"),
     ([Feature(name="h", kind="ids", table="item_id", pooling="timed_sum")],
      "timed_sum reads a history by its times, and ids has none: choose mean, sum or attention"),
     ([Feature(name="h", kind="history", table="item_id", pooling="timed_sum", column="before")],
      "items of a history's `column` have none: choose another pooling, or name a table")],
)  # fmt: skip
def test_times_that_cannot_be_are_refused(features, words, make) -> None:
    with pytest.raises(UserError, match=words):
        make(EVENTS, query=features)


def test_towers_train_on_the_terms_of_time(make, tmp_path) -> None:
    data, model, _ = timed_bundle(make, tmp_path)
    query, *_ = model.train()(BatchBuilder(data).events(np.arange(200, 300)))
    query.square().mul(torch.randn_like(query)).sum().backward()
    for kind in ENCODERS:
        gradient = model.query.pools[f"pool_{kind}"].gap_bias.grad
        assert (gradient.abs().amax(1) > 0).sum() > 8, "gaps of many sizes"
    assert (model.query.pools["pool_timed_sum"].of_span.grad != 0).sum() > SPANS // 3
