# SPDX-License-Identifier: Apache-2.0
"""Every wrong input of docs/errors.md, and the error it gets, from real vLLM."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints import write_int4

from .engines import METHOD, job, run_engines

pytestmark = [pytest.mark.compat, pytest.mark.slow]

FLAG = "--hf-overrides.quantization_config"
# name: (quantization_config, what the error says)
WRONG_OPTIONS = {
    "unknown option": (
        {"grup_size": 64},
        "unknown option 'grup_size' in quantization_config; did you mean 'group_size'?",
    ),
    "unknown preset": ({"preset": "fast"}, "'ssm', 'balanced', 'quality' or 'full'"),
    "wrong group size": ({"group_size": 48}, "quantization_config.group_size = 48"),
    "wrong algorithm": ({"algorithm": "magic"}, "quantization_config.algorithm = 'magic'"),
    "gptq while loading": (
        {"algorithm": "gptq"},
        "needs calibration data and cannot quantize while loading; run 'nanoquant quantize",
    ),
    "int4 that is not there": (
        {"preset": "ssm", "quant_method": METHOD, "format_version": 1},
        "in_proj should be int4 by config.json (preset ssm, group size 128, mse, format_version",
    ),
    "bad regex": ({"ignore": ["re:("]}, "'re:(' is not a regular expression"),
    "wrong bits": ({"overrides": {"lm_head": {"bits": 8}}}, "overrides.lm_head.bits = 8"),
    "nothing matches": ({"ignore": ["*.inproj"]}, "'*.inproj' in quantization_config matches no"),
    "never quantized": ({"overrides": {"*.conv1d": {"bits": 4}}}, "conv1d is never quantized"),
    "parts disagree": (
        {"preset": "full", "ignore": ["*.q_proj"]},
        "are served as one product, model.layers.3.mixer.qkv_proj",
    ),
}
OTHERS = {
    "option one level up": (
        {"hf_overrides": {"preset": "full"}},
        f"--hf-overrides.preset does not reach the recipe; use {FLAG}.preset",
    ),
    "file that is not there": (
        {"hf_overrides": {"quantization_config_file": "/nowhere/recipe.json"}},
        "quantization_config_file '/nowhere/recipe.json' cannot be read",
    ),
    "text that is not JSON": (
        {"hf_overrides": {"quantization_config_dict_json": "{preset"}},
        "quantization_config_dict_json is not JSON",
    ),
    "JSON that is no object": (
        {"hf_overrides": {"quantization_config_dict_json": "[1]"}},
        "holds [1], not a JSON object of options",
    ),
    "additional config": (
        {"additional_config": {"preset": "full"}},
        f"--additional-config 'preset' does not reach the recipe; use {FLAG}",
    ),
    "float16": ({"dtype": "float16"}, "squared ReLU overflows float16"),
    "another method's checkpoint": (
        {"hf_overrides": {"quantization_config": {"quant_method": "bitsandbytes"}}},
        "does not match the quantization method",
    ),
    "another tool's format that is not there": (
        {"hf_overrides": {"quantization_config": {"quant_method": "fp8"}}},
        "quant_method is 'fp8', but config.json does not say so and no tensor",
    ),
}
IN_PROJ = "backbone.layers.0.mixer.in_proj"
# name: (what becomes of an int4 checkpoint's tensors and settings, what the error says)
INT4 = {
    "contradicting option": (
        lambda tensors, settings: None,
        "--hf-overrides.quantization_config.preset is 'full', but the checkpoint's weights are "
        "int4 already, quantized with preset 'ssm'; leave the option out",
    ),
    "future format": (
        lambda tensors, settings: settings.update(format_version=2),
        "quantization_config.format_version = 2 in config.json; this release of vllm-nanoquant "
        "reads version 1: upgrade it",
    ),
    "missing scale": (
        lambda tensors, settings: tensors.pop(f"{IN_PROJ}.weight_scale"),
        f"{IN_PROJ}.weight_scale is missing beside {IN_PROJ}.weight_packed",
    ),
    "wrong dtype": (
        lambda tensors, settings: tensors.update(
            {f"{IN_PROJ}.weight_scale": tensors[f"{IN_PROJ}.weight_scale"].half()}
        ),
        f"{IN_PROJ}.weight_scale is F16 [3, 1288]; it must be BF16 [3, 1288]",
    ),
    "wrong shape": (
        lambda tensors, settings: tensors.update(
            {
                name: tensor[:, :1280].contiguous()
                for name, tensor in tensors.items()
                if name.startswith(f"{IN_PROJ}.")
            }
        ),
        f"{IN_PROJ}.weight_packed is [144, 1280]; model.layers.0.mixer.in_proj needs [144, 1288]",
    ),
    "another recipe": (
        lambda tensors, settings: settings.update(preset="balanced"),
        "down_proj should be int4 by config.json (preset balanced",
    ),
    "another group size": (
        lambda tensors, settings: settings.update(group_size=32),
        "weight_scale has 3 groups, and 288 columns in groups of 32 are 9",
    ),
    "lost recipe": (
        lambda tensors, settings: settings.clear(),
        "in_proj.weight_packed, but its config.json has no quantization_config of nanoquant_w4a16",
    ),
}


@pytest.fixture(scope="module")
def damaged(tiny_model, tmp_path_factory):
    """Copies of the model: a tensor missing, a tensor not finite, tied embeddings."""
    root = tmp_path_factory.mktemp("damaged")
    tensors = load_file(tiny_model / "model.safetensors")
    for name in ("missing", "infinite", "tied"):
        shutil.copytree(tiny_model, root / name)
    down = "backbone.layers.1.mixer.down_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != down}, root / "missing/model.safetensors")
    bad = tensors[down].clone()
    bad[3, 5] = float("nan")
    save_file(tensors | {down: bad}, root / "infinite/model.safetensors")
    config = json.loads((tiny_model / "config.json").read_text())
    (root / "tied/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return root


@pytest.fixture(scope="module")
def damaged_int4(tiny_model, tmp_path_factory):
    """Copies of the model in int4, each damaged as `INT4` says."""
    root = tmp_path_factory.mktemp("int4")
    for name, (damage, _) in INT4.items():
        folder = write_int4(tiny_model, root / name, preset="ssm")
        tensors = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        damage(tensors, config["quantization_config"])
        if not config["quantization_config"]:
            del config["quantization_config"]
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
    return root


@pytest.fixture(scope="module")
def reports(tiny_model, damaged, damaged_int4, tmp_path_factory):
    jobs = [job(name, tiny_model, options) for name, (options, _) in WRONG_OPTIONS.items()]
    for name, (engine, _) in OTHERS.items():
        jobs.append(job(name, tiny_model, {}, engine={"hf_overrides": {}} | engine))
    jobs += [job(name, damaged / name, {"preset": "full"}) for name in ("missing", "infinite")]
    jobs.append(job("tied", damaged / "tied", {"preset": "full"}))
    for name in INT4:
        options = {"preset": "full"} if name == "contradicting option" else None
        jobs.append(job(name, damaged_int4 / name, options, engine={"quantization": METHOD}))
    jobs.append(job("hook", tiny_model, {}, environment={"VLLM_USE_BYTECODE_HOOK": "1"}))
    return run_engines(jobs, tmp_path_factory.mktemp("wrong"))


@pytest.mark.parametrize("name", [*WRONG_OPTIONS, *OTHERS, *INT4])
def test_a_wrong_input_is_refused_before_weights_are_read(reports, name):
    _, text = (WRONG_OPTIONS | OTHERS | INT4)[name]
    assert text in reports[name].get("error", "no error"), reports[name]
    assert not any("Loading weights took" in line for line in reports[name]["log"])


def test_a_missing_tensor_is_an_error_that_names_its_module(reports):
    error = reports["missing"].get("error", "no error")
    assert "model.layers.1.mixer.down_proj only 0 of its 193536 weights" in error


def test_weights_that_are_not_finite_are_an_error_that_names_their_module(reports):
    assert "model.layers.1.mixer.down_proj.weight" in reports["infinite"].get("error", "no error")


def test_a_tied_lm_head_stays_as_it_is_and_the_log_says_so(reports):
    assert "lm_head.weight_packed" not in reports["tied"]["int4"]
    assert any("lm_head shares the embedding" in line for line in reports["tied"]["log"])


def test_the_bytecode_hook_is_refused(reports):
    assert "VLLM_USE_BYTECODE_HOOK=1 is set" in reports["hook"]["error"]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        (["--quantization-config", '{"group_size": 64}'], f"{FLAG}.group_size VALUE"),
        (["--preset", "full"], f"{FLAG}.preset VALUE"),
    ],
)
def test_the_command_line_names_the_right_flag(tiny_model, wrong, right):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(tiny_model), "--quantization", METHOD, *wrong),
        ],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert right in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [*WRONG_OPTIONS, *OTHERS, *INT4])
def test_the_documentation_lists_each_of_them(name):
    page = Path(__file__).parents[2] / "docs" / "errors.md"
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert any(name.lower() in row.lower() for row in rows)
