"""Certificates are made here with the openssl command."""

import shutil
import subprocess

import grpc
import pytest
from pilotfish.client import AsyncClient, Client, RetryPolicy, TlsOptions
from pilotfish.common.errors import Unavailable
from scripted_server import ScriptedServer

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command makes the certificates")
ONCE = RetryPolicy(max_attempts=1)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """ca, server (for 127.0.0.1), other-ca, client: each NAME.pem and NAME.key."""
    directory = tmp_path_factory.mktemp("tls")

    def make(name, *options):
        new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        files = ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}", "-days", "2"]
        subprocess.run(["openssl", "req", "-x509", *new_key, *files, *options], cwd=directory, check=True, capture_output=True)

    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=CA:FALSE")
    make("ca")
    make("other-ca")
    make("server", *signed, "-addext", "subjectAltName=IP:127.0.0.1,DNS:pilotfish.test")
    make("client", *signed)
    return directory


@pytest.fixture(scope="module", params=["server only", "mutual"])
def tls_server(request, certificates):
    def read(name):
        return (certificates / name).read_bytes()

    credentials = grpc.ssl_server_credentials(
        [(read("server.key"), read("server.pem"))],
        root_certificates=read("ca.pem"),
        require_client_auth=request.param == "mutual",
    )
    with ScriptedServer(credentials) as server:
        server.is_mutual = request.param == "mutual"
        yield server


def options(certificates, tls_server, **changes):
    identity = {"cert": certificates / "client.pem", "key": certificates / "client.key"} if tls_server.is_mutual else {}
    return TlsOptions(**{"ca": certificates / "ca.pem", **identity, **changes})


def test_encrypted_calls(certificates, tls_server):
    with Client(tls_server.address, tls=options(certificates, tls_server), api_key="t", retry=ONCE) as client:
        assert client.generate("count 2", timeout_s=20).text == "1 2 "
    assert tls_server.inference.metadata[-1]["authorization"] == "Bearer t"


async def test_encrypted_calls_of_the_async_client(certificates, tls_server):
    async with AsyncClient(tls_server.address, tls=options(certificates, tls_server), retry=ONCE) as client:
        assert (await client.generate("count 2", timeout_s=20)).text == "1 2 "


def test_the_name_in_the_certificate_can_differ_from_the_address(certificates, tls_server):
    tls = options(certificates, tls_server, server_name="pilotfish.test")
    with Client(tls_server.address, tls=tls, retry=ONCE) as client:
        assert client.generate("count 1", timeout_s=20).text == "1 "
    tls = options(certificates, tls_server, server_name="elsewhere.test")
    with Client(tls_server.address, tls=tls, retry=ONCE) as client, pytest.raises(Unavailable, match="cannot reach"):
        client.generate("count 1", timeout_s=20)


def test_a_server_that_is_not_trusted(certificates, tls_server):
    tls = options(certificates, tls_server, ca=certificates / "other-ca.pem")
    with Client(tls_server.address, tls=tls, retry=ONCE) as client, pytest.raises(Unavailable, match="cannot reach"):
        client.generate("count 1", timeout_s=20)


def test_a_client_without_encryption_or_without_its_certificate(certificates, tls_server):
    with Client(tls_server.address, retry=ONCE) as client, pytest.raises(Unavailable):
        client.generate("count 1", timeout_s=20)
    if tls_server.is_mutual:
        client = Client(tls_server.address, tls=TlsOptions(ca=certificates / "ca.pem"), retry=ONCE)
        with client, pytest.raises(Unavailable):
            client.generate("count 1", timeout_s=20)
