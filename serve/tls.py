"""Encryption of gRPC, also mutual: whom the server is, and whom it answers.

    serve:
      tls: {cert: server.pem, key: server.key, ca: ca.pem, name: recommend.internal, mutual: true}

Triton encrypts gRPC alone. With a certificate its HTTP endpoint listens on loopback only; a proxy
or `twotower gateway` serves HTTPS.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ClientTls:
    """How a client speaks to an encrypted server."""

    ca: str
    """PEM file of the authorities of which one signed the server's certificate."""
    cert: str | None = None
    """PEM file of the client's own certificate, for a server that asks for one."""
    key: str | None = None
    """PEM file of its private key."""
    name: str | None = None
    """Name in the server's certificate, where it is not that of the address."""

    def options(self, channel_args: list[tuple[str, Any]]) -> dict[str, Any]:
        """Return the arguments of Triton's gRPC clients, with others of the channel."""
        override = [("grpc.ssl_target_name_override", self.name)] if self.name else []
        return {
            "ssl": True, "root_certificates": self.ca, "private_key": self.key,
            "certificate_chain": self.cert, "channel_args": [*channel_args, *override],
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TlsConfig:
    """How gRPC is encrypted."""

    cert: str | None = None
    """PEM file of the server's certificate; none, for no encryption."""
    key: str | None = None
    """PEM file of its private key."""
    ca: str | None = None
    """PEM file of the authorities that signed it and, where mutual, the clients' certificates."""
    name: str = "localhost"
    """Name in the certificate, by which the supervisor knows its own server."""
    mutual: bool = False
    """Answer only clients with a certificate of `ca`; the supervisor shows the server's own."""

    def validate(self) -> None:
        """Refuse a half of it.

        Raises:
            UserError: naming the key.
        """
        given = {name: getattr(self, name) for name in ("cert", "key", "ca")}
        missing = [name for name, value in given.items() if value is None]
        if missing and (len(missing) < len(given) or self.mutual):
            raise UserError(
                f"serve.tls.{missing[0]} is missing: encryption needs cert, key and ca, three PEM "
                "files"
            )

    def check_files(self) -> None:
        """Refuse files that are not there, which Triton would only log.

        Raises:
            UserError: naming the key and the file.
        """
        for name in ("cert", "key", "ca"):
            file = getattr(self, name)
            if file is not None and not Path(file).is_file():
                raise UserError(f"serve.tls.{name}: {file} is no file: name a PEM file")

    def flags(self) -> list[str]:
        """Return tritonserver's arguments."""
        if self.cert is None:
            return []
        files = {"server-cert": self.cert, "server-key": self.key, "root-cert": self.ca}
        paths = [f"--grpc-{k}={Path(v).resolve()}" for k, v in files.items() if v is not None]
        return [f"--grpc-use-ssl{'-mutual' if self.mutual else ''}=true", *paths]

    def client(self) -> ClientTls | None:
        """Return how the supervisor, and the job's commands, speak to the server."""
        if self.cert is None or self.ca is None:
            return None
        own = (self.cert, self.key) if self.mutual else (None, None)
        return ClientTls(ca=self.ca, cert=own[0], key=own[1], name=self.name)
