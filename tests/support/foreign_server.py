"""A server of Open Inference Protocol v2 that is not of this program: it knows a model repository and ONNX Runtime, as
Triton does, and has none of the protocol's extensions. For tests of how the client gets on with servers of others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from hecompile.runtime.worker.engines.onnxruntime_engine import exact_here


class ForeignServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves the folders of `repository` while it is entered; loads every model at the start, from its own folder alone."""

    def __init__(self, repository: Path) -> None:
        self.configs: dict[str, model_config_pb2.ModelConfig] = {}
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        for folder in repository.iterdir():
            config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
            self.configs[config.name] = config
            # exact_here: without VNNI, ONNX Runtime would saturate, and a real server on such a machine be refused.
            self._sessions[config.name] = onnxruntime.InferenceSession(
                exact_here(folder / "1" / config.default_model_filename), providers=["CPUExecutionProvider"]
            )
        self._server = grpc.server(ThreadPoolExecutor(4))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.address = f"grpc://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> ForeignServer:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    def ServerReady(self, request, context):
        return service_pb2.ServerReadyResponse(ready=True)

    def ModelReady(self, request, context):
        return service_pb2.ModelReadyResponse(ready=request.name in self.configs)

    def ModelMetadata(self, request, context):
        config = self._config(request.name, context)
        tensor = service_pb2.ModelMetadataResponse.TensorMetadata
        return service_pb2.ModelMetadataResponse(
            name=config.name,
            versions=["1"],
            platform=config.platform,
            inputs=[tensor(name=t.name, datatype="UINT8", shape=t.dims) for t in config.input],
            outputs=[tensor(name=t.name, datatype="UINT8", shape=t.dims) for t in config.output],
        )

    def ModelInfer(self, request, context):
        config = self._config(request.model_name, context)
        if len(request.raw_input_contents) != 1:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "expected 1 inputs but got 0")
        planes = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(request.inputs[0].shape)
        (reply,) = self._sessions[config.name].run([config.output[0].name], {request.inputs[0].name: planes})
        response = service_pb2.ModelInferResponse(model_name=config.name, model_version="1")
        response.outputs.add(name=config.output[0].name, datatype="UINT8", shape=reply.shape)
        response.raw_output_contents.append(reply.tobytes())
        return response

    def _config(self, name, context):
        if name not in self.configs:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{name}' is not found")
        return self.configs[name]
