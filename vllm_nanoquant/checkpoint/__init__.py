# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk: read with suspicion, write whole. Nothing here imports vLLM."""
