# SPDX-License-Identifier: Apache-2.0
"""What llm-compressor made of the small model: read, scored and put beside ours."""

from __future__ import annotations

import json
import lzma
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model.data import LONG_CONTEXT, load
from small_model.geometry import MINIATURE
from tiny_model.export import export
from tiny_model.model import TinyNemotronH
from tokenizers import Tokenizer, models

from benchmarks.evidence import run
from benchmarks.evidence.cases import Case
from benchmarks.evidence.llm_compressor import main
from benchmarks.evidence.model import Subject, calibration_ids, read_model
from benchmarks.evidence.run import calibration_pool
from benchmarks.quality.llm_compressor import RECORD, scan
from vllm_nanoquant.recipe import Recipe

WINDOW, SAMPLES, GROUP = 32, 2, 32
MODEL = replace(MINIATURE, hidden_size=64, intermediate_size=160)  # groups divide every input
MODULES = 3 * 2 + 3 * 2 + 4
OPTIONS = ["--window", str(WINDOW), "--windows", "3", "--samples", str(SAMPLES)]


@pytest.fixture
def data(tmp_path):
    """Random text, as prepare_small_corpus.py would write it."""
    folder = tmp_path / "data"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, tokens in {"train": 2000, "heldout": 200, "long": LONG_CONTEXT}.items():
        ids = random.integers(0, MODEL.vocab_size, tokens, dtype=np.uint16)
        (folder / f"{name}.xz").write_bytes(lzma.compress(ids.tobytes(), preset=0))
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    (folder / "about.json").write_text("{}")
    (folder / "heldout.txt").write_text("")
    return folder


@pytest.fixture
def stock(tmp_path, data):
    """A checkpoint with random weights."""
    torch.manual_seed(0)
    weights = TinyNemotronH(MODEL).state_dict()
    larger = {n: 4 * w if w.dim() == 2 else w for n, w in weights.items()}  # so that layers matter
    export(larger, MODEL, data, tmp_path / "stock")
    return tmp_path / "stock"


def packed(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """W bf16 [N, K] rounded to symmetric groups, as compressed-tensors stores it."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, -1, GROUP)
    scale = (groups.abs().amax(-1) / 7.5).bfloat16()
    q = (groups / scale.float()[..., None]).round().clamp(-8, 7).long() + 8
    words = (q.view(rows, -1, 8) << 4 * torch.arange(8)).sum(-1)
    return {
        "weight_packed": torch.where(words >= 1 << 31, words - (1 << 32), words).int(),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }


@pytest.fixture
def theirs(tmp_path, stock):
    """The folder that benchmarks/quality/llm_compressor.py would make of it."""
    folder = tmp_path / "theirs"
    (folder / "rtn-sym").mkdir(parents=True)
    tensors = {}
    for name, tensor in load_file(stock / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if name.endswith("_proj.weight"):
            tensors |= {f"{module}.{leaf}": part for leaf, part in packed(tensor).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "rtn-sym" / "model.safetensors")
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme | {"group_size": GROUP}}}
    config = json.loads((stock / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": groups,
    }
    (folder / "rtn-sym" / "config.json").write_text(json.dumps(config))
    made = {"group_size": GROUP, "ignore": ["lm_head"], "seconds": 1.5}
    record = {"packages": {"llmcompressor": "0.0"}, "rtn-sym": made}
    (folder / RECORD).write_text(json.dumps(record))
    return folder


def test_their_checkpoint_is_scored_as_the_same_weights_of_ours_are(tmp_path, stock, data, theirs):
    output = tmp_path / "results" / "found.json"
    command = ["--model", str(stock), "--data", str(data), "--output", str(output), *OPTIONS]
    command += ["--folders", str(theirs), "--device", "cpu"]
    assert main([*command, "--methods", "rtn-sym", "gptq"]) == 0
    report = json.loads(output.read_text())
    assert report["problem"]["windows"] == 3
    assert report["problem"]["calibration"] == {"sequences": SAMPLES, "tokens": WINDOW}
    assert report["packages"] == {"llmcompressor": "0.0"}
    assert {"device", "torch"} <= set(report["machine"])
    results = report["results"]
    names = ["bf16", "llm-compressor-g32-rtn-sym", "linears-g32-rtn-sym", "linears-g32-gptq"]
    assert list(results) == names
    bf16, real, simulated, gptq = results.values()
    assert bf16["kl_divergence"] == 0
    assert real["section"] == gptq["section"] == "llm-compressor"
    assert real["modules"] == simulated["modules"] == MODULES
    assert real["weights"] == simulated["weights"]
    assert real["seconds_quantizing"] == 1.5
    assert set(real) == set(simulated)
    assert real["kl_divergence"] > 1e-4
    for key in ("kl_divergence", "perplexity_change", "relative_error", "agreement"):
        assert real[key] == pytest.approx(simulated[key], rel=1e-5)
    assert len(real["kl_by_window"]) == 3
    shapes = 16 * 8 * MODULES / real["weights"]  # weight_shape, two int64 of each module
    assert real["bits"] == pytest.approx(4 + 16 / GROUP + shapes, abs=1e-4)
    assert gptq["bits"] == 4 + 32 / GROUP

    # What is there is kept, and not mixed with figures of another problem.
    assert main([*command, "--methods", "minmax"]) == 0
    again = json.loads(output.read_text())["results"]
    assert [again[name] for name in names[1:]] == [results[name] for name in names[1:]]
    assert list(again) == [*names, "linears-g32-minmax"]
    with pytest.raises(ValueError, match="other options"):
        main([*command, "--windows", "2"])


def test_a_run_is_continued_where_it_was_begun(tmp_path, stock, data, monkeypatch):
    output = tmp_path / "found.json"
    command = ["--model", str(stock), "--data", str(data), "--output", str(output), *OPTIONS]
    command += ["--long-window", "64", "--device", "cpu"]
    assert run.main([*command, "--match", "^ssm-g128-minmax$"]) == 0
    assert run.main([*command, "--match", "^full-g128-minmax$"]) == 0
    report = json.loads(output.read_text())
    assert list(report["results"]) == ["bf16", "ssm-g128-minmax", "full-g128-minmax"]
    monkeypatch.setattr(run, "Windows", lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=r"found\.json .*other options .*its 'problem' is"):
        run.main([*command, "--samples", "3"])
    monkeypatch.setattr(run, "machine", lambda device: report["machine"] | {"torch": "0"})
    with pytest.raises(ValueError, match="another machine: its 'machine' is"):
        run.main(command)
    assert json.loads(output.read_text()) == report


def test_both_tools_get_the_same_sequences(tmp_path, stock, data):
    written = tmp_path / "ids.npy"
    main(["--model", str(stock), "--data", str(data), "--write-ids", str(written), *OPTIONS])
    model, kinds = read_model(stock, torch.device("cpu"))
    seen = []
    embeddings = model.backbone.embeddings
    embeddings.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pool = calibration_pool(load(data), WINDOW, 0)
    case = Case("", "", Recipe.parse({"preset": "full"}), "gptq", only="lm_head")
    with Subject(model, kinds, pool).quantized(case, SAMPLES):
        pass
    assert torch.equal(torch.cat(seen), torch.from_numpy(np.load(written)))
    assert torch.equal(torch.cat(seen), calibration_ids(pool, SAMPLES, seed=0))


def test_output_or_ids_are_wanted(capsys):
    with pytest.raises(SystemExit):
        main(["--model", "m", "--data", "d"])
    assert "--output" in capsys.readouterr().err


def test_the_quick_scan_is_the_recurrence():
    """Step by step: S = exp(dt a) S + dt x b^T, y = S c + D x."""
    torch.manual_seed(0)
    batch, time, heads, width, groups, state = 2, 70, 4, 3, 2, 5
    x = torch.randn(batch, time, heads, width)
    dt, dt_bias = torch.randn(batch, time, heads), torch.randn(heads)
    a, skip = -torch.rand(heads), torch.randn(heads)
    b, c = torch.randn(2, batch, time, groups, state)
    found = scan(x, dt, a, b, c, D=skip, dt_bias=dt_bias, dt_limit=(0.5, 1.0), chunk_size=16)
    steps = torch.nn.functional.softplus(dt + dt_bias).clamp(0.5, 1.0)
    states = torch.zeros(batch, heads, width, state)
    for t in range(time):
        maps, outs = (part[:, t].repeat_interleave(heads // groups, dim=1) for part in (b, c))
        step = steps[:, t, :, None, None]
        states = (step * a[:, None, None]).exp() * states
        states = states + step * x[:, t, :, :, None] * maps[:, :, None]
        expected = (states * outs[:, :, None]).sum(-1) + skip[:, None] * x[:, t]
        torch.testing.assert_close(found[:, t], expected, rtol=1e-4, atol=1e-5)
