"""Raise the exporter's decompositions to one node each, so that later passes see the model's own operators.

    MatMul(x, Transpose(W))                                      →  Linear(x, W)
    Mul(w, Mul(x, Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2)), ε)))))  →  RMSNorm(x, w; ε)
    Mul(x, Sigmoid(x))                                           →  SiLU(x)
    Add(Mul(x, cos), Mul(Concat(Neg(x₂), x₁), sin))                →  RotaryEmbedding(x, cos, sin)
    Reshape(Expand(Unsqueeze(x, 2)))                             →  RepeatKV(x; repeats)

Each rule matches, then checks (with a reason), then rewrites; layers are named by the exporter's name scopes. The result
computes the same function up to the rounding of float32. A layer norm or a gelu, which no rule
matches, stays as the exporter wrote it, and is the client's. A product by a frozen weight must not stay: it is the worker's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from hecompile.graph.ir import DOMAIN, ORIGIN, constant_of, module_path, remove_unused, source_of
from hecompile.graph.lazy import is_lazy

MatchResult = pattern.MatchResult


@dataclass(frozen=True)
class Canonicalize(ir.passes.InPlacePass):
    """Raise a simplified exporter graph to Linear, RMSNorm, SiLU, Softmax, RotaryEmbedding and RepeatKV nodes."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        rules = pattern.RewriteRuleSet([rule.rule() for rule in RULES], commute=True)
        count = rules.apply_to_model(model)
        remove_unused(model)
        model.opset_imports[DOMAIN] = 1
        for node in model.graph:
            node.metadata_props.setdefault(ORIGIN, module_path(node))
        return ir.passes.PassResult(model, count > 0)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type == "Expand":
                raise ir.passes.PostconditionError(f"{node.op_type} of {module_path(node)} was not raised")
            if node.op_type == "MatMul" and any(v is not None and v.is_initializer() for v in node.inputs):
                raise ir.passes.PostconditionError(
                    f"a product by a frozen weight in {module_path(node)} was not raised"
                )


class LinearRule(pattern.RewriteRuleClassBase):
    """Match x·Wᵀ with a frozen W [out, in]."""

    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.MatMul(x, op.Transpose(weight, perm=[1, 0]), _outputs=["product"])

    def check(self, op: Any, weight: ir.Value, **_: Any) -> MatchResult:
        result = MatchResult()
        if not weight.is_initializer():
            return result.fail("the right-hand side is computed, not a frozen weight", weight)
        if weight.shape is None or len(weight.shape) != 2:
            return result.fail("the weight is not a matrix", weight)
        return result

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, product: ir.Value, **_: Any) -> ir.Value:
        return _made_from(op.Linear(x, weight, _domain=DOMAIN), product)


class RMSNormRule(pattern.RewriteRuleClassBase):
    """Match x / sqrt(mean(x²) + ε) · w over the last axis."""

    def pattern(self, op: Any, x: Any, weight: Any, exponent: Any, axes: Any, epsilon: Any) -> Any:
        mean = op.ReduceMean(op.Pow(x, exponent), axes, _allow_other_attributes=True)
        inverse = op.Reciprocal(op.Sqrt(op.Add(mean, epsilon)))
        return op.Mul(weight, op.Mul(x, inverse), _outputs=["normalized"])

    def check(
        self, op: Any, weight: ir.Value, exponent: ir.Value, axes: ir.Value, epsilon: ir.Value, **_: Any
    ) -> MatchResult:
        result = MatchResult()
        if _scalar(exponent) != 2.0:
            return result.fail("the exponent is not 2", exponent)
        if _scalar(epsilon) is None:
            return result.fail("epsilon is not a constant scalar", epsilon)
        if _scalar(source_of(axes)) != -1.0:
            return result.fail("the mean is not over the last axis alone", axes)
        if not weight.is_initializer():
            return result.fail("the gain is computed, not a frozen weight", weight)
        return result

    def rewrite(
        self, op: Any, x: ir.Value, weight: ir.Value, epsilon: ir.Value, normalized: ir.Value, **_: Any
    ) -> ir.Value:
        eps = _scalar(epsilon)
        assert eps is not None
        return _made_from(op.RMSNorm(x, weight, epsilon=eps, _domain=DOMAIN), normalized)


class SiLURule(pattern.RewriteRuleClassBase):
    """Match x · sigmoid(x)."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Mul(x, op.Sigmoid(x), _outputs=["activated"])

    def rewrite(self, op: Any, x: ir.Value, activated: ir.Value, **_: Any) -> ir.Value:
        return _made_from(op.SiLU(x, _domain=DOMAIN), activated)


class RotaryRule(pattern.RewriteRuleClassBase):
    """Match x ⊙ cos + rotate_half(x) ⊙ sin in the half-split layout; cos and sin come through a shared Unsqueeze."""

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any) -> Any:
        first = op.Slice(x, _allow_other_inputs=True, _outputs=["first"])
        second = op.Slice(x, _allow_other_inputs=True, _outputs=["second"])
        rotated = op.Concat(op.Neg(second), first, _allow_other_attributes=True)
        return op.Add(op.Mul(x, cos), op.Mul(rotated, sin), _outputs=["turned"])

    def check(
        self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, first: ir.Value, second: ir.Value, **_: Any
    ) -> MatchResult:
        result = MatchResult()
        for table in (cos, sin):
            producer = table.producer()
            if producer is None or producer.op_type != "Unsqueeze" or _scalar(producer.inputs[1]) != 1.0:
                return result.fail("cos and sin are not broadcast over heads", table)
        if x.shape is None or not isinstance(x.shape[-1], int):
            return result.fail("the head size is not known", x)
        half = x.shape[-1] // 2
        for part, start in ((first, 0.0), (second, float(half))):
            if part.shape is None or part.shape[-1] != half or _slice_start(part) != start:
                return result.fail("the rotation does not split the head into halves", part)
        return result

    def rewrite(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, turned: ir.Value, **_: Any) -> ir.Value:
        tables = [table.producer().inputs[0] for table in (cos, sin)]  # type: ignore[union-attr]
        return _made_from(op.RotaryEmbedding(x, *tables, _domain=DOMAIN), turned)


class RepeatKVRule(pattern.RewriteRuleClassBase):
    """Match [B, kv, S, D] → [B, kv·n, S, D]."""

    def pattern(self, op: Any, x: Any, axis: Any, expanded_shape: Any, shape: Any) -> Any:
        expanded = op.Expand(op.Unsqueeze(x, axis), expanded_shape, _outputs=["expanded"])
        return op.Reshape(expanded, shape, _outputs=["repeated"], _allow_other_attributes=True)

    def check(
        self, op: Any, x: ir.Value, axis: ir.Value, expanded: ir.Value, repeated: ir.Value, **_: Any
    ) -> MatchResult:
        result = MatchResult()
        if _scalar(axis) != 2.0:
            return result.fail("the repetition is not over the head axis", axis)
        if x.shape is None or expanded.shape is None or repeated.shape is None:
            return result.fail("shapes are not known", x)
        kv_heads, repeats, heads = x.shape[1], expanded.shape[2], repeated.shape[1]
        if not (isinstance(kv_heads, int) and isinstance(repeats, int) and heads == kv_heads * repeats):
            return result.fail("the repeated heads are not merged into the head axis", repeated)
        return result

    def rewrite(self, op: Any, x: ir.Value, expanded: ir.Value, repeated: ir.Value, **_: Any) -> ir.Value:
        assert expanded.shape is not None
        return _made_from(op.RepeatKV(x, repeats=expanded.shape[2], _domain=DOMAIN), repeated)


RULES: tuple[type[pattern.RewriteRuleClassBase], ...] = (LinearRule, RMSNormRule, SiLURule, RotaryRule, RepeatKVRule)


def _scalar(value: ir.Value | None) -> float | None:
    if is_lazy(value):
        return None  # a large one
    array = constant_of(value)
    return float(array) if array is not None and array.size == 1 else None


def _slice_start(value: ir.Value) -> float | None:
    producer = value.producer()
    return _scalar(source_of(producer.inputs[1])) if producer is not None else None


def _made_from(output: ir.Value, matched: ir.Value) -> ir.Value:
    """Stamp the node that produces `output` with the module that produced `matched`."""
    producer, source = output.producer(), matched.producer()
    assert producer is not None and source is not None
    producer.metadata_props[ORIGIN] = module_path(source)
    return output
