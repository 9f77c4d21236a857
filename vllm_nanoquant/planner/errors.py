# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a plan. The text is for people."""

from vllm_nanoquant.checkpoint.errors import CheckpointError


class PlanError(CheckpointError):
    """A model that does not fit, or that cannot be planned; the text says what would help."""
