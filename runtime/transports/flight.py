"""Reach a worker over Arrow Flight; see `hecompile.runtime.wire.flight_frames` for the messages."""

from __future__ import annotations

import dataclasses
import ssl
from pathlib import Path

import grpc
import numpy as np

from hecompile.errors import InputError, WorkerError, WorkerUnavailableError
from hecompile.foreign import printable
from hecompile.runtime.transports.base import FrameTransport, TrafficRecorder
from hecompile.runtime.transports.grpc_channel import open_channel
from hecompile.runtime.wire import framing, protocol
from hecompile.runtime.wire.address import TcpAddress, parse_address
from hecompile.runtime.wire.credentials import ClientCredentials
from hecompile.runtime.wire.flight_frames import METHOD, OPTIONS, SERVICE, FrameReader, limits, request_messages
from hecompile.runtime.wire.framing import Frame
from hecompile.runtime.wire.network import FLIGHT_SCHEMES, check_client_access

_UNKNOWN_CLIENT = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_INTERRUPTED = (grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED, grpc.StatusCode.INTERNAL)
"""Statuses of a call that was lost on its way, while its connection may serve others."""


class FlightTransport(FrameTransport):
    """Carry any number of requests at once on one connection.

    Nothing is sent before the first request. A request that fails leaves the others on the connection alone. When the
    connection itself is lost the transport is closed and stays so. Bytes are counted as whole frames of
    `hecompile.runtime.wire.framing`; gRPC's own, some hundred a request, are not.

    Args:
        address: `flight://host:port` or `flights://host:port`.
        connect_timeout: seconds.
        reply_timeout: seconds for a request, from its first byte to the last of its reply.

    Raises:
        InputError: the address is malformed, or `credentials` would go over it in the clear.
    """

    concurrent = True

    def __init__(
        self,
        address: str,
        *,
        credentials: ClientCredentials | None = None,
        connect_timeout: float = 10.0,
        reply_timeout: float = 600.0,
        max_message_bytes: int = framing.MAX_MESSAGE_BYTES,
        recorder: TrafficRecorder | None = None,
    ) -> None:
        super().__init__(recorder)
        credentials = credentials or ClientCredentials()
        parsed = _checked_address(address, credentials)
        self._address = address
        self._reply_timeout = reply_timeout
        self._max_message_bytes = max_message_bytes
        self._metadata = () if credentials.token is None else (("authorization", f"Bearer {credentials.token}"),)
        if parsed.tls and credentials.authority is None:
            credentials = dataclasses.replace(credentials, authority=_system_authorities())
        options = [
            *OPTIONS, *limits(max_message_bytes),
            ("grpc.min_reconnect_backoff_ms", int(1000 * connect_timeout)),  # the longest attempt to connect
        ]  # fmt: skip
        self._channel: grpc.Channel | None = open_channel(parsed, credentials, options)

    def _exchange(self, frame: Frame) -> Frame:
        channel = self._channel
        if channel is None:
            raise self._closed()
        if frame.size > self._max_message_bytes:
            raise WorkerError(
                f"request of {frame.size} bytes; at most {self._max_message_bytes} are sent; use a smaller batch"
            )
        try:
            return self._call(channel, frame)
        except WorkerError as error:
            raise type(error)(f"worker at {self._address}: {error}") from None
        except grpc.RpcError as error:
            raise self._failure(error.code(), _text(error.details())) from None
        except ValueError:  # closed by another thread meanwhile
            raise self._closed() from None

    def _call(self, channel: grpc.Channel, frame: Frame) -> Frame:
        """Exchange one frame for one in a call. Raises WorkerError for a malformed reply, and what gRPC raises."""
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(
            request_messages(frame), timeout=self._reply_timeout, metadata=self._metadata
        )
        try:
            reader = FrameReader(call, self._max_message_bytes)
            answer = reader.next_frame()
            if answer is None:
                raise WorkerUnavailableError("it ended the call without an answer; see its log")
            if reader.next_frame() is not None:
                raise WorkerError("it sent more than one answer")
        finally:
            call.cancel()  # which does nothing to a call that has ended
        # gRPC's memory is read-only, of which torch warns.
        return Frame(answer.header, np.array(np.frombuffer(answer.payload, np.uint8)).data)

    def _failure(self, code: grpc.StatusCode, text: str) -> WorkerError:
        """Return the error for the status with which a call ended."""
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return WorkerUnavailableError(
                f"the worker at {self._address} was silent for {self._reply_timeout:g} s; "
                "see its log, or raise the reply timeout for a slow machine"
            )
        if code is grpc.StatusCode.UNAVAILABLE:
            self.close()
            return WorkerUnavailableError(self._unavailable(text))
        # This status also says that a message is too large, which it would be elsewhere and later as well.
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" not in text:
            return WorkerUnavailableError(f"the worker at {self._address} is busy: {text}")
        if code in _UNKNOWN_CLIENT:
            return WorkerError(f"the worker at {self._address} does not accept this client: {text}")
        if code in _INTERRUPTED:
            return WorkerUnavailableError(f"the exchange with the worker at {self._address} failed: {text}")
        return WorkerError(f"the worker refused the request: {text}")

    def _closed(self) -> WorkerError:
        return WorkerUnavailableError(f"the connection to the worker at {self._address} is closed; connect again")

    def _unavailable(self, reason: str) -> str:
        if self._info is None:
            return f"no worker answers at {self._address}: {reason}; start one with `hecompile worker serve`"
        return f"the connection to the worker at {self._address} broke: {reason}"

    def close(self) -> None:
        """See `Transport.close`."""
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()


def _checked_address(address: str, credentials: ClientCredentials) -> TcpAddress:
    parsed = parse_address(address)
    if not isinstance(parsed, TcpAddress) or parsed.scheme not in FLIGHT_SCHEMES:
        raise InputError(f"{address} is no address of Arrow Flight; needs flight://host:port or flights://host:port")
    check_client_access(parsed, credentials)
    return parsed


def _system_authorities() -> bytes | None:
    """Read the PEM of the authorities that this system trusts; None leaves it to gRPC, which has a list of its own."""
    file = ssl.get_default_verify_paths().cafile
    return None if file is None else Path(file).read_bytes()


def _text(details: str | None) -> str:
    """Return the worker's or gRPC's text without Arrow's addition, safe for a terminal: the worker is not trusted."""
    return printable((details or "").partition(". Detail: ")[0], protocol.MAX_ERROR_CHARACTERS)
