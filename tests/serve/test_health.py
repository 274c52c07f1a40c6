"""The supervisor's own endpoint, asked by clients that do not behave."""

import socket
import struct
import urllib.request

from twotower.serve.config import ServeConfig
from twotower.serve.health import Health, HealthEndpoint

HANG_UP = struct.pack("ii", 1, 0)  # close at once, with a reset


def test_who_hangs_up_unanswered_leaves_no_traceback(capfd) -> None:
    config = ServeConfig(health_port=0)
    health = Health(config)
    with HealthEndpoint(health, config) as endpoint:
        for _ in range(50):
            with socket.create_connection(("127.0.0.1", endpoint.port)) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, HANG_UP)
                connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        health.answered(0.01)
        with urllib.request.urlopen(f"{endpoint.url}/healthz") as response:
            assert response.read() == b"ok\n"
    assert capfd.readouterr().err == ""
