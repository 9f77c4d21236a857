# SPDX-License-Identifier: Apache-2.0
"""Building blocks of ``tools/train_small_model.py``: text, tokens, training, checkpoint."""
