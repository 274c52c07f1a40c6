"""The gateway as a process: opened, bound, answering until SIGTERM or SIGINT, drained."""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn
import uvloop

from twotower.data.schema import TensorSpec
from twotower.errors import UserError
from twotower.files import write_json
from twotower.serve.gateway.app import build_app
from twotower.serve.gateway.config import GatewayConfig
from twotower.serve.gateway.defaults import Defaults, read_defaults
from twotower.serve.gateway.feast import FeastFeatures
from twotower.serve.gateway.following import Following
from twotower.serve.gateway.front import Front
from twotower.serve.gateway.keys import read_keys
from twotower.serve.gateway.observe import Metrics, log_to_stderr
from twotower.serve.gateway.recommender import Recommender
from twotower.serve.gateway.replicas import Replicas
from twotower.serve.gateway.schemas import make_bodies
from twotower.serve.gateway.store import open_store
from twotower.serve.gateway.users import Users
from twotower.serve.request import Schema
from twotower.serve.tls import ClientTls

STATE = "gateway.json"
BACKLOG = 2048  # as uvicorn has it
# Requests under way may end within this time after a stop; none takes longer than its deadline.
DRAIN_S = 10


def run_gateway(
    config: GatewayConfig,
    *,
    name: str,
    folder: Path,
    servers: Sequence[str],
    start_s: float,
    tls: ClientTls | None,
    ready: Callable[[str, Schema], None],
) -> None:
    """Answer until SIGTERM or SIGINT.

    Args:
        config: of the gateway.
        name: of the job.
        folder: holds what `load-store` wrote; the state file is written here.
        servers: gRPC addresses of the model's servers.
        start_s: seconds in which one of them must tell its schema.
        tls: how their gRPC is encrypted; not at all without it.
        ready: told the URL and the schema once requests are answered.

    Raises:
        UserError: for a port in use, no server, missing or damaged files.
    """
    log_to_stderr()
    uvloop.run(_answer(config, name, folder, servers, start_s, tls, ready))


async def _answer(
    config: GatewayConfig, name: str, folder: Path, servers: Sequence[str], start_s: float,
    tls: ClientTls | None, ready: Callable[[str, Schema], None],
) -> None:  # fmt: skip
    defaults_file, keys, metrics = folder / "defaults.json", read_keys(config), Metrics()
    defaults = read_defaults(defaults_file)
    replicas = Replicas(servers, config, metrics, tls)
    try:
        schema = await replicas.schema(start_s)
        defaults.check(schema.features, defaults_file)
        models, items = await replicas.models(), await replicas.item_features()
        bodies = make_bodies(schema, defaults.user_id_dtype, config, models, items)
        store = open_store(config, name, folder, schema.item_id_dtype)
        feast = None
        try:
            if config.feast.url is not None:
                feast = FeastFeatures(
                    config.feast, defaults.user_id_dtype, config.deadline_ms / 1000
                )
                await feast.check(list(defaults.features))
            users = Users(store, feast, bodies, config, metrics)
            recommender = Recommender(defaults, users, replicas, config, metrics)
            app = build_app(recommender, bodies, models, keys, metrics)
            front = Front(app, config, keys, metrics)

            def remake(schema: Schema, items: list[TensorSpec], defaults: Defaults) -> None:
                bodies = make_bodies(schema, defaults.user_id_dtype, config, models, items)
                users.take(bodies)
                recommender.defaults = defaults
                front.take(build_app(recommender, bodies, models, keys, metrics))

            replicas.follow(Following(schema, items, defaults_file, remake))
            await recommender.health()  # connects, so that the first request need not
            # What the libraries have made stays: a collection need not go through it, which would
            # hold up every request for tens of milliseconds.
            gc.collect()
            gc.freeze()
            with _listen(config) as listening:
                server = uvicorn.Server(uvicorn.Config(
                    front, log_config=None, access_log=False, lifespan="off", server_header=False,
                    proxy_headers=False, timeout_graceful_shutdown=DRAIN_S,
                ))  # fmt: skip
                host = f"[{config.host}]" if ":" in config.host else config.host
                url = f"http://{host}:{listening.getsockname()[1]}"
                write_json(folder / STATE, {"pid": os.getpid(), "url": url})
                ready(url, schema)
                for number in (signal.SIGTERM, signal.SIGINT):
                    # Uvicorn handles both while it runs, and raises them again at its end.
                    signal.signal(number, lambda *_: None)
                await server.serve(sockets=[listening])
        finally:
            await store.close()
            if feast is not None:
                await feast.close()
    finally:
        (folder / STATE).unlink(missing_ok=True)
        await replicas.close()


def _listen(config: GatewayConfig) -> socket.socket:
    """Return a socket at the gateway's address, which takes connections already.

    Raises:
        UserError: for a port that is in use.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((config.host, config.port))
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise UserError(
            f"gateway.port: cannot bind {config.host}:{config.port} ({error.strerror}): stop what "
            "uses it, or choose another, for instance --gateway.port=0"
        ) from None
    return bound
