"""Reach a worker by Open Inference Protocol v2 over gRPC.

The server is `hecompile worker serve`, or any other that serves the worker bundle's model repository. Requests of several
threads travel on one HTTP/2 connection at once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping

import grpc
import numpy as np
from google.protobuf.message import Message

from hecompile.bundles.known_answer import KNOWN_ANSWER
from hecompile.bundles.public_rows import exact_name
from hecompile.bundles.triton_repository import INPUT_NAME, OUTPUT_NAME, PLAN_ID_PARAMETER
from hecompile.errors import InputError, WorkerError, WorkerUnavailableError
from hecompile.foreign import printable
from hecompile.runtime.transports.base import Answer, Direction, TrafficRecorder
from hecompile.runtime.transports.grpc_channel import open_channel
from hecompile.runtime.wire import framing
from hecompile.runtime.wire.address import TcpAddress, parse_address
from hecompile.runtime.wire.credentials import ClientCredentials
from hecompile.runtime.wire.inference_protocol import (
    DATATYPE,
    HINT_PARAMETER,
    MAX_RESPONSE_BYTES,
    PUBLIC_ROWS_PARAMETER,
    SERVICE,
    UNCOMPRESSED,
    compute_seconds,
    fill,
    messages,
    with_raw_contents,
)
from hecompile.runtime.wire.network import OIP_SCHEMES, check_client_access
from hecompile.runtime.wire.protocol import CircuitInfo, WorkerInfo

_ENDED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
"""Statuses of a request or an answer that was lost; every other status is the worker's own answer."""


class _Refused(WorkerError):
    """Report that the worker answered with the status `code`."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class OipTransport:
    """Carry requests of several threads on one gRPC connection, made at `hello`. A failed request leaves the others alone.

    Args:
        address: `grpc://host:port` or `grpcs://host:port`.
        connect_timeout, reply_timeout: seconds that the first answer and every later one may take.

    Attributes:
        bytes_sent, bytes_received: messages so far, hello and known answers included; without the framing of HTTP/2 and TLS.

    Raises:
        InputError: the address is malformed, or `credentials` must not be shown to it.
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
        parsed = parse_address(address)
        if not isinstance(parsed, TcpAddress) or parsed.scheme not in OIP_SCHEMES:
            raise InputError(f"worker address {address!r}: Open Inference Protocol is spoken over grpc:// or grpcs://")
        credentials = credentials or ClientCredentials()
        check_client_access(parsed, credentials)
        self.bytes_sent = 0
        self.bytes_received = 0
        self._address, self._tls = address, parsed.tls
        self._connect_timeout, self._reply_timeout = connect_timeout, reply_timeout
        self._max_message_bytes = max_message_bytes
        self._recorder = recorder
        self._lock = threading.Lock()
        self._metadata = () if credentials.token is None else (("authorization", f"Bearer {credentials.token}"),)
        self._channel: grpc.Channel | None = _channel(parsed, credentials, max_message_bytes)
        self._circuits: _Circuits | None = None

    def hello(self, plan_id: str) -> WorkerInfo:
        """See `Transport.hello`.

        The protocol knows no plans. The known-answer test shows that the worker serves this one, as its weight depends on
        the plan; a worker that tells its plan and has another is refused at once.
        """
        ready = messages.ServerReadyResponse()
        self._call("ServerReady", messages.ServerReadyRequest(), ready, self._connect_timeout)
        known = messages.ModelReadyResponse()
        self._call("ModelReady", messages.ModelReadyRequest(name=KNOWN_ANSWER), known)
        if not ready.ready or not known.ready:
            lacking = (
                f"the model {KNOWN_ANSWER}, which every worker bundle holds, is not" if ready.ready else "it is not"
            )
            raise WorkerError(f"the server at {self._address} does not serve a worker bundle yet: {lacking} ready")
        told = self._told_plan()
        if told not in (None, plan_id):
            raise WorkerError(
                f"worker bundle is of another plan: expected {plan_id}, got {told}; "
                "start the worker on the bundle that was compiled together with the client's"
            )
        circuits = _Circuits(self)
        _ = circuits[KNOWN_ANSWER]
        self._circuits = circuits
        return WorkerInfo(plan_id, circuits.platform, circuits)

    def evaluate(self, circuit: str, planes: np.ndarray) -> Answer:
        """See `Transport.evaluate`; needs `hello` first."""
        if planes.dtype != np.uint8 or planes.ndim != 3:
            raise WorkerError(f"planes are {planes.dtype} of rank {planes.ndim}; needs uint8 [bytes, T, features]")
        request = messages.ModelInferRequest(model_name=circuit)
        request.inputs.add(name=INPUT_NAME, datatype=DATATYPE, shape=planes.shape)
        request.outputs.add(name=OUTPUT_NAME)
        return self._product(circuit, with_raw_contents(request, planes), planes.shape[1])

    def setup(self, circuit: str, lattice_dim: int) -> Answer:
        """See `Transport.setup`; needs `hello` first, and a worker of this program."""
        name = exact_name(circuit)
        if self._circuits is not None and name not in self._circuits:
            raise WorkerError(
                f"the worker at {self._address} computes no hints (no circuit {name!r}): have a bundle that was exported "
                "with --no-hints served by `hecompile worker serve`, or export with stored hints"
            )
        request = messages.ModelInferRequest(model_name=name)
        request.parameters[PUBLIC_ROWS_PARAMETER].bool_param = True
        request.outputs.add(name=OUTPUT_NAME)
        return self._product(name, request.SerializeToString(), lattice_dim)

    def hint(self, circuit: str, size: int) -> Answer:
        """See `Transport.hint`; needs `hello` first, and a worker of this program."""
        request = messages.ModelInferRequest(model_name=circuit)
        request.parameters[HINT_PARAMETER].bool_param = True
        request.outputs.add(name=OUTPUT_NAME)
        try:
            return self._tensor(circuit, request.SerializeToString(), (1, 1, size))
        except _Refused as error:
            raise WorkerError(
                f"{error}. Only `hecompile worker serve` serves hints: with another server, put the folder hints of the "
                "worker bundle on a web server and name it in the recipe's connection.hints"
            ) from None

    def close(self) -> None:
        """See `Transport.close`."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def shape_of(self, circuit: str) -> tuple[CircuitInfo, str]:
        """Ask for the shape of a circuit and the platform that evaluates it. Raises KeyError where it has none."""
        request, response = messages.ModelMetadataRequest(name=circuit), messages.ModelMetadataResponse()
        try:
            self._call("ModelMetadata", request, response)
        except _Refused as error:
            if error.code is grpc.StatusCode.NOT_FOUND:
                raise KeyError(circuit) from None
            raise
        sides = []
        for tensors, name in ((response.inputs, INPUT_NAME), (response.outputs, OUTPUT_NAME)):
            shape = list(tensors[0].shape) if len(tensors) == 1 else []
            if len(shape) != 3 or tensors[0].name != name or tensors[0].datatype != DATATYPE or min(shape[::2]) < 1:
                raise WorkerError(
                    f"the worker at {self._address} has a model {circuit} that is no circuit: it lacks the one tensor "
                    f"{name!r} of {DATATYPE} [bytes, T, features]"
                )
            sides.append((shape[0], shape[2]))
        (limbs, inputs), (reply_bytes, outputs) = sides
        return CircuitInfo(8 * limbs, inputs, 8 * reply_bytes, outputs), printable(response.platform) or "unknown"

    def names(self) -> list[str]:
        """List the models that are ready. Raises WorkerError where the server cannot list them."""
        response = messages.RepositoryIndexResponse()
        self._call("RepositoryIndex", messages.RepositoryIndexRequest(ready=True), response)
        return sorted({model.name for model in response.models})

    def _told_plan(self) -> str | None:
        """Return the plan in the configuration of the known answer; None where the server does not give it."""
        response = messages.ModelConfigResponse()
        try:
            self._call("ModelConfig", messages.ModelConfigRequest(name=KNOWN_ANSWER), response)
        except _Refused:
            return None  # an extension of the protocol, which not every server has
        parameters = response.config.parameters
        return printable(parameters[PLAN_ID_PARAMETER].string_value) if PLAN_ID_PARAMETER in parameters else None

    def _product(self, circuit: str, request: bytes, tokens: int) -> Answer:
        if self._circuits is None:
            raise WorkerError("evaluate before hello: open connections with open_connection")
        announced = self._circuits.get(circuit)
        if announced is None:
            raise WorkerError(f"the worker has no circuit {circuit!r}; start it on the bundle of this plan")
        return self._tensor(circuit, request, (announced.reply_bytes, tokens, announced.out_features))

    def _tensor(self, circuit: str, request: bytes, expected: tuple[int, int, int]) -> Answer:
        """Send a request whose answer is one tensor of that shape, and check it."""
        response = messages.ModelInferResponse()
        sent, received = self._exchange("ModelInfer", request, response, self._reply_timeout)
        outputs, contents = response.outputs, response.raw_output_contents
        if len(outputs) != 1 or outputs[0].name != OUTPUT_NAME or outputs[0].datatype != DATATYPE or len(contents) != 1:
            raise WorkerError(
                f"circuit {circuit}: the worker's answer is not the one raw {DATATYPE} tensor {OUTPUT_NAME!r}"
            )
        if tuple(outputs[0].shape) != expected:
            shape = tuple(outputs[0].shape[:4])
            raise WorkerError(f"circuit {circuit}: the reply has shape {shape}; needs {expected}")
        raw = contents[0]  # every access copies it
        if len(raw) != math.prod(expected):
            raise WorkerError(f"circuit {circuit}: the reply is {len(raw)} bytes; needs {math.prod(expected)}")
        planes = np.frombuffer(raw, dtype=np.uint8).reshape(expected)
        return Answer(planes, compute_seconds(response), sent, received)

    def _call(self, method: str, request: Message, response: Message, timeout: float | None = None) -> None:
        """Send one of the small requests; fills `response`."""
        self._exchange(method, request.SerializeToString(), response, timeout or self._reply_timeout)

    def _exchange(self, method: str, data: bytes, response: Message, timeout: float) -> tuple[int, int]:
        """Fill `response` with the worker's answer; returns (bytes sent, bytes received). Raises WorkerError."""
        channel = self._channel
        if channel is None:
            raise WorkerUnavailableError(f"the connection to the worker at {self._address} is closed; connect again")
        if len(data) > self._max_message_bytes:
            raise WorkerError(
                f"request of {len(data)} bytes; at most {self._max_message_bytes} are sent; use a smaller batch"
            )
        self._record("sent", data)
        # Bytes in and out, and not messages, so that the bytes that travelled are counted and recorded.
        send = channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            answer: bytes = send(data, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._failure(error.code(), printable(error.details() or ""), timeout) from None
        except ValueError:  # closed by another thread meanwhile
            message = f"the connection to the worker at {self._address} is closed; connect again"
            raise WorkerUnavailableError(message) from None
        self._record("received", answer)
        try:
            fill(response, answer, MAX_RESPONSE_BYTES)
        except ValueError:
            raise WorkerError(f"the worker at {self._address} answered {method} with something else") from None
        return len(data), len(answer)

    def _failure(self, code: grpc.StatusCode, details: str, timeout: float) -> WorkerError:
        status = f"gRPC status {code.name}"
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return WorkerUnavailableError(
                f"the worker at {self._address} was silent for {timeout:g} s ({status}); "
                "see its log, or raise the reply timeout for a slow machine"
            )
        if code in _ENDED:
            advice = ", and do the certificates of both sides fit" if self._tls else ""
            return WorkerUnavailableError(
                f"the worker at {self._address} cannot be reached ({status}: {details}); "
                f"is it running (`hecompile worker serve`){advice}?"
            )
        # This status also says that a message is too large, which it would be elsewhere and later as well.
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" not in details:
            return WorkerUnavailableError(f"the worker at {self._address} is busy ({status}): {details}")
        return _Refused(code, f"the worker at {self._address} refused the request ({status}): {details}")

    def _record(self, direction: Direction, data: bytes) -> None:
        with self._lock:
            if direction == "sent":
                self.bytes_sent += len(data)
            else:
                self.bytes_received += len(data)
            if self._recorder is not None:
                self._recorder(direction, data)


class _Circuits(Mapping[str, CircuitInfo]):
    """Map names to circuits of a worker, each fetched when first needed. Iteration needs a server that lists models.

    Attributes:
        platform: what evaluates the circuit that was fetched last.
    """

    def __init__(self, transport: OipTransport) -> None:
        self._transport = transport
        self._known: dict[str, CircuitInfo] = {}
        self.platform = "unknown"

    def __getitem__(self, name: str) -> CircuitInfo:
        if name not in self._known:
            self._known[name], self.platform = self._transport.shape_of(name)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._transport.names())

    def __len__(self) -> int:
        return len(self._transport.names())


def _channel(address: TcpAddress, credentials: ClientCredentials, max_message_bytes: int) -> grpc.Channel:
    options = [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        UNCOMPRESSED,
    ]
    return open_channel(address, credentials, options)
