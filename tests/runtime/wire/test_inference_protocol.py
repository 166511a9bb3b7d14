"""Messages of Open Inference Protocol that are put together by hand are those that protobuf makes."""

from __future__ import annotations

import numpy as np
import pytest

from hecompile.runtime.wire.inference_protocol import compute_seconds, messages, with_raw_contents


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 127), (1, 1, 128), (2, 2, 4096), (3, 1, 70_000)])
@pytest.mark.parametrize("strided", [False, True])
def test_raw_contents_are_those_of_protobuf(shape: tuple[int, int, int], strided: bool) -> None:
    """At the sizes where the length takes one byte more, and from an array that is not contiguous."""
    planes = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if strided:
        planes = np.repeat(planes, 2, axis=2)[:, :, ::2]
    request = messages.ModelInferRequest(model_name="layers.0.linear.forward", id="1")
    request.inputs.add(name="ciphertext", datatype="UINT8", shape=shape)
    response = messages.ModelInferResponse(model_name="layers.0.linear.forward")
    response.parameters["compute_seconds"].double_param = 0.25
    for message, field in ((request, "raw_input_contents"), (response, "raw_output_contents")):
        made = type(message).FromString(with_raw_contents(message, planes))
        getattr(message, field).append(planes.tobytes())
        assert made == message


@pytest.mark.parametrize(
    ("told", "read"), [(0.25, 0.25), (-1.0, 0.0), (float("inf"), 0.0), (float("nan"), 0.0), (None, 0.0)]
)
def test_the_seconds_of_a_worker_are_a_time_or_nothing(told: float | None, read: float) -> None:
    response = messages.ModelInferResponse()
    if told is not None:
        response.parameters["compute_seconds"].double_param = told
    assert compute_seconds(response) == read
