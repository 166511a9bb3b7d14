"""Keep identities and the roster of a federation as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hecompile.errors import FederationError, InputError
from hecompile.files import missing_path_hint, read_whole, reason_of
from hecompile.foreign import parse_json
from hecompile.runtime.federation.protocol.channels import Identity, Roster

IDENTITY_FILE = "identity.key"
PUBLIC_KEY_BYTES = 32
_MOST_BYTES = 1 << 20


def own_identity(name: str, folder: Path) -> Identity:
    """Return the identity in an owner's private folder, made there if it has none. Raises InputError for a damaged one."""
    return Identity.load_or_create(name, folder / IDENTITY_FILE)


def write_roster(path: Path, identities: Sequence[Identity]) -> None:
    """Write names and public keys, in hexadecimal, as a JSON object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({one.name: one.public.hex() for one in identities}, indent=2) + "\n", encoding="utf-8")


def read_roster(path: Path) -> Roster:
    """Read the roster that `write_roster` wrote. Raises FederationError for anything else, InputError where none is."""
    try:
        content = parse_json(read_whole(path, _MOST_BYTES), _unique)
        roster = {str(name): bytes.fromhex(key) for name, key in content.items()}
        if any(len(key) != PUBLIC_KEY_BYTES for key in roster.values()):
            raise ValueError("a key of another length")
    except OSError as error:
        remedy = "`hecompile federation identities` makes one, or the owners put it together from `federation identity`"
        missing = missing_path_hint(path, remedy)
        reason = f"the roster {missing}" if missing else f"cannot read the roster {path}: {reason_of(error)}"
        raise InputError(reason) from None
    except (ValueError, AttributeError, TypeError):
        raise FederationError(
            f"{path} is no roster: a JSON object of names, each once, and public keys, {PUBLIC_KEY_BYTES} bytes each in "
            "hexadecimal"
        ) from None
    return roster


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(content := dict(pairs)) < len(pairs):
        raise ValueError("a name is given twice")
    return content
