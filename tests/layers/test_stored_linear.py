# SPDX-License-Identifier: Apache-2.0
"""Weights that are int4 in the checkpoint, in real vLLM layers, one rank at a time.

The oracle is the other way in: the same layer, given the BF16 weight, quantized while loading.
"""

import pytest
import torch

pytest.importorskip("vllm")

import vllm.model_executor.layers.linear as vllm_linear
import vllm.model_executor.layers.vocab_parallel_embedding as vllm_vocabulary
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_processing,
    record_metadata_for_reloading,
)

from tests.checkpoints import int4_tensors, reorder
from tests.layers.fake_ranks import RANKS, VOCABULARY_RANKS, random_weight, rank_of
from tests.layers.stored_layers import (
    HIDDEN,
    MIXER,
    PREFIX,
    column_layer,
    headers_of,
    load,
    up_proj,
)
from vllm_nanoquant.config import NanoquantConfig
from vllm_nanoquant.inventory import Inventory
from vllm_nanoquant.layers import stored_linear
from vllm_nanoquant.layers.stored_linear import StoredLinearMethod
from vllm_nanoquant.recipe import RecipeError, ServingOptions

pytestmark = pytest.mark.compat

GROUP_SIZES = [32, 64, 128, -1]


def both_ways(make, prefix, weights, group_size, rank=(0, 1), shard_ids=None):
    """The layer by quantizing while loading, and by int4 tensors made from the same weights."""
    options = ServingOptions(preset="full", group_size=group_size)
    stored = {}
    for module, weight in weights.items():
        stored |= int4_tensors(module, weight, group_size)
    with rank_of(*rank):
        while_loading = make(NanoquantConfig(Inventory(options)), prefix)
        dense = {f"{module}.weight": weight for module, weight in weights.items()}
        load(while_loading, prefix, dense, shard_ids or {})
        as_it_is = make(NanoquantConfig(Inventory(options, headers_of(stored))), prefix)
        load(as_it_is, prefix, stored, shard_ids or {})
    return while_loading, as_it_is


def assert_same_bytes(one, other):
    first, second = ({**layer._parameters, **layer._buffers} for layer in (one, other))
    assert first.keys() == second.keys()
    assert {"weight_packed", "weight_scale", "weight_arrivals"} <= first.keys()
    for name, tensor in first.items():
        assert (tensor is None) == (second[name] is None)
        if tensor is not None:
            assert tensor.dtype == second[name].dtype
            assert torch.equal(tensor, second[name]), name
    a, b = one.quant_method, other.quant_method
    assert (a.out_features, a.group_offset) == (b.out_features, b.group_offset)
    assert type(a) is not type(b)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("rank", RANKS)
def test_in_proj_whose_parts_are_split_one_by_one(rank, group_size):
    parts = [64, 64, 32, 32, 8]  # gate, x, B, C, dt

    def make(config, prefix):
        return vllm_linear.MergedColumnParallelLinear(
            HIDDEN, parts, bias=False, quant_config=config, prefix=prefix
        )

    prefix = f"{MIXER}.in_proj"
    weights = {prefix: random_weight(sum(parts), HIDDEN)}
    assert_same_bytes(*both_ways(make, prefix, weights, group_size, rank))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("rank", RANKS)
def test_a_row_parallel_share_that_starts_inside_a_group(rank, group_size):
    columns = 8 * 85  # a share of 85, 170, 340: inside a group, and odd

    def make(config, prefix):
        return vllm_linear.RowParallelLinear(
            columns, 48, bias=False, quant_config=config, prefix=prefix
        )

    prefix = f"{MIXER}.down_proj"
    weights = {prefix: random_weight(48, columns)}
    assert_same_bytes(*both_ways(make, prefix, weights, group_size, rank))


@pytest.mark.parametrize("rank", RANKS)
def test_qkv_with_fewer_kv_heads_than_ranks(rank):
    heads, kv_heads, size = 8, 2, 16

    def make(config, prefix):
        return vllm_linear.QKVParallelLinear(
            HIDDEN, size, heads, kv_heads, False, quant_config=config, prefix=prefix
        )

    rows = {"q_proj": heads * size, "k_proj": kv_heads * size, "v_proj": kv_heads * size}
    weights = {
        f"{MIXER}.{name}": random_weight(count, HIDDEN, seed=index)
        for index, (name, count) in enumerate(rows.items())
    }
    shards = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
    layers = both_ways(make, f"{MIXER}.qkv_proj", weights, 128, rank, shards)
    assert_same_bytes(*layers)


@pytest.mark.parametrize("rank", RANKS)
def test_gate_and_up_of_a_gated_mlp(rank):
    def make(config, prefix):
        return vllm_linear.MergedColumnParallelLinear(
            HIDDEN, [48, 48], bias=False, quant_config=config, prefix=prefix
        )

    weights = {
        f"{MIXER}.{name}": random_weight(48, HIDDEN, seed=index)
        for index, name in enumerate(("gate_proj", "up_proj"))
    }
    shards = {"gate_proj": 0, "up_proj": 1}
    assert_same_bytes(*both_ways(make, f"{MIXER}.gate_up_proj", weights, 64, rank, shards))


@pytest.mark.parametrize("columns", [HIDDEN, HIDDEN - 1])
@pytest.mark.parametrize("bias", [False, True])
def test_a_bias_and_an_odd_number_of_columns(bias, columns):
    def make(config, prefix):
        return vllm_linear.ColumnParallelLinear(
            columns, 40, bias=bias, params_dtype=torch.bfloat16, quant_config=config, prefix=prefix
        )

    prefix = f"{MIXER}.up_proj"
    options = ServingOptions(preset="full")
    weight, offset = random_weight(40, columns), random_weight(1, 40, seed=5)[0]
    tensors = int4_tensors(prefix, weight, 128)
    extra = {f"{prefix}.bias": offset} if bias else {}
    with rank_of(0, 1):
        one = make(NanoquantConfig(Inventory(options)), prefix)
        load(one, prefix, {f"{prefix}.weight": weight} | extra, {})
        other = make(NanoquantConfig(Inventory(options, headers_of(tensors))), prefix)
        load(other, prefix, tensors | extra, {})
    assert_same_bytes(one, other)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("rank", VOCABULARY_RANKS)
def test_an_lm_head_whose_vocabulary_is_padded(rank, group_size):
    vocabulary = 150  # padded; the last of eight ranks has nothing but padding

    def make(config, prefix):
        return vllm_vocabulary.ParallelLMHead(
            vocabulary, HIDDEN, params_dtype=torch.bfloat16, quant_config=config, prefix=prefix
        )

    weights = {"lm_head": random_weight(vocabulary, HIDDEN)}
    assert_same_bytes(*both_ways(make, "lm_head", weights, group_size, rank))


def test_a_replicated_layer_is_whole_on_every_rank():
    def make(config, prefix):
        return vllm_linear.ReplicatedLinear(
            HIDDEN, 40, bias=False, quant_config=config, prefix=prefix
        )

    prefix = f"{MIXER}.up_proj"
    weights = {prefix: random_weight(40, HIDDEN)}
    assert_same_bytes(*both_ways(make, prefix, weights, 32, (1, 2)))


def test_the_tensors_take_no_memory_before_and_none_after(monkeypatch):
    tensors, held = up_proj(), []
    original = StoredLinearMethod._take_quantized

    def keep(self, layer):
        held.extend(layer._parameters[name.rpartition(".")[2]] for name in tensors)
        assert not any(parameter.is_meta for parameter in held)
        return original(self, layer)

    monkeypatch.setattr(StoredLinearMethod, "_take_quantized", keep)
    with rank_of(0, 1):
        layer = column_layer(tensors)
        assert all(parameter.is_meta for parameter in layer.parameters())
        assert layer.quant_method.ledger.pending == {PREFIX}
        load(layer, PREFIX, tensors, {})
    assert len(held) == 3
    assert all(parameter.numel() == 0 for parameter in held)
    assert not hasattr(layer, "weight_zero_point")


@pytest.mark.parametrize("ordered", [False, True])
def test_very_large_tensors_are_filled_on_the_cpu_and_give_the_same_bytes(monkeypatch, ordered):
    tensors = up_proj()
    if ordered:
        tensors = reorder({}, PREFIX, random_weight(40, HIDDEN), 128, torch.arange(HIDDEN))
    layers = []
    # 100 rows of bytes, and two of two bytes for scales and for zero points.
    for limit in (108 * 40, 108 * 40 - 1):
        monkeypatch.setattr(stored_linear, "LARGE_BYTES", limit)
        with rank_of(0, 1):
            layer = column_layer(tensors)
            if limit < 108 * 40:
                with torch.device("meta"):  # stands for the GPU: nothing could be filled there
                    record_metadata_for_reloading(layer)
            load(layer, PREFIX, tensors, {})
        layers.append(layer)
    for name, tensor in layers[0].named_parameters():
        assert torch.equal(tensor, layers[1].get_parameter(name))


def test_it_is_converted_with_its_last_tensor_in_whatever_order_they_come():
    tensors = up_proj()
    *first, last = reversed(tensors.items())
    with rank_of(0, 1):
        layer = column_layer(tensors)
        load(layer, PREFIX, dict(first), {})
        assert layer.weight_packed.is_meta
        load(layer, PREFIX, dict([last]), {})
    assert layer.weight_packed.dtype == torch.int32


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_another_dtype_is_refused_by_name(name):
    tensors = up_proj()
    stored = headers_of(tensors)
    tensors[f"{PREFIX}.{name}"] = tensors[f"{PREFIX}.{name}"].float()
    with rank_of(0, 1), pytest.raises(ValueError, match=rf"up_proj\.{name} is torch\.float32"):
        load(column_layer(tensors, stored=stored), PREFIX, tensors, {})


@pytest.mark.parametrize("name", ["weight_scale", "weight_zero_point"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused_by_name(name, value):
    tensors = up_proj()
    tensors[f"{PREFIX}.{name}"][0, 3] = value
    with rank_of(0, 1), pytest.raises(ValueError, match=rf"up_proj: {name} has values that are"):
        load(column_layer(tensors), PREFIX, tensors, {})


@pytest.mark.parametrize(("columns", "rows"), [(HIDDEN + 2, 40), (HIDDEN, 48), (HIDDEN, 32)])
def test_a_weight_of_another_shape_is_refused_before_loading(columns, rows):
    with rank_of(0, 1), pytest.raises(RecipeError, match=r"up_proj\.weight_packed is \[100, 40\]"):
        column_layer(up_proj(), columns=columns, rows=rows)


@pytest.mark.parametrize("missing", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_a_missing_tensor_is_an_error_at_the_end_of_loading(missing):
    tensors = up_proj()
    stored = headers_of(tensors)
    del tensors[f"{PREFIX}.{missing}"]
    with rank_of(0, 1):
        layer = column_layer(tensors, stored=stored)
        with pytest.raises(ValueError, match=r"up_proj only \d+ of its \d+ weights"):
            load(layer, PREFIX, tensors, {})
            finalize_layerwise_processing(layer, None)


@pytest.mark.parametrize("ordered", [False, True])
def test_dummy_weights_are_finite_small_and_the_same_every_time(ordered):
    tensors = up_proj()
    if ordered:
        tensors = reorder({}, PREFIX, random_weight(40, HIDDEN), 128, torch.arange(HIDDEN))
    layers = []
    for _ in range(2):
        settings = LoadConfig(load_format="dummy")
        with rank_of(0, 1), set_current_vllm_config(VllmConfig(load_config=settings)):
            layer = column_layer(tensors)
            DummyModelLoader(settings).load_weights(layer, None)
        layers.append(layer)
    assert torch.equal(layers[0].weight_packed, layers[1].weight_packed)
    x = torch.eye(HIDDEN, dtype=torch.bfloat16)
    weight = layers[0].quant_method.apply(layers[0], x, None)
    assert 0.0005 < weight.abs().max() <= 0.00101
    assert weight.std() > 0.0003
