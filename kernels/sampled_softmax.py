"""Sampled softmax over in-batch and extra negatives, with logQ correction.

    loss_i = logsumexp_j(x_ij) - x_ip(i),   x_ij = <q_i, c_j> / temperature - logQ_j

Candidate p(i) = positive_offset + i is query i's positive; every other candidate is a negative,
except an accidental hit: one with the positive's id. Subtracting the log of the probability with
which a candidate was sampled makes the expected gradient that of the full softmax (Bengio and
Senecal 2008; Yi et al. 2019, "Sampling-bias-corrected neural modeling").

This is the eager reference; it holds the B x N logits.

Shape legend: `B` queries, `N` candidates, `D` width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sampled_softmax(
    query_BD: Tensor,
    candidate_ND: Tensor,
    temperature: Tensor,
    *,
    log_q_N: Tensor | None = None,
    candidate_id_N: Tensor | None = None,
    weight_B: Tensor | None = None,
    positive_offset: int = 0,
) -> Tensor:
    """Return the weighted mean loss, a scalar.

    Args:
        query_BD: query vectors.
        candidate_ND: positives of the queries and any other candidates.
        temperature: scalar > 0; its gradient is computed too.
        log_q_N: log of each candidate's sampling probability, up to a constant.
        candidate_id_N: int64; candidates of equal id are accidental hits of each other.
        weight_B: sample weights, 1 by default.
        positive_offset: candidate row of the first query's positive.

    Raises:
        ValueError: when the shapes do not fit together.
    """
    _validate(query_BD, candidate_ND, log_q_N, candidate_id_N, weight_B, positive_offset)
    rows = torch.arange(query_BD.shape[0], device=query_BD.device)
    positive_B = rows + positive_offset
    logits_BN = query_BD.float() @ candidate_ND.float().T / temperature
    if log_q_N is not None:
        logits_BN = logits_BN - log_q_N
    if candidate_id_N is not None:
        hit_BN = candidate_id_N[positive_B, None] == candidate_id_N[None, :]
        hit_BN[rows, positive_B] = False
        logits_BN = logits_BN.masked_fill(hit_BN, float("-inf"))
    loss_B = F.cross_entropy(logits_BN, positive_B, reduction="none")
    if weight_B is None:
        return loss_B.mean()
    return (loss_B * weight_B).sum() / weight_B.sum().clamp_min(1e-12)


def _validate(
    query_BD: Tensor,
    candidate_ND: Tensor,
    log_q_N: Tensor | None,
    candidate_id_N: Tensor | None,
    weight_B: Tensor | None,
    positive_offset: int,
) -> None:
    b, n = query_BD.shape[0], candidate_ND.shape[0]
    if query_BD.shape[1] != candidate_ND.shape[1]:
        raise ValueError(
            f"query and candidate must have one width, got {tuple(query_BD.shape)} and "
            f"{tuple(candidate_ND.shape)}"
        )
    if positive_offset < 0 or positive_offset + b > n:
        raise ValueError(
            f"positive_offset + queries must be <= candidates ({n}), got {positive_offset} + {b}"
        )
    for name, value, size in (
        ("log_q", log_q_N, n), ("candidate_id", candidate_id_N, n), ("weight", weight_B, b)
    ):  # fmt: skip
        if value is not None and value.shape != (size,):
            raise ValueError(f"{name} must have shape ({size},), got {tuple(value.shape)}")
