# SPDX-License-Identifier: Apache-2.0
"""Quantizers: tensors in, tensors out. Nothing here imports vLLM."""
