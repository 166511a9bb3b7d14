"""Measure what one round of a federation costs: encrypted sums beside the published scheme."""

from __future__ import annotations

import torch

from benchmarks.federation.federation_systems import MODULUS_BITS, POINTS, Cost, made_up_updates, ours, tenseal_ckks
from benchmarks.report import table
from hecompile.he.aggregation.parameters import AggregationParameters

COUNT, CLIENTS, FEWER, REPEATS, VALUE_RANGE = 1_000_000, 5, 3, 9, 0.25
PROSE = """\
## A federation: encrypted sums

One round's cryptography for one million parameters, one thread, both in one run. Ours, {clients} clients: quantising, key,
encryption, Shamir shares and their sealing for all others; the server's additions; opening from the shares, {bits:.0f} bits.
Theirs, {fewer} clients: TenSEAL CKKS as in FedShield-LLM's code (N = {points}, moduli {moduli}, scale 2^40, one key that
all clients hold). Errors are those of the mean of normal updates over the root mean square of one. Wanted: at most 5 MB,
0.1 s of a client, 1e-4.
"""
_HEADINGS = ("", "MB up", "client s", "server s per client", "opening s", "largest error", "rms error")


def run(quick: bool) -> str:
    """Return Markdown with a table."""
    torch.set_num_threads(1)
    count = 20_000 if quick else COUNT
    updates = made_up_updates(CLIENTS, count)
    ours(updates, VALUE_RANGE)  # compiles
    own = sorted((ours(updates, VALUE_RANGE) for _ in range(REPEATS)), key=lambda one: one.client)[REPEATS // 2]
    theirs = tenseal_ckks(updates[:FEWER])
    rows = [_row("ours", own, count, CLIENTS), _row("TenSEAL CKKS, as published", theirs, count, FEWER)]
    bits = AggregationParameters(CLIENTS, VALUE_RANGE).security_bits
    prose = PROSE.format(clients=CLIENTS, fewer=FEWER, points=POINTS, moduli=list(MODULUS_BITS), bits=bits)
    ratio = (
        f"\nOurs sends {theirs.bytes_up / own.bytes_up:.0f} times fewer bytes and takes {theirs.client / own.client:.0f} "
        "times less of a client's time. (With a shared mask only what it keeps is sent; theirs sends zeros too.)\n"
    )
    return prose + "\n" + table(_HEADINGS, rows) + "\n" + ratio


def _row(name: str, cost: Cost, count: int, clients: int) -> list[object]:
    million = 1e6 / count
    times = [cost.client * million, cost.server * million / clients, cost.opening * million]
    return [name, cost.bytes_up * million / 1e6, *times, cost.largest_error, cost.rms_error]
