# SPDX-License-Identifier: Apache-2.0
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.formats import packers
from tests.checkpoint.small import content, weights, write_stock
from vllm_nanoquant import __version__
from vllm_nanoquant.cli.main import main
from vllm_nanoquant.cli.output import size_option
from vllm_nanoquant.cli.recipe_options import override_option


def as_process(*arguments, **options):
    command = [sys.executable, "-m", "vllm_nanoquant", *map(str, arguments)]
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, **options)


def test_importing_the_command_line_is_quick_and_brings_in_nothing_large():
    code = (
        "import sys, vllm_nanoquant.cli.main as m; m.make_parser();"
        "large = 'torch', 'vllm', 'transformers', 'numpy', 'pydantic', 'huggingface_hub';"
        "print([name for name in large if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_version_and_help(run):
    assert run("--version") == (0, f"nanoquant {__version__}\n", "")
    quick = ("quantize", "convert", "verify", "inspect", "card", "doctor")
    for command in (*quick, "plan", "serve", "bench", "eval"):
        status, out, _ = run(command, "--help")
        assert status == 0
        assert f"examples:\n  nanoquant {command}" in out
    with as_process("--version") as process:
        assert process.stdout.read() == f"nanoquant {__version__}\n"


def test_the_whole_way(run, source, tmp_path):
    target = tmp_path / "target"
    recipe = ["--preset", "full", "--ignore", "lm_head", "--override", "*.down_proj=4/32"]
    status, out, err = run("quantize", source, target, *recipe, "--group-size", 64)
    assert status == 0
    assert f"vllm serve {target}" in out
    assert "quantize: 100%" in err
    before = content(target)
    status, out, _ = run("quantize", source, target, *recipe, "--group-size", 64)
    assert (status, content(target)) == (0, before)
    assert "complete already" in out

    status, out, _ = run("verify", target, "--against", source)
    assert status == 0
    assert f"{target}: sound, " in out
    assert "backbone.layers.0.mixer.in_proj.weight" in out

    status, out, _ = run("inspect", target)
    assert status == 0
    lines = {tuple(line.split()[:3]) for line in out.splitlines()}
    assert {("mamba", "int4", "g64"), ("mlp", "int4", "g32"), ("attention", "int4", "g64")} <= lines

    result = tmp_path / "result.json"
    result.write_text(json.dumps({"device": "abacus", "results": {"a": {"perplexity": 7.25}}}))
    assert run("card", target, "--results", result)[0] == 0
    card = (target / "README.md").read_text()
    assert card.startswith('---\nlicense: "other"\nlicense_link: "LICENSE"\n')
    assert 'base_model: "maker/model"\n' in card
    assert "| a, perplexity | 7.25 |" in card
    assert "on abacus" in card
    assert run("verify", target)[0] == 0


def test_json_on_every_command(run, source, tmp_path):
    target = tmp_path / "target"

    def result(*arguments):
        status, out, _ = run(*arguments, "--json")
        assert status == 0
        return json.loads(out)

    plan = result("quantize", source, target, "--dry-run")
    assert len(plan["quantized"]) == 4
    assert not target.exists()
    made = result("quantize", source, target)
    assert made["quantized"] == 4
    tensors = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    assert made["bytes"]["after"] == tensors
    assert plan["needs"]["disk_bytes"] == pytest.approx(tensors, abs=3000)
    assert result("verify", target)["sound"] is True
    summary = result("inspect", target)
    assert summary["recipe"]["preset"] == "balanced"
    assert summary["total"]["nbytes"] == plan["needs"]["disk_bytes"]
    assert Path(result("card", target)["card"]).is_file()


def test_a_dry_run_writes_nothing_and_says_what_it_would(run, source, tmp_path):
    status, out, _ = run("quantize", source, tmp_path / "target", "--dry-run")
    assert status == 0
    for text in ("mamba", "int4 g128, mse", "disk", "memory", "time", "nothing was written"):
        assert text in out
    assert not (tmp_path / "target").exists()


def test_damage_is_status_1_with_one_line_each(run, source, tmp_path):
    target = tmp_path / "target"
    run("quantize", source, target)
    (target / "tokenizer.json").write_text("{}")
    status, out, _ = run("verify", target)
    assert status == 1
    assert "problem: tokenizer.json: its SHA-256 is not the one" in out
    status, out, _ = run("verify", target, "--json")
    assert status == 1
    assert json.loads(out)["sound"] is False
    (target / "model.safetensors").write_bytes(b"1234")
    status, _, err = run("inspect", target)
    assert status == 1
    assert err.startswith("nanoquant: error: model.safetensors: 4 bytes are too few")


def test_a_card_takes_over_the_licence_and_nothing_that_acts(run, source, tmp_path):
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: '<script>|`fine'\nlanguage: [en, de]\ntags: [x]\n"
        "base_model: 'a\\nb: c'\npipeline_tag: {a: b}\n---\n# <script>\n"
    )
    run("quantize", source, tmp_path / "target")
    run("card", tmp_path / "target")
    import yaml

    card = (tmp_path / "target/README.md").read_text()
    fields = yaml.safe_load(card.split("---\n")[1])
    assert fields["license_name"] == "<script>|`fine"
    assert "base model (scriptfine)" in card
    assert fields["language"] == ["en", "de"]
    assert fields["base_model"] == "maker/model"
    assert "pipeline_tag" not in fields
    assert "<script>" not in card.split("---\n")[2]


def test_a_front_matter_that_is_hostile(run, source, tmp_path):
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 30)]
    bomb = "\n".join(["l0: &l0 [x]", *levels, "license: *l29"])
    (source / "README.md").write_text(f"---\n{bomb}\n---\n")
    assert run("quantize", source, tmp_path / "target")[0] == 0
    (source / "README.md").write_text("---\n!!python/object/apply:os.abort []\n---\n")
    assert run("quantize", source, tmp_path / "again")[0] == 0


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts a folder into a cache of the Hub, which cannot be reached; notes what is asked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    import huggingface_hub

    original, patterns = huggingface_hub.snapshot_download, []

    def download(*arguments, allow_patterns, **options):
        patterns[:] = allow_patterns
        cache = str(tmp_path / "hub")
        return original(*arguments, **options, allow_patterns=allow_patterns, cache_dir=cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)

    def put(folder, name):
        revision = "0" * 40
        model = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (model / "snapshots").mkdir(parents=True)
        folder.rename(model / "snapshots" / revision)
        (model / "refs").mkdir()
        (model / "refs/main").write_text(revision)
        return patterns

    return put


def test_the_hub_cache_without_a_network(run, source, tmp_path, hub):
    hub(source, "maker/model")
    status, _, err = run("quantize", "maker/model", tmp_path / "target")
    assert status == 0, err
    report = json.loads((tmp_path / "target/nanoquant_report.json").read_text())
    assert report["source"]["base_model"] == "maker/model"


SIDE_FILES = {
    "quantize_config.json": ({"bits": 4, "group_size": 32, "sym": False}, packers.gptq),
    "quant_config.json": ({"w_bit": 4, "q_group_size": 32, "zero_point": True}, packers.awq),
}


@pytest.mark.parametrize("file", SIDE_FILES)
def test_settings_in_files_of_their_own_come_from_the_hub_too(run, tmp_path, hub, file):
    settings, pack = SIDE_FILES[file]
    module = "model.layers.0.mlp.up_proj"
    options = {"less_one": True} if pack is packers.gptq else {}
    stored = pack(packers.Int4(8, 64, 32), **options)
    tensors = {f"{module}.{suffix}": tensor for suffix, tensor in stored.items()}
    folder = write_stock(tmp_path / "s", tensors, 1, hybrid_override_pattern=None)
    (folder / file).write_text(json.dumps(settings))
    patterns = hub(folder, "maker/other")
    status, out, err = run("inspect", "maker/other")
    assert status == 0, err
    assert "which `nanoquant convert` reads" in out
    # What is asked of the Hub where it can be reached.
    assert {"quantization_config.json", "hf_quant_config.json", *SIDE_FILES} <= set(patterns)
    status, _, err = run("quantize", "maker/other", tmp_path / "t")
    assert (status, f"quantized already: it has a {file}" in err) == (2, True)
    assert run("convert", "maker/other", tmp_path / "t")[0] == 0


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tmp_path):
    source = write_stock(tmp_path / "source", weights(wide=3000) | {
        f"backbone.layers.{i}.mixer.up_proj.weight": torch.randn(2000, 3000) for i in range(3, 12)
    })  # fmt: skip
    target = tmp_path / "target"
    # A shell's background jobs have it ignored, and so would the process then.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with as_process("quantize", source, target, preexec_fn=heard) as process:
        while not list(target.glob("*.partial")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith("nanoquant: interrupted; run the same command again to go on\n")
    assert "Traceback" not in err
    assert not (target / "config.json").exists()
    assert main(["quantize", str(source), str(target)]) == 0
    assert main(["verify", str(target), "--against", str(source)]) == 0


MEASURED = """
import resource, sys
from vllm_nanoquant.cli.main import main
import torch, safetensors, transformers  # noqa: F401
import vllm_nanoquant.checkpoint.quantize, vllm_nanoquant.checkpoint.formats  # noqa: F401
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = main(sys.argv[1:])
print(status, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["balanced", "full"])
def test_memory_does_not_grow_with_the_model(tmp_path, preset):
    """480 MB of tensors, of which the largest has 80 MB, on top of what torch itself takes."""
    largest = 80_000_000
    rows = torch.randn(100, 2000, dtype=torch.bfloat16)
    tensors = {name: rows.repeat(200, 1) for name in ("lm_head.weight", "embeddings.weight")}
    for i in range(8):
        tensors[f"backbone.layers.{i}.mixer.up_proj.weight"] = rows.repeat(100, 1)
    source = write_stock(tmp_path / "source", tensors, shards=1)
    del tensors
    target = tmp_path / "target"
    for arguments in (
        ["quantize", source, target, "--preset", preset, "--max-shard-size", "100MB"],
        ["verify", target],
        ["verify", target, "--against", source],
    ):
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=True,
        )
        status, grown = map(int, done.stdout.split()[-2:])
        assert status == 0, done.stdout
        # One tensor, its int4 form, temporaries of each core.
        assert grown < 3 * largest, arguments
    assert sum(path.stat().st_size for path in target.iterdir()) > 2 * largest


def test_foreign_formats_are_named(run, tmp_path):
    tensors = {
        "model.layers.0.mlp.up_proj.qweight": torch.zeros(64, 8, dtype=torch.int32),
        "model.layers.0.mlp.up_proj.qzeros": torch.zeros(1, 8, dtype=torch.int32),
        "model.layers.0.mlp.up_proj.scales": torch.ones(1, 64).half(),
    }
    settings = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
    folder = write_stock(tmp_path / "s", tensors, 1, {"quantization_config": settings})
    status, out, _ = run("inspect", folder)
    assert status == 0
    assert "awq, which `nanoquant convert` reads" in out
    status, _, err = run("quantize", folder, tmp_path / "t")
    assert status == 2
    assert "'awq'" in err
    assert "nanoquant convert" in err
    save_file({"x": torch.ones(1)}, folder / "model.safetensors")
    assert run("inspect", folder)[0] in (0, 1)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4.5GB", 4_500_000_000), ("500MB", 500_000_000), ("2000000", 2_000_000), ("1 gb", 10**9)],
)
def test_sizes(text, size):
    assert size_option(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "1KB", "nan", "infGB", "5XB", "1e999GB"])
def test_what_is_no_size(text):
    import argparse

    with pytest.raises(argparse.ArgumentTypeError):
        size_option(text)


def test_overrides_of_the_command_line():
    assert override_option("*.a=4/32") == ("*.a", {"bits": 4, "group_size": 32})
    assert override_option("re:a=b=16") == ("re:a=b", {"bits": 16})
