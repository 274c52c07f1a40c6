"""How well heads predict what followed the events of a split.

Of a binary outcome the area under the ROC curve, which is 0.5 where nothing is known; of a number
the mean absolute and the root mean squared error, in its own unit. Events weigh alike.

Shape legend: `B` events of a block, `H` heads, `E` events.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from twotower.data.batches import BatchBuilder
from twotower.data.prepared import PreparedDataset
from twotower.towers.catalogue import gather_parts, part_of_rank
from twotower.train.config import EvaluateConfig
from twotower.train.heads import Heads


@torch.no_grad()
def judge_heads(
    heads: Heads, model: Any, data: PreparedDataset, split: int, config: EvaluateConfig, seed: int,
    device: torch.device,
) -> dict[str, float]:  # fmt: skip
    """Return `<head>_auc`, or `<head>_mae` and `<head>_rmse`, of a split's events.

    What cannot be had of them, for instance where all were liked, is left out. Ranks that evaluate
    together each predict a part, and all return the same.

    Args:
        heads: the heads.
        model: a `TwoTower`.
        data: the prepared dataset.
        split: validation (1) or test (2).
        config: says how many events are judged at most.
        seed: of which they are.
        device: of the model.
    """
    section = data.section(split)
    rows = np.arange(section.start, section.stop)
    if len(rows) > config.max_queries:
        chosen = np.random.default_rng(seed).choice(rows, config.max_queries, replace=False)
        rows = np.sort(chosen)
    builder, parts = BatchBuilder(data), []
    for start in range(0, len(rows), config.batch_size):
        block = rows[start : start + config.batch_size]
        query_BD, item_BD, *_ = model(builder.events(block[part_of_rank(len(block))]).to(device))
        parts.append(gather_parts(heads.predictions(query_BD, item_BD), len(block)).cpu().numpy())
    metrics: dict[str, float] = {}
    predicted_EH = np.concatenate(parts).astype(np.float64)
    for place, (name, head) in enumerate(zip(heads.names, heads.configs, strict=True)):
        outcome_E = data.outcome(head.column)[rows].astype(np.float64)
        known_E = ~np.isnan(outcome_E)
        outcome_E, predicted_E = outcome_E[known_E], predicted_EH[known_E, place]
        if head.kind == "binary":
            if 0 < outcome_E.sum() < len(outcome_E):
                metrics[f"{name}_auc"] = area_under_curve(predicted_E, outcome_E > 0)
        elif len(outcome_E):
            error_E = predicted_E - outcome_E
            metrics[f"{name}_mae"] = float(np.abs(error_E).mean())
            metrics[f"{name}_rmse"] = float(np.sqrt((error_E**2).mean()))
    return metrics


def area_under_curve(score_E: npt.NDArray[np.float64], positive_E: npt.NDArray[np.bool_]) -> float:
    """Return how often a positive scores above a negative, a tie counting half.

    Args:
        score_E: scores.
        positive_E: which are positives; there must be some, and some others.
    """
    _, place, count = np.unique(score_E, return_inverse=True, return_counts=True)
    mean_rank_E = (np.cumsum(count) - (count - 1) / 2)[place]  # from 1
    positives = int(positive_E.sum())
    above = mean_rank_E[positive_E].sum() - positives * (positives + 1) / 2
    return float(above / (positives * (len(score_E) - positives)))
