"""Reach a worker over Arrow Flight; see `hecompile.runtime.wire.flight_frames` for the messages."""

from __future__ import annotations

import contextlib
import ssl
from pathlib import Path
from typing import Any

from hecompile.errors import InputError, WorkerError, WorkerUnavailableError
from hecompile.foreign import printable
from hecompile.runtime.transports.base import FrameTransport, TrafficRecorder
from hecompile.runtime.wire import framing, protocol
from hecompile.runtime.wire.address import TcpAddress, parse_address
from hecompile.runtime.wire.credentials import ClientCredentials
from hecompile.runtime.wire.flight_frames import COMMAND, flight, pyarrow, read_frame, write_frame
from hecompile.runtime.wire.framing import Frame
from hecompile.runtime.wire.network import FLIGHT_SCHEMES, check_client_access

_MIB = 1 << 20
_TUNING = [
    # Each transport has a connection of its own; gRPC would share one among those to the same address.
    ("grpc.use_local_subchannel_pool", 1),
    # The defaults of 16 KiB, 64 KiB and 64 KiB mean many small reads and writes for messages of several MiB.
    ("grpc.http2.max_frame_size", 4 * _MIB),
    ("grpc.http2.lookahead_bytes", 16 * _MIB),
    ("grpc.http2.write_buffer_size", 16 * _MIB),
]


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
        headers = [] if credentials.token is None else [(b"authorization", b"Bearer " + credentials.token.encode())]
        self._options = flight.FlightCallOptions(timeout=reply_timeout, headers=headers)
        options: dict[str, Any] = {
            "generic_options": [
                *_TUNING,
                ("grpc.min_reconnect_backoff_ms", int(1000 * connect_timeout)),  # the longest attempt to connect
                ("grpc.max_receive_message_length", max_message_bytes + framing.MAX_HEADER_BYTES),
            ]
        }
        if parsed.tls:
            options |= {
                "tls_root_certs": credentials.authority or _system_authorities(),
                "cert_chain": credentials.certificate,
                "private_key": credentials.key,
            }
        location = f"{'grpc+tls' if parsed.tls else 'grpc'}://{parsed.authority}"
        self._client: Any = flight.FlightClient(location, **options)

    def _exchange(self, frame: Frame) -> Frame:
        client = self._client
        if client is None:
            raise WorkerUnavailableError(f"the connection to the worker at {self._address} is closed; connect again")
        if frame.size > self._max_message_bytes:
            raise WorkerError(
                f"request of {frame.size} bytes; at most {self._max_message_bytes} are sent; use a smaller batch"
            )
        kind = WorkerError
        try:
            return self._call(client, frame)
        except flight.FlightTimedOutError:
            kind = WorkerUnavailableError
            failure = (
                f"the worker at {self._address} was silent for {self._reply_timeout:g} s; "
                "see its log, or raise the reply timeout for a slow machine"
            )
        except flight.FlightUnavailableError as error:
            kind = WorkerUnavailableError
            failure = self._unavailable(_text(error))
            self.close()
        except (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError) as error:
            failure = f"the worker at {self._address} does not accept this client: {_text(error)}"
        except WorkerError as error:
            kind = type(error)
            failure = f"worker at {self._address}: {error}"
        except flight.FlightServerError as error:
            failure = f"the worker refused the request: {_text(error)}"
        except (flight.FlightError, pyarrow.ArrowException, OSError) as error:
            kind = WorkerUnavailableError
            failure = f"the exchange with the worker at {self._address} failed: {_text(error)}"
        # Out here: pyarrow's own exception quotes what the worker sent at any length.
        raise kind(failure)

    def _call(self, client: Any, frame: Frame) -> Frame:
        """Exchange one frame for one in a call. Raises WorkerError for a malformed reply, and what pyarrow raises."""
        writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(COMMAND), self._options)
        try:
            try:
                write_frame(writer, frame)
                writer.done_writing()
            except (flight.FlightError, pyarrow.ArrowException, OSError):
                reader.read_chunk()  # raises the reason why the worker takes no more, if it gave one
                raise
            answer = read_frame(reader, self._max_message_bytes)
            if answer is None:
                raise WorkerUnavailableError("it ended the call without an answer; see its log")
            if read_frame(reader, self._max_message_bytes) is not None:
                raise WorkerError("it sent more than one answer")
            return answer
        except BaseException:
            reader.cancel()  # or closing would wait for what the worker may still send
            raise
        finally:
            with contextlib.suppress(flight.FlightError, pyarrow.ArrowException, OSError):
                writer.close()

    def _unavailable(self, reason: str) -> str:
        if self._info is None:
            return f"no worker answers at {self._address}: {reason}; start one with `hecompile worker serve`"
        return f"the connection to the worker at {self._address} broke: {reason}"

    def close(self) -> None:
        """See `Transport.close`."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()


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


def _text(error: BaseException) -> str:
    """Return the worker's or gRPC's text without pyarrow's additions, safe for a terminal: the worker is not trusted."""
    own = getattr(error, "extra_info", None)
    text = own.decode("utf-8", "replace") if own else _status_text(str(error))
    return printable(text, protocol.MAX_ERROR_CHARACTERS)


def _status_text(text: str) -> str:
    text = text.partition(". gRPC client debug context")[0].partition(". Detail: ")[0]
    return text.rpartition(" error, with message: ")[2]
