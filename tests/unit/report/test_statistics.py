import pytest

from kernel_pytorch.report.statistics import median, percentile, relative_error_of_median, spread


def test_percentiles_interpolate():
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0, 3.0], 0) == 1.0
    assert percentile([1.0, 2.0, 3.0], 100) == 3.0
    assert median([7.0]) == 7.0
    found = spread([float(value) for value in range(11)])
    assert (found.median, found.p10, found.p90) == (5.0, 1.0, 9.0)


def test_error_of_the_median():
    assert relative_error_of_median([5.0]) == 0.0
    assert relative_error_of_median([5.0, 5.0, 5.0]) == 0.0
    # IQR 2 around 4 with 5 samples.
    assert relative_error_of_median([2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx(1.2533 * 2 / 1.349 / 5**0.5 / 4)


@pytest.mark.parametrize("percent", [-1, 101])
def test_bad_percentages(percent):
    with pytest.raises(ValueError, match="of 1 samples"):
        percentile([1.0], percent)
    with pytest.raises(ValueError, match="of 0 samples"):
        percentile([], 50)
