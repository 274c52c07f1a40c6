"""A rollout: the running server takes another bundle, proven first, and can go back.

    twotower rollout --config job.yaml [--to VERSION | --back]

The other bundle is loaded beside the one that is served, under a name that no client asks, and must
answer its golden queries there. Only then does it take over (`TritonServer.flip`). Whatever is
wrong with it is said, and what was served goes on answering.

The choice outlives the process: `rollout.json` in the server's directory names the version to serve
and the one before. A server that starts again serves that version, lest a crash undo a roll-back.
"""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from twotower.data.schema import TensorSpec
from twotower.errors import UserError
from twotower.export.bundle import Bundle, bundle_versions, latest_bundle, read_bundle
from twotower.files import write_json
from twotower.serve.procfs import descendants, memory_bytes
from twotower.serve.repository import served_bytes
from twotower.serve.server import Judged, TritonServer, answerable

CHOICE = "rollout.json"
MB = 1e6


def chosen_bundle(bundles: Path, work_dir: Path) -> Path:
    """Return the bundle that a server starting in `work_dir` serves.

    It is the one that the last rollout chose, the newest before any rollout.

    Raises:
        UserError: when there is none, or it is gone.
    """
    file = work_dir / CHOICE
    chosen = read_choice(file)
    if chosen is None:
        return latest_bundle(bundles)
    if chosen[0] not in bundle_versions(bundles):
        raise UserError(
            f"{bundles}: no version {chosen[0]}, which the last rollout chose: put it back, or "
            f"delete {file} to serve the newest"
        )
    return bundles / str(chosen[0])


def read_choice(file: Path) -> tuple[int, int] | None:
    """Return the version to serve and the one before it, None before any rollout.

    Raises:
        UserError: for a file that no rollout wrote.
    """
    try:
        raw = json.loads(file.read_text())
        return int(raw["serve"]), int(raw["before"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: not what a rollout writes ({error}): delete it to serve the newest bundle"
        ) from None


class Rollouts:
    """Takes a running server from one bundle of a job to another.

    Args:
        server: that runs.
        bundles: folder of the job's bundles.
    """

    def __init__(self, server: TritonServer, bundles: Path) -> None:
        self.server, self.bundles = server, bundles
        self._one = threading.Lock()
        self._refused = 0

    def run(
        self, say: Callable[[str], None], *, to: int | None, back: bool, new_schema: bool
    ) -> str:
        """Serve another version; return what was done.

        Args:
            say: told each step.
            to: the version; the newest without it.
            back: to the version before the last rollout instead.
            new_schema: also where clients must send other features from then on.

        Raises:
            UserError: with the reason; what was served goes on answering.
        """
        if not self._one.acquire(blocking=False):
            raise UserError("another rollout of this server is under way: wait until it is done")
        try:
            old = self.server.served.version
            path = self._target(to, back)
            say(f"rollout from version {old} to {path.name}: reading {path}")
            bundle = read_bundle(path, signed_by=self.server.config.require_signature)
            incoming = Judged(bundle, answerable(bundle))
            if not new_schema:
                refuse_new_schema(self.server.bundle, bundle)
            refuse_too_large(self.server, incoming)
            with candidate(self.server, incoming, f"candidate-{self._refused}") as name:
                self.server.prove(incoming, name)
                refuse_beyond_limit(self.server, incoming)
            say(f"{len(incoming.golden)} golden queries answered beside version {old}")
            self.server.flip(incoming)
            write_json(self.server.work_dir / CHOICE, {"serve": incoming.version, "before": old})
            return f"version {path.name} answers, version {old} is drained and unloaded"
        except BaseException:
            # The name of a load that hung may not be usable again.
            self._refused += 1
            raise
        finally:
            self._one.release()
            # The answers to hundreds of golden queries are garbage in cycles, which Python would
            # leave for many rollouts.
            gc.collect()

    def _target(self, to: int | None, back: bool) -> Path:
        served, known = self.server.served.version, bundle_versions(self.bundles)
        if back:
            chosen = read_choice(self.server.work_dir / CHOICE)
            if chosen is None:
                raise UserError("--back: nothing to go back to, no rollout has been done here")
            to = chosen[1]
        elif to is None:
            to = int(latest_bundle(self.bundles).name)
        if to == served:
            raise UserError(f"version {to} is served already")
        if to not in known:
            raise UserError(
                f"{self.bundles}: no version {to}, there are {', '.join(map(str, known))}"
            )
        return self.bundles / str(to)


@contextmanager
def candidate(server: TritonServer, judged: Judged, name: str) -> Iterator[str]:
    """Have a bundle loaded beside what is served, where no client asks it, while the block runs."""
    server.render(judged, name)
    try:
        server.load(name, judged.version)
        yield name
    finally:
        server.unload(name, judged.version)


def refuse_new_schema(served: Bundle, incoming: Bundle) -> None:
    """Refuse a bundle that the running clients' requests or expectations do not fit.

    Raises:
        UserError: naming what differs.
    """
    old, new = served.manifest, incoming.manifest
    before, after = ({s.name: s for s in m.query} for m in (old, new))
    changes = [f"no feature '{name}'" for name in before if name not in after]
    for name, spec in after.items():
        if name in before:
            changes += _changes(before[name], spec)
        elif spec.kind != "times":  # which may be left out
            changes.append(f"a new feature '{name}'")
    if old.item_id_dtype != new.item_id_dtype:
        changes.append(f"item ids of type {new.item_id_dtype}, not {old.item_id_dtype}")
    if changes:
        raise UserError(
            f"version {new.version} has another schema than the served {old.version}: "
            f"{', '.join(changes)}: running clients' requests would fail; where they are ready for "
            "it, give --new-schema"
        )


def _changes(before: TensorSpec, after: TensorSpec) -> list[str]:
    name = f"'{before.name}'"
    if (before.kind, before.dtype) != (after.kind, after.dtype):
        return [f"{name} is {after.kind} of {after.dtype}, not {before.kind} of {before.dtype}"]
    if after.length < before.length or (after.length != before.length and not after.is_list):
        return [f"{name} has the length {after.length}, not {before.length}"]
    return []


def refuse_too_large(server: TritonServer, incoming: Judged) -> None:
    """Refuse a bundle that would not fit in memory beside what is served.

    It is expected to hold what the served one's stubs hold, and the difference of their files.

    Raises:
        UserError: with what was measured.
    """
    limit = server.config.memory_limit_mb
    if limit is None:
        return
    held = triton_bytes(server)
    models = server.config.models
    own = memory_bytes([p for name in models for p in server.stubs(name, server.served.version)])
    more = served_bytes(incoming.bundle, models) - served_bytes(server.bundle, models)
    expected = max(0, own + server.config.instances * more)
    if held + expected > limit * MB:
        raise UserError(
            f"version {incoming.version} would not fit beside version {server.served.version}: "
            f"Triton holds {held / MB:,.0f} MB, and it would need about {expected / MB:,.0f} MB "
            f"more (as version {server.served.version}'s {own / MB:,.0f} MB, and its files are "
            f"{more / MB:+,.0f} MB), the limit is serve.memory_limit_mb={limit}: raise it, or stop "
            "the server and start it on that version"
        )


def refuse_beyond_limit(server: TritonServer, incoming: Judged) -> None:
    """Refuse a bundle that, loaded, takes more memory than was expected and there may be.

    Raises:
        UserError: with what was measured.
    """
    limit, held = server.config.memory_limit_mb, triton_bytes(server)
    if limit is not None and held > limit * MB:
        raise UserError(
            f"version {incoming.version} does not fit: with it, Triton holds {held / MB:,.0f} MB, "
            f"the limit is serve.memory_limit_mb={limit}: raise it, or stop the server and start "
            "it on that version"
        )


def triton_bytes(server: TritonServer) -> int:
    """Return the memory of Triton and its stubs."""
    if server.process is None:
        return 0
    return memory_bytes([server.process.pid, *descendants(server.process.pid)])
