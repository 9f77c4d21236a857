# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM calls in every one of its processes, whatever the model."""

import logging
import sys

from vllm_nanoquant.command_line import refuse_misplaced_flags

PARSERS = "nanoquant_nemotron_v2"
"""Our name for ``--tool-call-parser`` and ``--reasoning-parser``."""


def register() -> None:
    """Make ``nanoquant_w4a16`` and our parsers known to vLLM. Idempotent; patches nothing.

    vLLM calls this outside any try block, so an exception here would end every vLLM process, also
    those that serve other models: whatever goes wrong is logged, and only what failed is missing.

    Raises:
        SystemExit: this very command line asks for our method and gives its options to a flag that
            cannot carry them.
    """
    refuse_misplaced_flags(sys.argv)
    try:
        from vllm_nanoquant.config import register_config

        register_config()
    except Exception:
        logging.getLogger("vllm.nanoquant").exception(
            "vllm-nanoquant could not register the quantization method nanoquant_w4a16; "
            "other models are not affected"
        )
    try:
        from vllm_nanoquant.compat import register_parsers

        register_parsers(
            PARSERS,
            tools=("vllm_nanoquant.serving.tool_parser", "NemotronV2ToolParser"),
            reasoning=("vllm_nanoquant.serving.reasoning_parser", "NemotronV2ReasoningParser"),
        )
    except Exception:
        logging.getLogger("vllm.nanoquant").exception(
            "vllm-nanoquant could not register its parsers %s; models and other parsers are not "
            "affected",
            PARSERS,
        )
