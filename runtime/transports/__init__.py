"""Carry requests to a worker; the client's code is the same over every transport.

The packages of a network transport are imported when one is connected.
"""

from __future__ import annotations

from hecompile.runtime.transports.base import Answer, Direction, TrafficRecorder, Transport
from hecompile.runtime.transports.inprocess import InProcessTransport
from hecompile.runtime.transports.open_connection import open_connection
from hecompile.runtime.transports.pool import TransportPool
from hecompile.runtime.transports.replicas import Replicas, RetryPolicy
from hecompile.runtime.transports.sockets import SocketTransport, connect, connect_for

__all__ = [
    "Answer",
    "Direction",
    "InProcessTransport",
    "Replicas",
    "RetryPolicy",
    "SocketTransport",
    "TrafficRecorder",
    "Transport",
    "TransportPool",
    "connect",
    "connect_for",
    "open_connection",
]
