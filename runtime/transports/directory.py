"""Fetch the addresses of a fleet's workers, a small JSON document over HTTP; asked again after a failure.

    GET  →  {"plan_id": "...", "workers": ["flight://10.0.0.7:40001", ...]}

It names addresses and nothing else. Trust is settled with each worker (certificate, token, known answers, verified replies),
so that a directory that lies can only point at nobody.
"""

from __future__ import annotations

import http.client
import ssl
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import Future

from hecompile.errors import InputError, WorkerError, WorkerUnavailableError
from hecompile.foreign import parse_json, printable
from hecompile.runtime.wire.address import parse_address
from hecompile.runtime.wire.credentials import ClientCredentials

TIMEOUT_SECONDS, MAX_BYTES, MAX_WORKERS = 10.0, 1 << 20, 4096
OVERALL_SECONDS = 30.0
"""Most seconds for connecting, a TLS handshake and an answer together; between its bytes TIMEOUT_SECONDS may pass."""
_MEANT = "give the address that `hecompile worker deploy` printed"


def fetch_workers(url: str, credentials: ClientCredentials | None = None) -> list[str]:
    """Return the addresses that the directory at `url` lists.

    Raises:
        WorkerUnavailableError: it does not answer.
        WorkerError: it answers something else.
    """
    content = _fetch_in_time(url, credentials)
    try:
        workers = parse_json(content)["workers"] if len(content) <= MAX_BYTES else None
    except (ValueError, TypeError, KeyError):
        workers = None
    if not isinstance(workers, list) or len(workers) > MAX_WORKERS or not all(isinstance(worker, str) for worker in workers):
        raise _no_directory(url)
    try:
        for worker in workers:
            parse_address(worker)
    except InputError as error:
        raise WorkerError(f"the directory {url} lists an address that is none: {printable(error)}") from None
    return workers


def _fetch_in_time(url: str, credentials: ClientCredentials | None) -> bytes:
    """Fetch in a thread of its own: urllib has no limit on the whole. One that is left behind ends with its connection."""
    content: Future[bytes] = Future()

    def fetch() -> None:
        try:
            content.set_result(_fetch(url, credentials))
        except BaseException as error:  # raised again where it is waited for
            content.set_exception(error)

    threading.Thread(target=fetch, daemon=True).start()
    try:
        return content.result(OVERALL_SECONDS)
    except TimeoutError:
        raise WorkerUnavailableError(f"the directory of workers {url} does not answer: it answers too slowly") from None


def _fetch(url: str, credentials: ClientCredentials | None) -> bytes:
    """Return what the address answers, cut after `MAX_BYTES`. Raises as `fetch_workers` does, whatever is there."""
    try:
        context = None
        if url.startswith("https://"):
            authority = credentials.authority if credentials is not None else None
            context = ssl.create_default_context(cadata=None if authority is None else authority.decode())
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS, context=context) as answer:  # noqa: S310  checked by the recipe
            return _read(answer)
    except urllib.error.HTTPError as error:
        reason = f"{error.code} {error.reason}; {_MEANT}"
    except http.client.IncompleteRead:
        reason = "its answer was cut off"
    except OSError as error:  # a URLError is one
        reason = str(getattr(error, "reason", None) or error or type(error).__name__)
    except Exception:  # what is there speaks no HTTP, or the address is none: urllib has many kinds of errors for that
        raise _no_directory(url) from None
    raise WorkerUnavailableError(f"the directory of workers {url} does not answer: {printable(reason)}")


def _read(answer: http.client.HTTPResponse) -> bytes:
    """Read an answer, no more than is looked at.

    Raises TimeoutError for one that comes too slowly, IncompleteRead for one that is cut off.
    """
    deadline, content = time.monotonic() + TIMEOUT_SECONDS, b""
    while len(content) <= MAX_BYTES and (part := answer.read1(MAX_BYTES)):
        content += part
        if time.monotonic() > deadline:
            raise TimeoutError("it answers too slowly")
    if len(content) <= MAX_BYTES and answer.length:  # `read1` ends silently where `read` raises
        raise http.client.IncompleteRead(content, answer.length)
    return content


def _no_directory(url: str) -> WorkerError:
    return WorkerError(
        f"{url} is not the directory of a fleet: {_MEANT}; a single worker's address begins with the scheme that it listens "
        "on, as tcp:// or flights://"
    )
