"""The cost of the weighting in an attention, for each polynomial that stands for softmax: the Power-Softmax
comparison."""
from __future__ import annotations

from benchmarks.report import section_main, table
from hecompile.passes.approximation.approximate_softmax import ApproximateSoftmax
from hecompile.softmax_cost import softmax_cost

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


def variants() -> dict[str, ApproximateSoftmax]:
    """What is compared."""
    return {
        "power 4, Lipschitz form": ApproximateSoftmax("power", form="lipschitz", division="goldschmidt", error=ERROR),
        "power 4, length-agnostic form": ApproximateSoftmax(
            "power", form="length_agnostic", division="goldschmidt", error=ERROR
        ),
        "Gaussian kernel": ApproximateSoftmax("gaussian_kernel", error=ERROR),
        "Chebyshev (softmax)": ApproximateSoftmax("chebyshev", error=ERROR),
    }


def run(quick: bool) -> str:
    """Markdown with a table."""
    rows: list[list[object]] = []
    for length in (8, 16) if quick else LENGTHS:
        for name, options in variants().items():
            cost = softmax_cost(options, length)
            products = [cost.ciphertext_products, cost.plaintext_products]
            rows.append([name, length, cost.iterations, cost.depth, *products, cost.error_bound])
    return PROSE.format(error=ERROR) + "\n" + table(_HEADINGS, rows)


if __name__ == "__main__":
    section_main("softmax_cost")
