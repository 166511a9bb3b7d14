"""Make the text that a plan is calibrated on: the model writes it itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import onnx_ir as ir
import torch

from hecompile.compiler.frontend import Checkpoint
from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.graph.interpreter import Interpreter, graph_inputs
from hecompile.he.random.sampling import PublicSeed

_CALIBRATION_SEQUENCES, _CALIBRATION_LENGTH = 8, 32
Samples = tuple[tuple[int, ...], ...] | Callable[[ir.Model], tuple[tuple[int, ...], ...]]


def sample_calibration_tokens(
    checkpoint: Checkpoint, seed: PublicSeed, length: int = _CALIBRATION_LENGTH
) -> tuple[tuple[int, ...], ...]:
    """Text that the model itself writes: in its own language, without any private data, the same for the same seed."""
    config = checkpoint.model.config
    length = min(length, config.max_position_embeddings)
    start = _start_token(checkpoint)
    prompts = torch.full((_CALIBRATION_SEQUENCES, 1), int(start))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(_calibration_seed(seed))
        tokens = cast("Any", checkpoint.model).generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            max_length=length,
            min_length=length,
            pad_token_id=int(start),
        )
    return tuple(tuple(int(token) for token in row) for row in tokens)


def _self_sampler(
    checkpoint: Checkpoint, seed: PublicSeed, length: int
) -> Callable[[ir.Model], tuple[tuple[int, ...], ...]]:
    """The same by the canonical graph, for a model that the Hugging Face class no longer computes."""
    start, number = _start_token(checkpoint), _calibration_seed(seed)

    def sample(model: ir.Model) -> tuple[tuple[int, ...], ...]:
        interpreter = Interpreter(model)

        def logits_of(tokens: torch.Tensor) -> torch.Tensor:
            return interpreter.run(graph_inputs(tokens, torch.ones_like(tokens)))["logits"]

        return sample_tokens(logits_of, start, _CALIBRATION_SEQUENCES, length, number)

    return sample


def calibration_for(
    checkpoint: Checkpoint, polynomials: PolynomialOptions, raised: ir.Model, seed: PublicSeed, length: int
) -> tuple[tuple[int, ...], ...]:
    """Text that the model writes, by whichever computes its function; `raised`: its graph after `raise_steps`."""
    if polynomials.retrained:
        return _self_sampler(checkpoint, seed, length)(raised)
    return sample_calibration_tokens(checkpoint, seed, length)


def _start_token(checkpoint: Checkpoint) -> int:
    start = checkpoint.model.config.bos_token_id
    return int(start) if start is not None else 0


def _calibration_seed(seed: PublicSeed) -> int:
    return int(seed.derive("calibration").stream("tokens").uint32(0, 1)[0])


def sample_tokens(
    logits_of: Any, start: int, sequences: int, length: int, seed: int
) -> tuple[tuple[int, ...], ...]:
    """Text that a model writes, `sequences` of `length` tokens from `start` at temperature 1: `logits_of` maps token ids
    i64 [B, S] to logits f32 [B, S, V]."""
    tokens = torch.full((sequences, 1), start, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        while tokens.shape[1] < length:
            probabilities = torch.softmax(logits_of(tokens)[:, -1], dim=-1)  # [B, V]
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    return tuple(tuple(row) for row in tokens.tolist())
