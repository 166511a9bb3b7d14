"""Small worker bundles, and credentials, for the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hecompile.bundles.worker import WorkerBundle
from hecompile.compiler.worker_bundle_writer import WorkerBundleWriter
from hecompile.passes.offload.lower_worker import LowerWorker
from hecompile.plan.encrypted_linear import encrypted_linear_model
from hecompile.runtime.wire.credentials import ClientCredentials, ServerCredentials
from hecompile.runtime.wire.development_certificates import (
    AUTHORITY,
    CLIENT,
    CLIENT_KEY,
    SERVER,
    SERVER_KEY,
    TOKEN,
    make_development_certificates,
)

PLAN_ID = "00112233445566778899aabbccddeeff"


def extreme_weight(in_features: int, out_features: int, seed: int = 0) -> np.ndarray:
    """int8 [in, out]: the first columns all 127, all -128 and alternating, the rest uniform."""
    values = np.random.default_rng(seed).integers(-128, 128, (in_features, out_features), dtype=np.int8)
    values[:, 0] = 127
    values[:, 1] = -128
    values[0::2, 2], values[1::2, 2] = 127, -128
    return values


def extreme_planes(limbs: int, tokens: int, features: int, seed: int = 0) -> np.ndarray:
    """uint8 [limbs, tokens, features]: token 0 all 255, then (if there are so many) all 0, all 128, 127 and uniform."""
    planes = np.random.default_rng(seed).integers(0, 256, (limbs, tokens, features), dtype=np.uint8)
    for token, value in enumerate((255, 0, 128, 127)[:tokens]):
        planes[:, token, :] = value
    return planes


def write_bundle(
    directory: Path, linears: dict[str, tuple[np.ndarray, int, int]], plan_id: str = PLAN_ID
) -> WorkerBundle:
    """linears: name → (right-hand side of the forward product int8 [in, out], upload_bits, reply_bits)."""
    with WorkerBundleWriter(directory, plan_id) as writer:
        for name, (weight, upload_bits, reply_bits) in linears.items():
            for direction, matrix in (("forward", weight), ("backward", weight.T)):
                model = encrypted_linear_model(matrix, upload_bits, reply_bits, f"{name}.{direction}")
                writer.add(LowerWorker()(model).model)
        return writer.commit()


def development_credentials(directory: Path) -> tuple[ServerCredentials, ClientCredentials]:
    """New ones that fit each other: certificates on both sides and a token."""
    made = directory / "credentials"
    make_development_certificates(made)
    authority, token = made / AUTHORITY, made / TOKEN
    return (
        ServerCredentials.load(made / SERVER, made / SERVER_KEY, authority, token),
        ClientCredentials.load(authority, made / CLIENT, made / CLIENT_KEY, token),
    )
