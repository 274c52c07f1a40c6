"""One local Triton server: started, proven by golden queries, reloaded, switched, stopped cleanly.

`twotower.serve.supervisor` keeps it answering.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from twotower.errors import UserError
from twotower.export.bundle import Bundle, Golden, answer_difference
from twotower.files import write_json
from twotower.serve.client import RecommendClient
from twotower.serve.config import MODEL, ServeConfig
from twotower.serve.hold import STATE
from twotower.serve.process import PORTS, TritonProcess, choose_ports
from twotower.serve.procfs import kill
from twotower.serve.rendered import copy_rendered
from twotower.serve.repository import render_model
from twotower.serve.request import Recommendation

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Judged:
    """A bundle, with the golden queries that a server of it is judged by."""

    bundle: Bundle
    golden: list[Golden]

    @property
    def version(self) -> int:
        """The bundle's number."""
        return self.bundle.manifest.version


class TritonServer(TritonProcess):
    """A tritonserver process that serves one bundle, and while it switches two.

    Args:
        bundle: checked already.
        config: of the server; ports of 0 are chosen when it starts.
        work_dir: holds the model repository, the log and `server.json`.
        rendered: a model repository of the bundle that is served as it is; without it, one is
            rendered.
    """

    def __init__(
        self, bundle: Bundle, config: ServeConfig, work_dir: Path, rendered: Path | None = None
    ) -> None:
        self.served, self.rendered = Judged(bundle, answerable(bundle)), rendered
        super().__init__(config, work_dir)
        # Whose answers are right: of the version served, and of the one that is taking over.
        self.expected: tuple[Judged, ...] = (self.served,)
        # Held by whoever changes what is loaded.
        self.changing = threading.Lock()
        self.changes = 0
        self._probes = 0
        self._copied = False
        self._answering: tuple[int, set[int]] = (0, set())
        # Stubs that a reload has replaced, and when they must have ended.
        self._replaced: tuple[set[int], float] = (set(), 0.0)

    @property
    def bundle(self) -> Bundle:
        """What is served."""
        return self.served.bundle

    @property
    def golden(self) -> list[Golden]:
        """The golden queries of what is served."""
        return self.served.golden

    @property
    def k_limit(self) -> int:
        """Most results of a request."""
        return self._limit(self.served)

    def _limit(self, judged: Judged) -> int:
        return min(self.config.max_k, judged.bundle.manifest.num_items)

    def start(self, *, prove: bool = True) -> None:
        """Start, wait until ready, and check every golden query, unless who starts it does.

        Raises:
            UserError: for a port in use, a server that does not come up, or a wrong answer.
        """
        self.config = choose_ports(self.wanted)
        self.work_dir.mkdir(parents=True, exist_ok=True)
        if not self._copied:
            shutil.rmtree(self.repository, ignore_errors=True)
        if self.rendered is None:
            self.render(self.served)
        elif not self._copied:
            copy_rendered(self.rendered, self.repository, self.config.models, self.runtime.path)
            # Something else may lie there when the process is replaced.
            self._copied = True
        self._answering = (0, set())
        self._launch()
        try:
            self._wait_ready()
            if prove:
                self.prove()
        except BaseException:
            self.stop()
            raise
        self._write_state()

    def render(self, judged: Judged, candidate: str | None = None) -> None:
        """Write a bundle as the one version of every model from its load on.

        Args:
            judged: the bundle.
            candidate: name of a model `recommend` that is written instead of those served.
        """
        kinds = self.config.models if candidate is None else [MODEL]
        for kind in kinds:
            folder = self.repository / (candidate or kind)
            render_model(kind, judged.bundle, folder, self.config, self.runtime.path)

    def _write_state(self) -> None:
        write_json(self.work_dir / STATE, {
            "pid": self.process.pid if self.process else None,
            "host": self.config.host,
            **{name: getattr(self.config, name) for name in (*PORTS, "health_port")},
            "bundle": str(self.bundle.path),
            "version": self.served.version,
        })  # fmt: skip

    def prove(self, judged: Judged | None = None, model: str = MODEL) -> float:
        """Answer every golden query and return the largest score difference.

        Args:
            judged: whose; of what is served without it.
            model: that is asked.

        Raises:
            UserError: when an answer differs from eager PyTorch's beyond ties.
        """
        judged = judged or self.served
        with self._client(self.config.load_timeout_s, model) as client:
            return max(
                self._ask(client, judged, number) for number in range(len(judged.golden))
            )  # fmt: skip

    def lost(self) -> set[int]:
        """Return the stubs that have ended since the last probe, of the version that is served.

        Triton takes a second to notice, and a probe may be answered by another instance.
        """
        version, stubs = self._answering
        if len(self.expected) > 1 or version != self.served.version:  # one version's may end
            return set()
        return stubs - set(self.stubs(MODEL, version))

    def probe(self) -> None:
        """Answer one golden query within the probe's deadline, another one each time.

        Raises:
            UserError: when no answer or a wrong one comes, or a stub has ended.
        """
        self._end_hung()
        if lost := self.lost():
            raise UserError(f"the stub of pid {', '.join(map(str, sorted(lost)))} has ended")
        self._probes += 1
        reasons = []
        with self._client(self.config.probe_timeout_s, MODEL) as client:
            for judged in self.expected:
                try:
                    self._ask(client, judged, self._probes % len(judged.golden))
                    self._answering = (judged.version, set(self.stubs(MODEL, judged.version)))
                    return
                except UserError as error:
                    reasons.append(error)
        raise reasons[0]

    def _client(self, timeout_s: float, model: str) -> RecommendClient:
        # A health check that asked again would hide what it is there to see.
        return RecommendClient(
            self.grpc_url, timeout_s=timeout_s, proxy=False, retries=0, model=model,
            tls=self.config.tls.client(),
        )  # fmt: skip

    def _ask(self, client: RecommendClient, judged: Judged, number: int) -> float:
        golden, k = judged.golden[number], self._limit(judged)
        answer = ask(client, golden, k)
        difference = answer_difference(
            golden.item_ids[:k], golden.scores[:k], answer.item_ids, answer.scores, TOLERANCE
        )
        if not difference <= TOLERANCE or answer.version != judged.version:
            raise UserError(
                f"golden query {number}: version {answer.version} answered "
                f"{answer.item_ids[:3]}… {answer.scores[:3]}, expected {golden.item_ids[:3]}… "
                f"{golden.scores[:3]} of version {judged.version}"
            )
        return difference

    def reload(self) -> None:
        """Load the models anew, which starts new stubs.

        Raises:
            UserError: when Triton does not.
        """
        self._answering = (0, set())
        before = self._stubs_served()
        for name in self.config.models:
            # Triton skips a load when no file has changed.
            (self.repository / name / str(self.served.version) / "model.py").touch()
            self.load(name, self.served.version)
        self._replaced = before, time.monotonic() + self.config.drain_s

    def _stubs_served(self) -> set[int]:
        version = self.served.version
        return {pid for name in self.config.models for pid in self.stubs(name, version)}

    def _end_hung(self) -> None:
        """Kill what was replaced and has not ended: Triton lets a hung stub keep its memory."""
        pids, deadline = self._replaced
        if pids and time.monotonic() > deadline:
            kill(pids & self._stubs_served())
            version, answering = self._answering
            self._answering, self._replaced = (version, answering - pids), (set(), 0.0)

    def restart(self) -> None:
        """Replace the server process, on the same ports.

        Raises:
            UserError: as `start`.
        """
        ports = {name: getattr(self.config, name) for name in PORTS}
        self.stop()
        self.wanted = replace(self.wanted, **ports)
        self.start()

    def flip(self, incoming: Judged) -> None:
        """Answer from another bundle, with no request that fails; the old one drains and goes.

        Triton loads what the version policy names beside what is served. Once that is ready it
        takes every new request, whether its number is higher or lower, and the old version ends
        with its last request under way.

        Raises:
            UserError: when it does not load or answers wrongly; the old one answers then.
        """
        with self.changing:
            old = self.served
            self.changes += 1
            self.expected = (old, incoming)
            try:
                self.render(incoming)
                for name in self.config.models:
                    self.load(name, incoming.version)
                self.prove(incoming)
                self.served = incoming
                self._write_state()
            except BaseException:
                self.served = old
                self.render(old)
                # Where not even that succeeds, the next probe that fails brings the server back.
                with suppress(UserError):
                    self.reload()
                self._leave(incoming)
                raise
            finally:
                self.expected = (self.served,)
        self._leave(old)

    def _leave(self, leaving: Judged) -> None:
        """Remove a version's directories, once it has answered what was under way."""
        for name in self.config.models:
            self.drained(name, leaving.version)
            shutil.rmtree(self.repository / name / str(leaving.version), ignore_errors=True)

    def _ended(self, pid: int) -> None:
        """Remove the state file, if it is this process's."""
        state = self.work_dir / STATE
        with suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(state.read_text())["pid"] == pid:
                state.unlink()


def ask(client: RecommendClient, golden: Golden, limit: int) -> Recommendation:
    """Ask a golden query for as many items as its answer has, at most `limit`."""
    # One of which nothing is left to answer is asked for one.
    k = min(max(1, len(golden.item_ids)), limit)
    return client.recommend(golden.features, k=k, exclude=golden.exclude)


def answerable(bundle: Bundle) -> list[Golden]:
    """Return the golden queries that a server can be judged by.

    Numbers that overflow the towers' float32 give eager PyTorch a vector of zeros, so scores of
    zeros; the server refuses such a query.

    Raises:
        UserError: when there is none, since nothing else says that a server is healthy.
    """
    golden = [g for g in bundle.golden() if not g.item_ids or any(g.scores)]
    if not golden:
        raise UserError(
            f"{bundle.path / 'golden.json'}: holds no golden query to judge the server by: make "
            "the bundle again with `twotower export`"
        )
    return golden
