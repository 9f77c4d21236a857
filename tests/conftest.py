# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

import pytest

# Before anything imports vLLM: it reads some of these once.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# vLLM's Mamba kernels try many settings in every new compile cache, for a minute and more; and two
# engines that chose differently round differently.
os.environ.setdefault("VLLM_TRITON_FORCE_FIRST_CONFIG", "1")

TINY_MODEL = Path(__file__).parent.parent / "models" / "tiny-nemotron-h"


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The trained model that the repository ships."""
    return TINY_MODEL


def pytest_collection_modifyitems(config, items):
    """Skip GPU tests where there is no GPU; importing torch only if there are any."""
    gpu_items = [item for item in items if "gpu" in item.keywords]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
