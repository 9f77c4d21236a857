# SPDX-License-Identifier: Apache-2.0
"""Whole checkpoints of other tools into ours."""

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.checkpoint.foreign import (
    AWQ,
    DOWN,
    EXPERT,
    FP8,
    GATE,
    UP,
    awq_checkpoint,
    convert,
    fp8_checkpoint,
    under,
    write,
)
from tests.checkpoint.formats import packers
from tests.checkpoint.formats.packers import Int4
from vllm_nanoquant.checkpoint import convert_work
from vllm_nanoquant.checkpoint.convert import Request, prepare, summary
from vllm_nanoquant.checkpoint.convert_plan import recipe_of
from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError
from vllm_nanoquant.checkpoint.formats import Converted, FormatError
from vllm_nanoquant.checkpoint.verify import verify
from vllm_nanoquant.quantize.groups import QuantizedWeight
from vllm_nanoquant.quantize.minmax import quantize_minmax
from vllm_nanoquant.recipe import Recipe


def stored(folder):
    """Tensors and quantization settings of a result, which must be sound."""
    found = verify(folder)
    assert found.problems == []
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    config = json.loads((folder / "config.json").read_text())
    return tensors, config


def weight_of(tensors, config, module, columns):
    """One module, its group size by the recipe in config.json."""
    ours = ("quant_method", "format_version", "producer")
    options = config["quantization_config"]
    recipe = Recipe.parse({key: value for key, value in options.items() if key not in ours})
    parts = [tensors[f"{module}.weight_{part}"] for part in ("packed", "scale", "zero_point")]
    weight = QuantizedWeight(*parts, recipe.scheme(module, None).group_size, columns)
    return Converted(weight, tensors.get(f"{module}.weight_order"))


def files(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_awq(tmp_path):
    report = convert(awq_checkpoint(tmp_path / "a", torch_dtype="float16"), tmp_path / "b")
    tensors, config = stored(tmp_path / "b")
    for module, w in ((UP, Int4(8, 64, 32, seed=1)),
                      (DOWN, Int4(16, 96, 32, seed=2, dtype=torch.float16))):  # fmt: skip
        found = packers.ours(weight_of(tensors, config, module, w.columns))
        assert torch.equal(found, w.values())
    for module, seed in ((EXPERT, 3), (GATE, 4)):
        wanted = Int4(8, 64, 32, seed=seed).values().float().bfloat16()
        assert torch.equal(tensors[f"{module}.weight"], wanted)
    assert tensors["model.embed_tokens.weight"].dtype == torch.float16
    assert f"{UP}.bias" in tensors
    assert len(tensors) == 2 * 3 + 2 + 3
    assert config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"]["format_version"] == 1
    assert sorted(report["tensors"]) == [f"{DOWN}.weight", f"{UP}.weight"]
    assert report["tensors"][f"{UP}.weight"]["rounded_scales"] == 0
    assert report["tensors"][f"{DOWN}.weight"]["rounded_scales"] > 0
    numbers = summary(report)
    assert 0 < numbers["largest_rounding"] <= 2**-8
    assert (numbers["int4"], numbers["requantized"], numbers["mean_second_error"]) == (2, 0, None)


def test_only_listed_files_are_copied(tmp_path):
    convert(awq_checkpoint(tmp_path / "a"), tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "config.json", "model.safetensors", "nanoquant_report.json", "tokenizer.json",
    ]  # fmt: skip


def test_a_module_in_two_files_and_groups_of_several_sizes(tmp_path):
    big = Int4(8, 512, 256, scattered=True, seed=1)
    small = Int4(8, 96, 32, seed=2)
    up = under(UP, packers.gptq(big, less_one=True))
    down = under(DOWN, packers.gptq(small, less_one=True))
    options = {
        "quant_method": "gptq", "bits": 4, "group_size": 256, "sym": False, "desc_act": True,
        "dynamic": {"+:.*down_proj": {"group_size": 32}},
    }  # fmt: skip
    first = {name: up.pop(name) for name in (f"{UP}.qweight", f"{UP}.g_idx")}
    source = write(tmp_path / "a", options, first, up | down)
    convert(source, tmp_path / "b", max_shard_bytes=1000)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 2
    tensors, config = stored(tmp_path / "b")
    assert torch.equal(packers.ours(weight_of(tensors, config, UP, 512)), big.values())
    assert torch.equal(packers.ours(weight_of(tensors, config, DOWN, 96)), small.values())
    assert f"{UP}.weight_order" in tensors and f"{DOWN}.weight_order" not in tensors


@pytest.mark.parametrize("indexed", [False, True])
def test_redhelix(tmp_path, indexed):
    module = "backbone.layers.0.mixer.in_proj"
    dense = {f"{module}.weight": torch.ones(4, 64).bfloat16(),
             "backbone.layers.1.mixer.up_proj.weight": torch.ones(4, 64).bfloat16()}  # fmt: skip
    parts = [{key: dense[key]} for key in dense] if indexed else [dense]
    source = write(tmp_path / "a", None, *parts)
    theirs = packers.redhelix(Int4(4, 64, 32))
    save_file(under(module, theirs), source / "w4a16_weights.safetensors")
    (source / "w4a16_manifest.json").write_text("{}")
    (source / "quantization_config.json").write_text('{"quant_type": "w4a16", "group_size": 32}')
    convert(source, tmp_path / "b")
    tensors, config = stored(tmp_path / "b")
    assert sorted(tensors) == [
        "backbone.layers.0.mixer.in_proj.weight_packed",
        "backbone.layers.0.mixer.in_proj.weight_scale",
        "backbone.layers.0.mixer.in_proj.weight_zero_point",
        "backbone.layers.1.mixer.up_proj.weight",
    ]
    assert torch.equal(tensors[f"{module}.weight_packed"], theirs["W_q"])
    assert torch.equal(tensors[f"{module}.weight_scale"], theirs["scales"])
    assert torch.equal(tensors[f"{module}.weight_zero_point"], theirs["zeros"])
    assert config["quantization_config"]["preset"] == "ssm"


def test_fp8_is_quantized_again_and_the_second_error_reported(tmp_path):
    source, dense = fp8_checkpoint(tmp_path / "a")
    report = convert(source, tmp_path / "b", group_size=64, algorithm="minmax")
    tensors, _ = stored(tmp_path / "b")
    wanted = quantize_minmax(dense, 64)
    assert torch.equal(tensors[f"{UP}.weight_packed"], wanted.packed)
    assert torch.equal(tensors[f"{UP}.weight_scale"], wanted.scale)
    for module in (EXPERT, GATE):
        assert torch.equal(tensors[f"{module}.weight"], dense)
    # What the source keeps in BF16 stays so, though a preset would cover it.
    assert torch.equal(tensors[f"{DOWN}.weight"], torch.ones(4, 8).bfloat16())
    record = report["tensors"][f"{UP}.weight"]
    w = Converted(wanted)
    difference = packers.ours(w) - dense.double()
    error = float(difference.norm() / dense.double().norm())
    assert record["relative_error"] == pytest.approx(error, rel=1e-4)
    assert 0.05 < error < 0.2
    assert summary(report)["mean_second_error"] == record["relative_error"]
    assert record["stored_as"] == "fp8"


def test_an_interrupted_run_is_taken_up(tmp_path, monkeypatch):
    source = awq_checkpoint(tmp_path / "a")
    convert(source, tmp_path / "whole")
    real, calls = convert_work.read_module, []

    def stops(fmt, module, tensors):
        calls.append(module)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(fmt, module, tensors)

    monkeypatch.setattr(convert_work, "read_module", stops)
    job = prepare(Request(str(source), source, tmp_path / "b"))
    with pytest.raises(KeyboardInterrupt):
        job.run()
    assert not (tmp_path / "b" / "config.json").exists()
    assert not job.is_done()
    job.run()
    assert len(calls) == 5  # two before, the third twice, the fourth
    assert job.is_done()
    assert files(tmp_path / "b") == files(tmp_path / "whole")


@pytest.mark.parametrize("other", [{"algorithm": "minmax"}, {"group_size": 32},
                                   {"max_shard_bytes": 5000}])  # fmt: skip
def test_another_request_is_not_done(tmp_path, other):
    source, _ = fp8_checkpoint(tmp_path / "a")
    convert(source, tmp_path / "b")
    job = prepare(Request(str(source), source, tmp_path / "b", **other))
    assert not job.is_done()
    before = files(tmp_path / "b")
    with pytest.raises(UsageError, match="is not empty"):
        job.run()
    assert files(tmp_path / "b") == before


def test_a_source_that_changes_in_between(tmp_path, monkeypatch):
    source = awq_checkpoint(tmp_path / "a")
    monkeypatch.setattr(convert_work, "read_module", lambda *_: (_ for _ in ()).throw(OSError))
    job = prepare(Request(str(source), source, tmp_path / "b"))
    with pytest.raises(OSError):
        job.run()
    monkeypatch.undo()
    path = source / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="the source has changed"):
        job.run()


def test_progress_reaches_the_bytes_of_the_source(tmp_path):
    source = awq_checkpoint(tmp_path / "a")
    job = prepare(Request(str(source), source, tmp_path / "b"))
    seen = []
    job.run(seen.append)
    assert sum(seen) == job.source_bytes == sum(
        tensor.nbytes for tensor in load_file(source / "model.safetensors").values()
    )  # fmt: skip


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    tensors = under(UP, packers.awq(Int4(8, 64, 32)))
    tensors[f"{UP}.qzeros"] = tensors[f"{UP}.qzeros"][:1]
    source = write(tmp_path / "a", AWQ, tensors)
    with pytest.raises(FormatError, match=r"up_proj\.qzeros is torch\.int32 \[1, 1\]"):
        convert(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_scales_that_are_no_numbers_are_found_while_converting(tmp_path):
    tensors = under(UP, packers.awq(Int4(8, 64, 32)))
    tensors[f"{UP}.scales"][0, 0] = float("nan")
    source = write(tmp_path / "a", AWQ, tensors)
    with pytest.raises(CheckpointError, match=r"scales of .*up_proj"):
        convert(source, tmp_path / "b")
    assert not (tmp_path / "b" / "config.json").exists()


def test_small_tensors_must_be_small(tmp_path):
    w = Int4(8, 64, 32)
    tensors = under(UP, packers.gptq(w, less_one=True))
    tensors[f"{UP}.g_idx"] = torch.zeros((8, 8), dtype=torch.int32)
    options = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    with pytest.raises(CheckpointError, match=r"g_idx: \[8, 8\]; it must have one dimension"):
        convert(write(tmp_path / "a", options, tensors), tmp_path / "b")


def test_fp8_without_a_scale(tmp_path):
    fp8 = torch.ones(2, 2).to(torch.float8_e4m3fn)
    tensors = under(UP, {"weight": fp8, "weight_scale": torch.tensor(1.0)})
    source = write(tmp_path / "a", FP8, tensors | {"model.experts.gate_up": fp8})
    with pytest.raises(FormatError, match=r"gate_up is F8_E4M3"):
        convert(source, tmp_path / "b")


def test_a_checkpoint_that_is_not_quantized(tmp_path):
    source = write(tmp_path / "a", None, {"a.weight": torch.ones(2, 2)})
    with pytest.raises(UsageError, match="is not quantized; `nanoquant quantize`"):
        convert(source, tmp_path / "b")


def test_ours_is_not_converted_to_ours(tmp_path):
    convert(awq_checkpoint(tmp_path / "a"), tmp_path / "b")
    with pytest.raises(UsageError, match="is in our format already"):
        convert(tmp_path / "b", tmp_path / "c")


def test_a_format_that_there_is_not(tmp_path):
    with pytest.raises(UsageError, match="'gguf' is no format to convert to; nanoquant and pack"):
        convert(awq_checkpoint(tmp_path / "a"), tmp_path / "b", to="gguf")


def test_nothing_that_we_serve_in_int4(tmp_path):
    source = write(tmp_path / "a", AWQ, under(EXPERT, packers.awq(Int4(8, 64, 32))))
    with pytest.raises(UsageError, match="nothing would be int4"):
        convert(source, tmp_path / "b")


leaves = st.sampled_from(["in_proj", "up_proj", "o_proj", "experts.1.up_proj", "gate", "norm"])
modules = st.builds("m.layers.{}.{}".format, st.integers(0, 9), leaves)
int4_leaves = st.sampled_from(["in_proj", "out_proj", "up_proj", "q_proj", "o_proj"])
int4_modules = st.builds("m.layers.{}.{}".format, st.integers(0, 9), int4_leaves)


@given(
    st.dictionaries(int4_modules, st.sampled_from([32, 64, 128, -1]), min_size=1),
    st.sets(modules),
)
@settings(deadline=None)
def test_a_recipe_that_covers_just_these_modules(int4, dense):
    dense -= int4.keys()
    recipe = recipe_of(int4, dense, "minmax")
    recipe.check_against([*int4, *dense])
    for module, size in int4.items():
        assert recipe.scheme(module, None).group_size == size
    for module in dense:
        assert recipe.scheme(module, None) is None


def test_a_name_that_would_be_a_pattern():
    with pytest.raises(FormatError, match="would be read as a pattern"):
        recipe_of({"m.*.up_proj": 32}, [], "minmax")


ATTENTION = "model.layers.0.self_attn."
Q, K, V = (f"{ATTENTION}{part}_proj" for part in "qkv")


@pytest.mark.parametrize("left", ["dense", "of another group size"])
def test_projections_that_are_served_as_one_and_stored_in_two_ways(tmp_path, left):
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    settings["dynamic"] = {"+:.*v_proj": {"group_size": 64}}
    tensors = {}
    for module in (Q, K):
        tensors |= under(module, packers.gptq(Int4(8, 64, 32), less_one=True))
    tensors |= (
        {f"{V}.weight": torch.ones(8, 64).bfloat16()}
        if left == "dense"
        else under(V, packers.gptq(Int4(8, 64, 64), less_one=True))
    )
    source = write(tmp_path / "a", settings, tensors)
    with pytest.raises(UsageError, match=r"v_proj are served as one product.*unquantized model"):
        convert(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()
