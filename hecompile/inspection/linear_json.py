"""Describe a compiled plan for programs. The keys are stable, and docs/command-line.md lists them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from hecompile.bundles.client import ClientBundle
from hecompile.inspection.linear import Product, Totals, Work
from hecompile.inspection.linear_tables import group_by_kind
from hecompile.inspection.prediction import hint_file_bytes

_RANGES = (
    "in_features", "out_features", "weight_bits", "effective_bits", "noise_std", "unseen_error", "input_bound",
    "upload_bits", "reply_bits", "upload_limbs", "reply_bytes", "bytes_up", "bytes_down", "multiplications",
    "gain",
)  # fmt: skip


def plan_json(bundle: ClientBundle, products: Sequence[Product]) -> dict[str, Any]:
    """Return what the tables show, and every product, as JSON values."""
    plan, ring = bundle.plan, bundle.ring
    least, most = plan.reached_bits()
    return {
        "what": "linear plan",
        "plan_id": bundle.plan_id,
        "base_model": plan.base_model,
        "ring": {**dataclasses.asdict(ring.to_literal()), "security_bits": ring.security_bits},
        "lora": plan.lora.model_dump(),
        "batch_size": plan.batch_size,
        "sequence_buckets": plan.sequence_buckets,
        "effective_bits": {"asked": plan.effective_bits, "least": least, "most": most},
        "totals": _totals(bundle, Totals.of(bundle, products)),
        "kinds": [_kind(kind, members, direction) for kind, direction, members in _kinds(products)],
        "products": [dataclasses.asdict(product) for product in products],
    }


def _totals(bundle: ClientBundle, totals: Totals) -> dict[str, Any]:
    training, tokens = totals.training, totals.step_tokens
    hints = bundle.plan.hints == "stored"
    return {
        "per_token": {
            "forward": _work(totals.forward),
            "backward": _work(totals.backward),
            "training": _work(training),
            "prefix_kept": None if totals.prefix_kept is None else _work(totals.prefix_kept),
            "kept_values": totals.kept_values,
        },
        "per_step": {
            "tokens": tokens,
            "bytes_up": training.bytes_up * tokens,
            "bytes_down": training.bytes_down * tokens + totals.step_hint_bytes,
            "hint_bytes_down": totals.step_hint_bytes,
            "multiplications": training.multiplications * tokens,
        },
        "disk": {
            "client": totals.client_disk,
            "worker": totals.worker_disk,
            "hints": hint_file_bytes(bundle.ring, bundle.circuits.values()) if hints else 0,
        },
        "remote_weights": totals.remote_weights,
    }


def _work(work: Work) -> dict[str, int]:
    return dataclasses.asdict(work)


def _kinds(products: Sequence[Product]) -> list[tuple[str, str, list[Product]]]:
    return [
        (kind, direction, [product for product in members if product.direction == direction])
        for kind, members in group_by_kind(products).items()
        for direction in dict.fromkeys(product.direction for product in members)
    ]


def _kind(kind: str, members: Sequence[Product], direction: str) -> dict[str, Any]:
    """Return one row: of every number the least and the most."""
    ranges = {name: [getattr(product, name) for product in members] for name in _RANGES}
    return {
        "kind": kind,
        "direction": direction,
        "count": len(members),
        **{name: [min(values), max(values)] for name, values in ranges.items()},
    }
