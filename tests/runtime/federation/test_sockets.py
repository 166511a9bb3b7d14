"""Real sockets: who may connect, who is left out, and what the others notice."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from hecompile.errors import FederationError, InputError
from hecompile.runtime.federation import sockets
from hecompile.runtime.federation.protocol.channels import Identity
from hecompile.runtime.federation.protocol.messages import Finished, Message
from hecompile.runtime.federation.protocol.participant import Participant
from hecompile.runtime.federation.sockets import FederationServer, longest_silence, take_part
from tests.runtime.federation.conftest import World, make_world


def owners(world: World, address: str, names: list[str]) -> tuple[list[threading.Thread], dict[str, object]]:
    ends: dict[str, object] = {}

    def run(name: str) -> None:
        try:
            ends[name] = take_part(world.participants[name], world.identities[name], address)
        except FederationError as error:
            ends[name] = error

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    return threads, ends


class Dying(Participant):
    """Closes its connection in the place of an answer of one kind."""

    dies_at = "start"

    def answer_or_refuse(self, message: Message) -> Message:
        if message.kind == self.dies_at:
            raise OSError("killed")
        return super().answer_or_refuse(message)


def make_dying(world: World, name: str, at: str) -> None:
    world.participants[name].__class__ = Dying
    world.participants[name].dies_at = at  # type: ignore[attr-defined]


@pytest.mark.parametrize("at", ["start", "opening"])
def test_a_federation_goes_on_without_an_owner_that_is_gone(at: str) -> None:
    world = make_world(4, rounds=2, threshold=3)
    make_dying(world, "owner-3", at)
    with FederationServer(world.federation.terms.roster, reply_timeout=20) as server:
        threads, ends = owners(world, server.address, list(world.participants))
        server.wait_for(4, 10)
        results = []
        final = world.federation.run(world.adapter, server, lambda number, result: results.append(result))
        for thread in threads:
            thread.join(10)
    assert [len(result.contributors) for result in results] == ([3, 3] if at == "start" else [4, 3])
    assert len(results[0].opened_by) == 3
    assert isinstance(ends["owner-3"], FederationError)
    for name in ("owner-0", "owner-1", "owner-2"):
        end = ends[name]
        assert isinstance(end, Finished) and np.array_equal(np.frombuffer(end.adapter, "<f4"), final)


def test_a_silent_owner_is_left_out_and_its_late_answer_is_not_mistaken(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(3, rounds=2, threshold=2)
    released, slow = threading.Event(), world.participants["owner-2"]
    original: Callable[[Message], Message] = slow.answer_or_refuse
    first = iter([True])

    def dawdle(message: Message) -> Message:
        if message.kind == "start" and next(first, False):
            released.wait(20)
        return original(message)

    monkeypatch.setattr(slow, "answer_or_refuse", dawdle)
    with FederationServer(world.federation.terms.roster, reply_timeout=1.5) as server:
        threads, ends = owners(world, server.address, list(world.participants))
        server.wait_for(3, 10)
        results = []

        def report(number: int, result: object) -> None:
            results.append(result)
            released.set()

        world.federation.run(world.adapter, server, report)
        for thread in threads:
            thread.join(10)
    assert results[0].contributors == ("owner-0", "owner-1")  # type: ignore[attr-defined]
    assert all(isinstance(end, Finished) for end in ends.values())


@contextmanager
def playing_server(drips: bytes, silent_from_the_start: bool = False) -> Iterator[str]:
    """Serve as a federation that says the beginning of a message, a byte now and then, and nothing else."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(os.urandom(3 if silent_from_the_start else 32))
                for octet in drips:
                    over.wait(0.05)
                    connection.sendall(bytes([octet]))
                over.wait(30)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        over.set()
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("what", ["silent", "slow", "no challenge"])
def test_an_owner_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    world = make_world(3)
    monkeypatch.setattr(sockets, "_SLOW_SECONDS", 0.3)
    drips = (5).to_bytes(8, "little") + (1 << 20).to_bytes(8, "little") + bytes(600)
    expected = "no federation answers at .* within 0.3 s" if what == "no challenge" else "said nothing for 0.3 s, or began"
    start = time.monotonic()
    with playing_server(drips if what == "slow" else b"", what == "no challenge") as address:
        participant, identity = world.participants["owner-0"], world.identities["owner-0"]
        with pytest.raises(FederationError, match=expected):
            take_part(participant, identity, address, timeout=0.3 if what == "no challenge" else 30, silence=0.3)
    assert time.monotonic() - start < 20  # the bytes alone would take 30 seconds
    assert longest_silence(600) == 180 + 4 * 600


def test_a_server_does_not_wait_for_an_owner_that_takes_nothing() -> None:
    world = make_world(3)
    identity = world.identities["owner-0"]
    with FederationServer(world.federation.terms.roster, reply_timeout=0.3) as server:
        host, _, port = server.address.removeprefix("tcp://").rpartition(":")
        with socket.create_connection((host, int(port))) as connection:
            hello = identity.sign_hello(b"hecompile/federation/hello/1" + connection.recv(32)) + b"owner-0"
            connection.sendall((0).to_bytes(8, "little") + len(hello).to_bytes(8, "little") + hello)
            assert server.wait_for(1, 10) == ["owner-0"]
            assert server({"owner-0": Finished(adapter=bytes(1 << 26), rounds=1)}) == {}
            with pytest.raises(FederationError, match="0 of 1 owners"):
                server.wait_for(1, 0.1)


def test_strangers_and_impostors_are_refused() -> None:
    world = make_world(3)
    with FederationServer(world.federation.terms.roster) as server:
        for identity in (Identity.generate("eve"), Identity.generate("owner-0")):
            with pytest.raises(FederationError, match="broke"):
                take_part(world.participants["owner-0"], identity, server.address)
        with pytest.raises(FederationError, match="0 of 3 owners"):
            server.wait_for(3, 0.1)


def test_garbage_does_not_stop_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(3, rounds=1)
    with FederationServer(world.federation.terms.roster, reply_timeout=20) as server:
        host, _, port = server.address.removeprefix("tcp://").rpartition(":")
        for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(garbage)
        threads, ends = owners(world, server.address, list(world.participants))
        server.wait_for(3, 10)
        world.federation.run(world.adapter, server)
        for thread in threads:
            thread.join(10)
    assert all(isinstance(end, Finished) for end in ends.values())


def test_only_loopback_and_only_a_server() -> None:
    with pytest.raises(InputError, match="no TLS"):
        FederationServer({}, host="0.0.0.0")
    world = make_world(3)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with pytest.raises(FederationError, match="no federation answers"):
        take_part(world.participants["owner-0"], world.identities["owner-0"], f"tcp://127.0.0.1:{port}")
    with pytest.raises(FederationError, match="no federation answers"):
        take_part(world.participants["owner-0"], world.identities["owner-0"], "nonsense")
    assert sockets.MAX_BYTES == 2**30
