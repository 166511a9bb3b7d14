"""Serve mutated worker bundles, in a process of its own: `python -m tests....mutated_bundles ENGINE COUNT`.

Each bundle is a good one with one to three changes in its manifest, circuits, weight files or public rows, whose hashes are
then made to fit. It must be refused with an InputError when it is opened, or serve every circuit exactly; what is exact is
read from the files by onnx alone. The last line on standard output is a JSON object of counts. Any other end is a failure,
a crash of the interpreter included; the line before it names the mutation.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.bundles.public_rows import base_name
from hecompile.bundles.worker import KNOWN_ANSWER, MANIFEST, WorkerBundle
from hecompile.compiler.worker_bundle_writer import WorkerBundleWriter
from hecompile.errors import InputError
from hecompile.files import file_sha256
from hecompile.passes.offload.lower_worker import LowerWorker
from hecompile.plan.encrypted_linear import encrypted_linear_model
from hecompile.runtime.worker.worker import Worker
from tests.support.bundles import PLAN_ID, extreme_planes, extreme_weight

NUMBERS = [0, 1, 2, 3, 4, 5, 8, 12, 16, 255, 256, 300, 768, 1031, 65536, 65793, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1]
WORDS = ["", "0", "-1", "-8", "1", "64", "76800", "+5", "0x10", "1e3", "٣", "9" * 30, "weight.bin", "../1/weight.bin", "/"]
OPERATORS = ["Add", "Sub", "Mul", "Cast", "MatMulInteger", "ReduceSum", "Identity", "Loop", "Slice", "BitShift", "Nonsense"]
Change = Callable[[random.Random, Path, dict[str, Any]], None]


def _circuit(chance: random.Random, directory: Path) -> Path:
    return chance.choice(sorted(directory.glob("circuits/*/1/*.onnx")))


def _number(chance: random.Random, value: int) -> int:
    return chance.choice([value + 1, value - 1, -value, 2 * value, value // 2, 4 * value, chance.choice(NUMBERS)])


def change_a_number(chance: random.Random, directory: Path, manifest: dict[str, Any]) -> None:
    spec = chance.choice(manifest["circuits"])
    key = chance.choice(["in_features", "out_features", "upload_bits", "reply_bits"])
    spec[key] = chance.choice([_number(chance, spec[key]), str(spec[key]), True, None, 10**400, float(spec[key]), [3]])


def set_a_number(chance: random.Random, directory: Path, manifest: dict[str, Any]) -> None:
    spec = chance.choice(manifest["circuits"])
    key = chance.choice(["in_features", "out_features", "upload_bits", "reply_bits"])
    spec[key] = _number(chance, spec[key])


def exchange_numbers(chance: random.Random, directory: Path, manifest: dict[str, Any]) -> None:
    spec, other = chance.choice(manifest["circuits"]), chance.choice(manifest["circuits"])
    for key in chance.sample(["in_features", "out_features", "upload_bits", "reply_bits"], chance.randrange(1, 5)):
        spec[key] = other[key]


def change_an_entry(chance: random.Random, directory: Path, manifest: dict[str, Any]) -> None:
    spec, other = chance.choice(manifest["circuits"]), chance.choice(manifest["circuits"])
    key = chance.choice([*spec, "surprise"])
    if chance.random() < 0.5:
        spec[key] = other.get(key, chance.choice([None, "", {}, "backward", "x" * 300, "../x", "a\u0000b", "\ud83d"]))
    else:
        spec.pop(key, None)


def change_the_manifest(chance: random.Random, directory: Path, manifest: dict[str, Any]) -> None:
    key = chance.choice([*manifest, "surprise"])
    manifest[key] = chance.choice([None, [], {}, "0123456789abcdef", 3, 1.5, "hecompile-client", [[]], {"path": "x"}])


def exchange_files(chance: random.Random, directory: Path, manifest: dict[str, Any]) -> None:
    kind = chance.choice(["*.onnx", "*.bin", "*"])
    files = sorted(path for path in directory.glob(f"circuits/*/1/{kind}"))
    one, other = chance.choice(files), chance.choice(files)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def change_a_size(chance: random.Random, directory: Path, manifest: dict[str, Any]) -> None:
    path = chance.choice([path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != MANIFEST])
    content = path.read_bytes()
    cut = chance.randrange(len(content) + 1)
    path.write_bytes(chance.choice([content[:cut], content[:-1], b"", content + b"\x00" * cut, content + b"x", content[1:]]))


def change_bytes(chance: random.Random, directory: Path, manifest: dict[str, Any]) -> None:
    path = chance.choice([path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != MANIFEST])
    content = bytearray(path.read_bytes())
    for _ in range(chance.randrange(1, 8) if content else 0):
        content[chance.randrange(min(len(content), 4096))] = chance.randrange(256)
    path.write_bytes(content)


def write_garbage(chance: random.Random, directory: Path, manifest: dict[str, Any]) -> None:
    path = chance.choice([path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != MANIFEST])
    garbage = [chance.randbytes(chance.randrange(2000)), b"\x3a\x00" * 5000, b"PK\x03\x04" + bytes(50)]
    path.write_bytes(chance.choice(garbage))


def change_a_tensor(chance: random.Random, directory: Path, manifest: dict[str, Any]) -> None:
    path = _circuit(chance, directory)
    model = onnx.load(path, load_external_data=False)
    tensor = chance.choice(model.graph.initializer)
    kind = chance.randrange(7)
    if kind == 0 and tensor.dims:
        tensor.dims[chance.randrange(len(tensor.dims))] = chance.choice([-1, 0, *NUMBERS])
    elif kind == 1:
        tensor.data_type = chance.choice([0, 1, 2, 3, 5, 6, 7, 8, 12, 13, 21, 99])
    elif kind == 2:
        tensor.raw_data = chance.choice([b"", tensor.raw_data[:-1], tensor.raw_data + b"\x00", chance.randbytes(8)])
    elif kind == 3:
        del tensor.dims[:]
        tensor.dims.extend(chance.choice(NUMBERS) for _ in range(chance.randrange(4)))
    elif kind == 4:
        tensor.int32_data.extend([1, 2, 3])
    elif kind == 5:
        tensor.name = chance.choice(model.graph.initializer).name
    else:
        model.graph.initializer.append(tensor)
    path.write_bytes(model.SerializeToString())


def change_a_place(chance: random.Random, directory: Path, manifest: dict[str, Any]) -> None:
    path = _circuit(chance, directory)
    model = onnx.load(path, load_external_data=False)
    tensor = chance.choice([one for one in model.graph.initializer if one.data_type == 3])
    if tensor.data_location != onnx.TensorProto.EXTERNAL or chance.random() < 0.2:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weight.bin")
    key = chance.choice(["location", "offset", "length", "checksum"])
    entry = next((entry for entry in tensor.external_data if entry.key == key), None) or tensor.external_data.add(key=key)
    entry.value = chance.choice([*WORDS, str(_number(chance, 76800))])
    path.write_bytes(model.SerializeToString())


def change_a_node(chance: random.Random, directory: Path, manifest: dict[str, Any]) -> None:
    path = _circuit(chance, directory)
    model = onnx.load(path, load_external_data=False)
    nodes = model.graph.node
    node, kind = chance.choice(nodes), chance.randrange(8)
    if kind == 0:
        node.op_type = chance.choice(OPERATORS)
    elif kind == 1 and node.input:
        names = [*(one.name for one in model.graph.initializer), *(name for one in nodes for name in one.output), ""]
        node.input[chance.randrange(len(node.input))] = chance.choice(names)
    elif kind == 2 and node.attribute:
        node.attribute[0].i = chance.choice([0, 1, -1, 2, 3, 12, 2**40])
    elif kind == 3:
        node.domain = chance.choice(["com.microsoft", "ai.onnx", "x"])
    elif kind == 4:
        del nodes[chance.randrange(len(nodes))]
    elif kind == 5:
        nodes.append(node)
    elif kind == 6:
        node.output[0] = chance.choice(["reply", "ciphertext", "", "z"])
    else:
        node.attribute.add(name="surprise", i=1, type=onnx.AttributeProto.INT)
    path.write_bytes(model.SerializeToString())


def change_a_type(chance: random.Random, directory: Path, manifest: dict[str, Any]) -> None:
    path = _circuit(chance, directory)
    model = onnx.load(path, load_external_data=False)
    value = chance.choice([*model.graph.input, *model.graph.output, *model.graph.value_info])
    kind = chance.randrange(5)
    if kind == 0:
        value.type.tensor_type.elem_type = chance.choice([0, 1, 2, 3, 6, 12, 99])
    elif kind == 1 and value.type.tensor_type.shape.dim:
        chance.choice(value.type.tensor_type.shape.dim).dim_value = chance.choice([0, -1, *NUMBERS])
    elif kind == 2:
        value.type.tensor_type.shape.dim.add(dim_value=1)
    elif kind == 3:
        model.ir_version = chance.choice([0, 3, 9, 11, 99])
    else:
        model.opset_import.add(domain=chance.choice(["", "com.microsoft"]), version=chance.choice([1, 13, 17, 19, 999]))
    path.write_bytes(model.SerializeToString())


CHANGES: list[Change] = [
    change_a_number, set_a_number, exchange_numbers, change_an_entry, change_the_manifest, exchange_files, change_a_size,
    change_bytes, write_garbage, change_a_tensor, change_a_place, change_a_node, change_a_type,
]  # fmt: skip


def seal(directory: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest with the sizes and hashes of the files as they are, so that nothing is refused for those."""
    records = [manifest.get("public_rows")]
    for spec in manifest["circuits"] if isinstance(manifest.get("circuits"), list) else []:
        records += [spec.get(key) for key in ("file", "data", "config")] if isinstance(spec, dict) else []
    for record in records:
        if isinstance(record, dict) and (path := directory / str(record.get("path"))).is_file():
            record.update(bytes=path.stat().st_size, sha256=file_sha256(path))
    (directory / MANIFEST).write_text(json.dumps(manifest))


def weight_in_the_files(bundle: WorkerBundle, name: str) -> np.ndarray:
    """Read the weight by onnx alone."""
    model = onnx.load(bundle.circuit_path(name))
    constants = {tensor.name: numpy_helper.to_array(tensor).astype(np.int64) for tensor in model.graph.initializer}
    digits = dict.fromkeys(node.input[1] for node in model.graph.node if node.op_type == "MatMulInteger")
    total: np.ndarray = sum(constants[digit] * 256**place for place, digit in enumerate(digits))  # type: ignore[assignment]
    return total


def check_served(bundle: WorkerBundle, engine: str) -> None:
    """Evaluate every circuit of an opened bundle, and compare with what its files say."""
    worker = Worker(bundle, engine)
    for name, spec in bundle.circuits.items():
        if bundle.has_public_rows and base_name(name) != name:
            exact, rows = worker.setup_product(base_name(name))
            assert exact == name and rows.shape[2] == spec.in_features and rows.sum() >= 0  # every byte is there
        if engine == "concrete" and name == KNOWN_ANSWER:
            continue  # of 38 147 weights
        tokens = 1 if engine == "concrete" else 5
        planes = extreme_planes(spec.upload_limbs, tokens, spec.in_features)
        reply = worker.engine.evaluate(name, planes)
        expected = encrypted_linear_reference(planes, weight_in_the_files(bundle, name), spec.reply_bits)
        if not np.array_equal(reply, expected):
            raise AssertionError(f"{name} is served wrongly")


def make_bundle(directory: Path, tiny: bool) -> None:
    """Write a bundle with weights in and beside their circuits, of one digit and two, and with exact forms."""
    wide = np.random.default_rng(3).integers(-32768, 32640, (9, 6), dtype=np.int16)
    linears = {"small": (extreme_weight(6, 4), 24, 16), "wide": (wide, 32, 16), "exact": (extreme_weight(300, 256), 15, 11)}
    linears |= {"large": (extreme_weight(300, 256, 1), 24, 16), "turned": (extreme_weight(256, 300), 16, 16)}
    if tiny:
        linears = {"exact": (extreme_weight(4, 3), 16, 8)}
    features = linears["exact"][0].shape[0]
    with WorkerBundleWriter(directory, PLAN_ID) as writer:
        for name, (weight, upload_bits, reply_bits) in linears.items():
            for direction, matrix in (("forward", weight), ("backward", weight.T)):
                circuit = f"{name}.{direction}"
                writer.add(LowerWorker()(encrypted_linear_model(matrix, upload_bits, reply_bits, circuit)).model)
                if name == "exact":
                    writer.add(LowerWorker()(encrypted_linear_model(matrix, 32, 32, f"{circuit}.exact")).model)
        writer.add_public_rows(_PublicRows(features), features)  # type: ignore[arg-type]
        writer.commit()


class _PublicRows:
    """Stand for a public matrix of six columns."""

    def __init__(self, rows: int) -> None:
        self.rows, self.params = rows, SimpleNamespace(lattice_dim=6)

    def coefficients(self, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(self.rows)
        return torch.arange(6 * start, 6 * stop, dtype=torch.int32).reshape(-1, 6) * 1_000_003


def main(engine: str, count: int) -> None:
    chance = random.Random(f"{engine} {count}")
    refused = served = 0
    with tempfile.TemporaryDirectory() as folder:
        good, mutated = Path(folder) / "good", Path(folder) / "mutated"
        make_bundle(good, engine == "concrete")
        check_served(WorkerBundle.open(good), engine)
        for number in range(count):
            shutil.rmtree(mutated, ignore_errors=True)
            shutil.copytree(good, mutated)
            manifest = json.loads((mutated / MANIFEST).read_text())
            changes = [chance.choice(CHANGES) for _ in range(chance.choice([1, 1, 1, 2, 3]))]
            print(f"{number}: {', '.join(change.__name__ for change in changes)}", flush=True)
            for change in changes:
                try:
                    change(chance, mutated, manifest)
                except Exception:  # what an earlier change has broken cannot be changed again
                    break
            seal(mutated, manifest)
            try:
                bundle = WorkerBundle.open(mutated)
            except InputError:
                refused += 1
                continue
            check_served(bundle, engine)
            served += 1
    print(json.dumps({"refused": refused, "served": served}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
