"""Stand in for a frozen linear whose weight the worker has: a module that PEFT and trainers take for the linear it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hecompile.errors import InputError
from hecompile.runtime.client.products import Products
from hecompile.runtime.client.remote_linear import remote_linear
from hecompile.runtime.offload.plan import PlannedProduct

_READABLE = frozenset({"shape", "dtype", "device", "requires_grad", "is_leaf", "grad", "ndim", "layout", "grad_fn"})
_HARMLESS = frozenset(
    {
        "size", "dim", "numel", "element_size", "stride", "is_floating_point", "is_complex", "is_contiguous",
        "requires_grad_", "__len__", "__hash__", "is_same_size", "get_device",
    }
)  # fmt: skip
Rows = Callable[[tuple[int, ...]], Tensor | None]


class WorkersWeight(nn.Parameter):
    """Stand for a weight that the worker has: its shape and type, no values. To read or change them raises InputError.

    It takes the memory of one number.
    """

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype) -> WorkersWeight:
        made: WorkersWeight = torch.Tensor._make_subclass(cls, torch.zeros(1, dtype=dtype).expand(*shape), False)
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        if name in ("__get__", "__set__", "__delete__"):
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            allowed = attribute in _READABLE and (name == "__get__" or attribute in ("requires_grad", "grad"))
        else:
            allowed = name in _HARMLESS
        if not allowed:
            raise InputError(
                "this weight is on the worker, and its values are not here: merging an adapter into it, copying or saving "
                "it, and adapters that read it (DoRA) need the model as it was before `hecompile.offload`"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"WorkersWeight({list(self.shape)}, {self.dtype})"

    def __reduce_ex__(self, protocol: object) -> Any:
        raise InputError("this weight is on the worker: a model that is offloaded can be neither copied nor pickled")

    def __deepcopy__(self, memo: object) -> Any:
        raise InputError("this weight is on the worker: a model that is offloaded can be neither copied nor pickled")


@dataclass
class _Shared(threading.local):
    """Hold a product that some of its linears have not taken yet. x: the input that it was computed of."""

    x: Tensor | None = None
    version: int = -1
    graded: bool = False
    parts: dict[int, Tensor] = field(default_factory=dict)


class SharedProduct:
    """Compute the linears of one product together: the first that is called sends the input, the others take their part.

    Args:
        planned: the product.
        outputs: features of each of its linears.
        products: who computes it.

    Attributes:
        rows: given the shape of an input without its features, which of its rows are real, bool of that shape; None for
            all. Others are not sent; their results are zeros.
        trained_before: tells whether something is trained that stands before the product.

    Raises:
        InputError: the sizes do not fit the plan.
    """

    def __init__(self, planned: PlannedProduct, outputs: Sequence[int], products: Products) -> None:
        if sum(outputs) != len(planned.row_scale):
            raise InputError(
                f"{planned.linear} has {sum(outputs)} outputs in the model and {len(planned.row_scale)} in the plan: "
                "offload the model that the plan was compiled from"
            )
        self._planned, self._outputs = planned, list(outputs)
        self._products = products
        self.rows: Rows = lambda shape: None
        self.trained_before: Callable[[], bool] = lambda: True
        self._backward = f"{planned.linear}.backward" in products.circuits
        self._shared = _Shared()

    def part(self, index: int, x: Tensor) -> Tensor:
        """Return the results of linear `index` for x [..., in], of x's type; differentiable in x."""
        shared = self._shared
        version = 0 if x.is_inference() else x._version  # what inference_mode makes counts no changes in place
        same = shared.x is x and shared.version == version and shared.graded == torch.is_grad_enabled()
        if not same or index not in shared.parts:
            shared.x, shared.version, shared.graded = x, version, torch.is_grad_enabled()
            shared.parts = dict(enumerate(torch.split(self._compute(x), self._outputs, dim=-1)))
        part = shared.parts.pop(index)
        if not shared.parts:
            shared.x = None
        return part.to(x.dtype)

    def forget(self) -> None:
        """Let go of parts that this thread's last forward pass has left."""
        self._shared.x, self._shared.parts = None, {}

    def _compute(self, x: Tensor) -> Tensor:
        rows = self.rows(tuple(x.shape[:-1]))
        if x.requires_grad and not self._backward and not self.trained_before():
            x = x.detach()  # gradient checkpointing wants a gradient of the embedding's output, which nobody reads
        values = x.float() if rows is None else x.float()[rows]
        scale = self._planned.row_scale
        result = remote_linear(self._planned.prepare(values), scale, self._products, self._planned.linear)
        if rows is None:
            return result
        whole = result.new_zeros(*x.shape[:-1], len(scale))
        whole[rows] = result
        return whole


class _Offloaded(nn.Module):
    """Hold what both kinds of stand-ins share."""

    weight: Tensor
    bias: Any
    _product: SharedProduct
    _index: int
    _path: str

    def _take_over(self, module: nn.Linear | Conv1D, product: SharedProduct, index: int, path: str) -> None:
        nn.Module.__init__(self)
        self.weight = WorkersWeight(module.weight.shape, module.weight.dtype)
        self.bias = module.bias
        object.__setattr__(self, "_product", product)
        self._index, self._path = index, path
        self.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return x·Wᵀ + bias, the product by the worker. Raises InputError where the base weight is to be trained."""
        if self.weight.requires_grad:
            raise InputError(
                f"{self._path}.weight is on the worker and cannot be trained: train adapters, and leave requires_grad of "
                "the base weights False"
            )
        if getattr(self, "_is_replica", False):
            raise InputError("an offloaded model runs in one process on the CPU: do not wrap it in DataParallel")
        result = self._product.part(self._index, x)
        return result if self.bias is None else result + self.bias

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast the bias alone: the weight is not here."""
        if self.bias is not None:
            bias = fn(self.bias.data)
            if bias.device.type != "cpu":
                raise InputError("an offloaded model runs on the CPU: its heavy part is on the worker")
            self.bias.data = bias
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Leave the weight out."""
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Take the bias, where there is one; base weights are what the plan was compiled from."""
        bias = state_dict.get(prefix + "bias")
        if self.bias is not None and bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)


class OffloadedLinear(_Offloaded, nn.Linear):
    """Stand in for a `torch.nn.Linear`."""

    def __init__(self, module: nn.Linear, product: SharedProduct, index: int, path: str) -> None:
        self._take_over(module, product, index, path)
        self.in_features, self.out_features = module.in_features, module.out_features


class OffloadedConv1D(_Offloaded, Conv1D):  # type: ignore[misc]  # transformers has no types here
    """Stand in for a `Conv1D`, GPT-2's linear with a transposed weight."""

    def __init__(self, module: Any, product: SharedProduct, index: int, path: str) -> None:
        self._take_over(module, product, index, path)
        self.nf, self.nx = module.nf, module.nx


def stand_in(module: nn.Module, product: SharedProduct, index: int, path: str) -> nn.Module:
    """Return the stand-in for a linear of which `outputs_of` told the outputs."""
    if isinstance(module, Conv1D):
        return OffloadedConv1D(module, product, index, path)
    assert isinstance(module, nn.Linear)
    return OffloadedLinear(module, product, index, path)


def outputs_of(module: Any, path: str) -> int:
    """Return the number of features that a linear makes. Raises InputError for another kind of module, or a stand-in."""
    if isinstance(module, _Offloaded):
        raise InputError(f"{path} is offloaded already, and has no weight here: load the model from its checkpoint again")
    if isinstance(module, Conv1D):
        return int(module.nf)
    if type(module) is nn.Linear:
        return module.out_features
    raise InputError(f"{path} is a {type(module).__name__}, and can be offloaded as a torch.nn.Linear alone")
