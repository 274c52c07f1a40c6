"""One client process of a load test.

It sends prepared requests at their times whatever becomes of the ones before, and notes when each
was due, sent and done. A thread keeps the time, since asyncio rounds its own timers up to the
millisecond.

Shape legend: `R` requests.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.errors import UserError
from twotower.serve.client import AsyncRecommendClient, ServerUnavailable
from twotower.serve.config import MODEL
from twotower.serve.load.arrivals import F64
from twotower.serve.tls import ClientTls

# What became of a request; all but the first have failed.
KINDS = ("answered", "deadline", "lost", "failed", "refused")
# Features, and the item ids that may not be answered.
Request = tuple[dict[str, Any], list[Any]]


@dataclass(frozen=True, kw_only=True)
class Target:
    """The server that is asked, and with what.

    Attributes:
        url: host:port of gRPC.
        proxy: whether the environment's proxy is heeded.
        deadline_s: of each request.
        k: results of each; None for the server's default.
        requests: to draw from.
        model: recommend, or embed_query, of which the features alone count.
        tls: how it is encrypted; not at all without it.
    """

    url: str
    proxy: bool
    deadline_s: float
    k: int | None
    requests: list[Request]
    model: str = MODEL
    tls: ClientTls | None = None


@dataclass(frozen=True)
class Record:
    """What one client process saw.

    Attributes:
        due: when each request should have been sent (R,), seconds of the monotonic clock.
        sent: when it was (R,).
        done: when its answer or failure came (R,).
        kind: what became of it (R,), an index into `KINDS`.
        busy: share of one core that the process used.
    """

    due: F64
    sent: F64
    done: F64
    kind: npt.NDArray[np.int8]
    busy: float


def kind_of(error: UserError) -> int:
    """Return what became of a request that raised this, an index into `KINDS`."""
    return KINDS.index(error.kind if isinstance(error, ServerUnavailable) else "refused")


def answer_commands(pipe: Connection, target: Target) -> None:
    """Ask what the pipe says, until it is closed: the process's main function."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    asyncio.run(_answer_commands(pipe, target))


async def _answer_commands(pipe: Connection, target: Target) -> None:
    # Every request is measured by itself, so none is asked again.
    client = AsyncRecommendClient(
        target.url, timeout_s=30.0, proxy=target.proxy, retries=0, model=target.model,
        tls=target.tls,
    )  # fmt: skip
    async with client:
        try:
            prepared = [
                await client.prepare(features, k=target.k, exclude=exclude)
                for features, exclude in target.requests
            ]
        except UserError as error:
            pipe.send(error)
            return
        client.timeout_s = target.deadline_s
        pipe.send(None)
        gc.freeze()
        gc.disable()  # a collection would look like a slow answer
        asker = _Asker(client, prepared)
        while True:
            try:
                name, *arguments = pipe.recv()
            except EOFError:
                return
            used, began = time.process_time(), time.monotonic()
            due, sent, done, kind = await getattr(asker, name)(*arguments)
            busy = (time.process_time() - used) / (time.monotonic() - began)
            pipe.send(Record(due, sent, done, kind, busy))


class _Asker:
    def __init__(self, client: AsyncRecommendClient, prepared: list[Any]) -> None:
        self.client, self.prepared = client, prepared

    async def _ask(self, which: int) -> tuple[float, float, int]:
        kind, sent = 0, time.monotonic()
        try:
            await self.client.ask(self.prepared[which])
        except UserError as error:
            kind = kind_of(error)
        return sent, time.monotonic(), kind

    async def open_loop(self, due: F64, which: npt.NDArray[np.int64]) -> tuple[Any, ...]:
        """Send request which[i] at due[i], and return when all are done."""
        sent, done = np.zeros(len(due)), np.zeros(len(due))
        kind = np.zeros(len(due), np.int8)

        async def ask(i: int) -> None:
            sent[i], done[i], kind[i] = await self._ask(int(which[i]))

        tasks: list[asyncio.Task[None]] = []
        loop, all_sent = asyncio.get_running_loop(), asyncio.Event()

        def send(first: int, end: int) -> None:
            tasks.extend(loop.create_task(ask(i)) for i in range(first, end))
            if end == len(due):
                all_sent.set()

        keeper = threading.Thread(
            target=_keep_time, args=(due, lambda a, b: loop.call_soon_threadsafe(send, a, b))
        )
        keeper.start()
        if len(due):
            await all_sent.wait()
        await asyncio.gather(*tasks)
        keeper.join()
        return due, sent, done, kind

    async def closed_loop(
        self, start: float, seconds: float, which: list[npt.NDArray[np.int64]]
    ) -> tuple[Any, ...]:
        """Keep as many requests under way as `which` has entries, until the time is over."""
        found: list[tuple[float, float, int]] = []

        async def ask(order: npt.NDArray[np.int64]) -> None:
            turn = 0
            while time.monotonic() < start + seconds:
                found.append(await self._ask(int(order[turn % len(order)])))
                turn += 1

        await asyncio.sleep(max(0.0, start - time.monotonic()))
        await asyncio.gather(*(ask(order) for order in which))
        sent, done = np.array([f[0] for f in found]), np.array([f[1] for f in found])
        return sent, sent, done, np.array([f[2] for f in found], np.int8)


def _keep_time(due: F64, send: Callable[[int, int], Any]) -> None:
    """Call `send` with the first and the end of what is due, each at its time."""
    first = 0
    while first < len(due):
        time.sleep(max(0.0, due[first] - time.monotonic()))
        # After a delay, all that has become due meanwhile goes out at once.
        end = int(np.searchsorted(due, time.monotonic(), side="right"))
        if end > first:
            send(first, end)
            first = end
