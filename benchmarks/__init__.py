"""Measure what the README claims about performance: one module per section, one page of results.

    python -m benchmarks [--quick] [SECTION ...]     run sections one after the other, then assemble results/README.md

A section is a module with `run(quick: bool) -> str`, which returns Markdown and may save plots with `report.save_plot`.
Each runs in a process of its own and stores its Markdown in results/, so that one can be run again without the others.
"""

import os

# Before torch is imported, as the command line does: client and worker share the cores, and a thread that spins while
# it waits would take them from the other side.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SECTIONS = {
    "worker": "benchmarks.worker.worker",
    "gpu": "benchmarks.worker.gpu",
    "crypto": "benchmarks.crypto.crypto",
    "verification": "benchmarks.crypto.verification",
    "detection": "benchmarks.crypto.detection",
    "bounds": "benchmarks.client.bounds",
    "step": "benchmarks.training.step",
    "client_cpu": "benchmarks.client.client_cpu",
    "bytes": "benchmarks.client.bytes",
    "head_precision": "benchmarks.client.head_precision",
    "client_saved": "benchmarks.client.client_saved",
    "field": "benchmarks.crypto.field",
    "precision": "benchmarks.training.precision",
    "precision_real": "benchmarks.training.precision_real",
    "curves": "benchmarks.training.curves",
    "compile_1b": "benchmarks.training.compile_1b",
    "families": "benchmarks.training.families",
    "loading": "benchmarks.training.loading",
    "hints": "benchmarks.client.hints",
    "client_disk": "benchmarks.client.client_disk",
    "hintless": "benchmarks.training.hintless",
    "prefix": "benchmarks.client.prefix",
    "growth": "benchmarks.training.growth",
    "unit_costs": "benchmarks.crypto.unit_costs",
    "transports": "benchmarks.worker.transports",
    "soak": "benchmarks.worker.soak",
    "generation": "benchmarks.training.generation",
    "softmax_cost": "benchmarks.polynomial.softmax_cost",
    "conversion": "benchmarks.polynomial.conversion",
    "range_loss": "benchmarks.polynomial.range_loss",
    "tfhe": "benchmarks.polynomial.tfhe",
    "ckks": "benchmarks.polynomial.ckks",
    "privacy": "benchmarks.privacy.privacy",
    "federation_cost": "benchmarks.federation.federation_cost",
    "federation": "benchmarks.federation.federation",
}
"""Name to module, in the order of the page."""
