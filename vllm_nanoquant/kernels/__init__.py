# SPDX-License-Identifier: Apache-2.0
"""The W4A16 product: an oracle in plain torch, Triton kernels, and the custom op over both."""
