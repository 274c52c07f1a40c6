"""Putting load on a server from client processes of its own.

Where their number is not given there is one, and another whenever the busiest has no time left.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np

from twotower.errors import UserError
from twotower.serve.client import RecommendClient
from twotower.serve.load.arrivals import arrival_times
from twotower.serve.load.asker import Record, Target, answer_commands
from twotower.serve.load.measurement import BUSY, Measurement, summarise

# Between the order to the client processes and the first request.
LEAD_S = 0.2
# Of a closed loop's clients, each goes through this many requests and begins again.
TURNS = 1000


class LoadGenerator:
    """Client processes that ask one server; to be used in a `with` block.

    Args:
        target: what they ask.
        processes: how many share the load; 0, as many as it takes, up to the cores.
        seed: of what is drawn.

    Raises:
        UserError: for a request that the model cannot answer, or a server that does not.
    """

    def __init__(self, target: Target, processes: int, seed: int) -> None:
        self.target, self.seed = target, seed
        self._most = processes or os.cpu_count() or 1
        self._client = RecommendClient(
            target.url, timeout_s=30.0, proxy=target.proxy, model=target.model, tls=target.tls
        )
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []
        try:
            self._start(processes or 1)
        except BaseException:
            self.close()
            raise

    def _start(self, processes: int) -> None:
        # A fork would copy the threads' locks of gRPC.
        context = multiprocessing.get_context("spawn")
        started = []
        for _ in range(processes):
            pipe, other = context.Pipe()
            process = context.Process(
                target=answer_commands, args=(other, self.target), daemon=True
            )  # fmt: skip
            process.start()
            other.close()
            self._processes.append(process)
            self._pipes.append(pipe)
            started.append(pipe)
        for error in _receive(started):
            if error is not None:
                raise error

    def __enter__(self) -> LoadGenerator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        """End the client processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(2.0)
            if process.is_alive():
                process.kill()
                process.join()
        self._client.close()

    def open_loop(
        self, rate: float, seconds: float, *, warmup_seconds: float, arrivals: str
    ) -> Measurement:
        """Send requests at a rate, whether or not the ones before are answered.

        Args:
            rate: requests a second.
            seconds: time that counts.
            warmup_seconds: of the same load before it.
            arrivals: see `twotower.serve.load.arrivals`.
        """
        due = arrival_times(arrivals, rate, warmup_seconds + seconds, self.seed)
        which = np.random.default_rng(self.seed).integers(len(self.target.requests), size=len(due))

        def order(start: float, i: int, share: int) -> tuple[Any, ...]:
            return "open_loop", start + due[i::share], which[i::share]

        return self._measure(order, warmup_seconds, seconds, asked_rate=rate, clients=None)

    def closed_loop(self, clients: int, seconds: float, *, warmup_seconds: float) -> Measurement:
        """Keep a number of requests under way, each followed by another when it is answered.

        Args:
            clients: requests under way.
            seconds: time that counts.
            warmup_seconds: of the same load before it.
        """
        rng = np.random.default_rng(self.seed)
        orders = list(rng.integers(len(self.target.requests), size=(clients, TURNS)))

        def order(start: float, i: int, share: int) -> tuple[Any, ...]:
            return "closed_loop", start, warmup_seconds + seconds, orders[i::share]

        return self._measure(order, warmup_seconds, seconds, asked_rate=None, clients=clients)

    def _measure(
        self, order: Callable[[float, int, int], tuple[Any, ...]], warmup_seconds: float,
        seconds: float, *, asked_rate: float | None, clients: int | None,
    ) -> Measurement:  # fmt: skip
        """Give every process its order, made of the start, its place and their number."""
        while True:
            begin = time.monotonic() + LEAD_S
            share = len(self._pipes)
            for i, pipe in enumerate(self._pipes):
                with _missed():
                    pipe.send(order(begin, i, share))
            start = begin + warmup_seconds
            time.sleep(max(0.0, start - time.monotonic()))
            before = self._statistics()
            time.sleep(max(0.0, start + seconds - time.monotonic()))
            after = self._statistics()
            records: list[Record] = _receive(self._pipes)
            found = summarise(
                records, start, seconds, asked_rate=asked_rate, clients=clients, before=before,
                after=after,
            )  # fmt: skip
            if found.client_busy <= BUSY or share >= self._most:
                return found
            self._start(1)

    def _statistics(self) -> dict[str, Any] | None:
        # A server that falls is what a load test is there to show.
        try:
            return self._client.statistics()
        except UserError:
            return None


def _receive(pipes: list[Connection]) -> list[Any]:
    with _missed():
        return [pipe.recv() for pipe in pipes]


@contextmanager
def _missed() -> Iterator[None]:
    """Explain that nobody is at the other end of a pipe."""
    try:
        yield
    except (EOFError, OSError):
        raise UserError(
            "a client process of the load test has ended: give the machine more memory, or fewer "
            "requests a second"
        ) from None
