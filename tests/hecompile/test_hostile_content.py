"""Every reader of what others wrote raises an error of this project and nothing else, and takes little memory for it."""

from __future__ import annotations

import hashlib
import http.server
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from hecompile.array_files import map_npy, read_npy
from hecompile.bundles.ckks import CkksPlan, open_worker, read_table
from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CIRCUIT, MANIFEST, PLAN, TABLE
from hecompile.bundles.public_rows import open_public_rows
from hecompile.bundles.worker import WorkerBundle
from hecompile.errors import HecompileError, WorkerError
from hecompile.foreign import finite, parse_json, printable
from hecompile.he.check_store import CheckStore
from hecompile.he.hints import HintStore
from hecompile.he.parameters import LinearParameters
from hecompile.runtime.ckks import messages
from hecompile.runtime.federation.protocol.messages import from_bytes
from hecompile.runtime.federation.roster import read_roster
from hecompile.runtime.recipes.document import load_document
from hecompile.runtime.recipes.training import Recipe
from hecompile.runtime.transports.directory import fetch_workers
from hecompile.runtime.wire import framing, protocol
from hecompile.runtime.wire.framing import Frame
from hecompile.runtime.worker.servers.fleet import load_fleet


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


CONTENT = {
    "nothing": b"",
    "zeros": bytes(100),
    "not UTF-8": b"\xff\xfe\x00{",
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "an endless number": b'{"format": ' + b"9" * 5000 + b"}",
    "a number of 400 digits": b'{"seconds": ' + b"9" * 400 + b', "version": ' + b"9" * 400 + b"}",
    "a lone surrogate": b'{"format": "\\ud83d", "name": "\\ud83d"}',
    "null": b"null",
    "a list": b"[1, 2]",
    "not a number": b'{"format": NaN, "version": Infinity}',
    "a date of month 13": b"bundle: 2001-13-45",
    "an alias of itself": b"bundle: &a [*a]",
    "an unknown tag": b"bundle: !!python/object/apply:os.system [true]",
    "a tab": b"bundle:\n\t- x",
    "an archive": b"PK\x03\x04" + bytes(40),
    "an array below nothing": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-8, 2), }\n"),
    "an array beyond everything": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 8), }\n"),
    "an array of a terabyte": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }\n"),
    "an array of objects": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n") + b"cos\nsystem\n",
    "an array whose header ends": npy("{'descr': '<f4', 'fortran"),
    "an array of words": npy("{'descr': '<f4', 'fortran_order': False, 'shape': ('a',), }\n"),
    "an array of nothing": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0,), }\n"),
    "an array that is none": npy("[" * 5000),
    "many empty nodes": b"\x3a\x00" * 100_000,
}


def _at(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    """Read the content as a file of that name, by a function of its folder."""

    def attempt(content: bytes, folder: Path) -> object:
        (folder / name).write_bytes(content)
        return read(folder)

    return attempt


def _ckks_message(content: bytes, folder: Path) -> object:
    near, far = socket.socketpair()
    with near, far:
        threading.Thread(target=framing.send_frame, args=(far, Frame(content))).start()
        near.settimeout(30)
        return messages.receive(near, 1 << 20)


def _hints(folder: Path) -> object:
    store = HintStore.__new__(HintStore)
    store.directory = folder
    return store._open("a")


def _ckks_plan(plan_id: str = "p") -> CkksPlan:
    return CkksPlan("m", plan_id, {"ring_dim": 8192}, 3, False, 8, 259, 4, {})


def _ckks_worker(folder: Path) -> object:
    """Open a circuit that is the one of its plan."""
    content = (folder / CIRCUIT).read_bytes() + json.dumps({"ring_dim": 8192}).encode()
    _ckks_plan(hashlib.sha256(content).hexdigest()).write(folder)
    return open_worker(folder)


LINEAR = LinearParameters(6, 2, max_l1=500, max_l2=250.0)
READERS: dict[str, Callable[[bytes, Path], object]] = {
    "worker bundle": _at(MANIFEST, WorkerBundle.open),
    "client bundle": _at(MANIFEST, ClientBundle.open),
    "polynomial plan": _at(PLAN, CkksPlan.read),
    "polynomial worker": _at(CIRCUIT, _ckks_worker),
    "embeddings": _at(TABLE, lambda folder: read_table(folder, _ckks_plan())),
    "public rows": _at("rows.npy", lambda folder: open_public_rows(folder / "rows.npy")),
    "check vectors": _at("a.npy", lambda folder: CheckStore(folder).checks("a", LINEAR)),
    "hints": _at("a.npy", _hints),
    "roster": _at("roster.json", lambda folder: read_roster(folder / "roster.json")),
    "fleet": _at("fleet.yaml", lambda folder: load_fleet(folder / "fleet.yaml")),
    "recipe": _at("recipe.yaml", lambda folder: load_document(folder / "recipe.yaml", (), Recipe, lambda *_: None)),
    "request": lambda content, _: protocol.decode_request(Frame(content)),
    "reply": lambda content, _: protocol.decode_reply(Frame(content)),
    "CKKS message": _ckks_message,
    "federation": lambda content, _: from_bytes(len(content).to_bytes(8, "little") + content),
    "federation, bare": lambda content, _: from_bytes(content),
}


@pytest.mark.parametrize("reader", READERS)
def test_hostile_content_is_refused_by_an_error_of_ours(reader: str, tmp_path: Path) -> None:
    before = psutil.Process().memory_info().rss
    for name, content in CONTENT.items():
        folder = tmp_path / name
        folder.mkdir()
        try:
            READERS[reader](content, folder)
        except HecompileError as error:
            assert "\n" not in str(error) and str(error).isprintable(), (name, str(error))
            assert len(str(error)) < 2500, (name, len(str(error)))
        else:
            pytest.fail(f"{reader} takes {name}")
    assert psutil.Process().memory_info().rss - before < 256 << 20


@pytest.mark.parametrize("digits", ["9" * 400, "-" + "9" * 400, "1e400", "NaN", "true", '"1"', "-1"])
def test_seconds_that_are_none_are_refused(digits: str) -> None:
    header = f'{{"kind": "evaluate", "id": 1, "shape": [1, 1, 1], "seconds": {digits}}}'
    with pytest.raises(WorkerError, match="seconds is no number"):
        protocol.decode_reply(Frame(header.encode(), b"x"))


@pytest.mark.parametrize("field", ["id", "protocol"])
def test_integers_of_more_than_64_bits_are_refused(field: str) -> None:
    fields = {"kind": "hello", "id": 1, "plan_id": "abcdef01", "protocol": 1} | {field: 10**400}
    with pytest.raises(WorkerError, match=f"{field} is no integer of 64 bits"):
        protocol.decode_request(Frame(json.dumps(fields).encode()))


def test_names_of_circuits_are_checked() -> None:
    fields = {"kind": "hello", "id": 1, "plan_id": "abcdef01", "protocol": 1, "engine": "e"}
    for name in ("\x1b[2J", "x" * 300, ""):
        with pytest.raises(WorkerError, match="circuits is not 1 to 256 printable"):
            protocol.decode_reply(Frame(json.dumps(fields | {"circuits": {name: [1, 1, 1, 1]}}).encode()))


def test_the_text_of_a_ckks_peer_is_made_safe() -> None:
    near, far = socket.socketpair()
    with near, far:
        messages.send(far, "error", message="red \x1b[31m\r\n" + "x" * 5000)
        with pytest.raises(WorkerError) as caught:
            messages.receive(near, 0)
    assert str(caught.value).isprintable() and "red ?[31m??xxx" in str(caught.value) and len(str(caught.value)) < 1100


def test_text_and_numbers_of_others() -> None:
    assert printable("a\x00\x1b\u202e\ud83dz\n") == "a????z?"
    assert printable("x" * 5000) == "x" * 1000 and printable(None) == "None"
    assert [finite(value) for value in (1, 2.5, 10**400, float("nan"), True, "1", None)] == [1.0, 2.5] + [None] * 5
    assert parse_json(b'{"a": 1}') == {"a": 1}


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8])
def test_arrays_are_read_as_they_were_written(tmp_path: Path, dtype: type) -> None:
    array = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    np.save(tmp_path / "a.npy", array)
    mapped = map_npy(tmp_path / "a.npy")
    assert mapped.dtype == dtype and not mapped.flags.writeable
    np.testing.assert_array_equal(mapped, array)
    assert read_npy(tmp_path / "a.npy").flags.writeable
    np.save(tmp_path / "f.npy", np.asfortranarray(array))
    with pytest.raises(ValueError, match="C order"):
        map_npy(tmp_path / "f.npy")


@pytest.fixture
def answering() -> Iterator[Callable[[bytes], str]]:
    """Serve one answer, as raw bytes, to each who connects."""
    listeners = []

    def serve(content: bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def run() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(content)

        threading.Thread(target=run, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/workers"

    yield serve
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize(
    "content",
    [
        b"SSH-2.0-OpenSSH\r\n", b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", b"HTTP/1.1 999 \x1b[31m\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 500 + b"\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000, b'HTTP/1.1 200 OK\r\n\r\n{"workers": ["\x01bad"]}',
        b'HTTP/1.1 200 OK\r\n\r\n{"workers": ["tcp://\\u001b[2J"]}', b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (1 << 21),
        b'HTTP/1.1 200 OK\r\n\r\n{"workers": [' + b'"tcp://127.0.0.1:1", ' * 5000 + b'"tcp://127.0.0.1:1"]}',
    ],
)  # fmt: skip
def test_a_directory_that_is_none_is_an_error_of_ours(answering: Callable[[bytes], str], content: bytes) -> None:
    with pytest.raises(WorkerError) as caught:
        fetch_workers(answering(content))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1500


def test_a_directory_is_read() -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"plan_id": "x", "workers": ["tcp://127.0.0.1:1"]}')

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert fetch_workers(f"http://127.0.0.1:{server.server_port}") == ["tcp://127.0.0.1:1"]
