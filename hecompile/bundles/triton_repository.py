"""Lay the circuits of a worker bundle out as a model repository of NVIDIA's Triton Inference Server, a model each.

    circuits/<name>/config.pbtxt       its name, tensors and shapes, as protobuf text of Triton's ModelConfig
    circuits/<name>/1/model.onnx       the lowered circuit (standard integer operators, see passes/offload/lower_worker.py)
    circuits/<name>/1/weight.bin       its weight in int8 digits, when that is above 64 KiB
    circuits/<name>/1/exact.onnx       only in a plan without stored hints: the circuit `<name>.exact`

The exact form of a circuit lies in the circuit's own folder and is no model of the repository. It refers to the same weight
file, and ONNX Runtime opens no external data outside the folder of the model, nor a symbolic link that leads out of it.
Triton takes `model.onnx` and passes over the other files of a version's folder.
"""

from __future__ import annotations

from hecompile.bundles.public_rows import base_name

CIRCUITS = "circuits"
MODEL_VERSION = "1"
WEIGHT_FILE = "weight.bin"
INPUT_NAME, OUTPUT_NAME = "ciphertext", "reply"
"""As in the ONNX files; see `hecompile.plan.circuits.encrypted_linear.encrypted_linear_model`."""

PLAN_ID_PARAMETER = "plan_id"


def model_path(name: str) -> str:
    """Return the path of the ONNX file of circuit `name`, relative to the bundle."""
    return f"{_folder(name)}/{MODEL_VERSION}/{'exact' if base_name(name) != name else 'model'}.onnx"


def weight_path(name: str) -> str:
    """Return the path of the weight file that circuit `name` uses; the exact form of a circuit shares that circuit's."""
    return f"{_folder(name)}/{MODEL_VERSION}/{WEIGHT_FILE}"


def config_path(name: str) -> str | None:
    """Return the path of the configuration of the model `name`; None for an exact form, which is no model."""
    return None if base_name(name) != name else f"{_folder(name)}/config.pbtxt"


def triton_config(
    name: str, upload_limbs: int, in_features: int, reply_bytes: int, out_features: int, plan_id: str
) -> str:
    """Write the ModelConfig of uint8 [upload_limbs, T, in_features] → uint8 [reply_bytes, T, out_features] as protobuf text.

    Instances are on the CPU: ONNX Runtime's CUDA provider has no product of uint8 by int8, so that with a GPU
    every tensor would travel to it and back for nothing. A batch size of 0 says that the shapes are whole.
    """
    return f"""\
name: "{name}"
platform: "onnxruntime_onnx"
backend: "onnxruntime"
default_model_filename: "model.onnx"
max_batch_size: 0
input [
  {{
    name: "{INPUT_NAME}"
    data_type: TYPE_UINT8
    dims: [ {upload_limbs}, -1, {in_features} ]
  }}
]
output [
  {{
    name: "{OUTPUT_NAME}"
    data_type: TYPE_UINT8
    dims: [ {reply_bytes}, -1, {out_features} ]
  }}
]
instance_group [
  {{
    count: 1
    kind: KIND_CPU
  }}
]
parameters {{
  key: "{PLAN_ID_PARAMETER}"
  value {{ string_value: "{plan_id}" }}
}}
"""


def _folder(name: str) -> str:
    return f"{CIRCUITS}/{base_name(name)}"
