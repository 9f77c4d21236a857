# SPDX-License-Identifier: Apache-2.0
"""Damage of every kind must be named, with file and tensor, and nothing else may happen."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.small import content, weights, write_stock
from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError
from vllm_nanoquant.checkpoint.reader import Checkpoint
from vllm_nanoquant.checkpoint.verify import verify

IN_PROJ = "backbone.layers.0.mixer.in_proj"
INDEX = "model.safetensors.index.json"
REPORT = "nanoquant_report.json"


def shard_of(folder, tensor):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def change(folder, tensor, with_value):
    """Write one tensor anew, with the safetensors library."""
    path = shard_of(folder, tensor)
    tensors = load_file(path)
    tensors[tensor] = with_value(tensors[tensor]) if callable(with_value) else with_value
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def only_problem(folder, *texts, without_report=True, **named):
    if without_report:
        (folder / REPORT).unlink(missing_ok=True)
    problems = verify(folder, **named).problems
    assert problems
    for text in texts:
        assert any(text in problem for problem in problems), (text, problems)
    return problems


def test_a_sound_checkpoint(pristine):
    source, target = pristine
    found = verify(target, source)
    assert found.problems == []
    assert found.notes == []
    assert len(found.errors) == 4
    report = json.loads((target / REPORT).read_text())
    for name, error in found.errors.items():
        assert error == pytest.approx(report["tensors"][name]["relative_error"])
    assert verify(source).problems == []


def test_the_model_that_the_repository_ships(tiny_model):
    assert verify(tiny_model).problems == []


def test_every_byte_counts(pristine, target):
    """Whatever byte of whatever file is flipped, it is noticed."""
    for name, data in content(pristine[1]).items():
        if name == REPORT:
            continue
        step = max(1, len(data) // 23)
        for position in range(0, len(data), step):
            broken = bytearray(data)
            broken[position] ^= 16
            (target / name).write_bytes(broken)
            found = verify(target)
            assert any(name in problem for problem in found.problems), (name, position)
        (target / name).write_bytes(data)
    assert verify(target).problems == []


def test_every_truncation(pristine, target):
    for name, data in content(pristine[1]).items():
        for length in (0, 4, 8, len(data) // 2, len(data) - 1):
            if name == REPORT and length == len(data) - 1:
                continue  # only the end of its last line is gone
            (target / name).write_bytes(data[:length])
            assert any(name in problem for problem in verify(target).problems), (name, length)
        (target / name).write_bytes(data)


def test_every_missing_file(pristine, target):
    for name, data in content(pristine[1]).items():
        (target / name).unlink()
        found = verify(target)
        if name == REPORT:
            assert "digests were not checked" in found.notes[0]
        elif name == INDEX:
            assert found.problems
        else:
            assert any(f"{name}: " in problem for problem in found.problems), name
        (target / name).write_bytes(data)


@pytest.mark.parametrize("suffix", ["scale", "zero_point"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite(target, suffix, value):
    name = f"{IN_PROJ}.weight_{suffix}"
    change(target, name, lambda tensor: tensor.index_fill(0, torch.tensor([0]), value))
    only_problem(target, f"{shard_of(target, name).name}: {name}: 70 of 70 values are")


def test_a_nan_in_a_dense_tensor(target):
    name = "backbone.layers.0.mixer.A_log"
    change(target, name, torch.tensor([1.0, float("nan"), 2.0]))
    only_problem(target, f"{name}: 1 of 3 values are NaN")


SCALE_FORM = "it must be BF16 [1, 70], as 32 columns in groups of 32 need"


@pytest.mark.parametrize(
    ("tensor", "value", "text"),
    [
        ("weight_packed", lambda t: t.char(), "I8 [16, 70]; it must be U8"),
        ("weight_packed", lambda t: t[:-1].clone(), SCALE_FORM),
        ("weight_packed", lambda t: t.flatten().clone(), "it must be U8 [ceil(K / 2), N]"),
        ("weight_scale", lambda t: t.float(), SCALE_FORM),
        ("weight_scale", lambda t: t.t().contiguous(), SCALE_FORM),
        ("weight_zero_point", lambda t: torch.cat([t, t]), SCALE_FORM),
    ],
)
def test_tensors_of_the_wrong_form(target, tensor, value, text):
    if tensor == "weight_packed" and text is SCALE_FORM:
        # 15 rows still stand for one group of 32; the report knows better.
        change(target, f"{IN_PROJ}.{tensor}", value)
        only_problem(target, "its shape does not fit the packed", without_report=False)
        return
    change(target, f"{IN_PROJ}.{tensor}", value)
    only_problem(target, f"{IN_PROJ}.{tensor}: ", text)


def test_a_missing_tensor(target):
    name = f"{IN_PROJ}.weight_scale"
    file = shard_of(target, name).name
    change(target, name, lambda _: None)
    only_problem(target, f"{file}: {name}: is in {INDEX}, and not in the file")
    weight_map = json.loads((target / INDEX).read_text())["weight_map"]
    del weight_map[name]
    edit(target / INDEX, weight_map=weight_map)
    only_problem(target, f"{name}: is missing")


def test_an_extra_tensor_and_one_that_is_there_twice(target):
    files = sorted(target.glob("*.safetensors"))
    name = f"{IN_PROJ}.weight_scale"
    other = next(path for path in files if path != shard_of(target, name))
    save_file(load_file(other) | {"extra": torch.ones(1), name: torch.ones(1)}, other)
    only_problem(target, f"{other.name}: extra: is not in {INDEX}", f": {name}: is in ")


def test_a_file_that_the_index_does_not_name(target):
    save_file({"extra": torch.ones(1)}, target / "other.safetensors")
    only_problem(target, f"other.safetensors: is not in {INDEX}")


def test_a_weight_that_is_dense_where_it_should_be_int4(target):
    edit(
        target / "config.json",
        quantization_config={
            "quant_method": "nanoquant_w4a16", "format_version": 1, "preset": "full"
        },
    )  # fmt: skip
    only_problem(target, "q_proj.weight: is dense, and config.json says int4")


def test_a_weight_that_is_int4_where_it_should_be_dense(target):
    edit(
        target / "config.json",
        quantization_config={
            "quant_method": "nanoquant_w4a16", "format_version": 1, "preset": "ssm",
            "group_size": 32,
        },
    )  # fmt: skip
    only_problem(target, "up_proj.weight_packed: part of an int4 weight that config.json does not")


@pytest.mark.parametrize(
    ("quantization", "text"),
    [
        (
            {"format_version": 2},
            "format_version = 2 in config.json; this release of vllm-nanoquant reads version 1",
        ),
        ({"format_version": "x" * 10**5}, "format_version = 'xxx"),
        ({"format_version": 1, "preset": "fast"}, "preset = 'fast'"),
        ({"format_version": 1, "ignore": ["re:("]}, "not a regular expression"),
        ({"format_version": 1, "new": 1}, "unknown option 'new'"),
    ],
)
def test_a_recipe_that_is_none(target, quantization, text):
    edit(
        target / "config.json",
        quantization_config={"quant_method": "nanoquant_w4a16"} | quantization,
    )
    problems = only_problem(target, text)
    assert max(map(len, problems)) < 1000


def with_order(target, order):
    name = f"{IN_PROJ}.weight_packed"
    path = shard_of(target, name)
    save_file(load_file(path) | {f"{IN_PROJ}.weight_order": order}, path)
    weight_map = json.loads((target / INDEX).read_text())["weight_map"]
    edit(target / INDEX, weight_map=weight_map | {f"{IN_PROJ}.weight_order": path.name})
    (target / REPORT).unlink()


def test_an_order_that_is_a_permutation(target):
    with_order(target, torch.randperm(32).int())
    assert verify(target).problems == []


@pytest.mark.parametrize(
    ("order", "text"),
    [
        (torch.zeros(32, dtype=torch.int32), "is not a permutation"),
        (torch.arange(32).int() + 1, "is not a permutation"),
        (torch.arange(32).int() - 1, "is not a permutation"),
        (torch.arange(31).int(), None),
        (torch.arange(33).int(), "it must be I32 [32]"),
        (torch.arange(32), "it must be I32 [32]"),
        (torch.arange(32).int().view(2, 16), "it must be I32 [32]"),
    ],
)
def test_an_order_that_is_none(target, order, text):
    with_order(target, order)
    problems = verify(target).problems
    assert any(text in problem for problem in problems) if text else not problems


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "x.bin",
        ".hidden.safetensors", "a\\b.safetensors", "a\0.safetensors", "\ud800.safetensors",
        "a" * 5000 + ".safetensors", 3, None, ["a.safetensors"], {"a": "b"},
    ],
)  # fmt: skip
def test_an_index_that_leads_out(target, name):
    weight_map = json.loads((target / INDEX).read_text())["weight_map"]
    edit(target / INDEX, weight_map=weight_map | {f"{IN_PROJ}.weight_scale": name})
    only_problem(target, f"{INDEX}: {IN_PROJ}.weight_scale: ", "is not the name of a")
    with pytest.raises(CheckpointError):
        Checkpoint.open(target)


def test_a_link_that_leads_out(target, tmp_path):
    path = sorted(target.glob("*.safetensors"))[0]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    only_problem(target, f"{path.name}: a symbolic link that leads out")
    path.unlink()
    path.symlink_to(path)
    only_problem(target, f"{path.name}: a symbolic link that leads nowhere")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file(target, kind):
    import os

    path = sorted(target.glob("*.safetensors"))[0]
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    only_problem(target, path.name)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", "", "a/b", "a\0b", "\ud800"])
def test_a_report_that_leads_out(target, name):
    edit(target / REPORT, files={name: {"bytes": 1, "sha256": ""}})
    only_problem(target, "nanoquant_report.json", without_report=name == "none")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"\xff\xfe{}", "is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "the key a is there twice"),
        (b"[1]", "a JSON list where an object is needed"),
        (b"9" * 10_000, "not JSON"),
        (b"", "not JSON"),
        (b"{" + b" " * (65 << 20), "the limit is"),
    ],
    ids=range(8),
)
@pytest.mark.parametrize("name", ["config.json", INDEX, REPORT])
def test_hostile_json(target, name, text, expected):
    (target / name).write_bytes(text)
    only_problem(target, f"{name}: ", expected, without_report=False)


def test_a_journal_means_that_it_is_not_complete(target):
    (target / ".nanoquant_progress.jsonl").write_text("")
    only_problem(target, "not complete")


def test_another_source(pristine, target, tmp_path):
    other = write_stock(tmp_path / "other", weights(seed=1, wide=32))
    only_problem(target, "it is another weight", "is not the source's", against=other)
    scaled = {k: v * (1.1 if "in_proj" in k else 1) for k, v in weights(wide=32).items()}
    near = write_stock(tmp_path / "near", scaled)
    shutil.copy(pristine[1] / REPORT, target)
    only_problem(
        target, f"{IN_PROJ}.weight: its relative error", against=near, without_report=False
    )
    fewer = {k: v for k, v in weights(wide=32).items() if "norm" not in k}
    only_problem(
        target, "norm.weight: is not in the source", against=write_stock(tmp_path / "f", fewer)
    )


def test_the_same_bytes_in_another_shape_are_not_the_source(pristine, target):
    change(target, "backbone.layers.0.mixer.conv1d.weight", lambda t: t.reshape(4, 1, 7))
    only_problem(target, "conv1d.weight: is not the source's", against=pristine[0])


def test_what_is_no_folder(tmp_path, pristine):
    with pytest.raises(UsageError, match="is not a folder"):
        verify(tmp_path / "nothing")
    with pytest.raises(UsageError, match="is not a folder"):
        verify(pristine[1], tmp_path / "nothing")
