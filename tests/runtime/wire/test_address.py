"""Addresses of workers."""

from __future__ import annotations

import pytest

from hecompile.errors import InputError
from hecompile.runtime.transports import connect
from hecompile.runtime.wire.address import TcpAddress, UnixAddress, parse_address


@pytest.mark.parametrize("address", ["", "inproces", "http://localhost:1", "tcp://localhost", "tcp://:5", "unix://a/b"])
def test_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="needs tcp://"):
        parse_address(address)
    with pytest.raises(InputError, match=r"not understood|Port"):
        connect(address)


def test_addresses() -> None:
    assert parse_address("tcp://[::1]:80") == TcpAddress("::1", 80)
    assert parse_address("unix:///run/worker") == UnixAddress("/run/worker")
    with pytest.raises(InputError, match="make an InProcessTransport"):
        connect("inprocess")
