"""Measure a compiled plan: each product's shape, precision and bytes, and what a token and a step take in all."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from hecompile.bundles.client import CircuitRecord, ClientBundle, PlanRecord
from hecompile.graph.gradients import without_gradient
from hecompile.graph.ir import module_path, nodes_of_type
from hecompile.he.check_tolerances import result_tolerance
from hecompile.he.parameters import LinearParameters, RingParameters
from hecompile.passes.offload.cut_prefix import CutPrefix
from hecompile.plan.costs import hint_bytes, limb_products


@dataclass(frozen=True)
class Traffic:
    """Hold predicted payload bytes per token of one forward and one backward pass, without frame headers."""

    bytes_up: int
    bytes_down: int

    @property
    def total(self) -> int:
        return self.bytes_up + self.bytes_down


def predicted_traffic(circuits: dict[str, LinearParameters], skipped: frozenset[str] = frozenset()) -> Traffic:
    """Sum the traffic of the circuits that are not in `skipped`."""
    used = [parameters for name, parameters in circuits.items() if name not in skipped]
    return Traffic(sum(p.bytes_up(1) for p in used), sum(p.bytes_down(1) for p in used))


def hint_traffic(
    circuits: dict[str, LinearParameters], ring: RingParameters, skipped: frozenset[str] = frozenset()
) -> int:
    """Return the bytes that a client without hints downloads besides, per step: each circuit's hint, once."""
    return sum(hint_bytes(ring, p.out_features) for name, p in circuits.items() if name not in skipped)


def circuits_without_gradient(model: ir.Model) -> frozenset[str]:
    """Name the backward circuits that training never calls.

    No LoRA matrix stands before such a linear, so that its input needs no gradient. Plans of version 5 and before have them.
    """
    return frozenset(f"{module_path(node)}.backward" for node in without_gradient(model, "RemoteLinear"))


@dataclass(frozen=True)
class Product:
    """Describe one product of a plan: a linear in one direction.

    Attributes:
        trained: whether training calls it.
        weight_bits: of the quantised weight.
        effective_bits, noise_std: predicted precision; noise in units of the integer product.
        unseen_error: from which on verification sees an error of a single result, in units of the same.
        upload_limbs, reply_bytes: as many bytes as hold those bits.
        multiplications: per token, of a byte of the input by a byte of a weight.
        gain: how many times longer than proven a token is scaled to be; 1 for a proven bound.
    """

    linear: str
    direction: str
    trained: bool
    in_features: int
    out_features: int
    weight_bits: int
    effective_bits: float
    noise_std: float
    unseen_error: float
    input_bound: int
    upload_bits: int
    reply_bits: int
    upload_limbs: int
    reply_bytes: int
    bytes_up: int
    bytes_down: int
    multiplications: int
    gain: float

    @classmethod
    def of(cls, record: CircuitRecord, parameters: LinearParameters, weight_bits: int, trained: bool) -> Product:
        """Describe a record of a plan whose weights have `weight_bits`."""
        limbs = limb_products(parameters.upload_limbs, 1 if weight_bits <= 8 else 2)
        return cls(
            record.linear, record.direction, trained, record.in_features, record.out_features, weight_bits,
            record.effective_bits, record.noise_std, float(result_tolerance(parameters)), int(parameters.input_bound),
            parameters.upload_bits, parameters.reply_bits, parameters.upload_limbs, parameters.reply_bytes,
            parameters.bytes_up(1), parameters.bytes_down(1),
            record.in_features * record.out_features * limbs, parameters.gain,
        )  # fmt: skip

    @property
    def remote_weights(self) -> int:
        return self.in_features * self.out_features if self.direction == "forward" else 0


def products_of(bundle: ClientBundle) -> list[Product]:
    """Return the products of a plan, in its order."""
    skipped = circuits_without_gradient(bundle.graph())
    return [
        Product.of(record, bundle.circuits[name], bundle.plan.bits_of(name), name not in skipped)
        for name, record in bundle.plan.circuits.items()
    ]


@dataclass(frozen=True)
class Work:
    """Sum what some products take per token: payload bytes up and down, multiplications of bytes on the worker."""

    bytes_up: int
    bytes_down: int
    multiplications: int

    @classmethod
    def of(cls, products: Iterable[Product]) -> Work:
        used = list(products)
        return cls(
            sum(product.bytes_up for product in used),
            sum(product.bytes_down for product in used),
            sum(product.multiplications for product in used),
        )


@dataclass(frozen=True)
class Totals:
    """Sum a plan: per token forward, and backward as training calls it; per step of the largest batch; on disk.

    Attributes:
        prefix_kept: forward and backward from the second epoch on, where the prefix is kept (`hecompile.passes.offload.
            cut_prefix`); None where there is nothing to keep.
        kept_values: numbers kept of a token then.
        step_tokens: of the largest batch.
        step_hint_bytes: down per step, where the client has no hints: each circuit's once, as in a step of one micro-batch,
            and none kept from the last step.
        client_disk, worker_disk: bytes; None for a half that is not there.
    """

    forward: Work
    backward: Work
    prefix_kept: Work | None
    kept_values: int
    step_tokens: int
    step_hint_bytes: int
    remote_weights: int
    client_disk: int
    worker_disk: int | None

    @classmethod
    def of(cls, bundle: ClientBundle, products: Iterable[Product]) -> Totals:
        """Sum the products of a bundle. Its worker's half is looked for beside it."""
        known = list(products)
        plan = bundle.plan
        skipped = frozenset(f"{product.linear}.{product.direction}" for product in known if not product.trained)
        worker = bundle.directory.resolve().parent / "worker"
        cut = CutPrefix()(bundle.graph())
        asked = set() if cut is None else {module_path(node) for node in nodes_of_type(cut.rest, "RemoteLinear")}
        beside = bundle.directory.resolve().name == "client" and worker.is_dir()
        return cls(
            forward=Work.of(product for product in known if product.direction == "forward"),
            backward=Work.of(product for product in known if product.direction == "backward" and product.trained),
            prefix_kept=None if cut is None else Work.of(p for p in known if p.trained and p.linear in asked),
            kept_values=0 if cut is None else cut.features,
            step_tokens=plan.batch_size * plan.sequence_buckets[-1],
            step_hint_bytes=_step_hint_bytes(bundle, skipped),
            remote_weights=sum(product.remote_weights for product in known),
            client_disk=bytes_below(bundle.directory),
            worker_disk=bytes_below(worker) if beside else None,
        )

    @property
    def training(self) -> Work:
        """Return the sum of both directions, per token."""
        first, second = self.forward, self.backward
        return Work(
            first.bytes_up + second.bytes_up,
            first.bytes_down + second.bytes_down,
            first.multiplications + second.multiplications,
        )


def _step_hint_bytes(bundle: ClientBundle, skipped: frozenset[str]) -> int:
    if bundle.plan.hints == "none":
        return hint_traffic(bundle.circuits, bundle.ring, skipped)
    return sum(record.bytes for circuit, record in bundle.fetched.items() if circuit not in skipped)


def bytes_below(directory: Path) -> int:
    """Return the bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def weight_bits_text(plan: PlanRecord) -> str:
    """Say how many bits the weights have, behind their number, with the share of the weights that has them."""
    counts: dict[int, int] = {}
    for name, circuit in plan.circuits.items():
        bits = plan.bits_of(name)
        counts[bits] = counts.get(bits, 0) + circuit.in_features * circuit.out_features
    if len(counts) == 1:
        return f" of {min(counts)} bits"
    total = sum(counts.values())
    return ": " + ", ".join(f"{100 * count / total:.0f} % of {bits} bits" for bits, count in sorted(counts.items()))


def reached_precision(plan: PlanRecord) -> str:
    """Say which precision the products have, and which was asked for: they can have more at no price.

    A precision between the two gives the same plan, for the choice is the cheapest of those that reach it.
    """
    low, high = plan.reached_bits()
    shown = f"{low:.1f} to {high:.1f} effective bits, {plan.effective_bits:g} asked for"
    least = math.floor(10 * low) / 10
    return f"{shown}; up to {least:g} the plan is the same" if least >= plan.effective_bits + 0.5 else shown
