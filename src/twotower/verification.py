"""The command `twotower verify`: does every runtime answer as eager PyTorch did at the export?

    twotower verify BUNDLE [--url HOST:PORT | --no-server] [--tolerance 1e-5] [--json]

A bundle carries golden queries with the answers that eager PyTorch gave in fp32 (of a lossy index,
what that index finds). Here ONNX Runtime answers them, and an NVIDIA Triton server: a running one,
or one that is started for this; and the towers for TensorRT, where the bundle has some, in ONNX
Runtime with their products rounded as on a GPU.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from twotower.errors import UserError
from twotower.export.bundle import Bundle, Golden, find_bundle, read_bundle
from twotower.export.golden import (
    Answer,
    Verdict,
    answered,
    catalogue_ids,
    judge,
    onnx_answers,
    raw_tensors,
    vector_answers,
)
from twotower.export.index import VECTORS
from twotower.export.search import exact_top_k, open_search
from twotower.serve.client import RecommendClient
from twotower.serve.config import ServeConfig
from twotower.serve.server import answerable, ask
from twotower.serve.supervisor import passing_server
from twotower.show import console, facts, table

DIFFERS = 1  # the exit code
SHOWN = 3


def verify(options: Any) -> int:
    """Answer the golden queries again, and show how far the answers differ; the exit code.

    The options are those of `twotower.bundles.add_verify_arguments`.
    """
    if options.url is not None and options.no_server:
        raise UserError("twotower verify: --url and --no-server contradict each other")
    with console.status("reading the bundle"):
        bundle = read_bundle(find_bundle(Path(options.path)), signed_by=options.require_signature)
    tolerance = options.tolerance
    if tolerance is None:
        tolerance = bundle.job()["export"]["tolerance"]
    golden = answerable(bundle)
    verdicts = []
    with console.status("ONNX Runtime answers"):
        verdicts.append(judge(golden, _onnx(bundle, golden), tolerance, "ONNX Runtime"))
        verdicts += _towers(bundle, golden, options.tolerance)
    if not options.no_server:
        with console.status("Triton answers"), _client(bundle, options.url) as (client, limit):
            answers = _triton(client, golden, limit, bundle)
            short = [_cut(g, limit) for g in golden]
            verdicts.append(judge(short, answers, tolerance, "Triton"))
    if options.json:
        print(json.dumps(_report(bundle, verdicts, golden), indent=2, default=str))
    else:
        _show(bundle, verdicts, golden)
    return 0 if all(v.passes for v in verdicts) else DIFFERS


def _onnx(bundle: Bundle, golden: list[Golden]) -> list[Answer]:
    m = bundle.manifest
    ids = catalogue_ids(bundle.path, m.item_id_dtype)
    search = open_search(bundle.path, asdict(m.index)).search
    k = max(len(g.item_ids) for g in golden)
    return onnx_answers(bundle.path, m.query, golden, ids, k, search)


def _towers(bundle: Bundle, golden: list[Golden], tolerance: float | None) -> list[Verdict]:
    """Judge the query towers for TensorRT, by an exact search whatever the index is."""
    described = bundle.tensorrt()
    if described is None:
        return []
    from twotower.export.halves import encoded_inputs, tower_vectors  # and with them torch

    m = bundle.manifest
    ids, k = catalogue_ids(bundle.path, m.item_id_dtype), max(len(g.item_ids) for g in golden)
    vectors = np.load(bundle.path / VECTORS, mmap_mode="r", allow_pickle=False)
    exact = functools.partial(exact_top_k, vectors)
    wanted = answered(golden, onnx_answers(bundle.path, m.query, golden, ids, k, exact))
    tensors = raw_tensors(m.query, [g.features for g in golden])
    encoded = encoded_inputs(bundle.path, "query", tensors)
    verdicts = []
    for precision, limit in described["tolerance"].items():
        vector_BD = tower_vectors(bundle.path, "query", precision, encoded)
        answers = vector_answers(vector_BD, golden, ids, k, exact)
        name = f"{precision} tower"
        verdicts.append(judge(wanted, answers, limit if tolerance is None else tolerance, name))
    return verdicts


@contextmanager
def _client(bundle: Bundle, url: str | None) -> Iterator[tuple[RecommendClient, int]]:
    """Yield a client of a running server, or of one that runs while the block does; its most k."""
    if url is not None:
        with RecommendClient(url) as client:
            yield client, min(client.schema().max_k, bundle.manifest.num_items)
        return
    with (
        passing_server(bundle, ServeConfig()) as server,
        RecommendClient(server.grpc_url, proxy=False) as client,
    ):
        yield client, server.k_limit


def _triton(
    client: RecommendClient, golden: list[Golden], limit: int, bundle: Bundle
) -> list[Answer]:
    version, answers = bundle.manifest.version, []
    for g in golden:
        answer = ask(client, g, limit)
        if answer.version != version:
            raise UserError(
                f"the server answers with version {answer.version}, and {bundle.path} is version "
                f"{version}: name the bundle that is served, or the address of another server"
            )
        answers.append((list(answer.item_ids), list(answer.scores)))
    return answers


def _cut(golden: Golden, k: int) -> Golden:
    return replace(golden, item_ids=golden.item_ids[:k], scores=golden.scores[:k])


def _report(bundle: Bundle, verdicts: list[Verdict], golden: list[Golden]) -> dict[str, Any]:
    m = bundle.manifest
    return {
        "bundle": str(bundle.path), "version": m.version, "versions": m.versions,
        "runtimes": [
            {
                "runtime": v.runtime, "queries": len(v.differences), "reordered": v.reordered,
                "largest_difference": v.differences[v.worst], "tolerance": v.tolerance,
                "passes": v.passes, "worst_query": vars(golden[v.worst]),
                "worst_answer": v.answers[v.worst],
            }
            for v in verdicts
        ],
    }  # fmt: skip


def _show(bundle: Bundle, verdicts: list[Verdict], golden: list[Golden]) -> None:
    m = bundle.manifest
    rows = [
        [v.runtime, f"{len(v.differences)}", f"{v.reordered}", _number(v.differences[v.worst]),
         f"{v.tolerance:.0e}", "passes" if v.passes else "DIFFERS"]
        for v in verdicts
    ]  # fmt: skip
    columns = ["runtime", ">queries", ">other order", ">largest difference", ">tolerance", ""]
    table(f"{bundle.path}, version {m.version}, beside eager PyTorch in fp32", columns, rows)
    for v in verdicts:
        g, (ids, scores) = golden[v.worst], v.answers[v.worst]
        facts(f"worst query of {v.runtime}: number {v.worst}", {
            "features": json.dumps(g.features, default=str)[:400],
            "excluded": f"{len(g.exclude)} items",
            "eager PyTorch": _pairs(g.item_ids, g.scores),
            v.runtime: _pairs(ids, scores),
        })  # fmt: skip


def _number(difference: float) -> str:
    return f"{difference:.1e}" if difference < float("inf") else "beyond ties"


def _pairs(ids: list[Any], scores: list[float]) -> str:
    shown = [f"{i} {s:.6f}" for i, s in zip(ids[:SHOWN], scores[:SHOWN], strict=True)]
    return ", ".join(shown) + (", …" if len(ids) > SHOWN else "") if ids else "nothing"
