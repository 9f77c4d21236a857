# SPDX-License-Identifier: Apache-2.0
"""A Mamba mixer with one B/C group: every rank has a copy of it, by a loader that vLLM puts in.

The oracle is the weight quantized whole, its rows gathered by hand.
"""

import contextlib

import pytest
import torch

pytest.importorskip("vllm")

import vllm.model_executor.layers.mamba.mamba_mixer2 as vllm_mamba
from vllm.config import CacheConfig
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_processing,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from tests.checkpoints import int4_tensors
from tests.layers.fake_ranks import RANKS, random_weight, rank_of
from tests.layers.stored_layers import headers_of, load
from vllm_nanoquant.config import NanoquantConfig
from vllm_nanoquant.inventory import Inventory
from vllm_nanoquant.kernels.layout import RuntimeWeight
from vllm_nanoquant.quantize.mse import quantize_mse
from vllm_nanoquant.recipe import RecipeError, ServingOptions

pytestmark = pytest.mark.compat

HIDDEN, HEADS, HEAD, STATE = 200, 8, 16, 24
INNER = HEADS * HEAD
PREFIX = "model.layers.0.mixer.in_proj"
ROWS = 2 * INNER + 2 * STATE + HEADS
SEVERAL = [rank for rank in RANKS if rank[1] > 1]


@contextlib.contextmanager
def mixer_of(rank, stored=None, group_size=128):
    """The mixer of one rank, as vLLM builds it."""
    options = ServingOptions(preset="full", group_size=group_size)
    config = NanoquantConfig(Inventory(options, stored))
    with pytest.MonkeyPatch.context() as patch, rank_of(*rank):
        for name, value in zip(("rank", "world_size"), rank, strict=True):
            patch.setattr(
                vllm_mamba, f"get_tensor_model_parallel_{name}", lambda value=value: value
            )
        yield vllm_mamba.MambaMixer2(
            hidden_size=HIDDEN, ssm_state_size=STATE, conv_kernel_size=4, intermediate_size=INNER,
            use_conv_bias=True, use_bias=False, n_groups=1, num_heads=HEADS, head_dim=HEAD,
            activation="silu", cache_config=CacheConfig(), quant_config=config,
            prefix="model.layers.0.mixer",
        )  # fmt: skip


def rows_of(weight, rank):
    """Gate, x and dt cut over the ranks, B and C whole."""
    gate, x, b, c, dt = weight.split([INNER, INNER, STATE, STATE, HEADS])
    index, count = rank
    cut = [part.chunk(count)[index] for part in (gate, x)]
    return torch.cat([*cut, b, c, dt.chunk(count)[index]])


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("rank", SEVERAL)
def test_quantized_while_loading(rank, group_size):
    weight = random_weight(ROWS, HIDDEN)
    with mixer_of(rank, group_size=group_size) as mixer:
        load(mixer.in_proj, PREFIX, {f"{PREFIX}.weight": weight}, {})
        assert_holds(mixer.in_proj, rows_of(weight, rank), group_size)


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("rank", SEVERAL)
def test_int4_in_the_checkpoint(rank, group_size):
    weight = random_weight(ROWS, HIDDEN)
    tensors = int4_tensors(PREFIX, weight, group_size)
    with mixer_of(rank, headers_of(tensors), group_size) as mixer:
        load(mixer.in_proj, PREFIX, tensors, {})
        assert_holds(mixer.in_proj, rows_of(weight, rank), group_size)


def assert_holds(layer, weight, group_size):
    runtime = RuntimeWeight.from_quantized(quantize_mse(weight, group_size))
    assert set(dict(layer.named_parameters())) == {"weight_packed", "weight_scale"}
    assert torch.equal(layer.weight_packed, runtime.words)
    assert torch.equal(layer.weight_scale, runtime.scales)
    assert layer.quant_method.out_features == len(weight)


@pytest.mark.parametrize("is_int4", [False, True])
def test_a_reload_gives_the_new_weights(is_int4):
    first, second = (random_weight(ROWS, HIDDEN, seed=seed) for seed in (1, 2))
    forms = [
        int4_tensors(PREFIX, weight, 128) if is_int4 else {f"{PREFIX}.weight": weight}
        for weight in (first, second)
    ]
    with mixer_of((1, 2), headers_of(forms[0]) if is_int4 else None) as mixer:
        layer = mixer.in_proj
        record_metadata_for_reloading(layer)
        load(layer, PREFIX, forms[0], {})
        assert_holds(layer, rows_of(first, (1, 2)), 128)
        initialize_layerwise_reload(layer)
        load(layer, PREFIX, forms[1], {})
        finalize_layerwise_reload(layer, None)
        assert_holds(layer, rows_of(second, (1, 2)), 128)


def test_a_missing_tensor_is_still_an_error():
    tensors = int4_tensors(PREFIX, random_weight(ROWS, HIDDEN), 128)
    stored = headers_of(tensors)
    del tensors[f"{PREFIX}.weight_zero_point"]
    with mixer_of((1, 2), stored) as mixer:
        load(mixer.in_proj, PREFIX, tensors, {})
        with pytest.raises(ValueError, match=r"in_proj only \d+ of its \d+ weights"):
            finalize_layerwise_processing(mixer.in_proj, None)


@pytest.mark.parametrize("rows", [ROWS + 1, ROWS - 1])
def test_a_weight_of_another_shape_is_refused_before_loading(rows):
    stored = headers_of(int4_tensors(PREFIX, random_weight(rows, HIDDEN), 128))
    with (
        pytest.raises(RecipeError, match=rf"in_proj\.weight_packed is \[100, {rows}\]"),
        mixer_of((0, 4), stored),
    ):
        pass
