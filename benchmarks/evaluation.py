"""Intervals and p-values over users: how long they take, and whether they mean what they say.

    python benchmarks/evaluation.py                     # about two minutes

Time is that of one `twotower evaluate` and one `twotower compare` of 20,000 queries: every metric
of three models, 1,000 resamples, and nine metrics of two runs, 10,000 permutations. Their peer is
scipy's `bootstrap` and `permutation_test` of a single metric, by user, whose results must agree.

Coverage is the share of 1,000 logs, of 200 users who each have a level of their own and 1 to 6
queries, whose 95% interval holds the true level: drawn over users as here, and over queries. False
alarms are the share of 1,000 pairs of equally good models with p < 0.05. The result is written to
benchmarks/results/evaluation.json.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from measure import write_result
from scipy.stats import bootstrap, permutation_test

from twotower.train.evaluation.bootstrap import Ratio, differences, intervals

QUERIES = 20_000
MODELS = 3
# Of a report with three cut-offs, slices and decay; of a comparison.
REPORTED, COMPARED = 58, 9
TRIALS = 1_000
LEVEL = 0.3


def timed(work: Any) -> tuple[float, Any]:
    """Return the seconds that something took, and what it gave."""
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def times(users: int) -> dict[str, Any]:
    """Measure one report and one comparison beside scipy."""
    rng = np.random.default_rng(0)
    user = np.sort(np.concatenate([np.arange(users), rng.integers(users, size=QUERIES - users)]))
    one = np.ones(QUERIES)

    def metrics(number: int) -> dict[str, Ratio]:
        return {f"m{i}": ((rng.random(QUERIES) < 0.2).astype(float), one) for i in range(number)}

    report, before, after = metrics(MODELS * REPORTED), metrics(COMPARED), metrics(COMPARED)
    ours, bounds = timed(lambda: intervals(report, user, 0))
    pair, found = timed(lambda: differences((before, after), user, 0))
    n = np.bincount(user).astype(float)
    a, b = (np.bincount(user, x["m0"][0]) for x in (before, after))

    def ratio(x: Any, y: Any, axis: int = -1) -> Any:
        return x.sum(axis) / y.sum(axis)

    first = np.bincount(user, report["m0"][0])
    peer, theirs = timed(lambda: bootstrap(
        (first, n), ratio, paired=True, n_resamples=1_000, method="percentile", batch=100, rng=0,
    ).confidence_interval)  # fmt: skip
    peer_pair, p = timed(lambda: permutation_test(
        (a, b), lambda x, y, axis=-1: (y - x).sum(axis), permutation_type="samples",
        n_resamples=10_000, vectorized=True, batch=100, rng=0,
    ).pvalue)  # fmt: skip
    return {
        "users": users,
        "report_s": round(ours, 2), "scipy_bootstrap_one_metric_s": round(peer, 2),
        "comparison_s": round(pair, 2), "scipy_permutation_one_metric_s": round(peer_pair, 2),
        "interval": [round(x, 5) for x in bounds["m0"]],
        "scipy_interval": [round(float(x), 5) for x in theirs],
        "p": round(found["m0"][3], 4), "scipy_p": round(float(p), 4),
    }  # fmt: skip


def meaning() -> dict[str, float]:
    """Measure how often an interval covers, and how often chance is taken for an effect."""
    rng = np.random.default_rng(1)
    covered: dict[str, list[bool]] = {"users": [], "queries": []}
    alarms = []
    for trial in range(TRIALS):
        user = np.repeat(np.arange(200), rng.integers(1, 7, 200))
        level = rng.beta(1.5 * LEVEL, 1.5 * (1 - LEVEL), 200)[user]
        one = np.ones(len(user))
        hit, again = (rng.random((2, len(user))) < level).astype(float)
        for over, owner in (("users", user), ("queries", np.arange(len(user)))):
            low, high = intervals({"m": (hit, one)}, owner, trial)["m"]
            covered[over].append(low <= LEVEL <= high)
        alarms.append(differences(({"m": (hit, one)}, {"m": (again, one)}), user, trial)["m"][3])
    return {
        "covered_over_users": round(float(np.mean(covered["users"])), 3),
        "covered_over_queries": round(float(np.mean(covered["queries"])), 3),
        "false_alarms": round(float(np.mean(np.array(alarms) < 0.05)), 3),
    }


def main() -> None:
    """Measure, print and write."""
    rows = [times(users) for users in (2_000, 20_000)]
    for row in rows:
        print(
            f"{QUERIES:,} queries of {row['users']:,} users: report of {MODELS * REPORTED} metrics "
            f"{row['report_s']:.2f} s (scipy, one metric {row['scipy_bootstrap_one_metric_s']:.2f} "
            f"s), comparison of {COMPARED} {row['comparison_s']:.2f} s (scipy, one "
            f"{row['scipy_permutation_one_metric_s']:.2f} s)\n"
            f"  interval {row['interval']} scipy {row['scipy_interval']}, p {row['p']} scipy "
            f"{row['scipy_p']}"
        )
    found = meaning()
    print(
        f"95% intervals that cover: over users {found['covered_over_users']:.1%}, over queries "
        f"{found['covered_over_queries']:.1%}; false alarms at 5%: {found['false_alarms']:.1%}"
    )
    result = {"queries": QUERIES, "trials": TRIALS, "times": rows, "meaning": found}
    write_result("evaluation", result, ("twotower", "numpy", "scipy"))


if __name__ == "__main__":
    main()
