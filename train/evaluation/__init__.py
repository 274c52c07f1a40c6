"""Judging retrieval: answers, metrics with intervals, the report, and two reports compared."""

from twotower.train.evaluation.answers import (
    answer,
    answer_by_cooccurrence,
    answer_by_popularity,
    judged_queries,
)
from twotower.train.evaluation.metrics import popularity_slices, score_answers, slice_sizes
from twotower.train.evaluation.report import compare_with_baselines, evaluate_towers, write_report

__all__ = [
    "answer",
    "answer_by_cooccurrence",
    "answer_by_popularity",
    "compare_with_baselines",
    "evaluate_towers",
    "judged_queries",
    "popularity_slices",
    "score_answers",
    "slice_sizes",
    "write_report",
]
