"""Labels beside points."""

import pytest

from autoq.placement import Box, Label, around, placed

INSIDE = Box(0, 0, 100, 100)


def test_a_label_goes_to_the_right_of_a_point_that_is_alone():
    (box,) = placed([Label(50, 50, 20, 10, 4)], [around(50, 50, 3)], INSIDE)
    assert box == (54, 45, 74, 55)


def test_a_label_goes_left_where_the_right_is_taken_or_outside():
    (box,) = placed([Label(50, 50, 20, 10, 4)], [Box(54, 45, 60, 55)], INSIDE)
    assert box == (26, 45, 46, 55)
    (box,) = placed([Label(90, 50, 20, 10, 4)], [], INSIDE)
    assert box == (66, 45, 86, 55)


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_labels_of_points_in_one_place_do_not_cover_each_other(count):
    boxes = placed([Label(50, 50, 20, 8, 4)] * count, [around(50, 50, 4)], INSIDE)
    for index, box in enumerate(boxes):
        assert box.overlap(INSIDE) == box.area
        assert box.overlap(around(50, 50, 4)) == 0
        assert all(box.overlap(other) == 0 for other in boxes[:index])
