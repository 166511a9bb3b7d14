"""Name the files of hints: `hints/<circuit>.npy`, in the client bundle or, where they are fetched, in the worker's.

A hint is public: the product of public weights and the public matrix. Where the worker's bundle has them, the client's
manifest has the SHA-256 of each, so that whoever serves the files can at most not serve them. The folder is static: any web
server can serve it as well.

This module is the worker's too: it knows nothing of what is in the files.
"""

from __future__ import annotations

HINTS = "hints"


def hint_path(circuit: str) -> str:
    """Return the path of a circuit's hint, relative to the bundle."""
    return f"{HINTS}/{circuit}.npy"
