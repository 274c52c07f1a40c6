"""How much of the structure planted in the demo log the towers find, beside the best possible.

    python benchmarks/planted.py
    python benchmarks/planted.py --events 400000 --config my.yaml
    python benchmarks/planted.py --cold --users 2000 --items 1000 --events 60000 --seeds 0,1

`twotower demo-log` writes the log, so it is known what it was drawn from. Best possible are the 20
items most likely for a query's user and moment, without those taken before:

- best possible knows all that the generator knows;
- best told the same, but items without a training event share their mean weight, since no log tells
  which of them will be taken more;
- best inferred the same, but nobody's tastes are told: they follow, by Bayes' rule, from how tastes
  are drawn, the user's country and age, and the events before the query. No model of the log can
  expect to do better.

Judged are all test queries, and with the columns `known` those for items that training has seen,
answered from such items alone by every row. `cold` and `warm` are the recall of items without and
with a training event when the whole catalogue is answered from.

With --cold the rows are those of cold start: shares of `train.id_dropout`, no `train.item_l2`, and
no item id at all, for each seed of training. Every row is written as it comes, to
benchmarks/results/planted.json or planted-cold.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import yaml
from measure import ROOT, write_result
from quality import changed, run, train_towers

from twotower.data.demo_log import DemoLogConfig, demo_truth, event_time, write_demo_log
from twotower.data.demo_truth import STRAY_SHARE, TASTE_SHARES, TASTES_CHANGE, DemoTruth, told
from twotower.data.prepared import PreparedDataset
from twotower.data.queries import Queries
from twotower.train.config import EvaluateConfig
from twotower.train.evaluation import (
    answer_by_cooccurrence,
    answer_by_popularity,
    judged_queries,
    score_answers,
    slice_sizes,
)

K = 20
BLOCK = 1024
I64 = npt.NDArray[np.int64]
# From queries to the items answered (Q, K).
Answer = Callable[[Queries], I64]
# Changes of the recipe: of the table beside the best possible, and of that of cold start.
PLANTED: dict[str, dict[str, Any]] = {
    "two towers": {},
    "with a plain sum": {"data.query.history.pooling": "sum"},
    "without item_l2": {"train.item_l2": 0.0},
}
COLD: dict[str, dict[str, Any]] = {
    "id dropout 0, no item_l2": {"train.id_dropout": 0.0, "train.item_l2": 0.0},
    "id dropout 0": {"train.id_dropout": 0.0},
    "id dropout 0.03": {"train.id_dropout": 0.03},
    "id dropout 0.1": {"train.id_dropout": 0.1},
    "no item id": {"train.id_dropout": 0.0, "train.item_l2": 0.0, "data.item.item_id": None},
    "id dropout 0.3": {"train.id_dropout": 0.3},
}


def places(data: PreparedDataset) -> Any:
    """Return where each item of the catalogue stands in the truth (N,)."""
    return np.array([int(name.removeprefix("item-")) for name in data.items["id"].to_pylist()])


def best_answers(
    truth: DemoTruth, data: PreparedDataset, queries: Queries, known_N: Any = None
) -> I64:
    """Return the rows of the catalogue that are most likely for each query, (Q, K).

    Args:
        truth: what the log was drawn from.
        data: the log, prepared.
        queries: to be answered.
        known_N: which items' weights may be told, by row of the catalogue; by default all.
    """
    place_N = places(data)
    user_Q = data.users["id"].to_numpy()[data.event_columns["user"][queries.event]] - 1
    time_Q = event_time(data.event_columns["time"][queries.event] / 1e6)
    if known_N is not None:
        known_N = known_N[np.argsort(place_N)]
    answers = []
    for start in range(0, len(user_Q), BLOCK):
        block = slice(start, start + BLOCK)
        p = truth.probabilities(user_Q[block], time_Q[block], known_N)[:, place_N]
        offset = queries.seen_offset[start : start + BLOCK + 1]
        p[np.repeat(np.arange(len(p)), np.diff(offset)), queries.seen[offset[0] : offset[-1]]] = -1
        answers.append(np.argsort(-p, axis=1, kind="stable")[:, :K])
    return np.concatenate(answers)


def best_inferred(
    truth: DemoTruth, log: DemoLogConfig, data: PreparedDataset, queries: Queries, known_N: Any,
    change: float,
) -> I64:  # fmt: skip
    """Return the rows most likely for each query where tastes are known by events alone, (Q, K).

    Args:
        truth: what the log was drawn from.
        log: that it was written by.
        data: the log, prepared.
        queries: to be answered.
        known_N: which items' weights may be told, by row of the catalogue.
        change: when tastes are taken to change, as a share of the log's days; 1 for never.
    """
    place_N = places(data)
    known_N = known_N[np.argsort(place_N)]
    users = pq.read_table(f"{log.output}/users.parquet", columns=["country", "age"]).to_pydict()
    events = data.event_columns
    everything, subs = np.arange(len(truth.sub_N)), int(truth.sub_N.max()) + 1
    stray_N = told(truth.stray_weights(), known_N)
    stray_N = stray_N / stray_N.sum()

    @cache
    def share_N(moment: int) -> Any:
        """How likely each item is, given its sub-genre, at a moment of the log's 400."""
        weight_N = told(truth.weights(everything, moment / 400), known_N)
        return weight_N / np.maximum(np.bincount(truth.sub_N, weight_N, subs), 1e-30)[truth.sub_N]

    # A user's events in the order of time, whichever split they are of.
    order = np.lexsort((events["time"], events["user"]))
    owner, time_E = events["user"][order], event_time(events["time"][order] / 1e6)
    item_E = place_N[events["item"][order]]
    answers = []
    for number, event in enumerate(queries.event):
        row, now = int(events["user"][event]), float(event_time(events["time"][event] / 1e6))
        own = slice(*np.searchsorted(owner, [row, row + 1]))
        before = np.flatnonzero(time_E[own] < now) + own.start
        user = int(data.users["id"][row].as_py()) - 1
        prior = log_priors(users["country"][user], users["age"][user], subs)
        likely = [
            (truth.sub_N[i], share_N(int(t * 400))[i], stray_N[i], t > change)
            for i, t in zip(item_E[before], time_E[before], strict=True)
        ]
        taste_S = inferred_taste(prior, likely, now > change)
        p_N = STRAY_SHARE * stray_N + (1 - STRAY_SHARE) * taste_S[truth.sub_N] * share_N(
            int(now * 400)
        )
        p_N = p_N[place_N]
        p_N[queries.seen[queries.seen_offset[number] : queries.seen_offset[number + 1]]] = -1
        answers.append(np.argsort(-p_N, kind="stable")[:K])
    return np.stack(answers)


def log_priors(country: str, age: float, subs: int) -> Any:
    """Return the log of how likely a user's three first tastes are, (S, S, S)."""
    near = (int(country.removeprefix("c")) * 7 + np.arange(8)) % subs
    liked_S = np.full(subs, 0.6 / subs)
    liked_S[near] += 0.4 / 8
    age_S = np.exp(-0.5 * ((age - 30 - (np.arange(subs) % 5) * 6) / 6) ** 2)
    first, second, third = np.ix_(np.log(liked_S * age_S), np.log(liked_S), np.log(liked_S))
    return first + second + third


def inferred_taste(
    prior_SSS: Any, events: list[tuple[int, float, float, bool]], later: bool
) -> Any:
    """Return how likely the next event that follows a taste is of each sub-genre (S,).

    Args:
        prior_SSS: log of how likely the first tastes are.
        events: sub-genre, share within it, share of the strays, and whether in the second half.
        later: whether the query is of the second half.
    """
    subs = len(prior_SSS)
    log_first, log_later = prior_SSS.copy(), np.zeros_like(prior_SSS)
    for sub, share, stray, second_half in events:
        liked = np.zeros_like(prior_SSS)
        liked[sub] += TASTE_SHARES[0]
        liked[:, sub] += TASTE_SHARES[1]
        liked[:, :, sub] += TASTE_SHARES[2]
        part = np.log(STRAY_SHARE * stray + (1 - STRAY_SHARE) * share * liked + 1e-30)
        if second_half:
            log_later += part
        else:
            log_first += part
    first = np.exp(log_first - log_first.max())
    if later:
        # Half of the users stay; the others' most liked is drawn again, from all.
        after = np.exp(log_later - log_later.max())
        first = 0.5 * first * after + 0.5 / subs * first.sum(0)[None] * after
    first /= first.sum()
    tastes = [first.sum(axes) for axes in ((1, 2), (0, 2), (0, 1))]
    return sum(share * taste for share, taste in zip(TASTE_SHARES, tastes, strict=True))


def known_queries(data: PreparedDataset, queries: Queries) -> Queries:
    """Return the queries for items that training has seen, with all others among the seen."""
    unknown = np.flatnonzero(data.train_count == 0)
    asked = np.diff(queries.relevant_offset)
    owner = np.repeat(np.arange(len(asked)), asked)
    keep = np.ones(len(asked), bool)
    keep[owner[data.train_count[queries.relevant] == 0]] = False
    had = np.split(queries.seen, queries.seen_offset[1:-1])
    left_out = [np.union1d(had[q], unknown) for q in np.flatnonzero(keep)]
    return Queries(
        queries.event[keep],
        queries.relevant[keep[owner]],
        np.append(0, np.cumsum(asked[keep])),
        np.concatenate(left_out),
        np.append(0, np.cumsum([len(rows) for rows in left_out])),
    )


def score(answers: Answer, data: PreparedDataset, queries: Queries) -> dict[str, float]:
    """Return a row of the table: recall@20 of all and of known queries, warm and cold, and NDCG."""
    whole = score_answers(answers(queries), queries, data, [K])
    known = known_queries(data, queries)
    sizes = slice_sizes(queries, data)
    warm = ("head", "torso", "tail")
    hits = sum(whole[f"recall@{K}/{name}"] * sizes[name] for name in warm)
    return {
        "recall": whole[f"recall@{K}"],
        "known": score_answers(answers(known), known, data, [K])[f"recall@{K}"],
        "warm": hits / sum(sizes[name] for name in warm),
        "cold": whole[f"recall@{K}/cold"],
        "ndcg": whole[f"ndcg@{K}"],
    }


def main() -> None:
    """Measure one log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    for name in ("users", "items", "events", "seed"):
        default = getattr(DemoLogConfig, name)
        parser.add_argument(f"--{name}", type=int, default=default, help="of the log")
    parser.add_argument("--cold", action="store_true", help="the table of cold start")
    parser.add_argument("--seeds", default="0", help="of training, with commas between")
    arguments = parser.parse_args()
    text = arguments.config.read_text()
    variants = COLD if arguments.cold else PLANTED
    with tempfile.TemporaryDirectory() as folder:
        log = DemoLogConfig(
            output=f"{folder}/log", users=arguments.users, items=arguments.items,
            events=arguments.events, seed=arguments.seed,
        )  # fmt: skip
        counts, _ = write_demo_log(log)
        truth = demo_truth(log)
        sizes = {k: v for k, v in asdict(log).items() if k != "output"} | {"kept": counts["events"]}
        result: dict[str, Any] = {"log": sizes, "job": yaml.safe_load(text), "rows": {}}
        job = changed(yaml.safe_load(text), {"data.root": log.output})
        run("prepare", job, Path(folder, "plain"))
        data = PreparedDataset(Path(folder, "plain", "prepared"))
        queries = judged_queries(data, 2, EvaluateConfig(k=[K]), 0)
        result["queries"] = len(queries.event)
        print(f"{'':24} {'recall@20':>9} {'known':>7} {'warm':>7} {'cold':>7} {'NDCG@20':>8}")

        def add(name: str, answers: Answer, **more: Any) -> None:
            row = score(answers, data, queries)
            result["rows"][name] = {k: round(v, 4) for k, v in row.items()} | more
            write_result("planted-cold" if arguments.cold else "planted", result,
                         ("twotower", "torch", "torchrec"))  # fmt: skip
            numbers = (row[k] for k in ("recall", "known", "warm", "cold", "ndcg"))
            print(f"{name:24}   " + " ".join(f"{v:7.4f}" for v in numbers), flush=True)

        if not arguments.cold:
            size = EvaluateConfig().batch_size
            add("best possible", lambda q: best_answers(truth, data, q))
            known_N = data.train_count > 0
            add("best told", lambda q: best_answers(truth, data, q, known_N))
            changes_at = {"best inferred": TASTES_CHANGE, "best without the change": 1.0}
            for name, at in changes_at.items():
                add(name, lambda q, at=at: best_inferred(truth, log, data, q, known_N, at))
            add("popularity", lambda q: answer_by_popularity(data, q, K, size))
            add("co-occurrence", lambda q: answer_by_cooccurrence(data, q, K, size))
        for seed in map(int, arguments.seeds.split(",")):
            for name, changes in variants.items():
                config = changed(
                    yaml.safe_load(text), {"data.root": log.output, "seed": seed, **changes}
                )
                seconds, _, answers = train_towers(config, Path(folder, "run"))
                add(
                    f"{name}, seed {seed}", lambda q, of=answers: of(q, K),
                    seconds=round(seconds, 1),
                )  # fmt: skip


if __name__ == "__main__":
    main()
