# SPDX-License-Identifier: Apache-2.0
"""int4 linear layers outside vLLM, against float64 products of dequantized weights."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.dequantized import dequantized
from vllm_nanoquant import W4A16Linear, quantize_w4, w4a16_linear
from vllm_nanoquant.kernels.layout import to_quantized

# Mean relative error: one rounding to bf16 (2^-9) on top of sums in fp32.
BF16_TOLERANCE = 2**-9
SHAPES = [(1, 1), (7, 33), (64, 128), (65, 129), (100, 300), (193, 96)]
GROUP_SIZES = [32, 64, 128, -1]


def linear(out_features, in_features, bias=True, dtype=torch.bfloat16):
    torch.manual_seed(out_features * 1000 + in_features)
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype)


def relative_error(found, exact):
    return float((found.double() - exact).abs().mean() / exact.abs().mean())


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_product_is_that_of_the_dequantized_weight(rows, columns, group_size):
    source = linear(rows, columns)
    layer = W4A16Linear.from_linear(source, group_size)
    x = torch.randn(2, 3, columns).to(torch.bfloat16)
    exact = x.double() @ dequantized(source.weight.detach(), group_size).T
    y = layer(x)
    assert y.shape == (2, 3, rows)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, exact + source.bias.detach().double()) < BF16_TOLERANCE
    functional = w4a16_linear(x, quantize_w4(source.weight, group_size), source.bias.detach())
    assert torch.equal(functional, y)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_bias(dtype, bias):
    source = linear(70, 150, bias, dtype)
    layer = W4A16Linear.from_linear(source)
    x = torch.randn(5, 150).to(dtype)
    exact = x.double() @ dequantized(source.weight.detach(), 128).T
    if bias:
        exact += source.bias.detach().double()
        assert layer.bias.dtype == dtype
    y = layer(x)
    assert y.dtype == dtype
    assert relative_error(y, exact) < {torch.float32: 1e-6}.get(dtype, BF16_TOLERANCE)


def test_strided_empty_and_flat_inputs():
    layer = W4A16Linear.from_linear(linear(20, 40))
    x = torch.randn(40, 6).to(torch.bfloat16)
    assert torch.equal(layer(x.t()), layer(x.t().contiguous()))
    assert torch.equal(layer(x[:, 0]), layer(x.t().contiguous())[0])
    assert layer(torch.empty(0, 40, dtype=torch.bfloat16)).shape == (0, 20)


def test_the_source_is_left_alone_and_shares_no_memory():
    source = linear(16, 48)
    before = copy.deepcopy(source.state_dict())
    layer = W4A16Linear.from_linear(source)
    pointers = {tensor.data_ptr() for tensor in source.parameters()}
    assert not pointers & {tensor.data_ptr() for tensor in layer.buffers()}
    assert all(torch.equal(before[name], value) for name, value in source.state_dict().items())
    assert source.weight.requires_grad and source.weight.grad is None
    y = layer(torch.ones(1, 48, dtype=torch.bfloat16))
    with torch.no_grad():
        source.bias.zero_()
        source.weight.zero_()
    assert torch.equal(layer(torch.ones(1, 48, dtype=torch.bfloat16)), y)


def test_nothing_is_trained():
    layer = W4A16Linear.from_linear(linear(16, 48))
    assert list(layer.parameters()) == []
    x = torch.ones(1, 48, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no gradient; call it under torch\.no_grad"):
        layer(x)
    with pytest.raises(RuntimeError, match="no gradient"):
        w4a16_linear(x, layer.weight)
    with torch.no_grad():
        assert not layer(x).requires_grad


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_state_dict_makes_the_same_layer(tmp_path, group_size, bias):
    layer = W4A16Linear.from_linear(linear(70, 150, bias), group_size)
    file = tmp_path / "layer.pt"
    torch.save(layer.state_dict(), file)
    again = W4A16Linear(150, 70, bias, group_size)
    again.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(4, 150).to(torch.bfloat16)
    assert torch.equal(again(x), layer(x))
    names = {"weight_packed", "weight_scale", "weight_shape"} | ({"bias"} if bias else set())
    assert layer.state_dict().keys() == names


@pytest.mark.parametrize(
    "other", [(151, 70, 128), (150, 71, 128), (100, 70, -1)], ids=["K", "N", "group size"]
)
def test_the_state_of_another_layer_is_refused(other):
    columns, rows, group_size = other
    same_padding = W4A16Linear(columns, rows, group_size=group_size)
    source = W4A16Linear.from_linear(linear(70, 100 if group_size == -1 else 150))
    with pytest.raises(RuntimeError, match=r"weight_shape is \[70, 1.0, 128\].*this layer has"):
        nn.Sequential(same_padding).load_state_dict(nn.Sequential(source).state_dict())


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies(duplicate):
    layer = W4A16Linear.from_linear(linear(70, 150))
    x = torch.randn(4, 150).to(torch.bfloat16)
    assert torch.equal(duplicate(layer)(x), layer(x))


def on_meta(source):
    with torch.device("meta"):
        return W4A16Linear(source.in_features, source.out_features)


@pytest.mark.parametrize("way", ["assign", "to_empty"])
def test_a_layer_made_on_the_meta_device_is_filled_by_a_state(way):
    """The counters are in no state: they must neither stay on meta nor hold what memory held."""
    source = W4A16Linear.from_linear(linear(70, 150))
    layer = on_meta(source)
    if way == "to_empty":
        layer = layer.to_empty(device="cpu")
        layer.weight_arrivals.fill_(83)
    layer.load_state_dict(source.state_dict(), assign=way == "assign")
    assert layer.weight_arrivals.device.type == "cpu" and not layer.weight_arrivals.any()
    x = torch.randn(4, 150).to(torch.bfloat16)
    assert torch.equal(layer(x), source(x))


def test_counters_keep_their_address_when_a_state_is_loaded():
    layer = W4A16Linear.from_linear(linear(70, 150))
    before = layer.weight_arrivals.data_ptr()  # CUDA graphs have it
    layer.load_state_dict(W4A16Linear.from_linear(linear(70, 150)).state_dict())
    assert layer.weight_arrivals.data_ptr() == before


def test_a_layer_without_values_is_refused():
    source = W4A16Linear.from_linear(linear(70, 150))
    with pytest.raises(ValueError, match="x is on cpu, a tensor of the weight on meta; bring all"):
        on_meta(source)(torch.zeros(1, 150, dtype=torch.bfloat16))


def test_to_changes_the_bias_and_leaves_the_integers():
    layer = W4A16Linear.from_linear(linear(70, 150))
    integers = to_quantized(layer.weight)
    layer.to(torch.float16)
    after = to_quantized(layer.weight)
    assert torch.equal(after.packed, integers.packed) and torch.equal(after.scale, integers.scale)
    assert layer(torch.zeros(1, 150, dtype=torch.float16)).dtype == torch.float16
    assert layer.to("meta").weight_packed.is_meta


def test_the_layer_says_what_it_is():
    layer = W4A16Linear.from_linear(linear(70, 150, bias=False), group_size=64).eval()
    expected = "W4A16Linear(in_features=150, out_features=70, bias=False, group_size=64)"
    assert repr(layer) == expected
    assert layer.weight.shape == (70, 150)
    assert W4A16Linear.from_linear(linear(2, 2).eval()).training is False


def test_the_device_of_a_weight_is_kept_or_chosen():
    source = linear(8, 8)
    assert quantize_w4(source.weight, device="cpu").words.device.type == "cpu"
    with pytest.raises(ValueError, match="meta device and has no values"):
        quantize_w4(source.weight.to("meta"))


def test_mse_is_no_worse_than_minmax():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    x = torch.eye(256)
    errors = {
        name: float((w4a16_linear(x, quantize_w4(weight, 32, name)).T - weight).square().mean())
        for name in ("minmax", "mse")
    }
    assert errors["mse"] < errors["minmax"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4)}, r"non-empty weight \[N, K\], got shape \[4\]"),
        ({"weight": torch.zeros(4, 4).double()}, "expected a weight in bf16, fp16 or fp32"),
        ({"weight": torch.full((4, 4), torch.nan)}, "16 weights are not finite"),
        ({"group_size": 48}, "group_size is 48; it must be one of"),
        ({"algorithm": "magic"}, "algorithm is 'magic'; it must be one of minmax"),
        ({"algorithm": "gptq"}, "needs calibration text"),
    ],
)
def test_what_cannot_be_quantized_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        quantize_w4(**{"weight": torch.ones(4, 4)} | change)


def test_what_does_not_fit_together_is_refused():
    layer = W4A16Linear.from_linear(linear(70, 100))
    with pytest.raises(ValueError, match=r"x is \[2, 101\]; its last dimension must be 100"):
        layer(torch.ones(2, 101, dtype=torch.bfloat16))  # the same padding: the op cannot tell
    with pytest.raises(ValueError, match=r"x is torch\.int64"):
        layer(torch.ones(2, 100, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"bias is torch\.bfloat16"):
        layer(torch.ones(2, 100))
    with pytest.raises(ValueError, match="bias is"):
        w4a16_linear(torch.ones(2, 100), layer.weight, torch.ones(71))
    with pytest.raises(TypeError, match=r"takes an nn\.Linear, not Conv1d"):
        W4A16Linear.from_linear(nn.Conv1d(4, 4, 1))
    with pytest.raises(ValueError, match="group_size is 48"):
        W4A16Linear(4, 4, group_size=48)
    with pytest.raises(ValueError, match="no elements"):
        W4A16Linear(0, 4)


def test_torch_compile_sees_one_graph_for_every_number_of_tokens():
    source = nn.Sequential(linear(70, 150), nn.ReLU(), linear(9, 70))
    model = nn.Sequential(*(
        W4A16Linear.from_linear(part) if isinstance(part, nn.Linear) else part for part in source
    ))  # fmt: skip
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (3, 20, 700):
        x = torch.randn(tokens, 150).to(torch.bfloat16)
        assert torch.equal(compiled(x), model(x))
    assert len(graphs) == 1
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("nanoquant.w4a16" in target for target in targets) == 2


def test_none_of_it_needs_vllm():
    code = (
        "import sys; sys.modules['vllm'] = None; import torch; "
        "from vllm_nanoquant import W4A16Linear, quantize_w4, w4a16_linear; "
        "layer = W4A16Linear.from_linear(torch.nn.Linear(8, 4)); "
        "print(layer(torch.ones(2, 8)).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip() == "torch.Size([2, 4])", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 16, 100, 2000])
def test_on_a_gpu_every_kernel_gives_the_product(tokens, dtype):
    source = linear(320, 500, dtype=dtype)
    layer = W4A16Linear.from_linear(source, device="cuda")
    x = torch.randn(tokens, 500).to(dtype)
    weight = dequantized(source.weight.detach(), 128)
    exact = x.double() @ weight.T + source.bias.detach().double()
    assert relative_error(layer(x.cuda()).cpu(), exact) < 5e-3
    assert torch.equal(W4A16Linear.from_linear(source).cuda()(x.cuda()), layer(x.cuda()))


@pytest.mark.gpu
def test_float32_is_refused_on_a_gpu():
    layer = W4A16Linear.from_linear(linear(8, 8, bias=False), device="cuda")
    with pytest.raises(ValueError, match=r"torch\.bfloat16 or torch\.float16"):
        layer(torch.ones(1, 8, device="cuda"))
