# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_nanoquant`` is ``nanoquant``."""

import sys

from vllm_nanoquant.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
