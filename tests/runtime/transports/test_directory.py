"""Whatever is asked for a fleet's directory, the error is one of a worker and names the address."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hecompile.errors import InputError, WorkerError, WorkerUnavailableError
from hecompile.runtime.recipes.workplace import make_workplace
from hecompile.runtime.transports import directory
from hecompile.runtime.transports.directory import fetch_workers

OK = b"HTTP/1.1 200 OK\r\n"


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """Listen, read one request, send `answer` and close; yields the address as http://."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/workers"
        thread.join(5.0)


def document(content: object) -> bytes:
    body = json.dumps(content).encode()
    return OK + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_the_addresses_are_returned() -> None:
    with answering(document({"workers": ["tcp://10.0.0.7:7700"]})) as url:
        assert fetch_workers(url) == ["tcp://10.0.0.7:7700"]


@pytest.mark.parametrize(
    "answer",
    [
        b"HEC1\x00\x00\x00\x10 a frame\r\n\r\n",  # a worker's frame
        b"HTTP/1.1 abc\r\n\r\n",
        OK + b"x" * 100_000 + b"\r\n\r\n",
        OK + b"h: 1\r\n" * 1000 + b"\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        OK + b"\r\n<html>",
        document(["workers"]),
        document({"workers": [1]}),
        document({"workers": ["somewhere"]}),
        b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\n\r\n",
        OK + b"Content-Length: 100\r\n\r\n{}",
        b"",
    ],
)  # fmt: skip
def test_any_other_answer_is_an_error_of_a_worker(answer: bytes) -> None:
    with answering(answer) as url, pytest.raises(WorkerError) as raised:
        fetch_workers(url)
    assert url in str(raised.value)


@pytest.mark.parametrize(
    "url", ["http://", "http://127.0.0.1:port", "http://127.0.0.1:99999", "http://[::1", "http://a b/", "http://ä\x00"]
)
def test_an_address_that_is_none_is_an_error_of_a_worker(url: str) -> None:
    with pytest.raises(WorkerError, match="director"):
        fetch_workers(url)


def test_nobody_there_may_be_asked_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(WorkerUnavailableError, match=url):
        fetch_workers(url)


@pytest.mark.parametrize("begin", [b"", OK, OK + b"Content-Length: 1000000\r\n\r\n"], ids=["status", "header", "body"])
def test_an_answer_that_drips_is_given_up(begin: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, and the whole never would."""
    monkeypatch.setattr(directory, "OVERALL_SECONDS", 0.2)
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(begin)
                while not done.wait(0.01):
                    connection.sendall(b"x")

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/workers"
        with pytest.raises(WorkerUnavailableError, match=f"{url} does not answer: it answers too slowly"):
            fetch_workers(url)
        done.set()
        thread.join(5.0)


def test_the_error_of_an_address_names_every_scheme() -> None:
    with pytest.raises(InputError, match=r"tcp://.*http:// or https://"):
        make_workplace({"model": "m", "worker": "somewhere"})
    with pytest.raises(InputError, match="stands alone"):
        make_workplace({"model": "m", "worker": ["http://a/workers", "tcp://a:1"]})
