"""Offload a transformers model in place: its frozen linears go to the encrypted worker, all else stays what it was."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import onnx_ir as ir
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hecompile.bundles.client import ClientBundle
from hecompile.errors import InputError
from hecompile.graph.interpreter import as_tensor
from hecompile.graph.ir import constant_of
from hecompile.polynomial.names import EXACT
from hecompile.runtime.client.functions import functions_of
from hecompile.runtime.client.products import Costs, Products
from hecompile.runtime.client.remote_linear import remote_linear
from hecompile.runtime.client.session import open_products
from hecompile.runtime.offload.modules import SharedProduct, outputs_of, stand_in
from hecompile.runtime.offload.plan import PlannedProduct, products_of
from hecompile.runtime.recipes.workplace import make_workplace

_EXPORTED = "checkpoint."
"""Begins the names of a plan's constants that are parameters of the checkpoint."""


class Offload:
    """Hold an offloaded model and its connection to the worker, until it is closed.

    Attributes:
        model: what was given, changed in place.
        bundle: the client bundle.
    """

    def __init__(self, model: nn.Module, bundle: ClientBundle, products: Products) -> None:
        self.model, self.bundle, self._products = model, bundle, products

    @property
    def costs(self) -> Costs:
        """Return what was spent up to now: seconds by who spent them, and bytes on the wire."""
        return replace(self._products.costs)

    def close(self) -> None:
        """Close the connection. The model has no frozen weights any more, and raises an error when it is called again."""
        self._products.close()

    def __enter__(self) -> Offload:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Rows:
    """Follow which rows of the inputs are real, by the attention mask that the decoder is called with.

    The worker then gets no row of padding. It sees their number, which the mask alone decides. Under gradient checkpointing
    all rows are sent: a layer may be computed again after the decoder was called with another mask.
    """

    def __init__(self, model: PreTrainedModel, shared: Sequence[SharedProduct]) -> None:
        self._model, self._shared, self._now = model, shared, threading.local()
        # PEFT calls its forward through it, and that of the model with the head by a shortcut
        decoder = self._decoder = model.base_model
        decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        decoder.register_forward_hook(self._end, always_call=True)

    def real(self, shape: tuple[int, ...]) -> Tensor | None:
        """Return the rows of an input of that shape, features left out, that are real: bool of that shape; None for all."""
        mask: Tensor | None = getattr(self._now, "mask", None)
        if mask is None or tuple(mask.shape) != shape or self._model.is_activation_checkpointing or bool(mask.all()):
            return None
        return mask

    def trained_before(self, later: Sequence[str]) -> bool:
        """Tell whether something trained stands before a product; `later` has the paths of its linears and all after it.

        That is an embedding that the decoder was called with, or a parameter of the decoder in none of these linears.
        """
        if getattr(self._now, "embedded", False):
            return True
        prefix = next((f"{name}." for name, part in self._model.named_modules() if part is self._decoder and name), "")
        after = tuple(f"{path}." for path in later)
        trained = (prefix + name for name, value in self._decoder.named_parameters() if value.requires_grad)
        return not all(name.startswith(after) for name in trained)

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        embedded = kwargs.get("inputs_embeds")
        self._now.embedded = isinstance(embedded, Tensor) and embedded.requires_grad
        mask = kwargs.get("attention_mask")
        self._now.mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        for shared in self._shared:
            shared.forget()


def offload(
    model: nn.Module,
    plan: str | Path,
    worker: str | Sequence[str] = "inprocess",
    *,
    worker_bundle: str | Path | None = None,
    engine: str | None = None,
    connection: Mapping[str, Any] | None = None,
) -> Offload:
    """Replace the frozen linears of a model, in place, by products with an encrypted worker.

    Everything else works as before: adapters of PEFT, put on before or after; trainers; `generate` with its cache; threads;
    gradient accumulation. Linears that read one input share an upload, rows of padding are not sent, and the frozen weights
    leave memory. Refused are what needs those weights (merging, saving the whole model, DoRA), training them, other devices
    and DataParallel.

    Args:
        model: of transformers, with a head for causal language modelling, or a PeftModel of one; the checkpoint that the
            plan was compiled from, in float32 or bfloat16, on the CPU.
        plan: the directory `client` of an export.
        worker: as in a recipe (docs/recipe.md): an address, several, a fleet's directory, or "inprocess".
        worker_bundle, engine: for "inprocess", as in a recipe.
        connection: settings of the recipe's `connection` section.

    Returns:
        the open connection, whose `costs` say what was spent; close it, or use it in a `with` statement.

    Raises:
        InputError: an argument is wrong, or the model is another one than the plan's; the model is unchanged.
        WorkerError: no worker of the plan answers; the model is unchanged.
    """
    base = _base_of(model)
    bundle = ClientBundle.open(Path(plan))
    settings: dict[str, Any] = {"model": plan, "worker": worker if isinstance(worker, str) else list(worker)}
    given = {"worker_bundle": worker_bundle, "engine": engine, "connection": connection}
    place = make_workplace(settings | {name: value for name, value in given.items() if value is not None})
    graph = bundle.graph()
    _check_same(base, graph)
    planned = products_of(graph)
    targets = [[_Target(base, path) for path in product.modules] for product in planned]
    sizes = [[target.outputs for target in group] for group in targets]
    products = open_products(bundle, place)
    try:
        shared = [SharedProduct(product, size, products) for product, size in zip(planned, sizes, strict=True)]
        for one, group in zip(planned if bundle.plan.hints == "stored" else planned[:1], targets, strict=False):
            _check_weights(one, group, products)
        rows = _Rows(base, shared)
        for number, (product, group) in enumerate(zip(shared, targets, strict=True)):
            later = tuple(path for one in planned[number:] for path in one.modules)
            product.rows, product.trained_before = rows.real, partial(rows.trained_before, later)
            for index, target in enumerate(group):
                target.replace(product, index)
        base.save_pretrained = _refuse_saving  # type: ignore[method-assign]  # of an adapter, PeftModel's own is called
    except BaseException:
        products.close()
        raise
    return Offload(model, bundle, products)


class _Target:
    """Find a linear in a model, and put another in its place: where PEFT has wrapped it, inside of the wrapper.

    Raises InputError where there is none, or its weights are to be trained.
    """

    def __init__(self, base: PreTrainedModel, path: str) -> None:
        self._path = path
        parent, _, self._name = path.rpartition(".")
        try:
            self._holder: Any = base.get_submodule(parent)
            found = self._holder.get_submodule(self._name)
        except AttributeError:
            raise InputError(f"the model has no module {path}: {_OTHER}") from None
        if isinstance(found, BaseTunerLayer):
            if found.merged:
                raise InputError(f"an adapter is merged into {path}: call unmerge_adapter first")
            self._holder, self._name = found, "base_layer"
        self._module: Any = getattr(self._holder, self._name)
        self.outputs = outputs_of(self._module, path)
        if isinstance(found, BaseTunerLayer) and not _reads_no_weight(found):
            raise InputError(f"the adapter of {path} reads the frozen weight, as DoRA does, and that goes to the worker")
        if self._module.weight.device.type != "cpu":
            raise InputError("an offloaded model runs on the CPU: its heavy part is on the worker")

    def frozen_product(self, x: Tensor) -> Tensor:
        """Return x·Wᵀ [T, out] by the model's own weight, for float32 x [T, in]."""
        weight = self._module.weight.detach().float()
        return x @ (weight if isinstance(self._module, Conv1D) else weight.t())

    def replace(self, product: SharedProduct, index: int) -> None:
        setattr(self._holder, self._name, stand_in(self._module, product, index, self._path))
        del self._module


def _check_weights(planned: PlannedProduct, group: Sequence[_Target], products: Products) -> None:
    """Ask the worker for one product of random numbers, and compare it with the model's own.

    Raises InputError where they point elsewhere: quantised weights alone are a hundred times nearer.
    """
    inputs = products.circuits[f"{planned.linear}.forward"].in_features
    x = torch.randn(1, inputs, generator=torch.Generator().manual_seed(0))
    own = torch.cat([target.frozen_product(x) for target in group], dim=1)
    found = remote_linear(planned.prepare(x), planned.row_scale, products, planned.linear)
    if torch.nn.functional.cosine_similarity(own, found).item() < _SAME and bool(own.any()):
        raise InputError(f"the weights of {planned.linear} in the model differ from the plan's: {_OTHER}")


_SAME = 0.99


def _refuse_saving(*arguments: Any, **settings: Any) -> None:
    raise InputError("the frozen weights of this model are on the worker: save its adapter (PeftModel.save_pretrained)")


_OTHER = "offload the model that the plan was compiled from"


def _reads_no_weight(layer: Any) -> bool:
    return not any(getattr(layer, "lora_variant", {}).values())


def _base_of(model: nn.Module) -> PreTrainedModel:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise InputError(f"a model of transformers, or a PeftModel of one, is wanted, got a {type(model).__name__}")
    return base


def _check_same(base: PreTrainedModel, graph: ir.Model) -> None:
    """Compare what the plan holds of the checkpoint (embedding, head, norms, biases) with the model.

    Raises InputError for another model, and for a plan that computes something else than the model: polynomials.
    """
    polynomial = [part for part, name in functions_of(graph).items() if name != EXACT]
    if polynomial:
        raise InputError(f"the plan has polynomials in place of its {polynomial[0]}, and the model has not")
    # Names are those of the checkpoint: PEFT puts what it adapts into wrappers.
    wrapped = re.compile(r"\.(base_layer|original_module)(?=\.)")
    state = {wrapped.sub("", name): value for name, value in base.named_parameters(remove_duplicate=False)}
    compared = 0
    for name, value in graph.graph.initializers.items():
        own, array = state.get(name.removeprefix(_EXPORTED)), constant_of(value)
        if own is None or array is None or tuple(own.shape) != array.shape:
            continue
        if not torch.equal(own.detach(), as_tensor(array).to(own.dtype)):
            raise InputError(f"{name.removeprefix(_EXPORTED)} of the model differs from the plan's: {_OTHER}")
        compared += 1
    if not compared:
        raise InputError(f"the model has none of the plan's embedding and norms: {_OTHER}")
