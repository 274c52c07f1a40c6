"""Exact search on a GPU by the fused top-k, in the place of a bundle's index.

Runs in Triton's Python backend on hosts with a GPU, where twotower is installed with torch.

Shape legend: `B` batch, `D` width, `N` items, `K` results, `R` rows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from twotower.kernels.top_k_inner_product import top_k_inner_product

F32 = npt.NDArray[np.float32]
Found = tuple[F32, npt.NDArray[np.int64]]


class FusedSearch:
    """Searches all item vectors on one device.

    Args:
        folder: with the bundle's files.
        device: that holds the vectors, fp32: `cuda:0`, say.
    """

    def __init__(self, folder: Path, device: str) -> None:
        vectors = np.load(folder / "item_vectors.npy", allow_pickle=False)
        self.item_ND = torch.from_numpy(vectors).to(device)

    @torch.inference_mode()
    def search(self, vector_BD: F32, k: int) -> Found:
        """Return the best scores and their rows (B, K), best first; k is at most N."""
        query_BD = torch.from_numpy(np.ascontiguousarray(vector_BD)).to(self.item_ND.device)
        scores, rows = top_k_inner_product(query_BD, self.item_ND, k)
        return scores.cpu().numpy(), rows.cpu().numpy()

    @torch.inference_mode()
    def among(self, vector_D: F32, row_R: npt.NDArray[np.int64], k: int) -> Found:
        """Return the best scores and rows (K,) of some rows, best first; k is at most R."""
        device = self.item_ND.device
        query_D = torch.from_numpy(np.ascontiguousarray(vector_D)).to(device)
        score_R = self.item_ND[torch.from_numpy(row_R).to(device)] @ query_D
        # Stable, so that of equal scores the lower row comes first.
        scores, place = score_R.sort(descending=True, stable=True)
        return scores[:k].cpu().numpy(), row_R[place[:k].cpu().numpy()]
