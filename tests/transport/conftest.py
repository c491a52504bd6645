"""Certificates for TLS, made once."""

import pytest
from transport.loopback import make_certificates

from jaxvla.transport.channel import TlsConfig


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TlsConfig]:
    """See `make_certificates`."""
    return make_certificates(tmp_path_factory.mktemp("tls"))
