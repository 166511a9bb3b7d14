"""Transports: how a request reaches the worker. The client's code is the same over each."""

from __future__ import annotations

from runtime.transports.base import Answer, Direction, TrafficRecorder, Transport
from runtime.transports.connection import open_connection
from runtime.transports.inprocess import InProcessTransport
from runtime.transports.pool import TransportPool
from runtime.transports.replicas import Replicas, RetryPolicy
from runtime.transports.sockets import SocketTransport, connect, connect_for

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
