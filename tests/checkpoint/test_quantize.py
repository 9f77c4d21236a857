# SPDX-License-Identifier: Apache-2.0
import errno
import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.small import CONFIG, content, weights, write_stock
from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError
from vllm_nanoquant.checkpoint.quantize import Request, prepare
from vllm_nanoquant.checkpoint.rows import RowQuantizer
from vllm_nanoquant.checkpoint.verify import verify
from vllm_nanoquant.quantize.algorithms import quantize as by_name
from vllm_nanoquant.quantize.mse import quantize_mse
from vllm_nanoquant.recipe import Recipe, RecipeError, Scheme

BALANCED = ["layers.0.mixer.in_proj", "layers.0.mixer.out_proj", "layers.1.mixer.up_proj"]
BALANCED = {f"backbone.{name}" for name in [*BALANCED, "layers.1.mixer.down_proj"]}


def quantize(source, target, max_shard_bytes=10**9, **recipe):
    job = prepare(Request(str(source), source, target, Recipe.parse(recipe), max_shard_bytes))
    return job.run()


def read_back(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_the_bytes_are_those_of_the_quantizer(tmp_path, group_size, max_shard_bytes):
    source = write_stock(tmp_path / "source")
    quantize(source, tmp_path / "target", max_shard_bytes, group_size=group_size)
    found, stock = read_back(tmp_path / "target"), weights()
    for module in BALANCED:
        expected = quantize_mse(stock.pop(f"{module}.weight"), group_size)
        for suffix in ("packed", "scale", "zero_point"):
            stored = found.pop(f"{module}.weight_{suffix}")
            assert torch.equal(stored, getattr(expected, suffix)), (module, suffix)
    assert found.keys() == stock.keys()
    for name, tensor in stock.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_index_and_config_let_vllm_find_everything(tmp_path):
    source = write_stock(tmp_path / "source")
    quantize(source, tmp_path / "target", 20_000, preset="full", ignore="lm_head")
    index = json.loads((tmp_path / "target/model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        named = {name for name, home in index["weight_map"].items() if home == file}
        assert load_file(tmp_path / "target" / file).keys() == named
    config = json.loads((tmp_path / "target/config.json").read_text())
    quantization = config.pop("quantization_config")
    assert quantization.pop("producer")["name"] == "vllm-nanoquant"
    assert quantization == {
        "quant_method": "nanoquant_w4a16",
        "format_version": 1,
        "preset": "full",
        "group_size": 128,
        "algorithm": "mse",
        "ignore": ["lm_head"],
        "overrides": {},
    }
    assert config.pop("mamba_ssm_cache_dtype") == "float32"
    assert config == {key: value for key, value in CONFIG.items() if key != "auto_map"}


def test_the_dtype_of_the_mamba_state_is_kept_and_only_given_to_hybrids(tmp_path):
    kept = write_stock(tmp_path / "kept", mamba_ssm_cache_dtype="bfloat16")
    quantize(kept, tmp_path / "a")
    assert json.loads((tmp_path / "a/config.json").read_text())["mamba_ssm_cache_dtype"] == (
        "bfloat16"
    )
    plain = write_stock(tmp_path / "plain", hybrid_override_pattern=None)
    quantize(plain, tmp_path / "b")
    assert "mamba_ssm_cache_dtype" not in json.loads((tmp_path / "b/config.json").read_text())


def test_only_files_on_the_list_are_copied(tmp_path):
    source = write_stock(tmp_path / "source")
    for name in ("modeling.py", "x.bin", "x.pt", "x.pkl", "tokenizer.py", "LICENSE.py", "a.sh"):
        (source / name).write_text("no")
    for name in ("chat_template.jinja", "generation_config.json", "NOTICE.md", "merges.txt"):
        (source / name).write_text("yes")
    quantize(source, tmp_path / "target")
    copied = {name for name in content(tmp_path / "target") if not name.startswith("model")}
    assert copied == {
        *("config.json", "nanoquant_report.json", "tokenizer.json", "LICENSE"),
        *("chat_template.jinja", "generation_config.json", "NOTICE.md", "merges.txt"),
    }


def test_a_copied_file_cannot_bring_in_another_from_outside(tmp_path):
    source = write_stock(tmp_path / "source")
    (tmp_path / "secret").write_text("key")
    (source / "NOTICE").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="NOTICE: a symbolic link that leads out"):
        quantize(source, tmp_path / "target")


def test_a_folder_of_the_hub_cache_may_consist_of_links(tmp_path):
    stock = write_stock(tmp_path / "stock")
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    blobs = tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(stock.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    quantize(snapshot, tmp_path / "target")
    assert (tmp_path / "target/LICENSE").read_text() == "free as in test\n"
    assert not any(path.is_symlink() for path in (tmp_path / "target").iterdir())


def test_the_report(tmp_path):
    source, target = write_stock(tmp_path / "source"), tmp_path / "target"
    report = quantize(source, target, 20_000)
    assert report == json.loads((target / "nanoquant_report.json").read_text())
    for folder, files in ((source, report["source"]["files"]), (target, report["files"])):
        for name, entry in files.items():
            data = (folder / name).read_bytes()
            assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert report["files"].keys() == content(target).keys() - {"nanoquant_report.json"}
    assert {f"{module}.weight" for module in BALANCED} == report["tensors"].keys()
    stock = weights()
    for name, record in report["tensors"].items():
        wanted = stock[name].double()
        quantized = quantize_mse(stock[name], 128)
        q = torch.stack([quantized.packed & 15, quantized.packed >> 4], 1).flatten(0, 1)
        group = torch.arange(wanted.shape[1]) // 128
        scale, zero = quantized.scale.double()[group], quantized.zero_point.double()[group]
        back = ((q[: wanted.shape[1]].double() + zero) * scale).t()
        assert record["relative_error"] == pytest.approx(
            float((back - wanted).norm() / wanted.norm()), rel=1e-5
        )
        assert record["shape"] == list(wanted.shape)
        assert record["bytes_after"] == quantized.nbytes


@pytest.mark.parametrize("rows", [1, 40, 1000])
@pytest.mark.parametrize("algorithm", ["minmax", "mse"])
def test_blocks_of_rows_give_the_bytes_of_the_whole(monkeypatch, rows, algorithm):
    monkeypatch.setattr("vllm_nanoquant.checkpoint.rows._BLOCK_WEIGHTS", 3000)
    from vllm_nanoquant.quantize.algorithms import quantize as at_once

    weight = torch.randn(rows, 200)
    with RowQuantizer(torch.device("cpu")) as quantizer:
        found, error = quantizer(weight, Scheme(64, algorithm))
    expected = at_once(weight, 64, algorithm)
    for part in ("packed", "scale", "zero_point"):
        assert torch.equal(getattr(found, part), getattr(expected, part))
    assert 0.0 < error < 0.2


def test_a_weight_that_is_not_finite_is_named_with_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr("vllm_nanoquant.checkpoint.rows._BLOCK_WEIGHTS", 1000)
    tensors = weights()
    tensors["backbone.layers.0.mixer.out_proj.weight"][57, 3] = float("nan")
    source = write_stock(tmp_path / "source", tensors)
    expected = r"model-.*safetensors: backbone.layers.0.mixer.out_proj.weight: 1 weights.*row 57"
    with pytest.raises(CheckpointError, match=expected):
        quantize(source, tmp_path / "target")
    assert not (tmp_path / "target/config.json").exists()


def test_a_tied_lm_head_stays_as_it_is(tmp_path):
    source = write_stock(tmp_path / "source", tie_word_embeddings=True)
    quantize(source, tmp_path / "target", preset="full")
    found = read_back(tmp_path / "target")
    assert "lm_head.weight" in found
    assert "backbone.layers.2.mixer.q_proj.weight_packed" in found


EXPERTS = "backbone.layers.1.mixer.experts"


def with_experts(tmp_path):
    tensors = weights()
    for expert in range(2):
        tensors[f"{EXPERTS}.{expert}.up_proj.weight"] = torch.randn(45, 96).bfloat16()
        tensors[f"{EXPERTS}.{expert}.down_proj.weight"] = torch.randn(96, 45).bfloat16()
    tensors["backbone.layers.1.mixer.gate.weight"] = torch.randn(2, 96).bfloat16()
    return tensors, write_stock(tmp_path / "source", tensors)


@pytest.mark.parametrize("algorithm", ["minmax", "mse"])
def test_routed_experts_become_int4_and_their_router_does_not(tmp_path, algorithm):
    tensors, source = with_experts(tmp_path)
    quantize(source, tmp_path / "target", algorithm=algorithm)
    found = read_back(tmp_path / "target")
    assert "backbone.layers.1.mixer.gate.weight" in found
    for expert in range(2):
        for leaf in ("up_proj", "down_proj"):
            module = f"{EXPERTS}.{expert}.{leaf}"
            expected = by_name(tensors[f"{module}.weight"], 128, algorithm)
            assert f"{module}.weight" not in found
            for part in ("packed", "scale", "zero_point"):
                assert torch.equal(found[f"{module}.weight_{part}"], getattr(expected, part))
    assert verify(tmp_path / "target").problems == []


def test_experts_that_lie_in_one_tensor_stay_as_they_are(tmp_path):
    tensors = weights() | {f"{EXPERTS}.up_proj.weight": torch.randn(2, 45, 96).bfloat16()}
    source = write_stock(tmp_path / "source", tensors)
    quantize(source, tmp_path / "target")
    found = read_back(tmp_path / "target")
    assert torch.equal(found[f"{EXPERTS}.up_proj.weight"], tensors[f"{EXPERTS}.up_proj.weight"])
    assert verify(tmp_path / "target").problems == []


def test_all_experts_of_a_layer_need_the_same_treatment(tmp_path):
    _, source = with_experts(tmp_path)
    expected = r"experts of .*layers\.1\.mixer\.experts .*experts\.0.* and .*experts\.1.*name all"
    with pytest.raises(UsageError, match=expected):
        quantize(source, tmp_path / "target", ignore="*.experts.1.*")
    quantize(source, tmp_path / "target", ignore="*.experts.*")
    assert f"{EXPERTS}.1.up_proj.weight" in read_back(tmp_path / "target")


def test_quality_finds_the_layer_kinds(tmp_path):
    config = {"hybrid_override_pattern": "M-M*---"}
    tensors = {f"backbone.layers.{i}.mixer.up_proj.weight": torch.randn(8, 64) for i in range(7)}
    quantize(write_stock(tmp_path / "s", tensors, config=config), tmp_path / "t", preset="quality")
    packed = [name for name in read_back(tmp_path / "t") if name.endswith("packed")]
    # Layer 2 stays, which feeds the attention layer.
    assert sorted(name.split(".")[2] for name in packed) == ["0", "1", "3", "4", "5", "6"]


@pytest.mark.parametrize(
    ("recipe", "error", "text"),
    [
        ({"ignore": "*.inproj"}, RecipeError, "'\\*.inproj'.*matches no module"),
        ({"overrides": {"*.conv1d": {"bits": 4}}}, RecipeError, "never quantized"),
        ({"preset": "full", "ignore": "*.q_proj"}, UsageError, "served as one product"),
        ({"ignore": "*"}, UsageError, "nothing to quantize"),
        ({"algorithm": "gptq"}, UsageError, "--calibration-text"),
    ],
)
def test_recipes_that_cannot_be_right(tmp_path, recipe, error, text):
    source = write_stock(tmp_path / "source")
    with pytest.raises(error, match=text):
        quantize(source, tmp_path / "target", **recipe)
    assert not (tmp_path / "target").exists()


def test_pickles_are_refused_with_the_way_out(tmp_path):
    source = write_stock(tmp_path / "source", shards=1)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pytorch_model.bin.*refused.*safe_serialization"):
        quantize(source, tmp_path / "target")


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "awq"}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
        {"compression_config": {}},
        {"quantization_config": []},
    ],
)
def test_quantized_sources_are_refused(tmp_path, config):
    source = write_stock(tmp_path / "source", config=config)
    with pytest.raises(UsageError, match=r"quantized already.*nanoquant convert"):
        quantize(source, tmp_path / "target")


def test_our_own_result_is_refused(tmp_path):
    quantize(write_stock(tmp_path / "source"), tmp_path / "target")
    with pytest.raises(UsageError, match="in our format already"):
        quantize(tmp_path / "target", tmp_path / "again")


@pytest.mark.parametrize("target", ["source", "source/inside", ".", "source/../source/x/.."])
def test_a_target_that_touches_the_source_is_refused(tmp_path, target):
    source = write_stock(tmp_path / "source")
    before = content(source)
    with pytest.raises(UsageError, match="is the source, in it or around it"):
        quantize(source, tmp_path / target)
    assert content(source) == before


def test_a_link_to_the_source_is_the_source(tmp_path):
    source = write_stock(tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(UsageError, match="is the source"):
        quantize(source, tmp_path / "link")


def test_a_target_with_other_content_is_refused(tmp_path):
    source = write_stock(tmp_path / "source")
    (tmp_path / "target").mkdir()
    (tmp_path / "target/thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        quantize(source, tmp_path / "target")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        quantize(source, tmp_path / "file")


def test_two_runs_at_once_are_refused(tmp_path):
    import fcntl

    source, target = write_stock(tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    held = os.open(target, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(UsageError, match="another process"):
            quantize(source, target)
    finally:
        os.close(held)


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vllm_nanoquant.checkpoint.job.free_bytes", lambda _: 1000)
    with pytest.raises(UsageError, match=r"its disk has 0\.0 MB left"):
        quantize(write_stock(tmp_path / "source"), tmp_path / "target")


@pytest.mark.parametrize("suffix", ["order", "zero_point"])
def test_tensors_that_would_pass_for_ours_are_refused(tmp_path, suffix):
    tensors = weights() | {f"backbone.layers.0.mixer.in_proj.weight_{suffix}": torch.zeros(96)}
    source = write_stock(tmp_path / "source", tensors)
    with pytest.raises(UsageError, match=f"quantized already: it has a tensor .*{suffix}"):
        quantize(source, tmp_path / "target")


def test_a_weight_of_a_dtype_that_cannot_be_quantized(tmp_path):
    tensors = weights()
    name = "backbone.layers.0.mixer.in_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    source = write_stock(tmp_path / "source", tensors)
    with pytest.raises(CheckpointError, match=r"in_proj.weight: F8_E4M3 weights cannot"):
        quantize(source, tmp_path / "target")


def test_the_default_is_the_search_and_config_says_so(tmp_path):
    source = write_stock(tmp_path / "source")
    report = prepare(Request(str(source), source, tmp_path / "target")).run()
    quantization = json.loads((tmp_path / "target/config.json").read_text())["quantization_config"]
    assert quantization["algorithm"] == "mse"
    assert {record["algorithm"] for record in report["tensors"].values()} == {"mse"}
    assert Recipe().algorithm == "mse"
    quantize(source, tmp_path / "plain", algorithm="minmax")
    plain = json.loads((tmp_path / "plain/config.json").read_text())["quantization_config"]
    assert plain["algorithm"] == "minmax"


def test_a_full_disk_leaves_what_can_be_taken_up(tmp_path, monkeypatch):
    source, target = write_stock(tmp_path / "source"), tmp_path / "target"
    quantize(source, tmp_path / "whole")
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        quantize(source, target)
    assert not (target / "config.json").exists()
    quantize(source, target)
    assert content(target) == content(tmp_path / "whole")
