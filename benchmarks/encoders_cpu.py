"""A step of a history's encoder, forward and backward, beside torch.nn.TransformerEncoder.

    python benchmarks/encoders_cpu.py                # about a minute on one thread

512 lists of up to 50 entries of width 64, 2 layers, 2 heads, in training mode with a dropout of
0.2; every state takes part in the loss. Times are medians of interleaved runs on the same threads;
the result is written to benchmarks/results/encoders_cpu.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from measure import write_result
from torch import Tensor, nn

from twotower.data.schema import ENCODERS
from twotower.towers.config import EncoderConfig
from twotower.towers.sequence import SequenceEncoder

BATCH, LENGTH, DIM = 512, 50, 64
CONFIG = EncoderConfig(layers=2, heads=2, dropout=0.2)
# As in a log of long histories, and in one of short: of Amazon Beauty, 8.9 events a user.
MEAN_LENGTHS = (LENGTH, 9)


def peer() -> Callable[[Tensor, Tensor], Tensor]:
    """Return torch's own encoder of the same shape, causal and with padding."""
    layer = nn.TransformerEncoderLayer(
        DIM, CONFIG.heads, CONFIG.ffn_multiple * DIM, CONFIG.dropout, batch_first=True,
        norm_first=True,
    )  # fmt: skip
    encoder = nn.TransformerEncoder(
        layer, CONFIG.layers, nn.LayerNorm(DIM), enable_nested_tensor=False
    )
    later_LL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)

    def encode(entry_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        out: Tensor = encoder(
            entry_BLD, mask=later_LL, src_key_padding_mask=~mask_BL, is_causal=True
        )
        return out

    return encode


def lists(mean: int) -> tuple[Tensor, Tensor]:
    """Return embeddings (B, L, D) and which there are, geometrically many, at least one."""
    length_B = torch.full((BATCH,), LENGTH)
    if mean < LENGTH:
        length_B = torch.empty(BATCH).geometric_(1 / mean).clamp_max(LENGTH).long()
    mask_BL = torch.arange(LENGTH) < length_B[:, None]
    entry_BLD = nn.functional.normalize(torch.randn(BATCH, LENGTH, DIM), dim=-1)
    return entry_BLD * mask_BL.unsqueeze(-1), mask_BL


def main() -> None:
    """Measure every encoder on long and on short lists."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=11)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    age_BL = torch.rand(BATCH, LENGTH).mul(1e7).sort(dim=1, descending=True).values
    encoders: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "torch.nn.TransformerEncoder": peer()
    }
    for kind in ENCODERS:
        encoders[kind] = SequenceEncoder(kind, DIM, LENGTH, CONFIG).encode
        timed = SequenceEncoder(kind, DIM, LENGTH, CONFIG, time_gaps=True)
        encoders[f"{kind}, time gaps"] = partial(timed.encode, age_BL=age_BL)
    results: dict[str, Any] = {}
    for mean in MEAN_LENGTHS:
        entry_BLD, mask_BL = lists(mean)
        entry_BLD.requires_grad_()
        measured: dict[str, list[float]] = {name: [] for name in encoders}
        for number in range(arguments.repeat + 1):
            for name, encode in encoders.items():
                started = time.perf_counter()
                loss = (encode(entry_BLD, mask_BL) * mask_BL.unsqueeze(-1)).square().sum()
                loss.backward()
                if number:  # the first warms up
                    measured[name].append(1e3 * (time.perf_counter() - started))
        filled = float(mask_BL.sum(1).double().mean())
        label = f"{BATCH} lists of {filled:.1f} entries on average"
        results[label] = {name: round(median(ms), 1) for name, ms in measured.items()}
        print(label)
        for name, ms in results[label].items():
            slow = results[label]["torch.nn.TransformerEncoder"]
            print(f"  {name:28} {ms:7.1f} ms, {slow / ms:4.2f}x as fast as torch's")
    shape = {"batch": BATCH, "length": LENGTH, "dim": DIM, "layers": CONFIG.layers,
             "heads": CONFIG.heads, "ffn_multiple": CONFIG.ffn_multiple,
             "dropout": CONFIG.dropout}  # fmt: skip
    threads = torch.get_num_threads()
    write_result(
        "encoders_cpu", {"threads": threads, "shape": shape, "ms": results}, ("torch", "numpy")
    )


if __name__ == "__main__":
    main()
