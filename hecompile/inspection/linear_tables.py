"""Show a compiled plan as tables that fit 80 columns: totals, a row per kind of linear with ranges over layers, all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from hecompile.bundles.client import ClientBundle, LoraRecord
from hecompile.he.security import show_bits
from hecompile.inspection.kinds import kind_of, layer_of, numbers, span
from hecompile.inspection.linear import Product, Totals, Work, reached_precision, weight_bits_text
from hecompile.inspection.prediction import hint_file_bytes, megabytes
from hecompile.inspection.rows import named_rows

Group = tuple[str, Sequence[Product]]
"""A name, and the products that a row or two stand for."""


def group_by_kind(products: Iterable[Product]) -> dict[str, list[Product]]:
    """Return the products of each kind of linear, in the order of the plan."""
    kinds: dict[str, list[Product]] = {}
    for product in products:
        kinds.setdefault(kind_of(product.linear), []).append(product)
    return kinds


def totals_table(bundle: ClientBundle, products: Sequence[Product]) -> Table:
    """Return the totals of the plan."""
    plan, ring, lora = bundle.plan, bundle.ring, bundle.plan.lora
    totals = Totals.of(bundle, products)
    table = Table(title=f"plan {bundle.plan_id[:16]} of {plan.base_model}", show_header=False, box=box.SIMPLE)
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    forward, backward = _millions(totals.forward), _millions(totals.backward)
    worker_disk = "none beside it" if totals.worker_disk is None else megabytes(totals.worker_disk)
    rows = {
        "bytes per token, forward": _traffic(totals.forward),
        "bytes per token, backward": _traffic(totals.backward),
        "bytes per token, training": _traffic(totals.training) + _head(products),
        "bytes per token, prefix kept": _kept(totals),
        f"bytes per step of {totals.step_tokens} tokens": _step(totals),
        "worker's products of bytes": f"per token {forward} forward, {backward} backward",
        "on disk": f"client {megabytes(totals.client_disk)}, worker {worker_disk}",
        "hints on the client": _hints(bundle, totals, products),
        "security": f"{show_bits(ring.security_bits)}: {'ring' if ring.packed else 'module'} LWE, dimension "
        f"{ring.lattice_dim}, q = 2^32; ring {ring.ring_dim} x {ring.rank}",
        "precision": reached_precision(plan),
        "remote weights": f"{totals.remote_weights}{weight_bits_text(plan)}",
        "LoRA": f"r = {lora.r}, alpha = {lora.lora_alpha:g}, {', '.join(lora.target_modules)}{_layers(lora)}",
        "batch": f"up to {plan.batch_size} x {plan.sequence_buckets} tokens",
    }
    for what, value in rows.items():
        table.add_row(what, value)
    return table


def _traffic(work: Work) -> str:
    return f"{work.bytes_up} up, {work.bytes_down} down"


def _layers(lora: LoraRecord) -> str:
    layers = lora.layers_to_transform
    return "" if layers is None else f"; layers {numbers(layers)} of {', '.join(lora.layers_pattern or ['the model'])}"


def _kept(totals: Totals) -> str:
    """Say what travels from the second epoch on where the recipe has a prefix_cache, and what is kept for it."""
    if totals.prefix_kept is None:
        return "nothing to keep"
    return f"{_traffic(totals.prefix_kept)}, for {totals.kept_values} values"


def _head(products: Sequence[Product]) -> str:
    """Say how much of a token's bytes is a remote output head's, which positions that are not scored do not have."""
    head = [product for product in products if layer_of(product.linear) is None]
    return f", of which the output head, where scored: {_traffic(Work.of(head))}" if head else ""


def _step(totals: Totals) -> str:
    up = totals.training.bytes_up * totals.step_tokens
    down = totals.training.bytes_down * totals.step_tokens + totals.step_hint_bytes
    return f"{megabytes(up)} up, {megabytes(down)} down"


def _millions(work: Work) -> str:
    return f"{work.multiplications / 1e6:.4g} M"


def _hints(bundle: ClientBundle, totals: Totals, products: Sequence[Product]) -> str:
    """Say what the hints take: on disk, or of the download of a training step."""
    if bundle.plan.hints == "stored":
        bits = [circuit.hint_bits for circuit in bundle.circuits.values()]
        size = megabytes(hint_file_bytes(bundle.ring, bundle.circuits.values()))
        return f"{size}, {span(bits)} bits a word"
    step, tokens = totals.step_hint_bytes, totals.step_tokens
    how = "computed" if bundle.plan.hints == "none" else "fetched"
    return f"none, {how}: {step} bytes more down per step, {step / tokens:.0f} per token at {tokens} tokens"


def kinds_table(products: Sequence[Product]) -> Text:
    """Return a row per kind of linear and direction, with ranges over the layers."""
    kinds = group_by_kind(products).items()
    return _product_table("kinds of linears, ranges over layers; bytes per token", kinds, counted=True)


def products_table(products: Sequence[Product]) -> Text:
    """Return a row per product, with what it sends and how exact it is."""
    return _product_table("products; bytes per token", _by_linear(products), counted=False)


def noise_table(products: Sequence[Product]) -> Text:
    """Return a row per product, with its noise, and the error that a worker could add unseen."""
    columns: dict[str, Callable[[Sequence[Product]], str]] = {
        "bits\nup": lambda those: span(p.upload_bits for p in those),
        "bits\ndown": lambda those: span(p.reply_bits for p in those),
        "noise\nstd": lambda those: span((p.noise_std for p in those), "{:.4g}".format),
        "unseen error\n/ noise std": lambda those: span((p.unseen_error / p.noise_std for p in those), "{:.3g}".format),
        "input\nbound": lambda those: span((p.input_bound for p in those), "{:.0f}".format),
        "bound's\ngain": lambda those: span((p.gain for p in those), "{:.2g}".format),
    }
    return _rows("noise, in units of the integer product", _by_linear(products), columns)


def _by_linear(products: Sequence[Product]) -> list[Group]:
    linears: dict[str, list[Product]] = {}
    for product in products:
        linears.setdefault(product.linear, []).append(product)
    return list(linears.items())


def _product_table(title: str, groups: Iterable[Group], counted: bool) -> Text:
    count: dict[str, Callable[[Sequence[Product]], str]] = {"×": lambda those: str(len(those))}
    columns: dict[str, Callable[[Sequence[Product]], str]] = {
        "in → out": lambda those: (
            f"{span((p.in_features for p in those), '{:.0f}'.format)} → "
            f"{span((p.out_features for p in those), '{:.0f}'.format)}"
        ),
        "weight\nbits": lambda those: span((p.weight_bits for p in those), "{:.0f}".format),
        "effective\nbits": lambda those: span((p.effective_bits for p in those), "{:.1f}".format),
        "bytes\nup": lambda those: span((p.bytes_up for p in those), "{:.0f}".format),
        "bytes\ndown": lambda those: span((p.bytes_down for p in those), "{:.0f}".format),
    }
    return _rows(title, groups, count | columns if counted else columns)


def _rows(title: str, groups: Iterable[Group], columns: dict[str, Callable[[Sequence[Product]], str]]) -> Text:
    """Lay out a row of numbers per name and direction."""
    named = [(name, list(_directions(members, columns))) for name, members in groups]
    return named_rows(title, ["", *columns], named)


def _directions(
    members: Sequence[Product], columns: dict[str, Callable[[Sequence[Product]], str]]
) -> Iterator[Sequence[str]]:
    for direction in dict.fromkeys(product.direction for product in members):
        those = [product for product in members if product.direction == direction]
        yield [direction, *(cell(those) for cell in columns.values())]
