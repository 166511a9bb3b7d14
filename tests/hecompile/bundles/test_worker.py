"""The worker bundle on disk: round trip, determinism, and every way in which it can be broken."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hecompile.bundles.worker import KNOWN_ANSWER, MANIFEST, WorkerBundle, known_answer_vector, known_answer_weight
from hecompile.compiler.worker_bundle_writer import WorkerBundleWriter
from hecompile.errors import InputError, LegalityError
from hecompile.passes.offload.lower_worker import LowerWorker
from hecompile.plan.encrypted_linear import encrypted_linear_model
from tests.support.bundles import PLAN_ID, write_bundle


def counting_weight(in_features: int, out_features: int) -> np.ndarray:
    """int8 [in, out] that depends on no random generator."""
    return (np.arange(in_features * out_features) * 37 % 256 - 128).astype(np.int8).reshape(in_features, out_features)


SMALL, LARGE = counting_weight(6, 4), counting_weight(300, 256)
LINEARS = {"layers.0.small": (SMALL, 24, 16), "layers.0.large": (LARGE, 32, 24)}
# SHA-256 over the names and contents of every file of the bundle above; changes with the format, and only then.
PINNED = "83df02ef864aa57397af1828c6053985f2b9dc54786890553d581e19dc8368a2"


def digest(directory: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            total.update(f"{path.relative_to(directory)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return total.hexdigest()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "worker", LINEARS)
    return tmp_path / "worker"


def test_round_trip(directory: Path) -> None:
    bundle = WorkerBundle.open(directory)
    assert bundle.plan_id == PLAN_ID
    assert list(bundle.circuits) == [
        "layers.0.small.forward",
        "layers.0.small.backward",
        "layers.0.large.forward",
        "layers.0.large.backward",
        KNOWN_ANSWER,
    ]
    spec = bundle.circuits["layers.0.large.backward"]
    assert (spec.linear, spec.direction) == ("layers.0.large", "backward")
    assert (spec.in_features, spec.out_features, spec.upload_limbs, spec.reply_bytes) == (256, 300, 4, 3)
    assert spec.data is not None and spec.data.bytes >= 300 * 256
    assert bundle.circuits["layers.0.small.forward"].data is None
    np.testing.assert_array_equal(bundle.weight("layers.0.large.forward"), LARGE)
    np.testing.assert_array_equal(bundle.weight("layers.0.large.backward"), LARGE.T)
    np.testing.assert_array_equal(bundle.weight("layers.0.small.backward"), SMALL.T)
    np.testing.assert_array_equal(bundle.weight(KNOWN_ANSWER), known_answer_weight(PLAN_ID))


def test_commit_returns_what_open_reads(tmp_path: Path) -> None:
    assert write_bundle(tmp_path / "worker", LINEARS) == WorkerBundle.open(tmp_path / "worker")


def test_bytes_are_deterministic_and_pinned(directory: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "again", LINEARS)
    assert digest(tmp_path / "again") == digest(directory) == PINNED


def test_known_answer_depends_on_the_plan_and_is_extreme() -> None:
    planes, expected = known_answer_vector(PLAN_ID)
    assert planes.shape == (4, 5, 1031) and expected.shape == (3, 5, 37)
    assert set(np.unique(planes)) == {0, 255}
    assert set(np.unique(known_answer_weight(PLAN_ID))) == {127, -127, -128}
    other_planes, other_expected = known_answer_vector(PLAN_ID[::-1])
    assert not np.array_equal(planes, other_planes) and not np.array_equal(expected, other_expected)


def edit_manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / MANIFEST
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return damage


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


ONNX, DATA = "circuits/layers.0.small.forward/1/model.onnx", "circuits/layers.0.large.backward/1/weight.bin"
CONFIG = "circuits/known_answer/config.pbtxt"
TAMPERINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda d: (d / MANIFEST).unlink(), "not a worker bundle: manifest.json is missing"),
    "cut manifest": (
        lambda d: (d / MANIFEST).write_bytes((d / MANIFEST).read_bytes()[:-30]),
        "manifest.json is damaged",
    ),
    "manifest of something else": (lambda d: (d / MANIFEST).write_text("[]"), "not the manifest of a worker bundle"),
    "long number in the manifest": (lambda d: (d / MANIFEST).write_text("7" * 5000), "manifest.json is damaged"),
    "deep manifest": (lambda d: (d / MANIFEST).write_text("[" * 100_000), "manifest.json is damaged"),
    "earlier version": (edit_manifest(lambda m: m.update(version=1)), "has version 1, this program reads 2 and 3"),
    "unknown field": (edit_manifest(lambda m: m.update(note="x")), "note: Extra inputs are not permitted"),
    "bad plan_id": (edit_manifest(lambda m: m.update(plan_id="xyz")), "plan_id: "),
    "text for a number": (edit_manifest(lambda m: m["circuits"][0].update(in_features="6")), "circuits.0.in_features"),
    "no known answer": (edit_manifest(lambda m: m["circuits"].pop()), "the circuit known_answer is missing"),
    "twice the same": (edit_manifest(lambda m: m["circuits"].append(m["circuits"][0])), "two circuits have one name"),
    "foreign path": (
        edit_manifest(lambda m: m["circuits"][0]["file"].update(path="../../etc/passwd")),
        "'../../etc/passwd' where circuits/layers.0.small.forward/1/model.onnx belongs",
    ),
    "missing circuit": (lambda d: (d / ONNX).unlink(), f"{ONNX} is damaged: it is missing"),
    "cut circuit": (lambda d: (d / ONNX).write_bytes((d / ONNX).read_bytes()[:-1]), f"{ONNX} is damaged: it has "),
    "flipped circuit": (lambda d: flip_a_bit(d / ONNX), f"{ONNX} is damaged: its SHA-256 is not the manifest's"),
    "missing config": (lambda d: (d / CONFIG).unlink(), f"{CONFIG} is damaged: it is missing"),
    "flipped config": (lambda d: flip_a_bit(d / CONFIG), f"{CONFIG} is damaged: its SHA-256 is not the manifest's"),
    "config left out": (
        edit_manifest(lambda m: m["circuits"][0].pop("config")),
        "layers.0.small.forward lacks its config",
    ),
    "missing weight": (lambda d: (d / DATA).unlink(), f"{DATA} is damaged: it is missing"),
    "flipped weight": (lambda d: flip_a_bit(d / DATA), f"{DATA} is damaged: its SHA-256 is not the manifest's"),
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_damage_is_refused_with_the_file_and_the_remedy(directory: Path, tampering: str) -> None:
    damage, message = TAMPERINGS[tampering]
    damage(directory)
    with pytest.raises(InputError) as caught:
        WorkerBundle.open(directory)
    assert message in str(caught.value)
    assert "compile" in str(caught.value)


@pytest.mark.parametrize("location", ["../../../../outside.bin", "/etc/hostname"])
def test_a_weight_outside_the_bundle_is_not_read(directory: Path, location: str) -> None:
    """Files may be exchanged after they were hashed: those of this process stay out of reach all the same."""
    bundle = WorkerBundle.open(directory)
    (directory.parent / "outside.bin").write_bytes(bytes(LARGE.size))
    path = bundle.circuit_path("layers.0.large.forward")
    model = onnx.load(path, load_external_data=False)
    places = [entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    assert len(places) == 1
    places[0].value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"refers to .*, outside the bundle; copy the bundle"):
        bundle.weight("layers.0.large.forward")


@pytest.mark.parametrize("damage", [lambda f: f.unlink(), lambda f: f.write_bytes(f.read_bytes()[:1000])])
def test_a_weight_that_went_after_the_bundle_was_opened_is_named(directory: Path, damage: Callable[[Path], object]) -> None:
    bundle = WorkerBundle.open(directory)
    damage(directory / DATA)
    with pytest.raises(InputError, match=rf"{re.escape(DATA)} cannot be read \(.*\); copy the worker bundle again"):
        bundle.weight("layers.0.large.backward")


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent does not exist; give the directory `worker`"):
        WorkerBundle.open(tmp_path / "absent")


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path) -> None:
    model = LowerWorker()(encrypted_linear_model(SMALL, 24, 16, "a.forward")).model
    with pytest.raises(RuntimeError, match="out of luck"), WorkerBundleWriter(tmp_path / "worker", PLAN_ID) as writer:
        writer.add(model)
        raise RuntimeError("out of luck")
    assert list(tmp_path.iterdir()) == []


def test_a_full_directory_is_not_overwritten(directory: Path) -> None:
    before = digest(directory)
    with pytest.raises(InputError, match="exists already; remove it or choose another"):
        WorkerBundleWriter(directory, PLAN_ID)
    assert digest(directory) == before


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write worker bundle"):
        WorkerBundleWriter(tmp_path / "file" / "worker", PLAN_ID)


@pytest.mark.parametrize("plan_id", ["", "0123", "0123456X", "ABCDEF0123"])
def test_writer_refuses_a_plan_id_that_is_not_hex(tmp_path: Path, plan_id: str) -> None:
    with pytest.raises(InputError, match="lowercase hex digits"):
        WorkerBundleWriter(tmp_path / "worker", plan_id)


@pytest.mark.parametrize("name", ["a.sideways", "forward", ".forward", "../a.forward", "a b.forward", KNOWN_ANSWER])
def test_writer_refuses_a_circuit_name(tmp_path: Path, name: str) -> None:
    model = LowerWorker()(encrypted_linear_model(SMALL, 24, 16, name)).model
    with WorkerBundleWriter(tmp_path / "worker", PLAN_ID) as writer, pytest.raises(LegalityError, match="circuit name"):
        writer.add(model)


def test_writer_refuses_a_circuit_twice_or_not_lowered(tmp_path: Path) -> None:
    model = encrypted_linear_model(SMALL, 24, 16, "a.forward")
    with WorkerBundleWriter(tmp_path / "worker", PLAN_ID) as writer:
        with pytest.raises(LegalityError, match=r"is hecompile\.EncryptedLinear; a worker runs only"):
            writer.add(model)
        writer.add(LowerWorker()(model).model)
        with pytest.raises(LegalityError, match=r"a\.forward is in the bundle already"):
            writer.add(model)
