"""Evaluate the reduced Llama wholly by a worker process under CKKS: error, time by operation, refreshes, bytes."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.polynomial.ckks_tuned import (
    BATCH,
    RANGE_LOSS,
    RATE,
    STEPS,
    Quality,
    Trial,
    Tuned,
    fine_tune,
    quality,
    tried,
)
from benchmarks.report import table
from benchmarks.timing import paired, ratio
from hecompile.bundles.ckks import CkksPlan
from hecompile.ckks.evaluator import CkksTensor, Evaluator
from hecompile.ckks.keys import SecretKey
from hecompile.ckks.library import seal
from hecompile.ckks.parameters import CkksLiteral, CkksParameters
from hecompile.compiler.ckks import CkksOptions, export_polynomial, lower_checkpoint, merged_checkpoint
from hecompile.compiler.frontend import Checkpoint, load_checkpoint
from hecompile.graph.interpreter import Interpreter
from hecompile.models import REDUCED_POLYNOMIAL
from hecompile.models.worlds.reduced_world import LINE_TOKENS, lines
from hecompile.passes.polynomial.expand_polynomials import EMBEDDINGS
from hecompile.runtime.ckks.client import CkksSession, CkksStats
from hecompile.runtime.model.backend import ForwardPass
from hecompile.runtime.worker.process import running_server

LEVELS = (4,)
PROSE = """\
## The polynomial Llama on ciphertexts (CKKS)

The reduced Llama (2 layers, hidden 32, 2 heads, FFN 64), converted by `hecompile convert
models/recipes/convert-reduced.yaml` (Gaussian-kernel attention, polynomial norm and activation), then **fine-tuned on
private lines by LoRA through the encrypted worker** ({steps} steps, rate {rate:g}, range loss {range_loss:g}), the adapter
merged by `ckks export --adapter`, and evaluated **wholly by a worker process** on held-out private lines of {length}
tokens, one in each slot; the client encrypts embeddings, refreshes where the plan says, and decrypts the logits of all
positions. Depth of the graph: {depth}. 30 bits a level, 128 bits of security (Homomorphic Encryption Standard). One run of
{batch} lines ({rows} predictions), {threads} threads for the worker, client on the same cores. Errors are to the cleartext
polynomial graph of the merged model.
"""
QUALITY = """\
What training taught, and that encryption keeps it: the same held-out lines before and after, loss in nats per token;
*answers* are the two numbers of a line that the words before them determine, the private price and the sum.
"""
PRODUCTS = """\
One product of two ciphertexts, relinearised and rescaled, one thread: the project's kernels beside SEAL's evaluator (through
TenSEAL), which gives the same words bit for bit (`tests/ckks`).
"""
PACKING = """\
A ciphertext holds one number of each of as many sequences as there are slots: nothing rotates, and attention is products
entry by entry. An evaluation takes the same time and bytes for one sequence as for all slots. From how many on that is less
than the interactive plan of the same model and adapter takes for each (logits of all positions, {batch} lines in batches of
{plan_batch}, worker in a process of its own; keys and hints, once per session or plan, left aside). Where that is more than
the slots, CKKS never costs less, and the table says how many times as much it costs per sequence with every slot filled:
"""


@dataclass(frozen=True)
class Evaluation:
    """Hold one evaluation of `rows` int64 [B, S] beside the cleartext polynomial graph.

    Logits are float32 [B, S, V], those of the cleartext graph with the adapter merged and without it.
    """

    plan: CkksPlan
    parameters: CkksParameters
    stats: CkksStats
    key_bytes: int
    peak: float
    rows: NDArray[np.int64]
    trial: Trial
    cleartext: NDArray[np.float32]
    untuned: NDArray[np.float32]


def run(quick: bool) -> str:
    """Write Markdown: errors and bytes, seconds by operation, the evaluator beside SEAL's, what a batch costs."""
    length = 2 if quick else LINE_TOKENS
    checkpoint = load_checkpoint(str(REDUCED_POLYNOMIAL))
    texts = checkpoint.tokenizer(lines(heldout=True, of_private=True))["input_ids"][: 4 if quick else None]
    whole = np.array([[*ids, checkpoint.tokenizer.eos_token_id] for ids in texts])
    with TemporaryDirectory() as directory:
        tuned = fine_tune(Path(directory), whole[:, :length], 2 if quick else STEPS)
        evaluations = [_evaluate(tuned, whole[:, :length], levels) for levels in ((4,) if quick else LEVELS)]
    batch = len(whole)
    prose = PROSE.format(
        length=length, threads=os.cpu_count(), depth=evaluations[0].plan.depth, batch=batch, rows=evaluations[0].rows.size,
        steps=STEPS, rate=RATE, range_loss=RANGE_LOSS,
    )  # fmt: skip
    headings = [f"{one.parameters.levels} levels, ring dimension {one.parameters.ring_dim}" for one in evaluations]
    operations = sorted(evaluations[0].stats.worker_seconds, key=lambda name: -evaluations[0].stats.worker_seconds[name])
    seconds = [[name, *(one.stats.worker_seconds.get(name, 0.0) for one in evaluations)] for name in operations]
    return "\n\n".join(
        [
            prose,
            QUALITY,
            table(["private text, held out", "loss", "next token right", "answers right"], _quality(tuned, evaluations)),
            "The evaluation on ciphertexts:",
            table(["measured", *headings], _rows(evaluations)),
            "Seconds of the worker by operation (`Refresh` is waiting for the client):",
            table(["operation", *headings], seconds),
            PRODUCTS,
            table(["level", "SEAL, ms", "kernels, ms", "ratio"], _products(quick)),
            PACKING.format(batch=batch, plan_batch=BATCH),
            table(["", "interactive, each", *(f"CKKS pays from: {one}" for one in headings)], _pays(tuned, evaluations)),
        ]
    )


def _evaluate(tuned: Tuned, rows: NDArray[np.int64], levels: int) -> Evaluation:
    options = CkksOptions(rows.shape[1], levels)
    with TemporaryDirectory() as directory:
        build, address = Path(directory) / "build", f"unix://{directory}/worker"
        plan = export_polynomial(str(REDUCED_POLYNOMIAL), build, options, tuned.adapter)
        command = [sys.executable, "-m", "hecompile.cli", "ckks", "serve", str(build / "worker"), "--listen", address]
        with (
            running_server([*command, "--events", "json"]) as (worker, _),
            CkksSession(build / "client", address) as session,
        ):
            trial = tried(session, rows)
            peak = _peak(worker.pid)
    before = load_checkpoint(str(REDUCED_POLYNOMIAL))
    untuned = _cleartext(before, options, rows)
    cleartext = _cleartext(merged_checkpoint(before, tuned.adapter), options, rows)
    return Evaluation(plan, session.parameters, session.stats, session.key_bytes, peak, rows, trial, cleartext, untuned)


def _cleartext(checkpoint: Checkpoint, options: CkksOptions, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    graph, _, _ = lower_checkpoint(checkpoint, options)
    with torch.no_grad():
        embeddings = checkpoint.model.get_input_embeddings()(torch.from_numpy(rows))
        return np.asarray(Interpreter(graph).run({EMBEDDINGS: embeddings})["logits"].numpy())


def _quality(tuned: Tuned, evaluations: Sequence[Evaluation]) -> list[list[object]]:
    first = evaluations[0]
    measured: dict[str, Quality] = {
        "before training, cleartext graph": quality(first.untuned, first.rows),
        "after, cleartext graph with the adapter merged": quality(first.cleartext, first.rows),
        "after, interactive plan": tuned.interactive.quality,
        **{f"after, CKKS with {one.parameters.levels} levels": one.trial.quality for one in evaluations},
    }
    return [
        [name, one.loss, f"{one.right:.1%}", "" if math.isnan(one.answers) else f"{one.answers:.1%}"]
        for name, one in measured.items()
    ]


def _pays(tuned: Tuned, evaluations: Sequence[Evaluation]) -> list[list[object]]:
    """Return a row per cost: of the interactive plan per sequence, and from how many sequences on CKKS takes less."""
    costs: dict[str, tuple[str, Callable[[ForwardPass], float]]] = {
        "seconds in all": ("s", lambda one: one.total_seconds),
        "seconds of the client": ("s", lambda one: one.client_seconds),
        "bytes": ("MB", lambda one: (one.bytes_up + one.bytes_down) / 1e6),
    }
    rows: list[list[object]] = []
    for name, (unit, cost) in costs.items():
        each = cost(tuned.interactive.passed) / len(evaluations[0].rows)
        cells = [_pays_from(cost(one.trial.passed), each, one.parameters.slots) for one in evaluations]
        rows.append([name, f"{each:.3g} {unit}", *cells])
    return rows


def _pays_from(constant: float, each: float, slots: int) -> str:
    needed = math.floor(constant / each) + 1
    if needed <= slots:
        return f"{needed} sequences"
    return f"never ({needed} sequences, {slots} slots): {constant / slots / each:.3g} times"


def _rows(evaluations: Sequence[Evaluation]) -> list[list[object]]:
    columns = [_figures(one) for one in evaluations]
    return [[name, *(column[name] for column in columns)] for name in columns[0]]


def _figures(one: Evaluation) -> dict[str, object]:
    stats, slots = one.stats, one.parameters.slots
    spread = float(one.cleartext.max() - one.cleartext.min())
    logits = one.trial.passed.logits
    error = np.abs(logits - one.cleartext)
    same = float((logits.argmax(-1) == one.cleartext.argmax(-1)).mean())
    return {
        "largest error over the range of logits (wanted: 1e-3)": f"{error.max() / spread:.2e}",
        "root mean square of the error over the range": f"{np.sqrt((error**2).mean()) / spread:.2e}",
        "same most likely next token (wanted: 99 %)": f"{same:.2%}",
        "refreshes, ciphertexts refreshed": f"{stats.refreshes}, {stats.refreshed}",
        "evaluation, s": f"{stats.total_seconds:.0f}",
        "of these the client: encrypting, decrypting, s": f"{stats.encrypt_seconds:.0f}, {stats.decrypt_seconds:.0f}",
        "up, down, MB": f"{stats.bytes_up / 1e6:.0f}, {stats.bytes_down / 1e6:.0f}",
        "evaluation keys, once per session, MB": f"{one.key_bytes / 1e6:.0f}",
        "slots: sequences that an evaluation takes at once": str(slots),
        "per sequence with all slots filled, ms": f"{1e3 * stats.total_seconds / slots:.1f}",
        "per sequence with all slots filled, kB": f"{(stats.bytes_up + stats.bytes_down) / slots / 1e3:.0f}",
        "memory of the worker at its peak, GB": f"{one.peak:.1f}",
    }


def _products(quick: bool) -> list[list[object]]:
    parameters = CkksLiteral(8192 if quick else 16384, 4 if quick else 11).validate()
    api, context = seal(), parameters.context()
    native, encoder, maker = api.Evaluator(context), api.CKKSEncoder(context), api.KeyGenerator(context)
    encryptor, relinearisation = api.Encryptor(context, maker.secret_key()), api.RelinKeys()
    maker.create_relin_keys(relinearisation)
    plain, ciphertext = api.Plaintext(), api.Ciphertext(context)
    encoder.encode(0.5, parameters.scales[-1], plain)
    encryptor.encrypt_symmetric(plain, ciphertext)
    key = SecretKey(parameters)
    evaluator = Evaluator(key.evaluation_keys(), threads=1)
    ours = CkksTensor(key.encrypt(np.full((1,), 0.5)), np.arange(1), parameters.levels)

    def by_seal() -> None:
        product = api.Ciphertext(context)
        native.multiply(ciphertext, ciphertext, product)
        native.relinearize_inplace(product, relinearisation)
        native.rescale_to_next_inplace(product)

    result: list[list[object]] = []
    for level in range(parameters.levels, 0, -1):
        if level in (parameters.levels, parameters.levels // 2, 1):
            samples = paired({"seal": by_seal, "own": partial(evaluator.multiply, ours, ours)}, 2 if quick else 9)
            theirs, own = samples["seal"], samples["own"]
            result.append([level, 1e3 * theirs.seconds, 1e3 * own.seconds, ratio(own.wall, theirs.wall)])
        native.mod_switch_to_next_inplace(ciphertext)
        ours = CkksTensor(np.ascontiguousarray(ours.words[:, :, :-1]), ours.index, level - 1)
    evaluator.close()
    key.close()
    return result


def _peak(process: int) -> float:
    """Return the largest resident memory of a process so far, in GB."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1e6
    return float("nan")
