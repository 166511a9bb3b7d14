"""Hold the options that several commands have, so that each has one name and one help text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # imported when a command runs: help is to be quick
    from hecompile.runtime.wire.credentials import ClientCredentials

CheckpointName = Annotated[
    str, typer.Option(help="Checkpoint: a directory made by save_pretrained, a .gguf file, or a hub id.")
]
ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Checkpoint: a directory made by save_pretrained, a .gguf file, or a hub id."),
]
BuildDirectory = Annotated[
    Path, typer.Option(help="Where to write client/ and worker/. An earlier build there is replaced.")
]
ClientBundlePath = Annotated[Path, typer.Argument(help="The client bundle (OUT/client).")]
WorkerBundlePath = Annotated[Path, typer.Argument(help="The worker bundle (OUT/worker).")]
AdapterPath = Annotated[Path | None, typer.Option(help="A PEFT adapter, e.g. runs/demo/adapter.")]

TrainingRecipePath = Annotated[
    Path, typer.Argument(help="YAML recipe; models/recipes/demo.yaml is a commented example.")
]
FederationRecipePath = Annotated[
    Path, typer.Argument(help="YAML recipe; models/recipes/federation.yaml is a commented example.")
]
ConversionRecipePath = Annotated[
    Path, typer.Argument(help="YAML recipe; models/recipes/convert-reduced.yaml is a commented example.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to the recipe as KEY=VALUE, e.g. training.learning_rate=1e-3")
]

Precision = Annotated[
    float,
    typer.Option(
        help="Effective bits of every encrypted product: b bits mean noise of 2^-b of the result's own size (8: 0.4 %, "
        "about what bfloat16 rounding does). Fewer bits send fewer bytes, down to what can be verified. The end of the "
        "export and `inspect` say what was reached."
    ),
]
MAX_NEW_TOKENS = "How many tokens an answer has at most."
ON_BAD_WORKER = "After a wrong reply: stop, or retry-elsewhere, which needs several workers."
WORKER_ADDRESS = "Where a worker listens, as in a recipe"


@dataclass(frozen=True)
class CredentialOptions:
    """Hold what a client shows to a worker on a network, and whom it believes."""

    panel = "Worker on a network"
    authority: Annotated[
        Path | None, typer.Option(help="PEM of the authority that signed the worker's certificate.")
    ] = None
    certificate: Annotated[Path | None, typer.Option(help="PEM of the certificate that this client shows.")] = None
    key: Annotated[Path | None, typer.Option(help="PEM of the private key of --certificate.")] = None
    token: Annotated[Path | None, typer.Option(help="A file with the bearer token.")] = None

    def load(self) -> ClientCredentials:
        """Read the files. Raises InputError for one that is missing or damaged."""
        from hecompile.runtime.wire.credentials import ClientCredentials

        return ClientCredentials.load(self.authority, self.certificate, self.key, self.token)


@dataclass(frozen=True)
class PolynomialChoice:
    """Hold what stands for softmax, norm and activation; None where the checkpoint decides."""

    panel = "Polynomials (docs/polynomial.md)"
    attention: Annotated[
        str | None,
        typer.Option(
            help="exact (softmax), or what stands for it: power, gaussian_kernel (both for models trained with them alone), "
            "chebyshev. By default what the checkpoint was converted for."
        ),
    ] = None
    norm: Annotated[
        str | None, typer.Option(help="exact or polynomial. By default what the checkpoint was converted for.")
    ] = None
    activation: Annotated[
        str | None,
        typer.Option(
            help="exact, polynomial, composed, or quantized (a table of 8 bits). By default what the checkpoint was "
            "converted for."
        ),
    ] = None
    unconverted: Annotated[
        bool,
        typer.Option(
            "--unconverted",
            help="Take an attention that the checkpoint was not trained with; its answers then mean nothing.",
        ),
    ] = False
