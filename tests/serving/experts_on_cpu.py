# SPDX-License-Identifier: Apache-2.0
"""For `worker_extension_cls`: importing it lets a vLLM on the CPU build experts without a gate.

vLLM's own CPU kernels cannot compute them and it refuses them all; our op can.
"""

from vllm.model_executor.layers.fused_moe import config


class _Platform:
    def __init__(self, real):
        self._real = real

    def __getattr__(self, name):
        return getattr(self._real, name)

    def is_xpu(self):  # named in the refusal, and asked for nothing else there
        return True


config.current_platform = _Platform(config.current_platform)


class Extension:
    """Adds nothing."""
