# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of random weights: whole, and in the names, shapes and dtypes that vLLM reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.end_to_end.contestants import COMPRESSED, GROUP
from benchmarks.random_checkpoint import main, write_checkpoint
from vllm_nanoquant.planner.shapes import shapes_by_config

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-nemotron-h"
INT4 = {"in_proj", "out_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"}


def written(tmp_path: Path, int4: bool) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Tensors and config.json of a checkpoint in the tiny model's geometry, its widths of 64s."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    config = json.loads((TINY / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"hidden_size": 256}))
    total = write_checkpoint(source, target, "cpu", int4)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in set(index["weight_map"].values()):
        tensors |= load_file(target / file)
    assert tensors.keys() == index["weight_map"].keys()
    assert total == index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    return tensors, json.loads((target / "config.json").read_text())


def test_a_stock_checkpoint(tmp_path: Path) -> None:
    tensors, config = written(tmp_path, int4=False)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == shapes_by_config(config)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert "quantization_config" not in config


def test_vllms_int4(tmp_path: Path) -> None:
    tensors, config = written(tmp_path, int4=True)
    assert config["quantization_config"] == COMPRESSED
    for name, shape in shapes_by_config(config).items():
        if name.split(".")[-2] not in INT4:
            assert tensors.pop(name).shape == shape
            continue
        packed, scale, size = (
            tensors.pop(f"{name}_{part}") for part in ("packed", "scale", "shape")
        )
        rows, columns = shape
        assert (packed.dtype, packed.shape) == (torch.int32, (rows, columns // 8))
        assert (scale.dtype, scale.shape) == (torch.bfloat16, (rows, columns // GROUP))
        assert bool((scale >= 0).all())
        assert tuple(size.tolist()) == shape
    assert not tensors


def test_a_wrong_geometry_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    target = tmp_path / "a" / "target"
    with pytest.raises(ValueError, match="model_type"):
        write_checkpoint(tmp_path, target, "cpu")
    assert not target.parent.exists()


def test_mistakes_are_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    for geometry, target, message in (
        (str(tmp_path), tmp_path / "new", f"{tmp_path}: config.json: model_type is missing"),
        ("/nope", tmp_path / "new", "'/nope' has no config.json"),
        (str(TINY), tmp_path, f"{tmp_path} exists: remove it, or name another folder"),
    ):
        monkeypatch.setattr("sys.argv", ["random_checkpoint.py", geometry, str(target)])
        with pytest.raises(SystemExit):
            main()
        assert message in capsys.readouterr().err.splitlines()[-1]
