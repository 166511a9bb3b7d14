"""What the performance claims in the README are made with: one module per section, one page of results.

    python -m benchmarks [--quick] [SECTION ...]     run sections one after the other, then assemble results/README.md
    python -m benchmarks.crypto [--quick]            one section, in this process

A section is a module with `run(quick: bool) -> str`, which returns Markdown and may save plots with `report.save_plot`.
Each runs in a process of its own and stores its Markdown in results/, so that one can be run again without the others.
"""

import os

# Before torch is imported, as the command line does: client and worker share the cores, and a thread that spins while
# it waits would take them from the other side.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SECTIONS = (
    "worker",
    "gpu",
    "crypto",
    "verification",
    "step",
    "client_saved",
    "field",
    "precision",
    "compile_1b",
    "hintless",
    "growth",
    "unit_costs",
    "transports",
    "soak",
    "generation",
    "softmax_cost",
    "conversion",
    "range_loss",
    "tfhe",
    "ckks",
    "privacy",
    "federation_cost",
    "federation",
)
"""In the order of the page. A section whose module is not there is left out."""
