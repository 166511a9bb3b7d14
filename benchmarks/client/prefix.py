"""Measure what adapters on the upper half of the layers save, and what a kept prefix saves besides: bytes, seconds, CPU.

On the small Llama with a worker process; and predicted at the shape of Llama-3.2-1B, from two random layers of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.report import table
from benchmarks.timing import paired, ratio
from benchmarks.training.builds import DEFAULTS, PRECISION, WEIGHT_BITS, options
from benchmarks.training.checkpoints import llama_1b_config
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.compiler.frontend import export_onnx
from hecompile.compiler.linear import compile_checkpoint
from hecompile.compiler.options import WeightBits
from hecompile.compiler.pipeline import lower_linear
from hecompile.inspection.linear import Totals, products_of
from hecompile.models import PRIVATE_TRAIN, TINY_LLAMA
from hecompile.passes.offload.attach_lora import AttachLora
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.session import load_tokenizer, open_session
from hecompile.runtime.model.data import IGNORED, PadToBucket, eos_and_pad, load_examples
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from hecompile.runtime.recipes.prefix import PrefixCacheSection
from hecompile.runtime.recipes.workplace import Workplace
from hecompile.runtime.worker.process import running_worker

LENGTH, BATCH = 48, 16
UPPER = (2, 3)  # of the small Llama's four layers
LAYERS_1B, TARGET = 16, 1.2e6
SIZE = "1GB"
PROSE = """\
## Adapters on the upper half, and a kept prefix

The small Llama (4 layers), LoRA of rank 8 on all linears, {weight_bits}-bit weights, precision {precision:g}, {sequences}
sequences of private data a step, all tokens scored; the worker is a process of its own. *Upper half*:
`--layers-to-transform 2-3`. *Prefix kept*: the same with `prefix_cache`, from the second epoch on. Bytes are whole frames
per token; *inspect* predicts the payload. Steps of all three are taken in turn, and the ratios are medians over pairs.
"""
EXACT = """\
Gradients of one batch against plaintext PEFT in float32, relative error of a matrix, upper half. The encryption's noise is
in all rows, and drawn anew for each: rows that differ by no more than the first two do not differ.
"""
ONE_B = """\
Predicted at the shape of Llama-3.2-1B ({layers} layers), MB of payload per token, head not counted; byte counts are those
that parameter selection takes for random weights of a layer that has one before it. Target with the upper half and the
prefix kept: at most {target:g} MB.
"""


@dataclass(frozen=True)
class _Measured:
    """Hold one way to take a step: the call, its model, and bytes per token as `inspect` predicts them."""

    step: Callable[[], None]
    model: EncryptedCausalLM
    predicted: int


def run(quick: bool) -> str:
    """Return Markdown: the measured steps, how exact they are, and the prediction at 1B."""
    batch, repeats = (2, 1) if quick else (BATCH, 9)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        everywhere = stack.enter_context(_opened(Path(scratch) / "all", AttachLora(), batch))
        upper, kept = (
            stack.enter_context(_opened(Path(scratch) / "upper", AttachLora(layers_to_transform=UPPER), batch))
            for _ in range(2)
        )
        tokens = int(_batch(upper, batch)["attention_mask"].sum())
        section = PrefixCacheSection.model_validate({"size": SIZE})
        exact = _exactness(upper, batch, rounds=1 if quick else 5)
        stack.enter_context(kept.prefix.keep(section, [tokens]))
        ways = {
            "all layers": _way(everywhere, batch, kept=False),
            "upper half": _way(upper, batch, kept=False),
            "upper half, prefix kept": _way(kept, batch, kept=True),
        }
        prose = PROSE.format(weight_bits=WEIGHT_BITS, precision=PRECISION, sequences=batch)
        measured = _steps(ways, repeats)
    return "\n\n".join([prose, measured, EXACT, exact, _one_b(quick)])


@contextmanager
def _opened(build: Path, lora: AttachLora, batch: int) -> Iterator[EncryptedCausalLM]:
    """Open the small Llama exported with `lora`, over a worker process, with an adapter in which nothing is zero."""
    if not build.exists():
        compile_checkpoint(str(TINY_LLAMA), build, replace(options(batch, LENGTH), lora=lora))
    with (
        running_worker(build / WORKER) as (_, address),
        open_session(Workplace(model=build / CLIENT, worker=address)) as session,
    ):
        generator = torch.Generator().manual_seed(7)
        own = session.model.adapter_state()
        session.model.load_adapter_state(
            {name: 0.05 * torch.randn(value.shape, generator=generator) for name, value in own.items()}
        )
        yield session.model


def _batch(model: EncryptedCausalLM, size: int) -> dict[str, Tensor]:
    tokenizer = load_tokenizer(model.bundle)
    examples = load_examples(PRIVATE_TRAIN, tokenizer, (LENGTH,))
    collate = PadToBucket((LENGTH,), eos_and_pad(tokenizer)[1], with_examples=True)
    batch = collate([examples[10 * place] for place in range(size)])
    return batch | {"labels": batch["input_ids"].where(batch["attention_mask"].bool(), torch.tensor(IGNORED))}


def _way(model: EncryptedCausalLM, size: int, kept: bool) -> _Measured:
    batch, totals = _batch(model, size), Totals.of(model.bundle, products_of(model.bundle))
    work = totals.prefix_kept if kept else totals.training
    assert work is not None
    return _Measured(lambda: _gradients(model, batch), model, work.bytes_up + work.bytes_down)


def _gradients(model: EncryptedCausalLM | PlaintextPeftModel, batch: dict[str, Tensor]) -> None:
    model.zero_grad()
    loss = model(**batch).loss
    assert loss is not None
    loss.backward()


def _steps(ways: dict[str, _Measured], repeats: int) -> str:
    for way in ways.values():
        way.step()  # the first epoch of what is kept
    before = {name: way.model.stats() for name, way in ways.items()}
    samples = paired({name: way.step for name, way in ways.items()}, repeats)
    first, rows = next(iter(ways)), []
    for name, way in ways.items():
        after, sample = way.model.stats(), samples[name]
        spent = {key: after[key] - before[name][key] for key in after}
        sent = (spent["bytes_up"] + spent["bytes_down"]) / spent["tokens"]
        rows.append(
            [
                name, f"{sent:,.0f}", f"{way.predicted:,}", sample.seconds, ratio(sample.wall, samples[first].wall),
                sample.cpu_seconds, ratio(sample.cpu, samples[first].cpu),
            ]
        )  # fmt: skip
    headings = ["adapters on", "bytes/token", "inspect", "step, s", "of all layers", "client CPU, s", "of all layers"]
    return table(headings, rows)


def _exactness(model: EncryptedCausalLM, size: int, rounds: int) -> str:
    """Compare gradients with plaintext, without and with what is kept; fresh noise each round."""
    batch = _batch(model, size)
    plain = PlaintextPeftModel.from_pretrained(TINY_LLAMA, model.peft_config, (LENGTH,), size)
    plain.load_adapter_state(model.adapter_state())
    _gradients(plain, {name: value for name, value in batch.items() if name != "examples"})
    reference = {name: value.grad for name, value in plain.adapter_state().items()}

    def errors() -> Tensor:
        _gradients(model, batch)
        own = {name: value.grad for name, value in model.adapter_state().items()}
        return torch.stack([(own[n] - g).norm() / g.norm() for n, g in reference.items() if g is not None])  # type: ignore[operator]

    def repeated(dtype: str | None) -> list[Tensor]:
        found = []
        for _ in range(rounds):
            if dtype is None:
                found.append(errors())
                continue
            with model.prefix.keep(PrefixCacheSection.model_validate({"size": SIZE, "dtype": dtype}), [1]):
                errors()
                found.append(errors())
        return found

    rows = []
    for name, dtype in (("nothing", None), ("nothing, again", None), ("float32", "float32"), ("bfloat16", "bfloat16")):
        found = torch.stack(repeated(dtype))  # [rounds, matrices]
        rows.append([name, f"{found.median(dim=1).values.mean():.5f}", f"{found.max(dim=1).values.mean():.5f}"])
    return table(["kept", "median", "worst"], rows)


def _one_b(quick: bool) -> str:
    rows = []
    for precision, weight_bits in [(PRECISION, WEIGHT_BITS)] if quick else [(PRECISION, WEIGHT_BITS), (6.0, 8), DEFAULTS]:
        forward, backward, first, first_backward = _layer_bytes(precision, weight_bits, quick)
        half = LAYERS_1B // 2
        everywhere = LAYERS_1B * (forward + backward) - first_backward
        upper = LAYERS_1B * forward + half * backward - first_backward
        kept = half * (forward + backward) - first - first_backward
        megabytes = [f"{bytes_ / 1e6:.2f}" for bytes_ in (everywhere, upper, kept, kept + first)]
        rows.append([f"{weight_bits} bits, precision {precision:g}", *megabytes, f"{kept / everywhere:.2f}"])
    headings = ["weights", "all layers", "upper half", "prefix kept", "hidden states alone kept", "kept / all"]
    prose = ONE_B.format(layers=LAYERS_1B, target=TARGET / 1e6)
    return f"{prose}\n\n" + table(headings, rows)


def _layer_bytes(precision: float, weight_bits: WeightBits, quick: bool) -> tuple[int, int, int, int]:
    """Return bytes per token of a layer, forward and backward, and of its query, key and value product alone."""
    config = llama_1b_config(2)
    config.vocab_size, config._attn_implementation = 1024, "eager"
    if quick:
        config.hidden_size, config.intermediate_size = 256, 1024
        config.num_attention_heads, config.num_key_value_heads = 4, 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        texts = torch.randint(3, 1024, (4, 64)).tolist()
    exported = export_onnx(model)
    del model
    plan, _ = lower_linear(exported, options(1, 512, precision, weight_bits), tuple(map(tuple, texts)))
    sizes = {
        circuit.name.partition(".layers.1.")[2]: circuit.parameters.bytes_up(1) + circuit.parameters.bytes_down(1)
        for circuit in plan.circuits
        if ".layers.1." in circuit.name
    }
    queries = "self_attn.q_proj-k_proj-v_proj"
    forward = sum(size for name, size in sizes.items() if name.endswith(".forward"))
    backward = sum(size for name, size in sizes.items() if name.endswith(".backward"))
    return forward, backward, sizes[f"{queries}.forward"], sizes[f"{queries}.backward"]
