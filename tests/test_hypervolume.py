"""The area a front covers, checked against counting, and when its growth is noise."""

import numpy as np
import pytest

from autoq.hypervolume import gain_and_noise, hypervolume, improvements

REFERENCE = (1.0, 1.0)


def counted(points, cells=400):
    """Share of a grid's cell centres that some point beats."""
    centres = (np.arange(cells) + 0.5) / cells
    beaten = np.zeros((cells, cells), dtype=bool)
    for x, y in points:
        beaten |= (centres[:, None] > x) & (centres[None, :] > y)
    return beaten.mean()


def test_one_point_covers_its_rectangle():
    assert hypervolume([(0.25, 0.5)], REFERENCE) == pytest.approx(0.75 * 0.5)
    assert hypervolume([(3.0, 2.0)], (5.0, 6.0)) == pytest.approx(8.0)


def test_points_outside_the_box_and_dominated_ones_cover_nothing():
    assert hypervolume([(1.0, 0.2), (0.2, 1.5)], REFERENCE) == 0.0
    assert hypervolume([(0.5, 0.5), (0.6, 0.7), (0.5, 0.5)], REFERENCE) == pytest.approx(0.25)
    assert hypervolume([], REFERENCE) == 0.0


def test_the_area_is_what_counting_cells_gives():
    rng = np.random.default_rng(3)
    for count in (2, 5, 20):
        points = [tuple(point) for point in rng.uniform(0, 1.2, size=(count, 2))]
        assert hypervolume(points, REFERENCE) == pytest.approx(counted(points), abs=5e-3)


def test_an_improvement_is_the_difference_of_two_hypervolumes():
    rng = np.random.default_rng(4)
    points = [tuple(point) for point in rng.uniform(0, 1.1, size=(12, 2))]
    candidates = [tuple(point) for point in rng.uniform(-0.1, 1.1, size=(50, 2))]
    before = hypervolume(points, REFERENCE)
    wanted = [hypervolume([*points, one], REFERENCE) - before for one in candidates]
    assert improvements(candidates, points, REFERENCE) == pytest.approx(wanted, abs=1e-12)
    assert max(wanted) > 0.01
    assert min(wanted) == 0.0


def test_improvements_over_nothing_are_whole_rectangles():
    assert improvements([(0.5, 0.5), (1.0, 0.0)], [], REFERENCE) == pytest.approx([0.25, 0.0])


def test_a_large_gain_exceeds_its_noise_and_a_lucky_one_does_not():
    rng = np.random.default_rng(5)
    common = rng.normal(0.0, 0.05, size=32)
    old = 0.5 + common
    better = (0.3 + common).tolist()
    gain, noise = gain_and_noise([0.5, 0.5], [old.tolist(), better], recent=1, reference=REFERENCE)
    assert gain == pytest.approx(0.5 * 0.2)
    # What all plans share on a row cancels in the gain; only the row's own differences are noise.
    assert noise < 0.01 * gain
    lucky = old + rng.normal(0.0, 0.1, size=32)
    lucky += old.mean() - 1e-4 - lucky.mean()
    gain, noise = gain_and_noise([0.5, 0.5], [old.tolist(), lucky.tolist()], recent=1, reference=REFERENCE)
    assert 0 < gain < noise


def test_the_noise_is_the_spread_over_other_draws_of_the_rows():
    rng = np.random.default_rng(6)

    def draw():
        old = rng.normal(0.5, 0.1, size=64)
        new = rng.normal(0.4, 0.1, size=64)
        return gain_and_noise([0.5, 0.4], [old.tolist(), new.tolist()], recent=1, reference=REFERENCE)

    draws = [draw() for _ in range(40)]
    spread = np.std([gain for gain, _ in draws])
    assert np.mean([noise for _, noise in draws]) == pytest.approx(spread, rel=0.35)
