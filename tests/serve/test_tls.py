"""Encrypted gRPC of a real server, one-way and mutual, with certificates made here."""

import asyncio
import datetime
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from twotower.errors import UserError
from twotower.export.bundle import read_bundle
from twotower.serve.client import AsyncRecommendClient, RecommendClient, ServerUnavailable
from twotower.serve.config import ServeConfig
from twotower.serve.load.asker import Target
from twotower.serve.load.generator import LoadGenerator
from twotower.serve.server import TritonServer
from twotower.serve.tls import ClientTls, TlsConfig

from .conftest import FREE
from .tiny import tiny_bundle

NAME = "recommend.internal"


def certify(folder: Path, name: str, issuer=None, ca: bool = False):
    """Write <name>.pem and <name>.key; returns the certificate and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(issuer[1] if issuer else key, hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}.key").write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ))  # fmt: skip
    return certificate, key


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities, the server's certificate and a client's of the first, one of the second."""
    folder = tmp_path_factory.mktemp("tls")
    ours, theirs = certify(folder, "ours", ca=True), certify(folder, "theirs", ca=True)
    certify(folder, NAME, ours)
    certify(folder, "client", ours)
    certify(folder, "stranger", theirs)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["one-way", "mutual"])
def server(request, folder):
    tls = TlsConfig(
        cert=str(folder / f"{NAME}.pem"), key=str(folder / f"{NAME}.key"),
        ca=str(folder / "ours.pem"), name=NAME, mutual=request.param,
    )  # fmt: skip
    where = folder / ("mutual" if request.param else "one-way")
    bundle = read_bundle(tiny_bundle(where / "bundles"))
    server = TritonServer(bundle, replace(FREE, host="0.0.0.0", tls=tls), where / "server")
    server.start()
    yield server
    server.stop()


def as_client(folder: Path, who: str | None, ca: str = "ours", name: str = NAME) -> ClientTls:
    own = [str(folder / f"{who}.{end}") if who else None for end in ("pem", "key")]
    return ClientTls(ca=str(folder / f"{ca}.pem"), cert=own[0], key=own[1], name=name)


def answers(server: TritonServer, tls: ClientTls | None) -> bool:
    golden = server.golden[1]
    url = f"127.0.0.1:{server.config.grpc_port}"

    async def ask() -> list[object]:
        async with AsyncRecommendClient(url, timeout_s=2, tls=tls) as client:
            return (await client.recommend(golden.features, k=6, exclude=golden.exclude)).item_ids

    try:
        with RecommendClient(url, timeout_s=2, tls=tls) as client:
            answer = client.recommend(golden.features, k=6, exclude=golden.exclude)
    except ServerUnavailable:
        with pytest.raises(ServerUnavailable):
            asyncio.run(ask())
        return False
    assert asyncio.run(ask()) == answer.item_ids == golden.item_ids
    return True


def test_only_those_who_may_ask_are_answered(server, folder) -> None:
    mutual = server.config.tls.mutual
    assert server.prove() < 1e-4
    assert answers(server, as_client(folder, "client"))
    assert answers(server, as_client(folder, None)) is not mutual
    assert answers(server, as_client(folder, "stranger")) is not mutual
    assert not answers(server, as_client(folder, "client", ca="theirs")), "not its authority"
    assert not answers(server, as_client(folder, "client", name="other")), "not its name"
    assert not answers(server, None), "not encrypted"


def test_http_which_triton_cannot_encrypt_stays_on_this_machine(server) -> None:
    assert server.http_url.startswith("127.0.0.1:")
    with socket.socket() as other:
        # Free for another address of this machine, so Triton does not listen there.
        other.bind(("127.0.0.2", server.config.http_port))
    with pytest.raises(UserError, match="Triton encrypts gRPC alone"):
        RecommendClient(server.http_url, "http", tls=server.config.tls.client())


def test_half_a_configuration_is_refused(tmp_path) -> None:
    for tls, words in (
        (TlsConfig(cert="a", ca="c"), r"serve\.tls\.key is missing"),
        (TlsConfig(mutual=True), r"serve\.tls\.cert is missing"),
    ):
        with pytest.raises(UserError, match=words):
            ServeConfig(tls=tls).validate()
    TlsConfig().validate()
    bundle = read_bundle(tiny_bundle(tmp_path / "bundles"))
    tls = TlsConfig(cert="no.pem", key="no.key", ca="no.pem")
    with pytest.raises(UserError, match=r"serve\.tls\.cert: no\.pem is no file"):
        TritonServer(bundle, replace(FREE, tls=tls), tmp_path / "server").start()


def test_a_load_test_speaks_to_an_encrypted_server(server) -> None:
    golden = server.golden[1]
    target = Target(
        url=f"127.0.0.1:{server.config.grpc_port}", proxy=False, deadline_s=5.0, k=5,
        requests=[(golden.features, golden.exclude)], tls=server.config.tls.client(),
    )  # fmt: skip
    with LoadGenerator(target, 1, 0) as generator:
        measured = generator.closed_loop(2, 1.0, warmup_seconds=0.2)
    assert measured.answered_rate > 0
    assert sum(measured.errors.values()) == 0
