"""Answer the methods of Open Inference Protocol v2 by a worker: as messages of `hecompile.runtime.wire.protocol`.

Everything is checked before it is used. An error says what is wrong with the request and holds no byte of a tensor.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
import numpy as np
from google.protobuf import text_format
from google.protobuf.message import Message

from hecompile.bundles.public_rows import base_name
from hecompile.bundles.triton_repository import INPUT_NAME, MODEL_VERSION, OUTPUT_NAME
from hecompile.bundles.worker import CircuitSpec
from hecompile.errors import HecompileError, WorkerError
from hecompile.files import read_whole
from hecompile.runtime.wire.inference_protocol import (
    COMPUTE_SECONDS,
    DATATYPE,
    HINT_PARAMETER,
    MAX_REQUEST_BYTES,
    PUBLIC_ROWS_PARAMETER,
    SERVICE,
    fill,
    messages,
    with_raw_contents,
)
from hecompile.runtime.wire.protocol import EvaluateReply, EvaluateRequest, HintRequest, Request, SetupRequest
from hecompile.runtime.worker.worker import Worker, handle

LOGGER = logging.getLogger(__name__)
_MOST_CONFIG_BYTES = 64 << 10
SHOWN_CHARACTERS = 80
"""Most characters of a client's text that an error repeats."""

Response = TypeVar("Response")
Method = Callable[[Any, grpc.ServicerContext], object]


class _Refusal(WorkerError):
    """Refuse a request with the status `code` and a text."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class OipService:
    """Answer the calls of clients by `worker`; keeps no state. Methods that are not here answer UNIMPLEMENTED."""

    METHODS = (
        "ServerLive",
        "ServerReady",
        "ServerMetadata",
        "RepositoryIndex",
        "ModelReady",
        "ModelMetadata",
        "ModelConfig",
        "ModelInfer",
    )

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._circuits = worker.bundle.circuits

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the handlers for a gRPC server.

        They take and return bytes. gRPC keeps all that it has of a call whose message its own decoder refuses.
        """
        methods = {
            name: grpc.unary_unary_rpc_method_handler(
                _decoded(getattr(self, name), getattr(messages, f"{name}Request")),
                response_serializer=None if name == "ModelInfer" else _serialised,
            )
            for name in self.METHODS
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def ServerLive(self, request: messages.ServerLiveRequest, context: grpc.ServicerContext) -> object:
        return messages.ServerLiveResponse(live=True)

    def ServerReady(self, request: messages.ServerReadyRequest, context: grpc.ServicerContext) -> object:
        return messages.ServerReadyResponse(ready=True)

    def ServerMetadata(self, request: messages.ServerMetadataRequest, context: grpc.ServicerContext) -> object:
        return messages.ServerMetadataResponse(name="hecompile", version=_version(), extensions=["model_configuration"])

    def RepositoryIndex(self, request: messages.RepositoryIndexRequest, context: grpc.ServicerContext) -> object:
        models = [
            messages.RepositoryIndexResponse.ModelIndex(name=name, version=MODEL_VERSION, state="READY")
            for name in self._circuits
        ]
        return messages.RepositoryIndexResponse(models=models)

    def ModelReady(self, request: messages.ModelReadyRequest, context: grpc.ServicerContext) -> object:
        known = request.name in self._circuits and request.version in ("", MODEL_VERSION)
        return messages.ModelReadyResponse(ready=known)

    def ModelMetadata(self, request: messages.ModelMetadataRequest, context: grpc.ServicerContext) -> object:
        return _answer(context, lambda: self._metadata(self._spec(request.name, request.version)))

    def ModelConfig(self, request: messages.ModelConfigRequest, context: grpc.ServicerContext) -> object:
        return _answer(context, lambda: self._config(self._spec(request.name, request.version)))

    def ModelInfer(self, request: messages.ModelInferRequest, context: grpc.ServicerContext) -> object:
        """Evaluate a circuit; returns the bytes of a ModelInferResponse."""
        return _answer(context, lambda: self._infer(request, context))

    def _spec(self, name: str, version: str) -> CircuitSpec:
        spec = self._circuits.get(name)
        if spec is None:
            raise _Refusal(
                grpc.StatusCode.NOT_FOUND,
                f"the worker bundle has no circuit {name[:SHOWN_CHARACTERS]!r}; it holds {len(self._circuits)} others",
            )
        if version not in ("", MODEL_VERSION):
            raise _Refusal(grpc.StatusCode.NOT_FOUND, f"circuit {name} has version {MODEL_VERSION} and no other")
        return spec

    def _metadata(self, spec: CircuitSpec) -> messages.ModelMetadataResponse:
        tensor = messages.ModelMetadataResponse.TensorMetadata
        ciphertext = tensor(name=INPUT_NAME, datatype=DATATYPE, shape=[spec.upload_limbs, -1, spec.in_features])
        reply = tensor(name=OUTPUT_NAME, datatype=DATATYPE, shape=[spec.reply_bytes, -1, spec.out_features])
        platform = f"hecompile_{self._worker.engine.name}"
        return messages.ModelMetadataResponse(
            name=spec.name, versions=[MODEL_VERSION], platform=platform, inputs=[ciphertext], outputs=[reply]
        )

    def _config(self, spec: CircuitSpec) -> messages.ModelConfigResponse:
        if spec.config is None:
            raise _Refusal(grpc.StatusCode.NOT_FOUND, f"circuit {spec.name} is no model of the repository")
        path = self._worker.bundle.directory / spec.config.path
        response = messages.ModelConfigResponse()
        try:
            text_format.Parse(read_whole(path, _MOST_CONFIG_BYTES).decode(), response.config)
        except Exception as error:  # a parser may raise anything for text that somebody made up
            LOGGER.warning("%s is no configuration of a model: %s", path, type(error).__name__)
            raise _Refusal(grpc.StatusCode.FAILED_PRECONDITION, f"the configuration of {spec.name} is damaged") from None
        return response

    def _infer(self, request: messages.ModelInferRequest, context: grpc.ServicerContext) -> bytes:
        message = self._request(request)
        if not context.is_active():
            raise _Refusal(grpc.StatusCode.CANCELLED, "the client left before its turn came")
        reply = handle(message, self._worker)
        assert isinstance(reply, EvaluateReply)
        response = messages.ModelInferResponse(
            model_name=request.model_name, model_version=MODEL_VERSION, id=request.id
        )
        response.parameters[COMPUTE_SECONDS].double_param = reply.compute_seconds
        response.outputs.add(name=OUTPUT_NAME, datatype=DATATYPE, shape=reply.planes.shape)
        return with_raw_contents(response, reply.planes)

    def _request(self, request: messages.ModelInferRequest) -> Request:
        """Read the request. Raises _Refusal unless it is well-formed; `handle` checks that it fits the circuit."""
        if PUBLIC_ROWS_PARAMETER in request.parameters and request.parameters[PUBLIC_ROWS_PARAMETER].bool_param:
            return self._setup(request)
        name = self._spec(request.model_name, request.model_version).name
        if HINT_PARAMETER in request.parameters and request.parameters[HINT_PARAMETER].bool_param:
            if request.inputs or request.raw_input_contents:
                raise _invalid(f"{HINT_PARAMETER} goes with no input")
            return HintRequest(name)
        if len(request.inputs) != 1 or request.inputs[0].name != INPUT_NAME:
            raise _invalid(f"circuit {name} takes the one input {INPUT_NAME!r}; got {len(request.inputs)}")
        tensor = request.inputs[0]
        if tensor.datatype != DATATYPE:
            got = tensor.datatype[:SHOWN_CHARACTERS]
            raise _invalid(f"circuit {name}: {INPUT_NAME} is {got!r}; needs {DATATYPE}")
        if any(output.name != OUTPUT_NAME for output in request.outputs):
            raise _invalid(f"circuit {name} has the one output {OUTPUT_NAME!r}")
        if len(request.raw_input_contents) != 1:
            count = len(request.raw_input_contents)
            raise _invalid(f"circuit {name}: {INPUT_NAME} travels as one raw content; got {count} of them")
        shape, raw = list(tensor.shape), request.raw_input_contents[0]
        if len(shape) != 3 or min(shape) < 1:
            raise _invalid(f"circuit {name}: {INPUT_NAME} has shape {shape[:4]}; needs [limbs, T, in] from 1")
        if math.prod(shape) != len(raw):
            raise _invalid(f"circuit {name}: shape {shape} is {math.prod(shape)} bytes, the raw content {len(raw)}")
        return EvaluateRequest(name, np.frombuffer(raw, dtype=np.uint8).reshape(shape))

    def _setup(self, request: messages.ModelInferRequest) -> SetupRequest:
        if not self._worker.bundle.has_public_rows:
            raise _Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "the worker bundle cannot compute hints: only one that was exported with --no-hints can",
            )
        name = self._spec(request.model_name, request.model_version).name
        base = base_name(name)
        if request.inputs or request.raw_input_contents or name == base:
            raise _invalid(f"{PUBLIC_ROWS_PARAMETER} goes with the exact form of a circuit and with no input")
        return SetupRequest(base)


def _answer(context: grpc.ServicerContext, method: Callable[[], Response]) -> Response:
    """Return the result of `method`; errors become a status of the call. No tensor and no traceback is sent or logged."""
    try:
        return method()
    except _Refusal as error:
        code, text = error.code, str(error)
    except HecompileError as error:
        code, text = grpc.StatusCode.INVALID_ARGUMENT, str(error)
    except Exception as error:
        code, text = grpc.StatusCode.INTERNAL, f"the worker failed with {type(error).__name__}"
    LOGGER.warning("refused a request: %s", text)
    context.abort(code, text)
    raise AssertionError("abort returns never")


def _decoded(method: Method, kind: type[Message]) -> Callable[[bytes, grpc.ServicerContext], object]:
    """Return `method` as a function of the bytes of its request, which refuses those that are no message of that kind."""

    def answer(content: bytes, context: grpc.ServicerContext) -> object:
        request = kind()
        try:
            fill(request, content, MAX_REQUEST_BYTES)
        except ValueError as error:
            text = f"malformed request: {error}"
        else:
            return method(request, context)
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        raise AssertionError("abort returns never")

    return answer


def _serialised(message: Message) -> bytes:
    return message.SerializeToString()


def _invalid(text: str) -> _Refusal:
    return _Refusal(grpc.StatusCode.INVALID_ARGUMENT, text)


def _version() -> str:
    try:
        return importlib.metadata.version("hecompile")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "0"
