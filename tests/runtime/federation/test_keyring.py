"""Keys between two messages of a round, in memory and in a directory: the same rights, once each."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest

from hecompile.errors import FederationError, InputError
from hecompile.runtime.federation.protocol.channels import Channels, Identity, check_advert
from hecompile.runtime.federation.protocol.keyring import DirectoryKeys, MemoryKeys, RoundKeys
from hecompile.runtime.federation.protocol.settings import RoundHeader
from tests.runtime.federation.conftest import make_world


@pytest.fixture(params=["memory", "directory"])
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> RoundKeys:
    return MemoryKeys() if request.param == "memory" else DirectoryKeys(tmp_path / "keys")


def header(number: int, nonce: int = 0) -> RoundHeader:
    """A header of round `number`, and of an adapter of its own."""
    terms = make_world(3, rounds=9).federation.terms
    return RoundHeader(
        federation="a" * 32, number=number, nonce=f"{nonce:032x}", agreement=terms.agreement, layout="0" * 64, mask="0" * 64,
        adapter=f"{number:064x}", coordinates=1,
    )  # fmt: skip


def test_each_right_is_used_once(keys: RoundKeys) -> None:
    round_3, names = header(3), ["a", "b"]
    begun = keys.begin(round_3).private_bytes_raw()
    assert keys.begin(round_3).private_bytes_raw() == begun
    assert keys.contribution(round_3, b"ctx") is None
    made = keys.contribute(round_3, b"ctx", lambda key: key.private_bytes_raw() + b"1")
    assert made == begun + b"1" == keys.contribution(round_3, b"ctx")
    assert keys.contribute(round_3, b"ctx", lambda key: b"2") == made
    for again in (
        lambda: keys.contribution(round_3, b"other"),
        lambda: keys.contribute(round_3, b"other", lambda key: b""),
        lambda: keys.confirm(round_3, b"other", names),
        lambda: keys.open(round_3, b"ctx", names, lambda key: b""),
    ):
        with pytest.raises(FederationError, match="once per round"):
            again()
    keys.confirm(round_3, b"ctx", names)
    given = keys.open(round_3, b"ctx", names, lambda key: key.private_bytes_raw() + b"s")
    assert given == begun + b"s" == keys.open(round_3, b"ctx", names, lambda key: b"other")
    for again in (
        lambda: keys.confirm(round_3, b"ctx", ["a", "c"]),
        lambda: keys.open(round_3, b"ctx", ["a", "c"], lambda key: b""),
        lambda: keys.begin(round_3),
    ):
        with pytest.raises(FederationError, match="once per round"):
            again()
    for old in (header(3, nonce=1), header(1)):
        with pytest.raises(FederationError, match="only grow"):
            keys.begin(old)


def test_a_new_round_forgets_an_unfinished_one(keys: RoundKeys) -> None:
    first = keys.begin(header(1)).private_bytes_raw()
    assert keys.begin(header(2)).private_bytes_raw() != first
    with pytest.raises(FederationError):
        keys.contribute(header(1), b"ctx", lambda key: b"")
    with pytest.raises(FederationError):
        keys.confirm(header(1), b"ctx", ["a", "b"])


def test_the_directory_outlives_the_process_and_is_private(tmp_path: Path) -> None:
    folder, names = tmp_path / "k", ["a", "b"]
    begun = DirectoryKeys(folder).begin(header(1)).private_bytes_raw()
    assert stat.S_IMODE((folder / "round-1.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "record.json").stat().st_mode) == 0o600
    assert DirectoryKeys(folder).contribute(header(1), b"ctx", lambda key: key.private_bytes_raw()) == begun
    DirectoryKeys(folder).confirm(header(1), b"ctx", names)
    with pytest.raises(FederationError, match="confirmed with other"):
        DirectoryKeys(folder).confirm(header(1), b"ctx", ["a", "c"])
    assert DirectoryKeys(folder).open(header(1), b"ctx", names, lambda key: b"share") == b"share"
    assert not (folder / "round-1.key").exists()
    DirectoryKeys(folder).finish()
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "record.json"]


def test_what_a_kill_leaves_half_done_is_done_again(tmp_path: Path) -> None:
    """Every step writes what it answers before it notes that it did."""
    keys = DirectoryKeys(tmp_path)
    keys.begin(header(1))
    (tmp_path / "round-1.key").unlink()  # killed between record and key: nothing was answered yet
    assert keys.begin(header(1)).private_bytes_raw() == keys.begin(header(1)).private_bytes_raw()
    (tmp_path / "round-1.contribution").write_bytes(b"never sent")
    assert keys.contribution(header(1), b"ctx") is None
    assert keys.contribute(header(1), b"ctx", lambda key: b"sent") == b"sent"


def test_damaged_and_earlier_records_are_named(tmp_path: Path) -> None:
    (tmp_path / "last-round").write_text("2\n")
    with pytest.raises(InputError, match="last-round is of a federation of an earlier release"):
        DirectoryKeys(tmp_path).begin(header(3))
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(InputError, match=r"record\.json is damaged"):
        DirectoryKeys(tmp_path).begin(header(3))


def test_a_round_with_a_new_process_for_every_message(tmp_path: Path) -> None:
    world = make_world(3, keys=lambda name: DirectoryKeys(tmp_path / name))
    result = world.federation.round(1, world.adapter, world.exchange)
    assert len(result.opened_by) == 3
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"lock", "record.json", "round-1.contribution", "round-1.share"}
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
    alice, key = Identity.generate("alice"), MemoryKeys().begin(header(1))
    public = key.public_key().public_bytes_raw()
    signature = alice.sign_advert(b"round 1", public)
    roster = {"alice": alice.public, "bob": alice.public}
    check_advert(roster, "alice", b"round 1", public, signature)
    for name, context in (("alice", b"round 2"), ("bob", b"round 1")):
        with pytest.raises(FederationError, match="not signed"):
            check_advert(roster, name, context, public, signature)
    with pytest.raises(FederationError, match="not in the roster"):
        check_advert(roster, "eve", b"round 1", public, signature)
    other = MemoryKeys().begin(header(1))
    publics = {"alice": public, "bob": other.public_key().public_bytes_raw(), "null": bytes(32)}
    sealed = Channels("alice", key, publics, b"round 1").seal("bob", b"share")
    assert Channels("bob", other, publics, b"round 1").unseal("alice", sealed) == b"share"
    for channels in (Channels("bob", other, publics, b"round 2"), Channels("alice", key, publics, b"round 1")):
        with pytest.raises(FederationError, match="forged, replayed"):
            channels.unseal("alice", sealed)
    with pytest.raises(FederationError, match="no usable key"):
        Channels("alice", key, publics, b"round 1").seal("null", b"share")
