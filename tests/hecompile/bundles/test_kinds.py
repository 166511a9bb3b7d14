"""A directory given in place of a bundle: the error says what it is, what takes it, and which was probably meant."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hecompile.bundles.ckks import CkksPlan, open_worker, read_table
from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import BundleKind, explain_mix_up, kind_of
from hecompile.bundles.worker import WorkerBundle
from hecompile.errors import InputError


@pytest.fixture
def ckks(tmp_path: Path) -> Path:
    """What `hecompile ckks export` writes, as far as its kind is concerned: the files, empty."""
    for half, name in (("client", "embeddings.npy"), ("worker", "circuit.onnx")):
        (tmp_path / "ckks" / half).mkdir(parents=True)
        for file in ("plan.json", name):
            (tmp_path / "ckks" / half / file).touch()
    return tmp_path / "ckks"


def test_every_kind_is_known(build: Path, ckks: Path, tmp_path: Path) -> None:
    found = [kind_of(folder / half) for folder in (build, ckks) for half in ("client", "worker")]
    assert found == list(BundleKind)
    assert kind_of(build) is kind_of(ckks) is kind_of(tmp_path / "absent") is None
    assert explain_mix_up(build / "client", BundleKind.CLIENT) is None
    for text in ("[]", "{", '{"format": ["a"]}'):
        (tmp_path / "manifest.json").write_text(text)
        assert kind_of(tmp_path) is None


def said(opener: object, directory: Path) -> str:
    with pytest.raises(InputError) as caught:
        opener(directory)  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(directory), "HERE")


def test_a_ckks_bundle_names_the_commands_that_take_it(ckks: Path) -> None:
    client, worker = said(ClientBundle.open, ckks / "client"), said(WorkerBundle.open, ckks / "worker")
    assert client == (
        "HERE is a CKKS client bundle of `hecompile ckks export`, which `hecompile infer HERE --worker ADDRESS` takes; "
        "a client bundle is needed here: the directory `client` of what `hecompile export llama` wrote"
    )
    assert worker.startswith("HERE is a CKKS worker bundle of `hecompile ckks export`, which `hecompile ckks serve HERE ")
    assert said(ClientBundle.open, ckks).startswith("HERE/client is a CKKS client bundle")
    assert said(WorkerBundle.open, ckks).startswith("HERE/worker is a CKKS worker bundle")


def test_the_folder_of_both_halves_asks_whether_its_half_was_meant(build: Path, ckks: Path) -> None:
    assert said(ClientBundle.open, build) == "HERE is not a client bundle itself; did you mean HERE/client?"
    assert said(WorkerBundle.open, build) == "HERE is not a worker bundle itself; did you mean HERE/worker?"
    assert said(CkksPlan.read, ckks) == "HERE is not a CKKS client bundle itself; did you mean HERE/client?"
    assert said(open_worker, ckks) == "HERE is not a CKKS worker bundle itself; did you mean HERE/worker?"


def test_the_other_half_asks_whether_its_sibling_was_meant(build: Path, ckks: Path) -> None:
    assert said(ClientBundle.open, build / "worker").endswith(f"; did you mean {build / 'client'}?")
    assert said(WorkerBundle.open, build / "client").endswith(f"; did you mean {build / 'worker'}?")
    assert said(open_worker, ckks / "client").endswith(f"; did you mean {ckks / 'worker'}?")
    plan = CkksPlan("", "", {}, 3, False, 8, 259, 0, {})
    assert said(lambda directory: read_table(directory, plan), ckks / "worker").endswith(f"mean {ckks / 'client'}?")


def test_a_bundle_of_export_llama_given_to_ckks_names_its_commands(build: Path) -> None:
    assert "which `hecompile worker serve HERE` serves; a CKKS worker bundle" in said(open_worker, build / "worker")
    assert "which `hecompile train` and `hecompile infer` take; a CKKS" in said(CkksPlan.read, build / "client")


def test_a_directory_that_is_none_of_them_is_told_as_before(build: Path, tmp_path: Path) -> None:
    assert "HERE does not exist" in said(ClientBundle.open, tmp_path / "absent")
    shutil.copytree(build / "client", tmp_path / "client")
    (tmp_path / "client" / "manifest.json").write_text("[]")
    assert "is not the manifest of a client bundle" in said(ClientBundle.open, tmp_path / "client")
