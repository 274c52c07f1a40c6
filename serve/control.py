"""How a command reaches the `twotower serve` of its job: a Unix socket in the server's directory.

Only the user who runs the server can open it (mode 0600). A command sends one JSON line and reads
JSON lines: `{"say": text}` as the work goes on, and at the end `{"done": text}` or
`{"error": text}`. Work that has begun is finished though its command goes away.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from twotower.errors import UserError

SOCKET = "control.sock"
# A command that says nothing for this long is let go.
SILENCE_S = 10.0
MAX_REQUEST = 1 << 16
Say = Callable[[str], None]
Act = Callable[[dict[str, Any], Say], str]


@contextmanager
def _address(work_dir: Path) -> Iterator[str]:
    """Yield a name of the socket that is short: the system takes 107 bytes."""
    handle = os.open(work_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{handle}/{SOCKET}"
    finally:
        os.close(handle)


@contextmanager
def control_socket(work_dir: Path, act: Act) -> Iterator[None]:
    """Answer commands, each in a thread, while the block runs.

    Args:
        work_dir: held by this process.
        act: does what a request says, telling its steps, and returns the outcome; a `UserError` of
            its is the answer.
    """
    file = work_dir / SOCKET
    file.unlink(missing_ok=True)  # of a killed server
    listener = socket.socket(socket.AF_UNIX)
    with listener, _address(work_dir) as address:
        listener.bind(address)
        file.chmod(0o600)
        # Nobody can connect before this.
        listener.listen()
        threading.Thread(target=_accept, args=(listener, act), daemon=True).start()
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            # Closing alone would leave the thread in accept.
            listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, act: Act) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_answer, args=(connection, act), daemon=True).start()


def _answer(connection: socket.socket, act: Act) -> None:
    def send(kind: str, text: str) -> None:
        with suppress(OSError):  # the command is gone
            connection.sendall(json.dumps({kind: text}).encode() + b"\n")

    with connection:
        connection.settimeout(SILENCE_S)
        try:
            request = json.loads(connection.makefile("rb").readline(MAX_REQUEST))
            send("done", act(request, lambda text: send("say", text)))
        except Exception as error:  # a bug of ours must not leave the command waiting
            send("error", str(error) or type(error).__name__)


def command(work_dir: Path, request: dict[str, Any], say: Say) -> str:
    """Have the server that works in `work_dir` do something; return the outcome.

    Raises:
        UserError: when none runs, it refuses, or ends meanwhile.
    """
    try:
        with _address(work_dir) as address, socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address)
            connection.sendall(json.dumps(request).encode() + b"\n")
            for line in connection.makefile("rb"):
                ((kind, text),) = json.loads(line).items()
                if kind == "done":
                    return str(text)
                if kind == "error":
                    raise UserError(text)
                say(text)
    except PermissionError:
        raise UserError(
            f"{work_dir / SOCKET}: belongs to the user who runs `twotower serve`: be that user"
        ) from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise UserError(
            f"no server of this job is running ({work_dir}): start `twotower serve` with the same "
            "--config, or PATH"
        ) from None
    except OSError as error:
        raise UserError(f"{work_dir / SOCKET}: {error.strerror or error}") from None
    raise UserError(f"the server ended before it was done: see its output and {work_dir}")
