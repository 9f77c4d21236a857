# SPDX-License-Identifier: Apache-2.0
"""In a module of its own, so that a function can be sent to an engine's workers by its name."""

import hashlib

import torch


def digest(tensor):
    """SHA-256 of the bytes of a tensor."""
    data = tensor.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(data.numpy()).hexdigest()


def digests(model):
    """Digest of every parameter and buffer, by name."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: digest(tensor) for name, tensor in tensors.items() if tensor.dim()}
