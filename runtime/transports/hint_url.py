"""Fetch the files of hints from a web server, for plans whose hints are fetched: `<address>/<circuit>.npy`.

The folder `hints` of a worker bundle is static, and what is fetched is checked by its SHA-256, so any server will do, and
`http://` as well as `https://`.
"""

from __future__ import annotations

import http.client
import ssl
import time
import urllib.error
import urllib.request

import numpy as np

from hecompile.errors import WorkerError, WorkerUnavailableError
from hecompile.foreign import printable
from hecompile.runtime.transports.base import Answer
from hecompile.runtime.transports.replicas import RetryPolicy
from hecompile.runtime.wire.credentials import ClientCredentials


class HintFolder:
    """Ask a web server for hints.

    Args:
        address: `http://` or `https://` address of the folder.
        credentials: whose authority checks the server's certificate; by default the system's.
        timeout: seconds of silence after which a request counts as lost.
        policy: how often a request is sent.
    """

    def __init__(
        self, address: str, credentials: ClientCredentials, timeout: float, policy: RetryPolicy | None = None
    ) -> None:
        self._address, self._timeout, self._policy = address.rstrip("/"), timeout, policy or RetryPolicy()
        authority = credentials.authority
        secure = address.startswith("https://")
        self._context = (
            ssl.create_default_context(cadata=None if authority is None else authority.decode()) if secure else None
        )

    def hint(self, circuit: str, size: int) -> Answer:
        """See `hecompile.runtime.transports.Transport.hint`. The bytes of the files are counted, without HTTP's headers.

        Raises:
            WorkerUnavailableError: the server does not answer.
            WorkerError: it has no such file, or one of another size.
        """
        url = f"{self._address}/{circuit}.npy"
        for attempt in range(1, self._policy.attempts + 1):
            try:
                content = self._get(url, size)
                break
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {printable(error.reason)}"
                if error.code < 500:
                    raise WorkerError(
                        f"{url}: {reason}; serve the folder hints of this plan's worker bundle there"
                    ) from None
            except (OSError, http.client.HTTPException) as error:  # a URLError is an OSError
                reason = printable(str(getattr(error, "reason", None) or error or type(error).__name__))
            if attempt == self._policy.attempts:
                raise WorkerUnavailableError(f"{url} cannot be fetched: {reason} (asked {attempt} times)")
            time.sleep(self._policy.wait(attempt))
        if len(content) != size:
            more = " or more" if len(content) > size else ""
            raise WorkerError(f"{url} has {len(content)} bytes{more}; the hint of {circuit} has {size}")
        return Answer(np.frombuffer(content, dtype=np.uint8).reshape(1, 1, size), 0.0, len(url), size, self._address)

    def _get(self, url: str, size: int) -> bytearray:
        """Read a file, one byte more than wanted at most."""
        content = bytearray(size + 1)
        with urllib.request.urlopen(url, timeout=self._timeout, context=self._context) as answer:  # noqa: S310  checked by the recipe
            read = 0
            while read <= size and (part := answer.readinto(memoryview(content)[read:])):
                read += part
            if read <= size and answer.length:  # `readinto` ends silently where `read` raises
                raise http.client.IncompleteRead(b"", answer.length)
        del content[read:]
        return content
