# SPDX-License-Identifier: Apache-2.0
"""What can go wrong in an evaluation. The text is one line for people."""

from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError


class SuiteError(UsageError):
    """A suite or a request that cannot be carried out; the text names file, key and way out."""


class EvaluationError(CheckpointError):
    """An evaluation that failed, or a result that is no result; the text says what to do."""
