# SPDX-License-Identifier: Apache-2.0
"""Whole checkpoints of other tools into ours, and ours into `pack-quantized`."""

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.checkpoint.formats import packers
from tests.checkpoint.formats.packers import Int4
from vllm_nanoquant.checkpoint import convert_work
from vllm_nanoquant.checkpoint.convert import PACK_QUANTIZED, Request, prepare, summary
from vllm_nanoquant.checkpoint.convert_plan import recipe_of
from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError
from vllm_nanoquant.checkpoint.formats import Converted, FormatError
from vllm_nanoquant.checkpoint.report import read_report
from vllm_nanoquant.checkpoint.verify import verify
from vllm_nanoquant.cli import convert as command
from vllm_nanoquant.cli import main as command_line
from vllm_nanoquant.quantize.groups import QuantizedWeight
from vllm_nanoquant.quantize.minmax import quantize_minmax
from vllm_nanoquant.recipe import Recipe

LAYER = "model.layers.0.mlp."
UP, DOWN = LAYER + "up_proj", LAYER + "down_proj"
EXPERT = LAYER + "experts.3.up_proj"
GATE = LAYER + "gate"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
FP8 = {"quant_method": "modelopt", "quant_algo": "FP8"}


def write(folder, options, *parts, **config):
    """A checkpoint of one file, or of several and an index."""
    folder.mkdir()
    if options is not None:
        config["quantization_config"] = options
    (folder / "config.json").write_text(json.dumps({"model_type": "x", **config}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_x.py").write_text("raise SystemExit")
    names = ["model.safetensors"]
    if len(parts) > 1:
        names = [f"model-{i}.safetensors" for i in range(len(parts))]
        weight_map = {t: n for n, part in zip(names, parts, strict=True) for t in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, part in zip(names, parts, strict=True):
        save_file({key: tensor.clone() for key, tensor in part.items()}, folder / name)
    return folder


def under(module, tensors):
    return {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}


def awq_checkpoint(folder, **config):
    tensors = {
        "model.embed_tokens.weight": torch.ones(4, 8, dtype=torch.float16),
        "model.norm.weight": torch.ones(8, dtype=torch.float16),
        f"{UP}.bias": torch.ones(8, dtype=torch.float16),
        **under(UP, packers.awq(Int4(8, 64, 32, seed=1))),
        **under(DOWN, packers.awq(Int4(16, 96, 32, seed=2, dtype=torch.float16))),
        **under(EXPERT, packers.awq(Int4(8, 64, 32, seed=3))),
        **under(GATE, packers.awq(Int4(8, 64, 32, seed=4))),
    }
    return write(folder, AWQ, tensors, **config)


def fp8_checkpoint(folder):
    values = torch.randn((24, 200), generator=torch.Generator().manual_seed(0))
    weight = (100 * values).to(torch.float8_e4m3fn)
    tensors = {
        "model.norm.weight": torch.ones(8).bfloat16(),
        f"{DOWN}.weight": torch.ones(4, 8).bfloat16(),
    }
    for module in (UP, EXPERT, GATE):
        scales = {"weight_scale": torch.tensor(0.01), "input_scale": torch.tensor(1.0)}
        tensors |= under(module, {"weight": weight, **scales})
    return write(folder, FP8, tensors), (weight.float() * torch.tensor(0.01)).bfloat16()


def convert(source, target, **options):
    job = prepare(Request(str(source), source, target, **options))
    return job.run()


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
    report = convert(source, tmp_path / "b", group_size=64)
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


@pytest.mark.parametrize("other", [{"algorithm": "mse"}, {"group_size": 32},
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


def test_only_ours_becomes_pack_quantized(tmp_path):
    with pytest.raises(UsageError, match="convert it to ours first"):
        convert(awq_checkpoint(tmp_path / "a"), tmp_path / "b", to=PACK_QUANTIZED)


@pytest.mark.parametrize("symmetric", [False, True])
def test_pack_quantized_there_and_back(tmp_path, symmetric):
    theirs = {
        "model.norm.weight": torch.ones(8).bfloat16(),
        "lm_head.weight": torch.ones(4, 8).bfloat16(),
    }
    for module, w in ((UP, Int4(8, 64, 32, seed=1, symmetric=symmetric)),
                      (DOWN, Int4(16, 96, 32, seed=2, symmetric=symmetric))):  # fmt: skip
        theirs |= under(module, packers.pack_quantized(w, symmetric=symmetric))
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group",
               "group_size": 32}  # fmt: skip
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    options = {"quant_method": "compressed-tensors", "config_groups": groups}
    convert(write(tmp_path / "a", options, theirs), tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c", to=PACK_QUANTIZED)
    found = load_file(tmp_path / "c" / "model.safetensors")
    assert sorted(found) == sorted(theirs)
    assert all(torch.equal(found[name], theirs[name]) for name in theirs)
    config = json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert group["weights"].items() >= weights.items()
    assert config["ignore"] == ["lm_head"]
    assert read_report(tmp_path / "c")["quantization_config"] == config


def test_our_own_zero_points_cannot_be_pack_quantized(tmp_path):
    source, _ = fp8_checkpoint(tmp_path / "a")
    convert(source, tmp_path / "b", group_size=-1)
    with pytest.raises(FormatError, match=r"zero points of .*up_proj are not whole numbers"):
        convert(tmp_path / "b", tmp_path / "c", to=PACK_QUANTIZED)
    assert not (tmp_path / "c").exists()


def test_a_ragged_group_cannot_be_pack_quantized(tmp_path):
    w = Int4(8, 80, 32)
    options = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    source = write(tmp_path / "a", options, under(UP, packers.gptq(w, less_one=True)))
    convert(source, tmp_path / "b")
    with pytest.raises(FormatError, match=r"up_proj has 80 inputs"):
        convert(tmp_path / "b", tmp_path / "c", to=PACK_QUANTIZED)


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
        if ".experts." not in module:
            assert recipe.scheme(module, None) is None


def test_a_name_that_would_be_a_pattern():
    with pytest.raises(FormatError, match="would be read as a pattern"):
        recipe_of({"m.*.up_proj": 32}, [], "minmax")


@pytest.fixture
def run(monkeypatch):
    if command not in command_line._COMMANDS:
        monkeypatch.setattr(command_line, "_COMMANDS", (*command_line._COMMANDS, command))
    return lambda *arguments: command_line.main(["convert", *map(str, arguments)])


def test_the_command(tmp_path, run, capsys):
    source = awq_checkpoint(tmp_path / "a")
    assert run(source, tmp_path / "b", "--max-shard-size", "1MB") == 0
    told = capsys.readouterr()
    assert "2 weights that the source holds quantized become BF16" in told.err
    text = told.out
    assert "2 weights taken over as they are, 0 quantized again" in text
    assert "scales were rounded to bf16" in text
    assert f"vllm serve {tmp_path / 'b'}" in text
    assert run(source, tmp_path / "b", "--json", "--max-shard-size", "1MB") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["done_before"] and result["int4"] == 2


def test_the_command_warns_of_a_second_error(tmp_path, run, capsys):
    source, _ = fp8_checkpoint(tmp_path / "a")
    assert run(source, tmp_path / "b", "--algorithm", "mse") == 0
    told = capsys.readouterr()
    assert "warning: 1 weights are not int4 in the source and are quantized again" in told.err
    assert "mean relative error 0." in told.out


def test_exit_statuses(tmp_path, run, capsys):
    assert run(tmp_path / "none", tmp_path / "b") == 2
    source = write(tmp_path / "a", AWQ, {f"{UP}.qweight": torch.ones(2, 2).int()})
    assert run(source, tmp_path / "b") == 1
    assert "up_proj' has qweight but not scales" in capsys.readouterr().err
    assert run(source, source / "inside") == 2
