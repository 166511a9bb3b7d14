"""Define where a plan runs: the client bundle, the workers, how they are reached. Training and inference share it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, ValidationError, field_validator, model_validator

from hecompile.errors import InputError
from hecompile.runtime.recipes.key_hints import explain
from hecompile.runtime.recipes.section import Positive, Section, Size
from hecompile.runtime.wire.address import DIRECTORY_SCHEMES, parse_address

UNIX_PREFIX = "unix://"


class ConnectionSection(Section):
    """Say how workers are reached.

    * `authority`: PEM file of who signs the workers' certificates (default: the system's list); `certificate` and `key`:
      what this client shows; `token`: a file with the bearer token that workers ask for.
    * `reply_timeout`: seconds of silence after which a request counts as lost; `attempts`: how often one is sent at most, to
      one worker or several, with growing waits between.
    * `on_bad_worker`: what a reply does that is not the right product. `stop` ends the run at its last checkpoint;
      `retry-elsewhere` sends the ciphertext to another worker and never uses the bad one again.
    * `hint_cache`: memory that hints may take which are fetched (`export --hints fetched`), in bytes or as `2GB`; `hints`:
      `http://` or `https://` address of a folder with them (default: the worker serves them).
    """

    authority: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token: Path | None = None
    reply_timeout: Annotated[float, Field(gt=0)] = 600.0
    attempts: Positive = 6
    on_bad_worker: Literal["stop", "retry-elsewhere"] = "stop"
    hint_cache: Size = ByteSize(512 << 20)
    hints: str | None = None

    @field_validator("hints")
    @classmethod
    def _is_a_web_address(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(DIRECTORY_SCHEMES):
            raise ValueError("needs the http:// or https:// address of a folder of hints")
        return value


class Workplace(Section):
    """Name the client bundle, `model`, and its `worker`.

    * `worker` is where the worker listens: `tcp://host:port`, `unix://path`, `grpc://`, `grpcs://`, `flight://` or
      `flights://host:port`;
    * or a list of such addresses for several workers of one plan, which may hold some of its layers each;
    * or the `http://` address of a fleet's directory;
    * or `inprocess`, which runs `worker_bundle` with `engine` (by default the fastest on this CPU) in this process.
    """

    model: Path
    worker: str | Annotated[list[str], Field(min_length=1)] = "inprocess"
    worker_bundle: Path | None = None
    engine: Literal["auto", "vnni", "torch", "torch-cuda", "onnxruntime", "cleartext"] | None = None
    head_products: Literal["float32", "bfloat16"] = "float32"
    connection: ConnectionSection = ConnectionSection()

    @property
    def workers(self) -> list[str]:
        """List the addresses in `worker`."""
        return [self.worker] if isinstance(self.worker, str) else self.worker

    @property
    def requests_in_flight(self) -> int:
        """Return how many requests may be under way at once."""
        return 1

    @field_validator("worker", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        # pydantic has an error for each kind that the value is not, and the first alone says half of it
        several = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
        if not (isinstance(value, str) or several):
            raise ValueError("needs an address, such as tcp://127.0.0.1:7700, or a list of addresses, or inprocess")
        return value

    @model_validator(mode="after")
    def _reachable(self) -> Workplace:
        if self.worker == "inprocess":
            if self.worker_bundle is None:
                raise ValueError("worker: inprocess needs worker_bundle, the worker's half of the export")
        elif self.engine is not None:
            raise ValueError("engine is the worker's own choice unless worker: inprocess; drop it here")
        if self.worker != "inprocess":
            if len(set(self.workers)) < len(self.workers):
                raise ValueError("worker names an address twice")
            for address in self.workers:
                if address.startswith(DIRECTORY_SCHEMES):
                    if len(self.workers) > 1:
                        raise ValueError(f"worker: {address} is a fleet's directory, which stands alone; drop the others")
                    continue
                try:
                    parse_address(address)
                except InputError as error:
                    raise ValueError(f"{error}, or a fleet's directory at http:// or https://, or inprocess") from None
        return self


def make_workplace(settings: dict[str, Any]) -> Workplace:
    """Make a workplace of command-line options. Raises InputError naming the one that is wrong."""
    try:
        return Workplace.model_validate(settings)
    except ValidationError as error:
        raise InputError(explain(error, Workplace)) from None


def resolve_worker(section: dict[str, Any], directory: Path) -> None:
    """Make relative `unix://` paths in a section's `worker`, one address or a list, relative to `directory`, in place."""
    worker = section.get("worker")
    if isinstance(worker, str):
        section["worker"] = _resolve_address(worker, directory)
    elif isinstance(worker, list):
        section["worker"] = [_resolve_address(one, directory) if isinstance(one, str) else one for one in worker]


def _resolve_address(address: str, directory: Path) -> str:
    if not address.startswith(UNIX_PREFIX) or address == UNIX_PREFIX:
        return address
    return f"{UNIX_PREFIX}{directory / address.removeprefix(UNIX_PREFIX)}"
