# SPDX-License-Identifier: Apache-2.0
"""Int4 weights whose columns are in another order, in real vLLM layers, one rank at a time."""

import pytest
import torch

pytest.importorskip("vllm")

import vllm.model_executor.layers.linear as vllm_linear

from tests.checkpoints import int4_tensors, reorder
from tests.layers.fake_ranks import random_weight, rank_of
from tests.layers.stored_layers import (
    HIDDEN,
    MIXER,
    PREFIX,
    column_layer,
    headers_of,
    load,
    row_layer,
)
from vllm_nanoquant.config import NanoquantConfig
from vllm_nanoquant.inventory import Inventory
from vllm_nanoquant.kernels.reference import dequantize
from vllm_nanoquant.quantize.mse import quantize_mse
from vllm_nanoquant.recipe import RecipeError, ServingOptions

pytestmark = pytest.mark.compat


@pytest.mark.parametrize("make", [column_layer, row_layer])
def test_columns_in_another_order_multiply_the_features_they_belong_to(make):
    weight = random_weight(40, HIDDEN)
    order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(3))
    tensors = reorder({}, PREFIX, weight, 128, order)
    with rank_of(0, 1):
        layer = make(tensors)
        load(layer, PREFIX, tensors, {})
    x = random_weight(3, HIDDEN, seed=9)
    exact = x.double() @ weight.double().T
    found = layer.quant_method.apply(layer, x, None).double()
    # int4 in groups of 128 normal weights is off by about a tenth.
    assert (found - exact).abs().mean() < 0.2 * exact.abs().mean()
    columns = dequantize(quantize_mse(weight[:, order], 128), torch.float64)
    exact = x[:, order].double() @ columns.T
    assert (found - exact).abs().mean() <= 5e-3 * exact.abs().mean()


def test_an_order_survives_the_compiler():
    weight = random_weight(40, HIDDEN)
    order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(3))
    tensors = reorder({}, PREFIX, weight, 128, order)
    with rank_of(0, 1):
        layer = column_layer(tensors)
        load(layer, PREFIX, tensors, {})
    compiled = torch.compile(
        lambda x: layer.quant_method.apply(layer, x, None), fullgraph=True, backend="aot_eager"
    )
    for tokens in (1, 5):
        x = random_weight(tokens, HIDDEN, seed=9)
        assert torch.equal(compiled(x), layer.quant_method.apply(layer, x, None))


def qkv_layer(tensors):
    config = NanoquantConfig(Inventory(ServingOptions(preset="full"), headers_of(tensors)))
    return vllm_linear.QKVParallelLinear(
        HIDDEN, 16, 8, 2, False, params_dtype=torch.bfloat16, quant_config=config,
        prefix=f"{MIXER}.qkv_proj",
    )  # fmt: skip


def qkv_tensors(seeds):
    """Tensors of q, k and v; a seed orders the columns at random, None leaves them alone."""
    tensors = {}
    for (name, rows), seed in zip((("q", 128), ("k", 32), ("v", 32)), seeds, strict=True):
        module, weight = f"{MIXER}.{name}_proj", random_weight(rows, HIDDEN, seed=rows)
        if seed is None:
            tensors |= int4_tensors(module, weight, 128)
        else:
            order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(seed))
            tensors = reorder(tensors, module, weight, 128, order)
    return tensors


SHARDS = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}


@pytest.mark.parametrize("rank", [(0, 1), (1, 2), (3, 4)])
def test_parts_of_one_order_are_served_as_one_on_every_rank(rank):
    tensors = qkv_tensors([4, 4, 4])
    with rank_of(*rank):
        layer = qkv_layer(tensors)
        load(layer, f"{MIXER}.qkv_proj", tensors, SHARDS)
    assert torch.equal(layer.weight_order, tensors[f"{MIXER}.k_proj.weight_order"])
    assert layer.weight_packed.dtype == torch.int32


def test_parts_of_different_orders_are_refused():
    tensors = qkv_tensors([4, 5, 4])
    with rank_of(0, 1), pytest.raises(RecipeError, match="columns are in different orders"):
        load(qkv_layer(tensors), f"{MIXER}.qkv_proj", tensors, SHARDS)


def test_parts_of_which_only_some_are_ordered_are_refused_before_loading():
    with rank_of(0, 1), pytest.raises(RecipeError, match="columns are in different orders"):
        qkv_layer(qkv_tensors([4, None, 4]))


def test_an_order_over_several_ranks_of_a_row_parallel_layer_is_refused():
    tensors = reorder({}, PREFIX, random_weight(40, HIDDEN), 128, torch.arange(HIDDEN))
    with rank_of(1, 2), pytest.raises(RecipeError, match=r"up_proj\.weight_order .*-size 1"):
        row_layer(tensors)


@pytest.mark.parametrize("wrong", [-1, HIDDEN, 0])
def test_an_order_that_is_no_permutation_is_refused(wrong):
    tensors = reorder({}, PREFIX, random_weight(40, HIDDEN), 128, torch.arange(HIDDEN))
    tensors[f"{PREFIX}.weight_order"][7] = wrong
    with rank_of(0, 1), pytest.raises(ValueError, match="not a permutation of 0 to 199"):
        load(column_layer(tensors), PREFIX, tensors, {})
