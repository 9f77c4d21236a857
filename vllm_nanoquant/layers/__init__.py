# SPDX-License-Identifier: Apache-2.0
"""vLLM's method classes: the parameters of a quantized layer, their loading, their product."""
