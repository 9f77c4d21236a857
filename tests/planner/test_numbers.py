# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_nanoquant.checkpoint.errors import UsageError
from vllm_nanoquant.planner.errors import PlanError
from vllm_nanoquant.planner.numbers import count_of, parse_memory, parse_size, split

UNITS = {
    "": 1, "B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4,
    "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 25769803776),
        ("24GB", 24000000000),
        ("24564MiB", 25757220864),
        ("24 gib", 25769803776),
        ("1.5GiB", 1610612736),
        ("0.000000001TB", 1000),
        ("123", 123),
    ],
)
def test_sizes_by_hand(text, size):
    assert parse_size(text) == size


@given(
    st.integers(0, 10**12),
    st.sampled_from(sorted(UNITS)),
    st.sampled_from([str.lower, str.upper, str]),
    st.sampled_from(["", " "]),
)
def test_whole_sizes(count, unit, spell, space):
    assert parse_size(f"{count}{space}{spell(unit)}") == count * UNITS[unit]


@given(st.decimals(0, 10**6, places=4), st.sampled_from(sorted(UNITS)))
def test_fractions_are_exact_and_rounded_down(number, unit):
    assert parse_size(f"{number:f}{unit}") == int(number * UNITS[unit])


@given(st.text(max_size=12))
def test_anything_else_is_refused(text):
    try:
        assert parse_size(text) >= 0
    except ValueError as error:
        assert "is not a size like 24GiB" in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1GiB", "24Gi", "24XB", "1e3GB", "24GiBs", "٢٤GiB", "1.GiB", "nan", "24 IB"],
)
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is not a size like 24GiB, 24GB or 24564MiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["24", "1000MB", "5TiB", "0GiB"])
def test_what_no_gpu_has(text):
    with pytest.raises(UsageError, match=f"--gpu-memory {text}: no GPU has"):
        parse_memory(text)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "4", [4], 1 << 40, float("inf")])
def test_counts_that_are_none(value):
    with pytest.raises(PlanError, match=r"config\.json: hidden_size is .* a whole number above 0"):
        count_of({"hidden_size": value}, "hidden_size")


def test_counts():
    assert count_of({"b": 3}, "a", "b") == 3
    assert count_of({"a": None, "b": 3}, "a", "b", default=7) == 3
    assert count_of({}, "a", default=7) == 7
    with pytest.raises(PlanError, match="a or b is missing"):
        count_of({}, "a", "b")


@given(st.integers(1, 10**6), st.integers(1, 64))
def test_ranks_share_all(count, ranks):
    assert 0 <= split(count, ranks) * ranks - count < ranks
