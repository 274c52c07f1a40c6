"""The losses of retrieval, behind one interface.

    softmax    mean_i [ lse_j x_ij - x_ip ]                    over the corrected candidates
    bilateral  mean_i [ lse_{j != p} x_ij - <q_i, c_p> / t+ ]  (Wu et al. 2024, "BSL")
    bce        mean_i [ b softplus(-s_ip) + sum_j v_j softplus(s_ij) ] / (K + 1)

with s = <q, c> / temperature, x = s - logQ. In bce (Petrov and Macdonald 2023, "gSASRec"), K
candidates stand for a catalogue of I items: v is 1 / Q, with a mean of 1, and b = 1 - t (1 - K / I)
undoes, by the calibration t, that positives are more frequent among the sampled than in truth.

Shape legend: `B` queries, `N` candidates, `D` width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from twotower.kernels.exclusions import unpacked
from twotower.kernels.sampled_softmax import sampled_softmax
from twotower.train.config import TrainConfig
from twotower.train.negatives import Candidates, scaled_gradient

# Queries whose scores of all candidates are held at once, by bce and beside a memory.
BLOCK = 1024


def retrieval_loss(
    config: TrainConfig, query_BD: Tensor, candidates: Candidates, temperature: Tensor,
    positive_B: Tensor, weight_B: Tensor, items: int, exclude_BW: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the weighted mean loss.

    Args:
        config: of training.
        query_BD: query vectors.
        candidates: what they are scored against.
        temperature: scalar.
        positive_B: the candidate that is each query's positive.
        weight_B: sample weights.
        items: size of the catalogue.
        exclude_BW: candidates that do not count for a query, see `sampled_softmax`.
    """
    loss, item_ND = config.loss, candidates.vector_ND
    if candidates.push_N is not None:
        pushed_ND = scaled_gradient(item_ND, candidates.push_N)
        candidates = replace(candidates, vector_ND=pushed_ND)
    if loss.kind == "bce":
        return _calibrated_bce(
            query_BD, candidates, temperature, item_ND[positive_B], positive_B, weight_B, items,
            loss.calibration, exclude_BW,
        )  # fmt: skip
    uncorrected = "corrected" if config.correct_positive else "uncorrected"
    value = sampled_softmax(
        query_BD,
        candidates.vector_ND,
        temperature,
        log_q_N=candidates.log_q_N,
        candidate_id_N=candidates.id_N.int() if items < 2**31 else candidates.id_N,
        weight_B=weight_B,
        positive_B=positive_B,
        positive="outside" if loss.kind == "bilateral" else uncorrected,
        label_smoothing=loss.label_smoothing,
        exclude_BW=exclude_BW,
    )
    if candidates.push_N is None and loss.positive_temperature is None:
        return value
    # In place of the op's term of the positives. A query's own is there at every draw: it is pulled
    # and pushed once, whatever the gradients of candidates are multiplied by.
    share_B = weight_B
    if loss.kind == "softmax":
        own_B = _share_of_own(
            query_BD, item_ND, candidates, temperature, positive_B, config.correct_positive,
            exclude_BW,
        )  # fmt: skip
        share_B = weight_B * (1 - loss.label_smoothing - own_B)
    query_BD = query_BD.float()
    by_op_B = (query_BD * candidates.vector_ND[positive_B].float()).sum(1) / temperature
    plain_B = (query_BD * item_ND[positive_B].float()).sum(1)
    plain_B = plain_B / (loss.positive_temperature or temperature)
    return value + ((by_op_B - plain_B) * share_B).sum() / weight_B.sum().clamp_min(1e-12)


@torch.no_grad()
def _share_of_own(
    query_BD: Tensor, vector_ND: Tensor, candidates: Candidates, temperature: Tensor,
    positive_B: Tensor, corrected: bool, exclude_BW: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the share (B,) of the softmax that is the positives' own."""
    shares = []
    for start in range(0, len(query_BD), BLOCK):
        block = slice(start, start + BLOCK)
        own = positive_B[block]
        score, hit = _scored(
            query_BD[block], vector_ND, temperature.reciprocal(), candidates.id_N, own,
            None if exclude_BW is None else exclude_BW[block],
        )  # fmt: skip
        logits = score - candidates.log_q_N
        at_own = logits[torch.arange(len(own), device=own.device), own]
        if not corrected:
            at_own = at_own + candidates.log_q_N[own]
        shares.append(torch.sigmoid(at_own - logits.masked_fill(hit, -torch.inf).logsumexp(1)))
    return torch.cat(shares)


def _scored(
    query_BD: Tensor, vector_ND: Tensor, scale: Tensor, id_N: Tensor, own_B: Tensor,
    exclude_BW: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return scores (B, N), and which candidates are no negatives of a query."""
    hit_BN = id_N[own_B, None] == id_N[None, :]
    if exclude_BW is not None:
        hit_BN |= unpacked(exclude_BW, len(vector_ND))
    return (query_BD @ vector_ND.T).float() * scale, hit_BN


def _calibrated_bce(
    query_BD: Tensor, candidates: Candidates, temperature: Tensor, own_BD: Tensor,
    positive_B: Tensor, weight_B: Tensor, items: int, calibration: float,
    exclude_BW: Tensor | None,
) -> Tensor:  # fmt: skip
    # The positives' vectors beside the candidates', whose gradients may be scaled.
    value_N = (-candidates.log_q_N).exp()  # 0 of fillers
    number = (value_N > 0).sum()
    value_N = value_N * (number / value_N.sum().clamp_min(1e-12))
    share = (number / max(1, items - 1)).clamp_max(1)
    power = 1 - calibration * (1 - share)

    def block(
        query: Tensor, vector_ND: Tensor, own_BD: Tensor, scale: Tensor, own: Tensor,
        exclude: Tensor | None,
    ) -> Tensor:  # fmt: skip
        score, hit = _scored(query, vector_ND, scale, candidates.id_N, own, exclude)
        negative = (F.softplus(score) * value_N).masked_fill(hit, 0).sum(1)
        at_own = (query.float() * own_BD.float()).sum(1) * scale
        return (power * F.softplus(-at_own) + negative) / (number + 1)

    scale = temperature.reciprocal()
    loss_B = torch.cat([
        checkpoint(
            block, query_BD[start : start + BLOCK], candidates.vector_ND,
            own_BD[start : start + BLOCK], scale, positive_B[start : start + BLOCK],
            None if exclude_BW is None else exclude_BW[start : start + BLOCK], use_reentrant=False,
        )
        for start in range(0, len(query_BD), BLOCK)
    ])  # fmt: skip
    return (loss_B * weight_B).sum() / weight_B.sum().clamp_min(1e-12)
