# SPDX-License-Identifier: Apache-2.0
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_nanoquant.layers.sharding import column_share


@given(
    share=st.integers(1, 1000),
    ranks=st.sampled_from([1, 2, 4, 8]),
    group_size=st.sampled_from([32, 64, 128]),
)
def test_ranks_tile_the_columns_and_read_whole_groups(share, ranks, group_size):
    in_features = share * ranks
    shares = [column_share(in_features, share, rank, group_size) for rank in range(ranks)]
    assert shares[0].start == 0
    assert shares[-1].stop == in_features
    for left, right in pairwise(shares):
        assert left.stop == right.start
    for one in shares:
        assert one.read_start % group_size == 0
        assert one.read_stop % group_size == 0 or one.read_stop == in_features
        assert one.read_start <= one.start < one.stop <= one.read_stop
        assert one.kept == (one.start - one.read_start, one.stop - one.read_start)
        assert one.columns_read < share + 2 * group_size


@pytest.mark.parametrize(
    ("rank", "read", "kept"), [(0, (0, 384), (0, 336)), (1, (256, 672), (80, 416))]
)
def test_the_example_of_the_picture(rank, read, kept):
    share = column_share(672, 336, rank, 128)
    assert (share.read_start, share.read_stop) == read
    assert share.kept == kept


def test_a_layer_that_does_not_split_its_input_reads_all_of_it_on_every_rank():
    assert column_share(300, 300, 3, 128) == column_share(300, 300, 0, 128)


def test_a_group_that_is_the_whole_row_is_read_whole():
    share = column_share(672, 336, 1, -1)
    assert (share.read_start, share.read_stop, share.kept) == (0, 672, (336, 672))
