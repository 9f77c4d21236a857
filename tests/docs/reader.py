# SPDX-License-Identifier: Apache-2.0
"""A reader of int4 checkpoints, written from docs/specification.md alone.

Neither the package nor torch: numpy, and JSON. It proves that the page says enough.
"""

import json
import re

import numpy as np

DTYPES = {"U8": np.uint8, "BF16": np.uint16, "I32": np.int32}
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_order")


class Refused(ValueError):
    """What the page says a reader must refuse."""


def need(condition, text):
    if not condition:
        raise Refused(text)


def read_file(path):
    """Tensors of a safetensors file, those of dtypes that int4 weights have as arrays."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    need(8 + length <= len(data), "truncated")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    position, found = 8 + length, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        need(start == position and end <= len(data), "truncated")
        position = end
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        array = None
        if dtype in DTYPES:
            array = np.frombuffer(data[start:end], DTYPES[dtype]).reshape(shape)
        found[name] = (dtype, shape, array)
    need(position == len(data), "truncated")
    return found


def read_folder(folder):
    """config.json and all tensors of a checkpoint."""
    need((folder / "config.json").exists(), "not finished")
    need(not (folder / ".nanoquant_progress.jsonl").exists(), "not finished")
    config = json.loads((folder / "config.json").read_text())
    index = folder / "model.safetensors.index.json"
    homes = json.loads(index.read_text())["weight_map"] if index.exists() else None
    if homes is None:
        names = {path.name for path in folder.glob("[!.]*.safetensors")}
    else:
        names = set(homes.values())
    tensors = {}
    for name in sorted(names):
        need(re.fullmatch(r"[^/\\.][^/\\]*\.safetensors", name), "a name that is not a file's")
        for tensor, entry in read_file(folder / name).items():
            need(tensor not in tensors, "in two files")
            need(homes is None or homes.get(tensor) == name, "not as the index says")
            tensors[tensor] = entry
    need(homes is None or set(homes) == set(tensors), "not as the index says")
    return config, tensors


def widened(bf16):
    """BF16, given as uint16, in float32."""
    return (bf16.astype(np.uint32) << 16).view(np.float32)


def group_width(columns, groups):
    """Columns of a group, by the shapes."""
    if groups == 1:
        return columns
    fitting = [g for g in (32, 64, 128) if -(-columns // g) == groups]
    need(len(fitting) == 1, f"{groups} groups of {columns} columns")
    return fitting[0]


def dequantize(parts, columns, group_size=None):
    """W, float32 [N, K], of the tensors of one module.

    Args:
        parts: dtype, shape and array by suffix.
        columns: K.
        group_size: by config.json, where the reader knows it.
    """
    for suffix in PARTS[:3]:
        need(suffix in parts, f"{suffix} is missing")
    packed, scale, zero = (parts[suffix] for suffix in PARTS[:3])
    need(packed[0] == "U8" and len(packed[1]) == 2 and 0 not in packed[1], "weight_packed")
    half, rows = packed[1]
    need(half == (columns + 1) // 2, "K")
    for dtype, shape, _ in (scale, zero):
        need(dtype == "BF16" and len(shape) == 2 and shape[1] == rows, "scale or zero point")
    need(scale[1] == zero[1] and scale[1][0] >= 1, "scale and zero point")
    groups = scale[1][0]
    if group_size is not None:
        need(groups == (1 if group_size == -1 else -(-columns // group_size)), "groups")
    group = np.arange(columns) // group_width(columns, groups)
    scales, zeros = widened(scale[2]), widened(zero[2])
    need(np.isfinite(scales).all() and np.isfinite(zeros).all(), "not finite")
    column = np.arange(columns)
    q = (packed[2][column // 2] >> (4 * (column % 2))[:, None].astype(np.uint8)) & 15
    w = ((q.astype(np.float32) + zeros[group]) * scales[group]).T
    if "weight_order" in parts:
        dtype, shape, order = parts["weight_order"]
        need(dtype == "I32" and shape == (columns,), "weight_order")
        need((np.sort(order) == column).all(), "weight_order")
        stored, w = w, np.empty_like(w)
        w[:, order] = stored
    return w


def read(folder, columns_of):
    """Every int4 weight of a checkpoint by module; `columns_of` gives K of a module."""
    config, tensors = read_folder(folder)
    modules = {}
    for name, entry in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in PARTS:
            modules.setdefault(module, {})[leaf] = entry
    settings = config.get("quantization_config") or {}
    ours = settings.get("quant_method") == "nanoquant_w4a16"
    need(ours or not modules, "not ours")
    if "format_version" not in settings:
        need(not modules, "a stock checkpoint with int4 tensors")
        return {}
    version = settings["format_version"]
    need(type(version) is int and version == 1, "format_version")
    for module, parts in modules.items():
        need(module + ".weight" not in tensors, "dense and int4")
        need("weight_packed" in parts, "weight_packed is missing")
    # Overrides may give a module another size; without evaluating patterns only this is known.
    size = settings.get("group_size", 128) if not settings.get("overrides") else None
    return {
        module: dequantize(parts, columns_of(module), size) for module, parts in modules.items()
    }


def rounded(values):
    """float32 to BF16, ties to even, as uint16."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def minmax(weight, group_size):
    """The three tensors of W, float32 [N, K], by the page's formulas."""
    rows, columns = weight.shape
    width = columns if group_size == -1 else group_size
    q = np.zeros((rows, 2 * ((columns + 1) // 2)), np.uint8)
    scales, zeros = [], []
    for start in range(0, columns, width):
        part = weight[:, start : start + width]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        scale = rounded((high - low) / np.float32(15))
        empty = scale == 0
        scale[empty] = 0x3F80
        zero = rounded(np.where(empty, np.float32(0), low / widened(scale)))
        zero[zero == 0x8000] = 0
        found = np.rint(part / widened(scale)[:, None] - widened(zero)[:, None])
        q[:, start : start + part.shape[1]] = np.clip(found, 0, 15)
        scales.append(scale)
        zeros.append(zero)
    packed = (q[:, 0::2] | (q[:, 1::2] << 4)).T
    return {
        "weight_packed": packed,
        "weight_scale": np.stack(scales),
        "weight_zero_point": np.stack(zeros),
    }
