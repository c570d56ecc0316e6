"""Cutting a sorted table into slices."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exfm.data.cut import equal_slices, window_slices
from exfm.data.errors import UserError


@given(st.lists(st.integers(0, 60), min_size=1, max_size=200), st.integers(1, 12))
def test_equal_slices_tile_rows_and_time_split_no_second_and_none_is_empty(times, num_slices):
    stamps = np.sort(np.array(times))
    if len(np.unique(stamps)) < num_slices:
        with pytest.raises(UserError, match="cannot be cut"):
            equal_slices(stamps, num_slices)
        return
    cuts = equal_slices(stamps, num_slices)
    assert len(cuts) == num_slices and cuts[0].row0 == 0 and cuts[-1].row1 == len(stamps)
    for left, right in pairwise(cuts):
        assert left.row1 == right.row0 and left.t1 == right.t0
    for cut in cuts:
        inside = stamps[cut.row0 : cut.row1]
        assert len(inside) and cut.t0 == inside[0] and inside[-1] < cut.t1


def test_equal_slices_are_as_equal_as_the_seconds_allow():
    assert [c.row1 - c.row0 for c in equal_slices(np.arange(100), 7)] == [14, 15, 14, 14, 14, 15, 14]
    assert [c.row1 for c in equal_slices(np.array([0] * 90 + list(range(1, 11))), 4)] == [90, 91, 92, 100]


def test_windows_have_equal_width_and_an_empty_one_is_named():
    cuts = window_slices(np.array([100, 105, 109, 110, 125, 129]), 10)
    assert [tuple(c) for c in cuts] == [(0, 3, 100, 110), (3, 4, 110, 120), (4, 6, 120, 130)]
    with pytest.raises(UserError, match=r"window 1 of 5 s, \[105, 110\), has no events; 15 s pass without one"):
        window_slices(np.array([100, 100, 115]), 5)


def test_nothing_unsorted_input_and_senseless_settings_are_refused():
    for cut in (equal_slices, window_slices):
        with pytest.raises(UserError, match="no rows"):
            cut(np.array([], np.int64), 3)
        with pytest.raises(UserError, match="row 2 is earlier"):
            cut(np.array([3, 4, 1]), 1)
        with pytest.raises(UserError, match="is 0"):
            cut(np.array([3]), 0)
