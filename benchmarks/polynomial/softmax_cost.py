"""Count what the weighting of an attention costs on ciphertexts, for each polynomial that stands for softmax.

The counts are of the graph that the passes make; the comparison is that of Power-Softmax (arXiv 2410.09457).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch

from benchmarks.report import table
from hecompile.graph.interpreter import causal_attention_bias
from hecompile.graph.ir import attributes_of
from hecompile.graph.matching import attentions
from hecompile.passes.approximation.approximate_softmax import ApproximateSoftmax
from hecompile.passes.polynomial.expand_polynomials import ExpandPolynomials
from hecompile.polynomial.depth import circuit_cost, levels_used, multiplications, product_kind
from hecompile.polynomial.inputs import AttentionInputs
from hecompile.polynomial.ranges import AttentionRange, write_range

LENGTHS, ERROR = (128, 1024), 1e-3
PROSE = """\
## Softmax by polynomials: what the weighting costs

Counted on the expanded graph, per head and sequence, without q·kᵀ and the product with v; masked entries count. Causal
attention, head size 64, normal scores of standard deviation 1, domains 1.5 times those of a sample of that length,
error bound asked for {error:g}: of the quotient (power), of a weight (Gaussian kernel), of the sum over the keys of
a weight's error
(Chebyshev, which is softmax itself; the others are functions that a model is trained for). Nothing here is timed;
the same numbers come out on any machine. The comparison is that of Zimerman et al. (arXiv 2410.09457).
"""
_HEADINGS = ("variant", "tokens", "Goldschmidt iterations", "levels", "ct × ct", "ct × constant", "error bound")


_TEXT = """<ir_version: 10, opset_import: ["" : 23, "hecompile" : 1]>
attention (float[B,1,{length},{size}] q, float[B,1,{length},{size}] k, float[B,1,{length},{size}] v,
           float[B,1,{length},{length}] attention_bias) => (float[B,1,{length},{size}] y)
<float c = {{{scale}}}>
{{
    kt = Transpose <perm = [0, 1, 3, 2]> (k)
    scores = MatMul (q, kt)
    scaled = Mul (scores, c)
    biased = Add (scaled, attention_bias)
    weights = Softmax <axis = -1> (biased)
    y = MatMul (weights, v)
}}
"""


@dataclass(frozen=True)
class SoftmaxCost:
    """Count what one head takes for one sequence, without q·kᵀ and the product with v.

    Attributes:
        iterations: of Goldschmidt, one after the other.
        depth: levels.
        error_bound: as on the node.
    """

    iterations: int
    depth: int
    ciphertext_products: int
    plaintext_products: int
    error_bound: float


def softmax_cost(options: ApproximateSoftmax, length: int, head_size: int = 64, spread: float = 1.0) -> SoftmaxCost:
    """Count the cost of causal attention over `length` tokens, masked entries included.

    q and k are normal, so that scores have standard deviation `spread`; domains are those of one such sample, times the
    options' margin. Raises LegalityError as the pass does.
    """
    scale = head_size**-0.5
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.randn(1, 1, length, head_size, generator=generator) * spread**0.5 for _ in range(2))
    bias = causal_attention_bias(torch.ones(1, length, dtype=torch.int64))
    model = ir.from_onnx_text(_TEXT.format(length=length, size=head_size, scale=scale))
    (node, _), *_ = attentions(model)
    write_range(node.outputs[0], AttentionRange.measure(AttentionInputs(q, k, bias, scale)))
    approximated = options(model).model
    (node, _), *_ = attentions(approximated)
    attributes = attributes_of(node)
    expanded = ExpandPolynomials(length)(approximated).model
    whole = circuit_cost(expanded)
    inner = [node for node in expanded.graph if node.op_type == "MatMul"]
    # What q and k are multiplied by stands in the rotary tables of a model, which it has anyway.
    folded = [
        node for node in expanded.graph if product_kind(node) == "plaintext" and node.inputs[0] in expanded.graph.inputs
    ]
    return SoftmaxCost(
        iterations=attributes.get("iterations", 0)
        + attributes.get("halvings", 0) * attributes.get("square_iterations", 0),
        depth=whole.depth - sum(map(levels_used, inner)) - min(1, len(folded)),
        ciphertext_products=whole.ciphertext_products - sum(map(multiplications, inner)),
        plaintext_products=whole.plaintext_products - sum(map(multiplications, folded)),
        error_bound=float(attributes["error_bound"]),
    )


def variants() -> dict[str, ApproximateSoftmax]:
    """Return the options that are compared, by name."""
    return {
        "power 4, Lipschitz form": ApproximateSoftmax("power", form="lipschitz", division="goldschmidt", error=ERROR),
        "power 4, length-agnostic form": ApproximateSoftmax(
            "power", form="length_agnostic", division="goldschmidt", error=ERROR
        ),
        "Gaussian kernel": ApproximateSoftmax("gaussian_kernel", error=ERROR),
        "Chebyshev (softmax)": ApproximateSoftmax("chebyshev", error=ERROR),
    }


def run(quick: bool) -> str:
    """Write Markdown with a table."""
    rows: list[list[object]] = []
    for length in (8, 16) if quick else LENGTHS:
        for name, options in variants().items():
            cost = softmax_cost(options, length)
            products = [cost.ciphertext_products, cost.plaintext_products]
            rows.append([name, length, cost.iterations, cost.depth, *products, cost.error_bound])
    return PROSE.format(error=ERROR) + "\n" + table(_HEADINGS, rows)
