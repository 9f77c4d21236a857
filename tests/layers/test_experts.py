# SPDX-License-Identifier: Apache-2.0
"""Routed experts in real vLLM layers, one rank at a time, against an unsharded oracle."""

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, routed_experts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_processing,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from tests.layers.expert_layers import (
    EXPERTS,
    HIDDEN,
    PREFIX,
    RANKS,
    TOP_K,
    Rank,
    config_of,
    int4_experts,
    load,
    make_layer,
    names_of,
    quantized_expert,
    random_experts,
)
from tests.layers.fake_ranks import random_weight
from vllm_nanoquant.kernels.reference import dequantize
from vllm_nanoquant.layers import dispatch
from vllm_nanoquant.layers.experts import NanoquantExpertsMethod
from vllm_nanoquant.layers.stored_experts import StoredExpertsMethod
from vllm_nanoquant.quantize.groups import slice_columns
from vllm_nanoquant.quantize.mse import quantize_mse
from vllm_nanoquant.recipe import RecipeError

pytestmark = pytest.mark.compat

ODD_WIDTH = 8 * 29  # 1.8 groups of 128; shares of 116, 58 and 29 columns start inside a group


def experts_of(rank):
    """Numbers, in the model, of a rank's experts."""
    each = EXPERTS // rank.size
    return range(rank.rank * each, (rank.rank + 1) * each) if rank.whole_experts else range(EXPERTS)


def expected_expert(dense, number, width, gated, rank, group_size):
    """Both matrices of an expert, by quantizing all of it and cutting a share out of the result."""
    tensors = {
        shard: dense[f"{PREFIX}.{number}.{leaf}.weight"] for shard, leaf in names_of(gated).items()
    }
    share = slice(0, width)
    if not rank.whole_experts:
        each = width // rank.size
        share = slice(rank.rank * each, (rank.rank + 1) * each)
    rows = [tensors[shard][share] for shard in ("w1", "w3") if shard in tensors]
    w2 = slice_columns(quantize_mse(tensors["w2"], group_size), share.start, share.stop)
    return {"w13": quantize_mse(torch.cat(rows), group_size), "w2": w2}


def assert_same(found, expected):
    assert (found.shape, found.group_size, found.group_offset) == (
        expected.shape,
        expected.group_size,
        expected.group_offset,
    )
    for name in ("packed", "scale", "zero_point"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("way_in", ["while loading", "stored"])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rank", RANKS, ids=str)
def test_a_rank_has_the_bytes_of_an_unsharded_model(rank, gated, group_size, way_in):
    dense = random_experts(ODD_WIDTH, gated)
    if way_in == "stored":
        tensors = int4_experts(dense, group_size)
        config = config_of(tensors, group_size=group_size)
    else:
        tensors, config = dense, config_of(group_size=group_size)
    layer = make_layer(config, ODD_WIDTH, gated, rank)
    load(layer, tensors)
    numbers = experts_of(rank)
    assert layer.w13_weight_packed.shape[0] == len(numbers)
    for here, number in enumerate(numbers):
        expected = expected_expert(dense, number, ODD_WIDTH, gated, rank, group_size)
        for matrix, weight in expected.items():
            assert_same(quantized_expert(layer, matrix, here), weight)


def routes(tokens=5):
    """Weights and experts of some tokens, as a router gives them."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)])
    return torch.rand(tokens, TOP_K, generator=generator), ids.int()


def exact_mixture(dense, x, weights, ids, gated, group_size):
    """The mixture in float64 with the weights that the integers stand for."""
    y = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    for token, chosen in enumerate(ids.tolist()):
        for weight, number in zip(weights[token].double(), chosen, strict=True):
            w = {
                shard: dequantize(
                    quantize_mse(dense[f"{PREFIX}.{number}.{leaf}.weight"], group_size),
                    torch.float64,
                )
                for shard, leaf in names_of(gated).items()
            }
            h = w["w1"] @ x[token].double()
            h = (
                torch.nn.functional.silu(h) * (w["w3"] @ x[token].double())
                if gated
                else h.relu() ** 2
            )
            y[token] += weight * (w["w2"] @ h)
    return y


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("whole_experts", [False, True])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_what_the_ranks_compute_adds_up_to_the_whole(size, whole_experts, gated):
    dense = random_experts(ODD_WIDTH, gated)
    x = random_weight(5, HIDDEN, seed=9).float()
    weights, ids = routes()
    total = torch.zeros(5, HIDDEN, dtype=torch.float64)
    for rank in range(size):
        layer = make_layer(config_of(), ODD_WIDTH, gated, Rank(rank, size, whole_experts))
        load(layer, dense)
        method = layer.quant_method
        total += method.apply(layer, x, weights, ids, None, None).double()
        assert method.moe_kernel is None and not method.mk_can_overlap_shared_experts
    exact = exact_mixture(dense, x, weights, ids, gated, 128)
    # fp32 throughout, and the sums of the ranks; 1e-2 is what a bf16 model may lose.
    assert (total - exact).abs().mean() <= 1e-5 * exact.abs().mean()


def test_experts_take_no_memory_before_and_none_but_a_byte_while_they_are_loaded(monkeypatch):
    layer = make_layer(config_of(), ODD_WIDTH)
    assert layer.w13_weight.is_meta
    assert layer.w13_weight.shape == (EXPERTS, ODD_WIDTH, HIDDEN)
    assert layer.quant_method.ledger.pending == {PREFIX}
    held = []
    original = NanoquantExpertsMethod._take

    def take(*arguments):
        held.append(layer.w13_weight)
        original(*arguments)

    monkeypatch.setattr(NanoquantExpertsMethod, "_take", take)
    load(layer, random_experts(ODD_WIDTH))
    assert {parameter.untyped_storage().nbytes() for parameter in held} == {1}
    assert layer.quant_method.ledger.done == {PREFIX}


@pytest.mark.parametrize("stored", [False, True])
def test_dummy_weights_are_there_at_once_and_the_same_for_every_expert(stored):
    tensors = int4_experts(random_experts(ODD_WIDTH), 128) if stored else None
    layer = make_layer(config_of(tensors), ODD_WIDTH, rank=Rank(1, 2), load_format="dummy")
    record_metadata_for_reloading(layer)
    DummyModelLoader.load_weights(object.__new__(DummyModelLoader), layer, None)
    first, last = (quantized_expert(layer, "w2", expert) for expert in (0, EXPERTS - 1))
    assert_same(last, first)
    assert first.packed.unique().numel() > 200
    assert 5e-4 < dequantize(first).abs().max() < 2e-3
    x = torch.ones(2, HIDDEN)
    y = layer.quant_method.apply(layer, x, *(part[:2] for part in routes()), None, None)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("rank", [Rank(), Rank(0, 2, True)], ids=str)
@pytest.mark.parametrize("stored", [False, True])
def test_a_reload_gives_the_new_bytes_at_the_old_addresses(stored, rank):
    def checkpoint(scale):
        dense = {name: t * scale for name, t in random_experts(ODD_WIDTH, True).items()}
        return int4_experts(dense, 128) if stored else dense

    config = config_of(checkpoint(1) if stored else None)
    layer = make_layer(config, ODD_WIDTH, True, rank)
    record_metadata_for_reloading(layer)
    load(layer, checkpoint(1))
    before = {name: (t.data_ptr(), t.clone()) for name, t in layer.named_parameters()}
    for scale in (2, 1):
        initialize_layerwise_reload(layer)
        load(layer, checkpoint(scale))
        finalize_layerwise_processing(layer, None)
        changed = layer.w2_weight_scale
        assert torch.equal(changed, before["w2_weight_scale"][1]) == (scale == 1)
        for name, tensor in layer.named_parameters():
            assert tensor.data_ptr() == before[name][0]
            assert scale == 2 or torch.equal(tensor, before[name][1])
    assert not dict(layer.named_buffers())["weight_arrivals"].any()
    assert "weight_arrivals" not in layer.state_dict()


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("lost", ["0.gate_proj", "3.up_proj", "7.down_proj"])
def test_a_missing_tensor_is_an_error_that_names_the_layer(lost, stored):
    dense = random_experts(ODD_WIDTH, True)
    tensors = int4_experts(dense, 128) if stored else dense
    layer = make_layer(config_of(tensors if stored else None), ODD_WIDTH, True)
    name = f"{PREFIX}.{lost}.weight_scale" if stored else f"{PREFIX}.{lost}.weight"
    missing = tensors.pop(name).numel()
    load(layer, tensors)
    expected = sum(tensor.numel() for tensor in tensors.values()) + missing
    text = f"gives {PREFIX} only {expected - missing} of the {expected} weights of its 8 experts"
    with pytest.raises(ValueError, match=text):
        finalize_layerwise_processing(layer, None)


def test_a_tensor_that_comes_twice_does_not_stand_for_another():
    dense = random_experts(ODD_WIDTH)
    name = f"{PREFIX}.0.up_proj.weight"
    del dense[f"{PREFIX}.7.up_proj.weight"]
    layer = make_layer(config_of(), ODD_WIDTH)
    with pytest.raises(ValueError, match="a tensor is missing"):
        load(layer, dense)
        load(layer, {name: dense[name]})


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rank", [Rank(), Rank(1, 2), Rank(1, 2, True)], ids=str)
def test_experts_in_one_tensor_with_three_dimensions(gated, rank):
    dense = random_experts(ODD_WIDTH, gated)
    one = make_layer(config_of(), ODD_WIDTH, gated, rank)
    load(one, dense)
    other = make_layer(config_of(), ODD_WIDTH, gated, rank)
    for shard, leaf in names_of(gated).items():
        stack = torch.stack([dense[f"{PREFIX}.{e}.{leaf}.weight"] for e in range(EXPERTS)])
        if rank.whole_experts and shard == "w2":
            stack = stack[experts_of(rank)[0] :]  # some models cut before they load
        parameter = getattr(other, "w2_weight" if shard == "w2" else "w13_weight")
        assert parameter.weight_loader(parameter, stack, f"experts.{leaf}", shard, 0, True)
    for name, tensor in one.named_parameters():
        assert torch.equal(getattr(other, name), tensor)


WRONG = {
    "transposed": lambda t: t.t().contiguous(),
    "of another width": lambda t: t[:-1].contiguous(),
    "eight bits": lambda t: t.to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("change", WRONG)
def test_a_tensor_of_another_form_is_named(change):
    name = f"{PREFIX}.2.down_proj.weight"
    tensors = random_experts(ODD_WIDTH)
    tensors[name] = WRONG[change](tensors[name])
    layer = make_layer(config_of(), ODD_WIDTH)
    form = r"must be torch\.bfloat16 or .* \[200, 232\]"
    with pytest.raises(ValueError, match=rf"experts\.2\.down_proj\.weight is .*{form}"):
        load(layer, tensors)


@pytest.mark.parametrize("stored", [False, True])
def test_values_that_are_not_finite_are_named(stored):
    tensors = random_experts(ODD_WIDTH)
    if stored:
        tensors = int4_experts(tensors, 128)
    tensors[f"{PREFIX}.5.up_proj.weight{'_scale' * stored}"][1, 7] = float("nan")
    layer = make_layer(config_of(tensors if stored else None), ODD_WIDTH)
    with pytest.raises(ValueError, match=r"experts\.5\.up_proj\.weight.* not finite"):
        load(layer, tensors)


class LeftAlone(FusedMoEMethodBase):
    """Stands for vLLM's own method, which not every machine of the tests has a kernel for."""

    def create_weights(self, layer, **sizes):
        pass

    def get_fused_moe_quant_config(self, layer):
        return None


@pytest.fixture
def vllms_own(monkeypatch):
    monkeypatch.setattr(routed_experts, "UnquantizedFusedMoEMethod", LeftAlone)
    return LeftAlone


def test_a_preset_without_mlps_leaves_experts_alone(vllms_own):
    layer = make_layer(config_of(preset="ssm"), ODD_WIDTH, True)
    assert isinstance(layer.quant_method, vllms_own)


@pytest.mark.parametrize(
    "options",
    [
        {"ignore": "*.experts.3.*"},
        {"ignore": "*.experts.*.up_proj"},
        {"overrides": {"*.experts.1.*": {"group_size": 32}}},
    ],
)
def test_experts_of_a_layer_must_agree(options):
    with pytest.raises(
        RecipeError, match=rf"experts of {PREFIX} .* same treatment, but .*name all"
    ):
        make_layer(config_of(**options), ODD_WIDTH, True)


UNSUPPORTED = {
    "activation": ({"activation": MoEActivation.SWIGLUSTEP}, "swiglustep is none of silu, gelu"),
    "router": ({"apply_router_weight_on_input": True}, "router's weights are applied to their inp"),
    "bias": ({"described": {"has_bias": True}}, "they have biases"),
    "clamp": ({"swiglu_limit": 7.0}, "swiglu_limit"),
    "adapters": ({"described": {"is_lora_enabled": True}}, "LoRA"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_experts_that_cannot_be_served_stay_and_the_log_says_why(monkeypatch, vllms_own, case):
    options, reason = UNSUPPORTED[case]
    said = []
    monkeypatch.setattr(dispatch.logger, "warning", lambda text, *words: said.append(text % words))
    layer = make_layer(config_of(), ODD_WIDTH, True, **options)
    assert isinstance(layer.quant_method, vllms_own)
    assert len(said) == 1 and f"the experts of {PREFIX} stay as they are" in said[0]
    assert reason in said[0]
    stored = int4_experts(random_experts(ODD_WIDTH, True), 128)
    with pytest.raises(
        RecipeError, match=r"are int4 in the checkpoint and cannot be served.*ignore"
    ):
        make_layer(config_of(stored), ODD_WIDTH, True, **options)


def test_shapes_of_another_model_are_refused_while_the_model_is_built():
    stored = int4_experts(random_experts(ODD_WIDTH), 128)
    with pytest.raises(RecipeError, match=r"experts\.0\.up_proj\.weight_packed is \[100, 232\]"):
        make_layer(config_of(stored), ODD_WIDTH + 8)


def test_columns_in_another_order_are_refused():
    stored = int4_experts(random_experts(ODD_WIDTH), 128)
    stored[f"{PREFIX}.4.up_proj.weight_order"] = torch.arange(HIDDEN, dtype=torch.int32)
    with pytest.raises(RecipeError, match=r"experts\.4\.up_proj\.weight_order.*activation order"):
        make_layer(config_of(stored), ODD_WIDTH)


def test_an_int4_checkpoint_whose_experts_lie_in_one_tensor_has_them_in_bf16(vllms_own):
    stored = int4_experts(
        {f"{PREFIX.rpartition('.')[0]}.shared.up_proj.weight": random_weight(8, 8)}, 128
    )
    layer = make_layer(config_of(stored), ODD_WIDTH, True)
    assert isinstance(layer.quant_method, vllms_own)


def test_methods_by_the_way_in():
    stored = int4_experts(random_experts(ODD_WIDTH), 128)
    assert type(make_layer(config_of(), ODD_WIDTH).quant_method) is NanoquantExpertsMethod
    assert type(make_layer(config_of(stored), ODD_WIDTH).quant_method) is StoredExpertsMethod
