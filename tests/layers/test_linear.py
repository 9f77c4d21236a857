# SPDX-License-Identifier: Apache-2.0
"""Loading and sharding of real vLLM layers, one rank at a time, against an unsharded oracle."""

import pytest
import torch

pytest.importorskip("vllm")

import vllm.model_executor.layers.linear as vllm_linear
import vllm.model_executor.layers.vocab_parallel_embedding as vllm_vocabulary
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_processing,
    record_metadata_for_reloading,
)

from tests.layers.fake_ranks import RANKS, VOCABULARY_RANKS, random_weight, rank_of, rows_of
from vllm_nanoquant.config import NanoquantConfig
from vllm_nanoquant.inventory import Inventory
from vllm_nanoquant.kernels.layout import RuntimeWeight
from vllm_nanoquant.kernels.reference import dequantize
from vllm_nanoquant.layers import linear
from vllm_nanoquant.quantize.groups import slice_columns
from vllm_nanoquant.quantize.mse import quantize_mse
from vllm_nanoquant.recipe import ServingOptions

pytestmark = pytest.mark.compat

HIDDEN = 200
MIXER = "model.layers.0.mixer"


def config_of(**options):
    return NanoquantConfig(Inventory(ServingOptions(preset="full", **options)))


def assert_same(layer, expected):
    assert not hasattr(layer, "weight")
    runtime = RuntimeWeight.from_quantized(expected)
    assert torch.equal(layer.weight_packed, runtime.words)
    assert torch.equal(layer.weight_scale, runtime.scales)
    assert torch.equal(layer.weight_arrivals, runtime.arrivals)
    assert layer.quant_method.group_offset == expected.group_offset


def assert_multiplies(layer, expected, bias=None):
    """The layer's product is x by its dequantized weight, within bf16."""
    x = random_weight(3, expected.in_features, seed=9)
    weight = dequantize(expected, torch.float64)
    exact = x.double() @ weight.T + (0 if bias is None else bias.double())
    found = layer.quant_method.apply(layer, x, bias)
    assert (found.double() - exact).abs().mean() <= 5e-3 * exact.abs().mean()


@pytest.mark.parametrize(("tp_rank", "tp_size"), RANKS)
def test_mamba_in_proj_shards_each_of_its_parts(tp_rank, tp_size):
    parts = [64, 64, 32, 32, 8]  # gate, x, B, C, dt
    with rank_of(tp_rank, tp_size):
        layer = vllm_linear.MergedColumnParallelLinear(
            HIDDEN, parts, bias=False, quant_config=config_of(), prefix=f"{MIXER}.in_proj"
        )
        weight = random_weight(sum(parts), HIDDEN)
        layer.weight.weight_loader(layer.weight, weight)  # fused on disk
    expected = quantize_mse(rows_of(weight, parts, tp_rank, tp_size), 128)
    assert_same(layer, expected)
    assert_multiplies(layer, expected)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize(("tp_rank", "tp_size"), RANKS)
def test_a_row_parallel_share_may_start_inside_a_group(tp_rank, tp_size, group_size):
    columns = 8 * 85  # a share of 85, 170, 340: inside a group, and odd
    config = config_of(group_size=group_size)
    with rank_of(tp_rank, tp_size):
        layer = vllm_linear.RowParallelLinear(
            columns, 48, bias=False, quant_config=config, prefix=f"{MIXER}.down_proj"
        )
        weight = random_weight(48, columns)
        layer.weight.weight_loader(layer.weight, weight)
    share = columns // tp_size
    whole = quantize_mse(weight, group_size)
    expected = slice_columns(whole, tp_rank * share, (tp_rank + 1) * share)
    assert_same(layer, expected)
    assert_multiplies(layer, expected)


@pytest.mark.parametrize(("tp_rank", "tp_size"), RANKS)
def test_qkv_with_fewer_kv_heads_than_ranks(tp_rank, tp_size):
    heads, kv_heads, size = 8, 2, 16
    weights = {"q": heads * size, "k": kv_heads * size, "v": kv_heads * size}
    weights = {name: random_weight(rows, HIDDEN, seed=rows) for name, rows in weights.items()}
    with rank_of(tp_rank, tp_size):
        layer = vllm_linear.QKVParallelLinear(
            HIDDEN, size, heads, kv_heads, False, quant_config=config_of(),
            prefix=f"{MIXER}.qkv_proj",
        )  # fmt: skip
        for name, weight in weights.items():
            layer.weight.weight_loader(layer.weight, weight, name)
    kv_parts = min(tp_size, kv_heads)
    kv_rank = tp_rank * kv_parts // tp_size
    mine = [
        weights["q"].chunk(tp_size)[tp_rank],
        weights["k"].chunk(kv_parts)[kv_rank],
        weights["v"].chunk(kv_parts)[kv_rank],
    ]
    assert_same(layer, quantize_mse(torch.cat(mine), 128))


@pytest.mark.parametrize(("tp_rank", "tp_size"), RANKS)
def test_gate_and_up_of_a_gated_mlp_are_cut_one_by_one(tp_rank, tp_size):
    parts = [8 * 41, 8 * 41]
    with rank_of(tp_rank, tp_size):
        layer = vllm_linear.MergedColumnParallelLinear(
            HIDDEN, parts, bias=False, quant_config=config_of(), prefix=f"{MIXER}.gate_up_proj"
        )
        weight = random_weight(sum(parts), HIDDEN)
        for index, part in enumerate(weight.split(parts)):
            layer.weight.weight_loader(layer.weight, part, index)
    assert_same(layer, quantize_mse(rows_of(weight, parts, tp_rank, tp_size), 128))


@pytest.mark.parametrize(
    ("tp_rank", "skips", "given"), [(0, False, 1), (1, False, 0), (0, True, 0)]
)
def test_kernels_are_warmed_up_with_the_bias_that_vllm_hands_in(tp_rank, skips, given, monkeypatch):
    """Another variant would be compiled while serving: ranks after the first add no bias."""
    warm = []
    monkeypatch.setattr(linear, "warm_up", lambda weight, bias, dtype: warm.append(bias))
    with rank_of(tp_rank, 2):
        layer = vllm_linear.RowParallelLinear(
            256, 48, bias=True, skip_bias_add=skips,
            quant_config=config_of(), prefix=f"{MIXER}.down_proj", params_dtype=torch.bfloat16,
        )  # fmt: skip
        layer.bias.weight_loader(layer.bias, torch.zeros(48, dtype=torch.bfloat16))
        layer.weight.weight_loader(layer.weight, random_weight(48, 256))
    assert [each is not None for each in warm] == [bool(given)]
    handed = []
    monkeypatch.setattr(vllm_linear, "tensor_model_parallel_all_reduce", lambda y: y)
    monkeypatch.setattr(
        layer.quant_method, "apply", lambda layer, x, bias: handed.append(bias) or x[:, :48]
    )
    layer(random_weight(2, 128))
    assert [each is not None for each in handed] == [bool(given)]


@pytest.mark.parametrize("order", ["weight", "weight bias", "bias weight"])
@pytest.mark.parametrize("kind", ["ColumnParallelLinear", "RowParallelLinear", "ReplicatedLinear"])
def test_a_bias_is_loaded_and_added(kind, order):
    """Before the weight or after it: a checkpoint sorted by name has it before."""
    with rank_of(0, 1):
        layer = getattr(vllm_linear, kind)(
            HIDDEN, 40, bias="bias" in order, params_dtype=torch.bfloat16,
            quant_config=config_of(), prefix=f"{MIXER}.up_proj",
        )  # fmt: skip
        found = {"weight": random_weight(40, HIDDEN), "bias": random_weight(1, 40, seed=5)[0]}
        for name in order.split():
            assert hasattr(layer, "weight"), "quantized before all was there"
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, found[name])
    expected = quantize_mse(found["weight"], 128)
    assert_same(layer, expected)
    if "bias" in order:
        assert torch.equal(layer.bias, found["bias"])
    assert_multiplies(layer, expected, layer.bias)


@pytest.mark.parametrize(("tp_rank", "tp_size"), RANKS)
def test_biases_of_a_fused_layer_come_before_their_weights(tp_rank, tp_size):
    parts = [64, 128]
    with rank_of(tp_rank, tp_size):
        layer = vllm_linear.MergedColumnParallelLinear(
            HIDDEN, parts, bias=True, params_dtype=torch.bfloat16, quant_config=config_of(),
            prefix=f"{MIXER}.gate_up_proj",
        )  # fmt: skip
        weight, bias = random_weight(sum(parts), HIDDEN), random_weight(sum(parts), 1, seed=5)
        for part, (rows, offsets) in enumerate(
            zip(weight.split(parts), bias.split(parts), strict=True)
        ):
            layer.bias.weight_loader(layer.bias, offsets[:, 0], part)
            assert hasattr(layer, "weight"), "quantized before all was there"
            layer.weight.weight_loader(layer.weight, rows, part)
    expected = quantize_mse(rows_of(weight, parts, tp_rank, tp_size), 128)
    assert_same(layer, expected)
    assert torch.equal(layer.bias, rows_of(bias, parts, tp_rank, tp_size)[:, 0])


def test_a_bias_that_is_missing_is_named():
    with rank_of(0, 1):
        layer = vllm_linear.ColumnParallelLinear(
            HIDDEN, 40, bias=True, params_dtype=torch.bfloat16, quant_config=config_of(),
            prefix=f"{MIXER}.up_proj",
        )  # fmt: skip
        layer.weight.weight_loader(layer.weight, random_weight(40, HIDDEN))
        with pytest.raises(ValueError, match="only 8000 of its 8040 weights"):
            finalize_layerwise_processing(layer, None)


def test_a_replicated_layer_is_whole_on_every_rank():
    with rank_of(1, 2):
        layer = vllm_linear.ReplicatedLinear(
            HIDDEN, 40, bias=False, quant_config=config_of(), prefix=f"{MIXER}.up_proj"
        )
        weight = random_weight(40, HIDDEN)
        layer.weight.weight_loader(layer.weight, weight)
    assert_same(layer, quantize_mse(weight, 128))


@pytest.mark.parametrize(("tp_rank", "tp_size"), VOCABULARY_RANKS)
def test_a_padded_vocabulary_has_rows_of_exact_zeros(tp_rank, tp_size):
    vocabulary = 150  # padded; the last of eight ranks has nothing but padding
    with rank_of(tp_rank, tp_size):
        layer = vllm_vocabulary.ParallelLMHead(
            vocabulary, HIDDEN, params_dtype=torch.bfloat16, quant_config=config_of(),
            prefix="lm_head",
        )  # fmt: skip
        weight = random_weight(vocabulary, HIDDEN)
        layer.weight.weight_loader(layer.weight, weight)
        if hasattr(layer, "weight"):  # vLLM 0.26 waits for the padding until the end of loading
            finalize_layerwise_processing(layer, None)
    rows = layer.num_embeddings_per_partition
    padded = torch.zeros(rows * tp_size, HIDDEN, dtype=torch.bfloat16)
    padded[:vocabulary] = weight
    expected = quantize_mse(padded[tp_rank * rows : (tp_rank + 1) * rows], 128)
    assert_same(layer, expected)
    assert_multiplies(layer, expected)


def test_the_bf16_weight_takes_no_memory_until_it_is_loaded():
    with rank_of(0, 1):
        layer = vllm_linear.ColumnParallelLinear(
            HIDDEN, 40, bias=False, quant_config=config_of(), prefix=f"{MIXER}.up_proj"
        )
    assert layer.weight.is_meta
    assert layer.quant_method.ledger.pending == {f"{MIXER}.up_proj"}


@pytest.mark.parametrize("prefix", [f"{MIXER}.gate", f"{MIXER}.conv1d"])
def test_what_no_preset_names_stays_unquantized(prefix):
    with rank_of(0, 1):
        layer = vllm_linear.ColumnParallelLinear(
            HIDDEN, 64, bias=False, quant_config=config_of(), prefix=prefix
        )
    assert isinstance(layer.quant_method, vllm_linear.UnquantizedLinearMethod)


def test_a_very_large_weight_is_filled_on_the_cpu_and_gives_the_same_bytes(monkeypatch):
    monkeypatch.setattr(linear, "LARGE_WEIGHT_BYTES", 40 * HIDDEN * 2 - 1)
    with rank_of(0, 1):
        layer = vllm_linear.ColumnParallelLinear(
            HIDDEN, 40, bias=False, params_dtype=torch.bfloat16, quant_config=config_of(),
            prefix=f"{MIXER}.up_proj",
        )  # fmt: skip
        with torch.device("meta"):  # stands for the GPU: nothing could be quantized there
            record_metadata_for_reloading(layer)
        weight = random_weight(40, HIDDEN)
        layer.weight.weight_loader(layer.weight, weight)
    assert_same(layer, quantize_mse(weight, 128))


def test_the_bf16_weight_is_freed_although_the_loader_holds_it(monkeypatch):
    held = []
    original = linear.quantize

    def keep(data, *rest):
        held.append(layer.weight)
        return original(data, *rest)

    monkeypatch.setattr(linear, "quantize", keep)
    with rank_of(0, 1):
        layer = vllm_linear.ColumnParallelLinear(
            HIDDEN, 40, bias=False, quant_config=config_of(), prefix=f"{MIXER}.up_proj"
        )
        layer.weight.weight_loader(layer.weight, random_weight(40, HIDDEN))
    (parameter,) = held
    assert parameter.numel() == 0
