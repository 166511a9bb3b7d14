"""Make the worker circuits and hints of a plan one at a time, and go on after an interruption.

The products that make a hint keep every core busy. Lowering, writing and hashing run in one thread beside them, which mostly
waits for the disk. At most three hints are in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from hecompile.bundles.client_files import FileRecord, describe_file, is_intact
from hecompile.bundles.hint_files import HINTS
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.bundles.worker import BundleFile, CircuitSpec
from hecompile.compiler.pipeline import lower_circuit
from hecompile.compiler.staging import Staging
from hecompile.compiler.worker_bundle_writer import WorkerBundleWriter
from hecompile.he.hints import write_hint
from hecompile.he.parameters import RingParameters
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.setup import PreparedMatrix
from hecompile.plan.circuits import RemoteCircuit, SplitPlan

Progress = Callable[[str, int, int], None]
"""Receives (name of the work, amount done, total amount)."""

RESUMED = "resume"
MAKING = "hints (rows)"
_PENDING = 2
"""Hints that may wait to be written."""


class _CompleteCircuit(BaseModel):
    """Represent the journal's line on a circuit whose files are complete."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: str
    hint: FileRecord
    worker: CircuitSpec


def write_circuits(
    stage: Staging, plan: SplitPlan, ring: RingParameters, plan_id: str, progress: Progress, fetched: bool = False
) -> tuple[FileRecord, ...]:
    """Write each circuit's hint into the client's part of the build, and the worker bundle beside it.

    With `fetched` the hints are part of the worker bundle instead.

    Progress counts rows of hints. Returns the records of the hint files. Raises OSError or InputError when the disk cannot
    be written.
    """
    total = sum(circuit.parameters.out_features for circuit in plan.circuits)
    listed = [line for line in map(_parsed, stage.begin(plan_id)) if line is not None]
    with WorkerBundleWriter(stage.build / WORKER, plan_id, keep=True) as writer:
        home = writer.folder if fetched else stage.build / CLIENT
        home.mkdir(exist_ok=True)
        kept = _keep_complete(stage, writer, home, {line.name: line for line in listed}, plan.circuits)
        missing = [circuit for circuit in plan.circuits if circuit.name not in kept]
        done = total - sum(circuit.parameters.out_features for circuit in missing)
        if kept:
            progress(RESUMED, done, total)
        progress(MAKING, done, total)
        records = [line.hint for line in kept.values()]
        public = PublicMatrix(ring, stage.public_seed, max(c.parameters.in_features for c in plan.circuits))
        prepared = PreparedMatrix(public)
        pending: deque[tuple[RemoteCircuit, Future[FileRecord]]] = deque()
        with ThreadPoolExecutor(max_workers=1) as background:
            for circuit in missing:
                hint = prepared.setup(torch.from_numpy(circuit.weight).t())  # of [features_out, features_in]
                pending.append((circuit, background.submit(_write, stage, writer, home, circuit, hint, ring)))
                while len(pending) > (_PENDING if circuit is not missing[-1] else 0):
                    written, future = pending.popleft()
                    records.append(future.result())
                    done += written.parameters.out_features
                    progress(MAKING, done, total)
        for record in records if fetched else ():
            writer.add_hint(BundleFile(**record.model_dump()))
        writer.commit([circuit.name for circuit in plan.circuits])
    return tuple(records)


def write_circuits_without_hints(
    stage: Staging, plan: SplitPlan, ring: RingParameters, plan_id: str, progress: Progress
) -> tuple[FileRecord, ...]:
    """Write a worker bundle that can compute hints (`hecompile.bundles.public_rows`), and no hints; return no records.

    It takes as long as writing the weights, and always starts afresh.
    """
    stage.begin(plan_id)
    stage.drop_unlisted(())
    (stage.build / CLIENT).mkdir(exist_ok=True)
    features = max(circuit.parameters.in_features for circuit in plan.circuits)
    with WorkerBundleWriter(stage.build / WORKER, plan_id) as writer:
        for done, circuit in enumerate(plan.circuits):
            progress("circuits", done, len(plan.circuits))
            writer.add(lower_circuit(circuit.model()))
            writer.add(lower_circuit(circuit.exact_model()))
        progress("public rows", len(plan.circuits), len(plan.circuits))
        writer.add_public_rows(PublicMatrix(ring, stage.public_seed, features), features)
        writer.commit()
    return ()


def _write(
    stage: Staging, writer: WorkerBundleWriter, home: Path, circuit: RemoteCircuit, hint: Tensor, ring: RingParameters
) -> FileRecord:
    spec = writer.add(lower_circuit(circuit.model()))
    single = ring if circuit.parameters.decryption_precision is np.float32 else None
    path = write_hint(home / HINTS, circuit.name, hint, single, circuit.parameters.hint_bits)
    record = describe_file(home, path)
    stage.note(_CompleteCircuit(name=circuit.name, hint=record, worker=spec).model_dump(mode="json"))
    return record


def _keep_complete(
    stage: Staging,
    writer: WorkerBundleWriter,
    home: Path,
    listed: dict[str, _CompleteCircuit],
    wanted: Iterable[RemoteCircuit],
) -> dict[str, _CompleteCircuit]:
    """Count the circuits that are complete and intact as added; delete every other file of the build."""
    kept: dict[str, _CompleteCircuit] = {}
    files: list[Path] = []
    for name in (circuit.name for circuit in wanted):
        line = listed.get(name)
        if line is None or line.worker.name != name or not line.hint.path.startswith(f"{HINTS}/{name}."):
            continue
        if is_intact(home, line.hint) and (circuit_files := writer.add_complete(line.worker)) is not None:
            kept[name] = line
            files += [home / line.hint.path, *circuit_files]
    stage.drop_unlisted(files)
    return kept


def _parsed(line: dict[str, Any]) -> _CompleteCircuit | None:
    try:
        return _CompleteCircuit.model_validate(line)
    except ValidationError:
        return None
