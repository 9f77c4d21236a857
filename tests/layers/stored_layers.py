# SPDX-License-Identifier: Apache-2.0
"""Real vLLM layers for int4 tensors, and their loading, as vLLM does both."""

import torch
import vllm.model_executor.layers.linear as vllm_linear
from vllm.model_executor.model_loader.reload import finalize_layerwise_processing

from tests.checkpoints import int4_tensors
from tests.layers.fake_ranks import random_weight
from vllm_nanoquant.checkpoint.stored import Int4Module
from vllm_nanoquant.config import NanoquantConfig
from vllm_nanoquant.inventory import Inventory
from vllm_nanoquant.recipe import ServingOptions

HIDDEN = 200
MIXER = "model.layers.0.mixer"
PREFIX = f"{MIXER}.up_proj"


def headers_of(tensors):
    """What `maybe_update_config` learns from the headers of these tensors."""
    found = {}
    names = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.int32: "I32"}
    headers = {
        name: {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        for name, tensor in tensors.items()
    }
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            found[module] = Int4Module.from_headers(module, headers)
    return found


def load(layer, prefix, tensors, shard_ids):
    """Hand a layer the checkpoint's tensors, as vLLM's loaders do."""
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        parameter = getattr(layer, leaf)
        shard = shard_ids.get(module.removeprefix(f"{prefix.rpartition('.')[0]}."))
        parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
    # vLLM before 0.31 waits for the rows that pad the vocabulary.
    if prefix == "lm_head" and not layer.quant_method.out_features:
        finalize_layerwise_processing(layer, None)


def column_layer(tensors, columns=HIDDEN, rows=40, stored=None):
    stored = headers_of(tensors) if stored is None else stored
    config = NanoquantConfig(Inventory(ServingOptions(preset="full"), stored))
    return vllm_linear.ColumnParallelLinear(
        columns, rows, bias=False, params_dtype=torch.bfloat16, quant_config=config, prefix=PREFIX
    )


def row_layer(tensors):
    config = NanoquantConfig(Inventory(ServingOptions(preset="full"), headers_of(tensors)))
    return vllm_linear.RowParallelLinear(
        HIDDEN, 40, bias=False, params_dtype=torch.bfloat16, quant_config=config, prefix=PREFIX
    )


def up_proj():
    return int4_tensors(PREFIX, random_weight(40, HIDDEN), 128)
