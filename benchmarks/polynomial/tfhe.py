"""Measure a quantised SiLU under TFHE: accuracy of the small Llama, time per element, linear RLWE and CKKS beside it.

About three minutes, most of them for the keys of the 8-bit table. The row of CKKS needs the `bench` extra.
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from benchmarks.crypto.client_path import TRAINED
from benchmarks.report import table
from benchmarks.timing import paired, threads
from benchmarks.worker.linears import engine_of, public_matrix, random_linear, random_rows, stored_hint
from hecompile.approximation.silu import silu
from hecompile.approximation.silu_table import ActivationTable
from hecompile.compiler.frontend import export_onnx, load_checkpoint
from hecompile.compiler.pipeline import approximate
from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.graph.interpreter import Interpreter, graph_inputs
from hecompile.graph.ir import attributes_of, nodes_of_type
from hecompile.graph.quantized_operators import table_indices
from hecompile.models import TINY_LLAMA
from hecompile.models.making.pretrain import token_stream
from hecompile.models.worlds.public_world import documents
from hecompile.passes.approximation.calibrate import Calibrate
from hecompile.passes.approximation.quantize_activation import QuantizeActivation
from hecompile.passes.offload.select_parameters import choose_ring
from hecompile.runtime.worker.engines import DEFAULT_ENGINE
from hecompile.runtime.worker.engines.concrete_table import EncryptedTable

BITS, ELEMENTS, LENGTH = (6, 7, 8), 16, 128
WIDTH, TOKENS = 2048, 1024
CKKS_DEGREE, CKKS_MODULUS, CKKS_SCALE, CKKS_TERMS = 16384, (60, 40, 40, 40, 40, 40, 40, 60), 2.0**40, 15
PROSE = """\
## A SiLU of few bits under TFHE

The small Llama with `QuantizedSiLU`, a table of 2^bits integers, in place of every SiLU
(`passes/approximation/quantize_activation.py`, ranges from {samples} × {length} tokens of its public training corpus),
in its cleartext integer form on {tokens} held-out tokens; and the table of its layer 0 under TFHE
(`runtime/worker/engines/concrete_table.py`, concrete-python, probability of a wrong look-up at most 2^-40) on {elements}
inputs spread over the layer's own, one programmable bootstrapping each. *Equal*: how many results are the integers of
the cleartext form. One run each, both cores. """
ELEMENT_PROSE = """\
What one element costs in each scheme, at the size that suits it. Linear RLWE: an output of a {width} × {width} linear at
{tokens} tokens, as training computes it. CKKS (TenSEAL): a polynomial of degree {degree} in place of SiLU on [-8, 8], ring
dimension {ring}, all {slots} slots filled, which is the time of one ciphertext over its slots; its largest error is
{error}. TFHE: the table above. *Client*: encrypting and decrypting; *server*: wall time, both cores.
"""


@dataclass(frozen=True)
class Quality:
    """Hold nats per token, and the fraction of next tokens that are predicted."""

    loss: float
    accuracy: float
    predictions: Tensor


def run(quick: bool) -> str:
    """Write Markdown: accuracy and time by bits, then the three schemes side by side."""
    checkpoint = load_checkpoint(str(TINY_LLAMA))
    proto = ir.to_proto(export_onnx(checkpoint.model))
    count = 2 if quick else 32
    held_out = _rows(checkpoint.tokenizer, documents(20 if quick else 200, heldout=True), count)
    samples = _rows(checkpoint.tokenizer, documents(40), 2 if quick else 8)
    exact = _quality(approximate(ir.from_proto(proto)), held_out)
    rows: list[list[object]] = [["SiLU", f"{exact.loss:.4f}", f"{exact.accuracy:.2%}", "", "", "", "", "", ""]]
    seconds: dict[int, tuple[float, float]] = {}
    for bits in (4,) if quick else BITS:
        options = PolynomialOptions(activation=QuantizeActivation(bits))
        calibrate = Calibrate(tuple(map(tuple, samples.tolist())))
        model = approximate(ir.from_proto(proto), options, calibrate)
        quality = _quality(model, held_out)
        same = float((quality.predictions == exact.predictions).float().mean())
        bound = max(float(attributes_of(node)["error_bound"]) for node in nodes_of_type(model, "QuantizedSiLU"))
        cells, seconds[bits] = _under_tfhe(model, held_out, 2 if quick else ELEMENTS)
        rows.append([f"{bits} bits", f"{quality.loss:.4f}", f"{quality.accuracy:.2%}", f"{same:.2%}", bound, *cells])
    headings = [
        "activation", "loss, nats", "next token right", "same as SiLU", "error bound", "equal", "s per element", "keys, s",
        "keys, MB",
    ]  # fmt: skip
    return "\n\n".join(
        [
            PROSE.format(
                samples=len(samples), length=LENGTH, tokens=held_out.numel(), elements=2 if quick else ELEMENTS
            ),
            table(headings, rows),
            *_per_element(seconds, quick),
        ]
    )


def _rows(tokenizer: object, texts: list[str], count: int) -> Tensor:
    """Return rows int64 [count, LENGTH], text after text."""
    stream = token_stream(tokenizer, texts)  # type: ignore[arg-type]
    return torch.from_numpy(stream[: count * LENGTH].reshape(count, LENGTH))


def _quality(model: ir.Model, tokens: Tensor) -> Quality:
    interpreter = Interpreter(model)
    losses, predictions = [], []
    with torch.no_grad():
        for batch in tokens.split(8):
            logits = interpreter.run(graph_inputs(batch, torch.ones_like(batch)))["logits"][:, :-1].flatten(0, 1)
            losses.append(torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none"))
            predictions.append(logits.argmax(dim=-1))
    predicted = torch.cat(predictions)
    right = predicted == tokens[:, 1:].flatten()
    return Quality(float(torch.cat(losses).mean()), float(right.float().mean()), predicted)


def _under_tfhe(model: ir.Model, tokens: Tensor, elements: int) -> tuple[list[object], tuple[float, float]]:
    """Return cells of the table, and seconds per element of (client, server)."""
    node = next(nodes_of_type(model, "QuantizedSiLU"))
    given, source = attributes_of(node), node.inputs[0]
    seen: list[Tensor] = []
    batch = tokens[:1]
    with torch.no_grad():
        Interpreter(model).run(
            graph_inputs(batch, torch.ones_like(batch)), observer=lambda v, x: seen.append(x) if v is source else None
        )
    # As many entries of the table as there are elements: inputs spread over the layer's own.
    x = seen[0].flatten().sort().values
    x = x[torch.linspace(0, len(x) - 1, elements).long()]
    indices = table_indices(x, given).numpy()
    encrypted = EncryptedTable(ActivationTable.of(given), block=min(8, elements))
    encrypted.lookup(indices[:1])  # makes the keys
    encrypted.evaluate_seconds = 0.0
    start = time.perf_counter()
    entries = encrypted.lookup(indices)
    client = time.perf_counter() - start - encrypted.evaluate_seconds
    equal = int((entries == encrypted.table.lookup(indices)).sum())
    server = encrypted.evaluate_seconds / elements
    cells = [f"{equal} of {elements}", server, encrypted.keygen_seconds, encrypted.key_bytes / 1e6]
    return cells, (client / elements, server)


def _per_element(tfhe: dict[int, tuple[float, float]], quick: bool) -> list[str]:
    rows: list[list[object]] = [["linear RLWE, linear layer", *_cells(*_linear(quick))]]
    error = "not measured here"
    if importlib.util.find_spec("tenseal") is None:
        rows.append(["CKKS, polynomial SiLU", "the bench extra is not installed", "", ""])
    else:
        client, server, worst = _ckks(quick)
        rows.append(["CKKS, polynomial SiLU", *_cells(client, server)])
        error = f"{worst:.2g}"
    rows += [[f"TFHE, table of {bits} bits", *_cells(*found)] for bits, found in tfhe.items()]
    prose = ELEMENT_PROSE.format(
        width=WIDTH, tokens=TOKENS, degree=CKKS_TERMS, ring=CKKS_DEGREE, slots=CKKS_DEGREE // 2, error=error
    )
    return [prose, table(["scheme", "client, µs per element", "server, µs", "both, µs"], rows)]


def _cells(client: float, server: float) -> list[object]:
    return [1e6 * client, 1e6 * server, 1e6 * (client + server)]


def _linear(quick: bool) -> tuple[float, float]:
    """Measure seconds per output element of (client, server)."""
    width, tokens = (64, 40) if quick else (WIDTH, TOKENS)
    linear, x = random_linear(width, width), random_rows(tokens, width)
    public = public_matrix(choose_ring(tokens), width)
    with stored_hint(public, linear) as hint, engine_of(linear, DEFAULT_ENGINE) as engine, threads(2):
        ciphertext, _ = TRAINED.encrypt(public, x, linear.parameters)
        planes = ciphertext.planes.numpy()
        reply = torch.from_numpy(engine.evaluate("linear.forward", planes))

        def both_ways() -> None:
            _, key = TRAINED.encrypt(public, x, linear.parameters)
            TRAINED.decrypt(key, hint, reply, linear.parameters)

        calls = {"client": both_ways, "server": lambda: engine.evaluate("linear.forward", planes)}
        samples = paired(calls, 2 if quick else 9)
    client, server = (float(np.median(samples[name].wall)) / (tokens * width) for name in ("client", "server"))
    return client, server


def _ckks(quick: bool) -> tuple[float, float, float]:
    """Measure seconds per slot of (client, server), and the largest error."""
    import tenseal

    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS, CKKS_DEGREE, coeff_mod_bit_sizes=list(CKKS_MODULUS), n_threads=2
    )
    context.global_scale = CKKS_SCALE
    context.generate_relin_keys()
    # Inputs come scaled to [-1, 1], where the powers of a polynomial stay in reach of the scale.
    unit = np.linspace(-1.0, 1.0, CKKS_DEGREE // 2)
    fitted = np.polynomial.chebyshev.chebinterpolate(lambda u: silu(8.0 * u), CKKS_TERMS)
    coefficients = np.polynomial.chebyshev.cheb2poly(fitted).tolist()
    clients, servers, error = [], [], 0.0
    for _ in range(1 if quick else 5):
        start = time.perf_counter()
        sent = tenseal.ckks_vector(context, unit.tolist())
        encrypted = time.perf_counter()
        reply = sent.polyval(coefficients)
        served = time.perf_counter()
        values = np.asarray(reply.decrypt())
        clients.append(time.perf_counter() - served + encrypted - start)
        servers.append(served - encrypted)
        error = max(error, float(np.abs(values - silu(8.0 * unit)).max()))
    return float(np.median(clients)) / len(unit), float(np.median(servers)) / len(unit), error
