# SPDX-License-Identifier: Apache-2.0
"""What a model needs of a GPU, told without the GPU and without the weights."""

from vllm_nanoquant.planner.errors import PlanError
from vllm_nanoquant.planner.fit import Limits
from vllm_nanoquant.planner.limits import suggest_limits

__all__ = ["Limits", "PlanError", "suggest_limits"]
