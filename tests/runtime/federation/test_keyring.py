"""Keys between two messages of a round, in memory and in a directory: the same rights, once each."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest

from hecompile.errors import FederationError, InputError
from hecompile.runtime.federation.protocol.channels import Channels, Identity, check_advert
from hecompile.runtime.federation.protocol.keyring import DirectoryKeys, MemoryKeys, RoundKeys
from tests.runtime.federation.conftest import make_world


@pytest.fixture(params=["memory", "directory"])
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> RoundKeys:
    return MemoryKeys() if request.param == "memory" else DirectoryKeys(tmp_path / "keys")


def test_each_right_is_used_once(keys: RoundKeys) -> None:
    begun = keys.begin(3).private_bytes_raw()
    assert keys.contribute(3).private_bytes_raw() == begun
    with pytest.raises(FederationError, match="contributed to before"):
        keys.contribute(3)
    assert keys.take(3).private_bytes_raw() == begun
    for again in (keys.take, keys.contribute):
        with pytest.raises(FederationError, match="once per round"):
            again(3)
    for old in (3, 1):
        with pytest.raises(FederationError, match="only grow"):
            keys.begin(old)


def test_a_new_round_forgets_an_unfinished_one(keys: RoundKeys) -> None:
    first = keys.begin(1).private_bytes_raw()
    assert keys.begin(2).private_bytes_raw() != first
    for use in (keys.contribute, keys.take):
        with pytest.raises(FederationError):
            use(1)


def test_the_directory_outlives_the_process_and_is_private(tmp_path: Path) -> None:
    begun = DirectoryKeys(tmp_path / "k").begin(1).private_bytes_raw()
    assert stat.S_IMODE((tmp_path / "k/round-1.key").stat().st_mode) == 0o600
    assert DirectoryKeys(tmp_path / "k").take(1).private_bytes_raw() == begun
    with pytest.raises(FederationError):
        DirectoryKeys(tmp_path / "k").take(1)
    assert sorted(path.name for path in (tmp_path / "k").iterdir()) == ["last-round"]


def test_a_round_with_a_new_process_for_every_message(tmp_path: Path) -> None:
    world = make_world(3, keys=lambda name: DirectoryKeys(tmp_path / name))
    result = world.federation.round(1, world.adapter, world.exchange)
    assert len(result.opened_by) == 3
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"last-round", "round-1.contributed"}
    assert np.isfinite(result.mean).all()


def test_an_identity_is_made_once_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "owner/identity.key"
    first = Identity.load_or_create("a", path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load_or_create("a", path).public == first.public
    path.write_bytes(b"short")
    with pytest.raises(InputError, match="no identity key"):
        Identity.load_or_create("a", path)


def test_signatures_and_seals_are_bound_to_name_and_round() -> None:
    alice, key = Identity.generate("alice"), MemoryKeys().begin(1)
    public = key.public_key().public_bytes_raw()
    signature = alice.sign_advert(b"round 1", public)
    roster = {"alice": alice.public, "bob": alice.public}
    check_advert(roster, "alice", b"round 1", public, signature)
    for name, context in (("alice", b"round 2"), ("bob", b"round 1")):
        with pytest.raises(FederationError, match="not signed"):
            check_advert(roster, name, context, public, signature)
    with pytest.raises(FederationError, match="not in the roster"):
        check_advert(roster, "eve", b"round 1", public, signature)
    other = MemoryKeys().begin(1)
    publics = {"alice": public, "bob": other.public_key().public_bytes_raw(), "null": bytes(32)}
    sealed = Channels("alice", key, publics, b"round 1").seal("bob", b"share")
    assert Channels("bob", other, publics, b"round 1").unseal("alice", sealed) == b"share"
    for channels in (Channels("bob", other, publics, b"round 2"), Channels("alice", key, publics, b"round 1")):
        with pytest.raises(FederationError, match="forged, replayed"):
            channels.unseal("alice", sealed)
    with pytest.raises(FederationError, match="no usable key"):
        Channels("alice", key, publics, b"round 1").seal("null", b"share")
