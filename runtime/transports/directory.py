"""Fetch the addresses of a fleet's workers, a small JSON document over HTTP; asked again after a failure.

    GET  →  {"plan_id": "...", "workers": ["flight://10.0.0.7:40001", ...]}

It names addresses and nothing else. Trust is settled with each worker (certificate, token, known answers, verified replies),
so that a directory that lies can only point at nobody.
"""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request

from hecompile.errors import InputError, WorkerError, WorkerUnavailableError
from hecompile.runtime.wire.address import parse_address
from hecompile.runtime.wire.credentials import ClientCredentials

TIMEOUT_SECONDS, MAX_BYTES = 10.0, 1 << 20


def fetch_workers(url: str, credentials: ClientCredentials | None = None) -> list[str]:
    """Return the addresses that the directory at `url` lists.

    Raises:
        WorkerUnavailableError: it does not answer.
        WorkerError: it answers something else.
    """
    context = None
    if url.startswith("https://"):
        authority = credentials.authority if credentials is not None else None
        context = ssl.create_default_context(cadata=None if authority is None else authority.decode())
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS, context=context) as answer:  # noqa: S310  checked by the recipe
            content = answer.read(MAX_BYTES + 1)
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise WorkerUnavailableError(f"the directory of workers {url} does not answer: {reason}") from None
    try:
        workers = json.loads(content)["workers"] if len(content) <= MAX_BYTES else None
    except (ValueError, TypeError, KeyError, RecursionError):
        workers = None
    if not isinstance(workers, list) or not all(isinstance(worker, str) for worker in workers):
        raise WorkerError(f"{url} is not the directory of a fleet: give the address that `hecompile worker deploy` printed")
    try:
        for worker in workers:
            parse_address(worker)
    except InputError as error:
        raise WorkerError(f"the directory {url} lists an address that is none: {error}") from None
    return workers
