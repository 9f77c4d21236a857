# SPDX-License-Identifier: Apache-2.0
"""Layers of real vLLM, weights loaded, that become int4 in place."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

import vllm.model_executor.layers.linear as vllm_linear
import vllm.model_executor.layers.vocab_parallel_embedding as vllm_vocabulary
from vllm.model_executor.layers.fused_moe import RoutedExperts

from tests.dequantized import dequantized
from tests.layers.fake_ranks import random_weight, rank_of
from vllm_nanoquant.kernels.layout import RuntimeWeight
from vllm_nanoquant.layers import replace
from vllm_nanoquant.quantize.mse import quantize_mse
from vllm_nanoquant.recipe import Recipe, RecipeError

pytestmark = pytest.mark.compat

HIDDEN = 200
CONFIG = SimpleNamespace(hybrid_override_pattern="M-M*-M-", tie_word_embeddings=False)


class Model(torch.nn.Module):
    """Modules by name; dots become underscores, as no module has children here."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def up_proj(rows=40, columns=HIDDEN, bias=False, seed=0, dtype=torch.bfloat16):
    layer = vllm_linear.ColumnParallelLinear(columns, rows, bias=bias, params_dtype=dtype)
    layer.weight.data.copy_(random_weight(rows, columns, seed))
    if bias:
        layer.bias.data.copy_(random_weight(1, rows, seed=5)[0])
    return layer


def as_loaded(layer):
    """What vLLM does after loading; on a CPU it repacks the weight and drops it."""
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def lm_head(rows=64):
    head = vllm_vocabulary.ParallelLMHead(rows, HIDDEN, params_dtype=torch.bfloat16)
    head.weight.data.copy_(random_weight(rows, HIDDEN))
    return head


def plan(model, config=CONFIG, **options):
    return replace.plan_replacements(model, Recipe(**{"preset": "full"} | options), config)


def carry_out(chosen):
    return {item.name: replace.replace(item) for item in chosen.replacements}


def assert_int4(layer, weight, bias=None, group_size=128):
    runtime = RuntimeWeight.from_quantized(quantize_mse(weight, group_size))
    assert not hasattr(layer, "weight") and not hasattr(layer, "cpu_linear")
    assert torch.equal(layer.weight_packed, runtime.words)
    assert torch.equal(layer.weight_scale, runtime.scales)
    x = random_weight(3, weight.shape[1], seed=9)
    exact = x.double() @ dequantized(weight, group_size).T
    exact += 0 if bias is None else bias.double()
    found = layer.quant_method.apply(layer, x, bias)
    assert (found.double() - exact).abs().mean() <= 5e-3 * exact.abs().mean()


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bias", [False, True])
def test_a_loaded_layer_becomes_int4(bias, group_size):
    with rank_of(0, 1):
        layer = as_loaded(up_proj(bias=bias))
        if bias:  # as vLLM leaves it for one of its matrix libraries for CPUs
            layer.bias.data = layer.bias.data.float()
        chosen = plan(Model(up_proj=layer), group_size=group_size)
        nbytes = carry_out(chosen)
    offset = random_weight(1, 40, seed=5)[0] if bias else None
    assert_int4(layer, random_weight(40, HIDDEN), offset, group_size)
    if bias:
        assert layer.bias.dtype == torch.bfloat16 and torch.equal(layer.bias.data, offset)
    tensors = (layer.weight_packed, layer.weight_scale, layer.weight_arrivals)
    assert nbytes == {"up_proj": sum(tensor.nbytes for tensor in tensors)}
    assert chosen.left == {}
    y = layer(random_weight(3, HIDDEN))
    assert (y[0] if isinstance(y, tuple) else y).shape == (3, 40)


def test_a_wide_weight_is_read_back_in_parts(monkeypatch):
    monkeypatch.setattr(replace, "_COLUMNS_READ", 64)
    with rank_of(0, 1):
        layer = as_loaded(up_proj())
        carry_out(plan(Model(up_proj=layer)))
    assert_int4(layer, random_weight(40, HIDDEN))


def test_a_rank_quantizes_its_own_columns_from_the_first_on():
    columns = 672  # rank 1 of 2 begins 80 columns inside a group of the whole layer
    with rank_of(1, 2):
        layer = vllm_linear.RowParallelLinear(columns, 48, bias=False, params_dtype=torch.bfloat16)
        share = random_weight(48, columns // 2)
        layer.weight.data.copy_(share)
        as_loaded(layer)
        carry_out(plan(Model(down_proj=layer)))
    assert layer.quant_method.group_offset == 0
    assert_int4(layer, share)


def test_an_lm_head_becomes_int4():
    with rank_of(0, 1):
        head = as_loaded(lm_head())
        carry_out(plan(Model(lm_head=head)))
    assert_int4(head, random_weight(64, HIDDEN))


def test_the_memory_is_freed_although_vllm_holds_the_parameter():
    with rank_of(0, 1):
        layer = up_proj()
        held = layer.weight
        carry_out(plan(Model(up_proj=layer)))
    assert held.numel() == 0


def test_a_second_plan_is_empty():
    with rank_of(0, 1):
        model = Model(up_proj=as_loaded(up_proj()))
        carry_out(plan(model))
        again = plan(model)
    assert again.replacements == []
    assert again.left == {"up_proj": "int4 already"}


def test_the_smallest_layers_come_first():
    with rank_of(0, 1):
        model = Model(up_proj=up_proj(80), down_proj=up_proj(40), gate_proj=up_proj(120))
        names = [item.name for item in plan(model).replacements]
    assert names == ["down_proj", "up_proj", "gate_proj"]


def test_what_the_recipe_does_not_name_is_left_without_a_word():
    with rank_of(0, 1):
        model = Model(up_proj=up_proj(), in_proj=up_proj(), out_proj=up_proj(), gate=up_proj())
        chosen = plan(model, preset="ssm", ignore=["out_*"])
    assert [item.name for item in chosen.replacements] == ["in_proj"]
    assert chosen.left == {}


def test_an_override_has_its_own_group_size():
    with rank_of(0, 1):
        layer = as_loaded(up_proj())
        carry_out(plan(Model(up_proj=layer), overrides={"up_proj": {"group_size": 32}}))
    assert_int4(layer, random_weight(40, HIDDEN), group_size=32)


def test_quality_reads_the_kinds_of_layers():
    with rank_of(0, 1):
        layers = torch.nn.ModuleList(
            Model(mixer=Model(in_proj=up_proj()))
            for _ in "M-M*-M-"  # 2 feeds the attention of 3
        )
        chosen = plan(Model(layers=layers), preset="quality")
        assert [item.name for item in chosen.replacements] == [
            f"layers.{index}.mixer.in_proj" for index in (0, 1, 3, 4, 5, 6)
        ]
        with pytest.raises(RecipeError, match="preset 'quality' needs the kind of each layer"):
            plan(Model(layers=layers), SimpleNamespace(), preset="quality")


@pytest.mark.parametrize("by", ["config", "tensor"])
def test_a_tied_lm_head_stays(by):
    with rank_of(0, 1):
        embedding = vllm_vocabulary.VocabParallelEmbedding(64, HIDDEN, torch.bfloat16)
        head, up = lm_head(), up_proj()
    if by == "tensor":
        head.weight = embedding.weight
    config = SimpleNamespace(tie_word_embeddings=by == "config")
    chosen = plan(Model(embed_tokens=embedding, lm_head=head, up_proj=up), config)
    assert [item.name for item in chosen.replacements] == ["up_proj"]
    assert chosen.left == {"lm_head": "shares the embedding's weights"}


@pytest.mark.parametrize(("preset", "counted"), [("balanced", True), ("ssm", False)])
def test_routed_experts_stay_and_are_counted(preset, counted):
    experts = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(experts)
    with rank_of(0, 1):
        chosen = plan(Model(experts=experts, in_proj=up_proj()), preset=preset)
    assert chosen.left == ({"experts": "routed experts"} if counted else {})


def test_what_another_method_quantized_stays():
    class Fp8Method(vllm_linear.UnquantizedLinearMethod):
        """Stands for any method but vLLM's unquantized one."""

    with rank_of(0, 1):
        layer = up_proj()
        layer.quant_method = Fp8Method()
        chosen = plan(Model(up_proj=layer))
    assert chosen.replacements == []
    assert chosen.left == {"up_proj": "not unquantized: Fp8Method"}


def test_a_weight_that_is_not_finite_is_refused_before_anything_is_touched():
    with rank_of(0, 1):
        good, bad = as_loaded(up_proj(8)), up_proj(40)
        bad.weight.data[7, 3] = torch.nan
        model = Model(up_proj=good, down_proj=bad)
        with pytest.raises(ValueError, match=r"down_proj\.weight: 1 weights .* is in row 7"):
            plan(model)
    assert type(good.quant_method) is vllm_linear.UnquantizedLinearMethod


def test_patterns_that_match_nothing_and_gptq_are_refused():
    with rank_of(0, 1):
        model = Model(up_proj=up_proj())
        with pytest.raises(RecipeError, match=r"'q_proj' .* matches no module"):
            plan(model, ignore=["q_proj"])
        with pytest.raises(RecipeError, match="'gptq' needs calibration text"):
            plan(model, algorithm="gptq")


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"Linear has no linear layers of vLLM.*from_linear"):
        plan(torch.nn.Linear(4, 4))


def test_loading_again_is_refused():
    with rank_of(0, 1):
        layer = as_loaded(up_proj())
        carry_out(plan(Model(up_proj=layer)))
    with pytest.raises(RuntimeError, match=r"up_proj became int4 .* cannot be loaded again"):
        layer.quant_method.process_weights_after_loading(layer)
    with pytest.raises(NotImplementedError, match="up_proj was replaced"):
        layer.quant_method.create_weights(layer)


@pytest.mark.parametrize(("free_mb", "enough"), [(700, True), (500, False)])
def test_a_device_without_room_is_refused(monkeypatch, free_mb, enough):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_mb << 20, 0))
    weight = SimpleNamespace(device=torch.device("cuda"))
    layer = SimpleNamespace(
        weight=weight, output_size_per_partition=4096, input_size_per_partition=4096
    )
    item = replace.Replacement("up_proj", layer, Recipe().scheme("up_proj", None), torch.bfloat16)
    chosen = replace.Plan([item] * 3)
    if enough:
        replace._require_room(chosen)
        return
    with pytest.raises(ValueError, match=r"up_proj needs up to 5.. MB .* 524 MB will be free"):
        replace._require_room(chosen)
