# SPDX-License-Identifier: Apache-2.0
"""docs/specification.md says enough: a reader written from it gives the package's values."""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.checkpoint.foreign import DOWN, UP, under, write
from tests.checkpoint.formats import packers
from tests.checkpoint.formats.packers import Int4
from tests.checkpoint.small import write_stock
from tests.docs import reader
from vllm_nanoquant.checkpoint.verify import verify
from vllm_nanoquant.cli.main import main
from vllm_nanoquant.kernels.reference import dequantize
from vllm_nanoquant.quantize.groups import QuantizedWeight, group_count
from vllm_nanoquant.quantize.minmax import quantize_minmax

PAGE = Path(__file__).parents[2] / "docs" / "specification.md"


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def tensors_of(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def shapes_of(folder):
    """N and K of each weight of a stock checkpoint."""
    found = tensors_of(folder).items()
    return {name.removesuffix(".weight"): tensor.shape for name, tensor in found}


def packages_values(folder, module, columns, group_size):
    """W, float32 [N, K], by the package."""
    tensors = tensors_of(folder)
    parts = [tensors[f"{module}.weight_{part}"] for part in ("packed", "scale", "zero_point")]
    return dequantize(QuantizedWeight(*parts, group_size, columns)).numpy()


def same_bits(ours, theirs):
    return ours.shape == theirs.shape and (ours.view(np.uint32) == theirs.view(np.uint32)).all()


def test_the_reader_has_nothing_of_the_package():
    tree = ast.parse(Path(reader.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names}  # fmt: skip
    assert names == {"json", "re", "numpy"}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))


@pytest.fixture(scope="module", params=[(32, "minmax"), (128, "mse"), (-1, "minmax")], ids=str)
def quantized(request, tiny_model, tmp_path_factory):
    group_size, algorithm = request.param
    folder = tmp_path_factory.mktemp("spec") / "int4"
    options = ("--group-size", group_size, "--algorithm", algorithm, "--preset", "full")
    run("quantize", tiny_model, folder, *options, "--max-shard-size", "1MB")
    return folder, group_size, algorithm


def test_what_quantize_writes(quantized, tiny_model):
    folder, group_size, algorithm = quantized
    shapes = shapes_of(tiny_model)
    found = reader.read(folder, lambda module: shapes[module][1])
    assert len(found) == 17  # 6 of Mamba, 6 of MLPs, 4 of attention, the LM head
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert count > 1 and (folder / "model.safetensors.index.json").exists()
    stock = tensors_of(tiny_model)
    for module, values in found.items():
        expected = packages_values(folder, module, shapes[module][1], group_size)
        assert same_bits(values, expected), module
        error = np.linalg.norm(values - stock[module + ".weight"].float().numpy())
        assert error < 0.2 * np.linalg.norm(values)
    if algorithm != "minmax":
        return
    stored = tensors_of(folder)
    for module in found:
        weight = stock[module + ".weight"].float().numpy()
        for suffix, part in reader.minmax(weight, group_size).items():
            tensor = stored[f"{module}.{suffix}"]
            tensor = tensor.view(torch.int16) if suffix != "weight_packed" else tensor
            assert (tensor.numpy().view(part.dtype) == part).all(), (module, suffix)


def test_odd_sizes_an_override_and_other_dtypes(tmp_path):
    source, folder = write_stock(tmp_path / "source"), tmp_path / "int4"
    run("quantize", source, folder, "--override", "*.in_proj=4/32", "--override", "lm_head=16")
    shapes = shapes_of(source)
    found = reader.read(folder, lambda module: shapes[module][1])
    assert {shapes[module][1] % 2 for module in found} == {0, 1}
    for module, values in found.items():
        size = 32 if module.endswith("in_proj") else 128
        assert same_bits(values, packages_values(folder, module, shapes[module][1], size))


@pytest.mark.parametrize("scattered", [False, True], ids=["in order", "weight_order"])
def test_whole_zero_points_and_an_order_of_columns(tmp_path, scattered):
    up = Int4(16, 96, 32, seed=1, scattered=scattered)
    down = Int4(24, 160, 32, seed=2, scattered=scattered)
    tensors = {
        "model.norm.weight": torch.ones(8, dtype=torch.float16),
        **under(UP, packers.gptq(up, less_one=True)),
        **under(DOWN, packers.gptq(down, less_one=True)),
    }
    options = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": scattered}
    source = write(tmp_path / "source", options | {"sym": False}, tensors)
    run("convert", source, tmp_path / "int4")
    assert any(name.endswith("weight_order") for name in tensors_of(tmp_path / "int4")) == scattered
    found = reader.read(tmp_path / "int4", {UP: 96, DOWN: 160}.get)
    for module, weight in ((UP, up), (DOWN, down)):
        # 4 bits, a small whole number and 8 bits of a scale: exact in float32.
        assert (found[module].astype(np.float64) == weight.values().numpy()).all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 300),
    group_size=st.sampled_from([32, 64, 128, -1]),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    kind=st.sampled_from(["normal", "positive", "minus zero", "zero", "constant"]),
)
def test_minmax_of_any_weight(rows, columns, group_size, seed, scale, kind):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    if kind != "normal":
        weight = {
            "positive": weight.abs(),
            "minus zero": torch.where(weight > 0, weight, -0.0),
            "zero": weight * 0,
            "constant": weight * 0 - scale,
        }[kind]
    ours = quantize_minmax(weight, group_size)
    parts = reader.minmax(weight.numpy(), group_size)
    assert (ours.packed.numpy() == parts["weight_packed"]).all()
    for name, tensor in (("scale", ours.scale), ("zero_point", ours.zero_point)):
        assert (tensor.view(torch.int16).numpy().view(np.uint16) == parts[f"weight_{name}"]).all()
    stored = {
        name: ("U8" if part.dtype == np.uint8 else "BF16", part.shape, part)
        for name, part in parts.items()
    }
    read = reader.dequantize(stored, columns, group_size)
    assert same_bits(np.ascontiguousarray(read), dequantize(ours).numpy())


def test_the_group_size_follows_from_the_shapes():
    for columns in range(1, 700):
        for group_size in (32, 64, 128):
            groups = group_count(columns, group_size)
            width = reader.group_width(columns, groups)
            assert (np.arange(columns) // width == np.arange(columns) // group_size).all()


def config(change):
    def damage(folder, tensors):
        path = folder / "config.json"
        read = json.loads(path.read_text())
        change(read["quantization_config"])
        path.write_text(json.dumps(read))

    return damage


def parts(change):
    def damage(folder, tensors):
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


UP_PROJ = "backbone.layers.1.mixer.up_proj"


def replace(suffix, change):
    name = f"{UP_PROJ}.{suffix}"
    return parts(lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))


def remove(suffix):
    return parts(lambda tensors: tensors.pop(f"{UP_PROJ}.{suffix}"))


def with_first(value):
    def change(tensor):
        tensor[0, 0] = value
        return tensor

    return change


def cut_short(folder, tensors):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def twice(folder, tensors):
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")


DAMAGE = {
    "a later version": config(lambda options: options.update(format_version=2)),
    "a version that is true": config(lambda options: options.update(format_version=True)),
    "another group size": config(lambda options: options.update(group_size=32)),
    "no scale": remove("weight_scale"),
    "no zero point": remove("weight_zero_point"),
    "no packed weight": remove("weight_packed"),
    "both": parts(lambda tensors: tensors.update({f"{UP_PROJ}.weight": torch.ones(45, 96)})),
    "a dtype": replace("weight_scale", lambda tensor: tensor.half()),
    "a shape": replace("weight_zero_point", lambda tensor: tensor[:, :-1]),
    "a packed dtype": replace("weight_packed", lambda tensor: tensor.view(torch.int8)),
    "another K": replace("weight_packed", lambda tensor: tensor[:-1]),
    "NaN": replace("weight_scale", with_first(float("nan"))),
    "infinite": replace("weight_zero_point", with_first(float("-inf"))),
    "no permutation": parts(
        lambda tensors: tensors.update({f"{UP_PROJ}.weight_order": torch.zeros(96).int()})
    ),
    "truncated": cut_short,
    "in two files": twice,
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    root = tmp_path_factory.mktemp("sound")
    source = write_stock(root / "source")
    run("quantize", source, root / "int4", "--preset", "balanced")
    (root / "int4" / "nanoquant_report.json").unlink()
    return root / "int4", shapes_of(source)


@pytest.mark.parametrize("name", DAMAGE)
def test_what_a_reader_must_refuse(name, sound, tmp_path):
    origin, shapes = sound
    folder = shutil.copytree(origin, tmp_path / "int4")
    assert reader.read(folder, lambda module: shapes[module][1])
    DAMAGE[name](folder, load_file(folder / "model.safetensors"))
    with pytest.raises(reader.Refused):
        reader.read(folder, lambda module: shapes[module][1])
    # K is the model's to know, and the report's, which was removed so that no digest tells.
    assert verify(folder).problems or name == "another K"


def test_what_is_not_ours_is_refused_by_the_reader(sound, tmp_path):
    origin, shapes = sound
    changes = {
        "another method": lambda options: options.update(quant_method="awq"),
        "a stock checkpoint": lambda options: options.pop("format_version"),
        "none": lambda options: options.clear(),
    }
    for name, change in changes.items():
        folder = shutil.copytree(origin, tmp_path / name)
        config(change)(folder, {})
        with pytest.raises(reader.Refused):
            reader.read(folder, lambda module: shapes[module][1])
