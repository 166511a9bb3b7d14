"""Keep a launcher's environment out of what is computed here: one client is one process, which opens no port.

Clusters set WORLD_SIZE, RANK, MASTER_ADDR and others for whatever runs on them; accelerate and transformers take these for
an order to listen, to wait for other ranks and to train on a share of the data. accelerate's own variables (`ACCELERATE_*`,
`FSDP_*`, …) change precision, batches and devices. None of them is a setting of ours: a recipe has all that there are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PREFIXES = (
    # accelerate and its plugins
    "ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_", "FP8_", "DEEPSPEED_",
    # torchrun, MPI, Slurm, SageMaker, Kubeflow
    "TORCHELASTIC_", "PET_", "OMPI_", "PMI_", "PMIX_", "MV2_", "MPI_LOCAL", "I_MPI_", "SLURM_", "SM_", "SMDATAPARALLEL_",
    "SAGEMAKER_", "KUBEFLOW_",
    # precision of accelerators and of the library under torch's products
    "XLA_", "PJRT_", "ONEDNN_DEFAULT_FPMATH", "DNNL_DEFAULT_FPMATH",
)  # fmt: skip
_NAMES = frozenset({
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME",
    "ROLE_RANK", "ROLE_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT", "FORK_LAUNCHED", "TPU_NAME",
})  # fmt: skip


def is_of_launcher(name: str) -> bool:
    """Say whether an environment variable tells a process how to be one of several, or accelerate what to do."""
    return name in _NAMES or name.startswith(_PREFIXES)


@contextmanager
def without_launcher() -> Iterator[None]:
    """Take a launcher's variables out of the environment until the block ends, and torch's products to full precision.

    Every trainer is made and run in such a block, and every checkpoint loaded. The environment is that of the whole process.
    """
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if is_of_launcher(name)}
    torch = sys.modules.get("torch")
    # TORCH_ALLOW_TF32_CUBLAS_OVERRIDE lowers it when torch is imported.
    precision = None if torch is None else torch.get_float32_matmul_precision()
    if torch is not None:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        os.environ.update(hidden)
        if torch is not None and precision is not None:
            torch.set_float32_matmul_precision(precision)
