"""Read the client bundle: the client plan, the hints, the check vectors, the tokenizer and a manifest.

All of it is public but for the check vectors and those that find wrapped products, which the worker must not see: with them
it could return wrong results that pass for right ones (and would learn nothing about the data). There is no key in it: keys
are drawn for each request.

manifest.json   format, plan id, public seed, ring, LoRA options, buckets, every circuit's parameters, file hashes
plan.onnx(.data) the client plan: embedding, norms, row scales, and linears that stay with the client
hints/*.npy     H = W·A mod q, one per circuit; none in a plan whose worker has or computes them (`hints` in the manifest)
checks/*.npy    secret: what each reply is verified with, one per circuit (`hecompile.he.verification`)
wraps/*.npy     secret: what finds wrapped products, one per circuit with a calibrated bound (`hecompile.he.wraps`)
tokenizer/      what AutoTokenizer.from_pretrained loads; generation_config.json: the ids of the tokens that end an answer
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from hecompile.bundles.client_files import REMEDY, FileRecord, check_file, describe_file
from hecompile.bundles.hint_files import HINTS, hint_path
from hecompile.bundles.kinds import CLIENT_FORMAT, MANIFEST, MAX_MANIFEST_BYTES, BundleKind, explain_mix_up
from hecompile.bundles.mapped_constants import map_constants
from hecompile.errors import HecompileError, InputError
from hecompile.files import missing_path_hint, read_whole, unreadable
from hecompile.foreign import parse_json, printable
from hecompile.graph.ir import print_model
from hecompile.he.parameters import LOG_Q, LinearParameters, RingParameters, RingParametersLiteral
from hecompile.he.random.sampling import PublicSeed
from hecompile.he.security import AMPLE_BITS, MINIMUM_BITS, show_bits

LOGGER = logging.getLogger(__name__)

VERSION = 6
READABLE = (3, 4, 5, 6)
"""Versions that can be read; 3 has neither packed rings nor transformed hints, 4 one number of weight bits for all, 5
words and hints of whole bytes, proven bounds, a backward product of every linear and adapters on all layers."""

PLAN, PLAN_DATA = "plan.onnx", "plan.onnx.data"
CHECKS, WRAPS, TOKENIZER = "checks", "wraps", "tokenizer"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RingRecord(_Record):
    """Hold an unchecked ring, as in the file; `ring()` checks it."""

    ring_dim: int
    rank: int
    log_q: int
    sigma: float
    packed: bool = False

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `packed` where it is false: a plan from before there were packed rings must hash to its id."""
        return {name: value for name, value in serialize(self).items() if name != "packed" or value}

    def ring(self) -> RingParameters:
        """Return the checked ring. Raises InputError or SecurityError as `RingParameters` does."""
        return RingParameters.from_literal(RingParametersLiteral(**self.model_dump()))


class LoraRecord(_Record):
    """Hold LoRA options under the names of PEFT."""

    r: int = Field(ge=1)
    lora_alpha: float
    lora_dropout: float
    target_modules: list[str]
    fan_in_fan_out: bool = False
    layers_to_transform: list[int] | None = None
    layers_pattern: list[str] | None = None

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is later than the first plans where it is false or None: those must hash to their ids."""
        later = ("fan_in_fan_out", "layers_to_transform", "layers_pattern")
        return {name: value for name, value in serialize(self).items() if name not in later or value}


class CircuitRecord(_Record):
    """Hold one product: its parameters, and the precision predicted for it."""

    linear: str
    direction: Literal["forward", "backward"]
    in_features: int
    out_features: int
    max_l1: int
    max_l2: float
    upload_bits: int | None = None
    reply_bits: int | None = None
    upload_limbs: int | None = None
    reply_bytes: int | None = None
    """Whole bytes instead of bits, in a plan of version 5 or before."""
    noise_std: float
    effective_bits: float
    weight_sha256: str
    weight_bits: int | None = None
    """Bits that hold every weight; None in a plan of version 4 or before, whose circuits all have those of the plan."""
    gain: float | None = None
    """How many times longer than proven a token may be; None for a proven bound, as of every plan before version 6."""
    hint_bits: int | None = None
    """Bits of a word of the hint; None where words are whole, as in plans of version 5 or before."""

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is None: a plan from before must hash to its id."""
        return {name: value for name, value in serialize(self).items() if value is not None}

    def parameters(self) -> LinearParameters:
        """Return the checked form. Raises InputError where the numbers cannot belong together."""
        upload_bits = 8 * (self.upload_limbs or 0) if self.upload_bits is None else self.upload_bits
        reply_bits = 8 * (self.reply_bytes or 0) if self.reply_bits is None else self.reply_bits
        return LinearParameters(
            in_features=self.in_features,
            out_features=self.out_features,
            max_l1=self.max_l1,
            max_l2=self.max_l2,
            upload_bits=upload_bits,
            reply_bits=reply_bits,
            gain=self.gain or 1.0,
            hint_bits=LOG_Q if self.hint_bits is None else self.hint_bits,
        )


class PlanRecord(_Record):
    """Hold everything that client and worker must agree on. Its hash is the plan id."""

    base_model: str
    public_seed: str
    ring: RingRecord
    lora: LoraRecord
    batch_size: int = Field(ge=1)
    sequence_buckets: list[int]
    effective_bits: float
    weight_bits: int | Literal["auto"]
    hints: Literal["stored", "fetched", "none"] = "stored"
    """Where hints are: in this bundle, in the worker's, or nowhere, as the worker computes them with every product."""
    graph_sha256: str
    circuits: dict[str, CircuitRecord]

    def plan_id(self) -> str:
        """Return the SHA-256 of the canonical JSON form, in hex."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    def bits_of(self, circuit: str) -> int:
        """Return the bits of the weights of a circuit."""
        bits = self.circuits[circuit].weight_bits
        if bits is not None:
            return bits
        assert self.weight_bits != "auto"  # no plan of that version
        return self.weight_bits

    def reached_bits(self) -> tuple[float, float]:
        """Return the least and the most effective bits of its products; at least `effective_bits`, which was asked for."""
        reached = [circuit.effective_bits for circuit in self.circuits.values()]
        return min(reached, default=self.effective_bits), max(reached, default=self.effective_bits)


class _Manifest(_Record):
    format: str
    version: int
    plan_id: str
    plan: PlanRecord
    files: list[FileRecord]
    fetched: list[FileRecord] | None = None
    """The hints in the worker's bundle, which the client fetches."""


def read_plan(directory: Path) -> PlanRecord:
    """Read what a client bundle says of its plan; no other file is looked at. Raises InputError where there is none."""
    return _read_manifest(directory).plan


@dataclass(frozen=True)
class ClientBundle:
    """Hold an opened bundle: every file was hashed, ring and circuits are checked objects."""

    directory: Path
    plan_id: str
    plan: PlanRecord
    ring: RingParameters
    circuits: dict[str, LinearParameters]
    fetched: dict[str, FileRecord] = field(default_factory=dict)
    """Circuit → its hint in the worker's bundle; empty where hints are not fetched."""

    @property
    def public_seed(self) -> PublicSeed:
        return PublicSeed.from_hex(self.plan.public_seed)

    @property
    def hints(self) -> Path:
        return self.directory / HINTS

    @property
    def checks(self) -> Path:
        return self.directory / CHECKS

    @property
    def wraps(self) -> Path:
        return self.directory / WRAPS

    @property
    def tokenizer(self) -> Path:
        return self.directory / TOKENIZER

    def graph(self) -> ir.Model:
        """Return the client plan, nodes and values made anew for the caller to change; constants are shared with every other
        copy, and the large ones stay mapped from their file.

        Raises InputError when it cannot be read.
        """
        return self._parsed.clone()

    @cached_property
    def _parsed(self) -> ir.Model:
        """Parse the plan's file, once for as long as the bundle is open. Nobody changes what this returns."""
        try:
            model = ir.load(self.directory / PLAN)
            map_constants(model, self.directory / PLAN_DATA)
            return model
        except OSError as error:
            raise unreadable(self.directory / PLAN, error, REMEDY) from error
        except Exception as error:  # protobuf and onnx_ir raise many kinds for a file that is no model
            raise InputError(f"{self.directory / PLAN} cannot be read; {REMEDY}") from error

    @classmethod
    def open(cls, directory: str | Path) -> ClientBundle:
        """Open a bundle after checking every file's size and hash.

        Raises:
            InputError: a file is missing, damaged or of another version.
            SecurityError: the ring is under 128 bits.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory)
        if manifest.plan.plan_id() != manifest.plan_id:
            raise InputError(f"{directory / MANIFEST}: the plan does not hash to its id; {REMEDY}")
        for record in manifest.files:
            check_file(directory, record)
        listed = {record.path for record in manifest.files}
        stored = manifest.plan.circuits if manifest.plan.hints == "stored" else ()
        hints = (hint_path(circuit) for circuit in stored)
        checks = (f"{CHECKS}/{circuit}.npy" for circuit in manifest.plan.circuits)
        data = (PLAN_DATA,) if (directory / PLAN_DATA).exists() else ()
        wraps = (f"{WRAPS}/{name}.npy" for name, record in manifest.plan.circuits.items() if record.gain is not None)
        for needed in (PLAN, *data, *hints, *checks, *wraps):
            if needed not in listed:
                raise InputError(f"{directory / MANIFEST} is damaged: {needed} is not listed; {REMEDY}")
        fetched = {record.path: record for record in manifest.fetched or ()}
        remote = manifest.plan.circuits if manifest.plan.hints == "fetched" else ()
        for circuit in remote:
            if hint_path(circuit) not in fetched:
                raise InputError(f"{directory / MANIFEST} is damaged: the hint of {circuit} is not listed; {REMEDY}")
        _refuse_strangers(directory, listed)
        ring = manifest.plan.ring.ring()
        if ring.security_bits < AMPLE_BITS:
            LOGGER.warning(
                "%s: its ring has %s for one secret, which sinks below %.0f after 2^%.0f blocks of tokens: "
                "export again",
                directory, show_bits(ring.security_bits), MINIMUM_BITS, ring.security_bits - MINIMUM_BITS,
            )  # fmt: skip
        circuits = {name: record.parameters() for name, record in manifest.plan.circuits.items()}
        hashes = {circuit: fetched[hint_path(circuit)] for circuit in remote}
        bundle = cls(directory, manifest.plan_id, manifest.plan, ring, circuits, hashes)
        # The plan id that client and worker agree on covers the graph through its hash, not through the file's.
        if graph_sha256(bundle._parsed) != manifest.plan.graph_sha256:
            raise InputError(f"{directory / PLAN} is not the graph that the plan was made with; {REMEDY}")
        return bundle


def write_manifest(
    directory: Path, plan: PlanRecord, hashed: Iterable[FileRecord] = (), fetched: Iterable[FileRecord] = ()
) -> None:
    """Hash every file under `directory`, apart from those in `hashed`, and write the manifest beside them.

    fetched: the hints in the worker's bundle.
    """
    known = {record.path: record for record in hashed}
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    files = [known.get(path.relative_to(directory).as_posix()) or describe_file(directory, path) for path in paths]
    remote = sorted(fetched, key=lambda record: record.path) or None
    manifest = _Manifest(
        format=CLIENT_FORMAT, version=VERSION, plan_id=plan.plan_id(), plan=plan, files=files, fetched=remote
    )
    content = manifest.model_dump(exclude=None if remote else {"fetched"})
    (directory / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def graph_sha256(model: ir.Model) -> str:
    """Return the SHA-256 of the printed graph, in hex: its operators, names, shapes and small constants."""
    return hashlib.sha256(print_model(model).encode()).hexdigest()


def _read_manifest(directory: Path) -> _Manifest:
    path = directory / MANIFEST
    if (missing := missing_path_hint(directory, "`hecompile export llama` makes the client bundle")) is not None:
        raise InputError(missing)
    if (mix_up := explain_mix_up(directory, BundleKind.CLIENT)) is not None:
        raise InputError(mix_up)
    if not path.is_file():
        raise InputError(f"{directory} is not a client bundle: {MANIFEST} is missing; {REMEDY}")
    try:
        raw = parse_json(read_whole(path, MAX_MANIFEST_BYTES))
        if not isinstance(raw, dict) or raw.get("format") != CLIENT_FORMAT:
            raise InputError(f"{path} is not the manifest of a client bundle; {REMEDY}")
        if raw.get("version") not in READABLE:
            raise InputError(
                f"{path} has format version {raw.get('version')}, this program reads {READABLE}; {REMEDY}"
            )
        return _Manifest.model_validate(raw)
    except HecompileError:
        raise
    except OSError as error:
        raise unreadable(path, error, REMEDY) from error
    except ValueError as error:  # a ValidationError is one
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, ValidationError):
            detail = error.errors()[0]
            first = printable(f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}")
        raise InputError(f"{path} is damaged ({first}); {REMEDY}") from error


def _refuse_strangers(directory: Path, listed: set[str]) -> None:
    """Refuse a file beside the tokenizer that the manifest does not have: it may change how text is read."""
    folder = directory / TOKENIZER
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.relative_to(directory).as_posix() not in listed:
            raise InputError(f"{path} is not part of the bundle, and a tokenizer may read it; delete it")
