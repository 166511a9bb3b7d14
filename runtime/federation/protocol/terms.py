"""Hold what a party knows before the first round, against which it checks every message."""

from __future__ import annotations

from dataclasses import dataclass

from hecompile.runtime.federation.protocol.channels import Roster
from hecompile.runtime.federation.protocol.layout import Layout
from hecompile.runtime.federation.protocol.settings import Agreement


@dataclass(frozen=True)
class Terms:
    """Hold a party's own copies of the agreement, of the roster, and of the layout of its adapter."""

    agreement: Agreement
    roster: Roster
    layout: Layout
