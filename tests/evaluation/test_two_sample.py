import numpy as np
import pytest
from scipy import stats

from busigen.evaluation.statistics.grouped import adjusted
from busigen.evaluation.statistics.two_sample import Sample, compare, tail_p


def _sample(values, classes=None, groups=None):
    values = np.asarray(values, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    classes = np.full(len(values), "benign") if classes is None else np.asarray(classes)
    return Sample(values, classes, np.arange(len(values)) if groups is None else np.asarray(groups))


@pytest.mark.parametrize("decimals", [6, 0])
def test_distances_are_those_of_scipy(decimals):
    rng = np.random.default_rng(0)
    # Rounding to whole numbers makes ties everywhere.
    first, second = np.round(rng.normal(0.3, 1.5, 150), decimals), np.round(rng.normal(0, 1, 120), decimals)
    second[:7] = np.nan
    found = compare(_sample(second), _sample(first), rng)
    known = second[7:]
    assert found.scopes == ("benign",)
    assert found.ks.value[0, 0] == pytest.approx(stats.ks_2samp(first, known).statistic)
    assert found.wasserstein.value[0, 0] == pytest.approx(stats.wasserstein_distance(first, known) / known.std())
    exceeds = stats.mannwhitneyu(first, known).statistic / (len(first) * len(known))
    assert found.shift[0, 0] == pytest.approx(exceeds - 0.5)
    assert (found.synthetic[0, 0], found.real[0, 0]) == (150, 113)


def test_another_mix_of_classes_alone_is_no_difference():
    rng = np.random.default_rng(1)

    def side(benign, malignant):
        values = np.concatenate([rng.normal(0, 1, benign), rng.normal(4, 1, malignant)])
        return _sample(values, ["benign"] * benign + ["malignant"] * malignant)

    found = compare(side(260, 140), side(150, 150), rng)
    assert found.reweighted
    everything = found.scopes.index("all")
    # Unweighted, the share of malignant images alone would make it 0.15.
    assert found.ks.value[everything, 0] < found.ks.floor_high[everything, 0]
    assert found.ks.p[everything, 0] > 0.01


def test_exchanged_classes_measure_one_and_right_ones_nothing():
    rng = np.random.default_rng(2)

    def side(count, swapped=False):
        labels = np.repeat(["benign", "malignant"], count)
        values = rng.normal(0, 1, (2 * count, 6)) + (labels == "malignant")[:, None]
        return _sample(values, labels[::-1] if swapped else labels)

    right = compare(side(150), side(150), rng)
    wrong = compare(side(150), side(150, swapped=True), rng)
    # Sampling moves it by about 0.05 at this size.
    assert right.swap.value[0, 0] == pytest.approx(0.0, abs=0.2)
    assert wrong.swap.value[0, 0] == pytest.approx(1.0, abs=0.2)
    assert right.swap.p[0, 0] > 0.01 > wrong.swap.p[0, 0]


def test_patients_with_many_images_raise_no_alarm():
    rng = np.random.default_rng(3)
    alarms = 0
    for _ in range(3):
        sides = []
        for _ in range(2):
            groups = np.repeat(np.arange(40), 6)
            sides.append(_sample(rng.normal(size=(40, 8))[groups] + 0.1 * rng.normal(size=(240, 8)), groups=groups))
        found = compare(*sides, rng)
        alarms += int((adjusted(found.ks.p.ravel()) < 0.01).sum())
        # Taken as independent, 240 values that are really 40 look significant.
        naive = [stats.ks_2samp(a, b).pvalue for a, b in zip(*(side.values.T for side in sides), strict=True)]
        assert min(naive) < 0.01
    assert alarms == 0


def test_intervals_hold_the_value_and_floors_lie_below_a_real_difference():
    rng = np.random.default_rng(4)
    found = compare(_sample(rng.normal(0, 1, 200)), _sample(rng.normal(0.8, 1, 200)), rng)
    for part in (found.ks, found.wasserstein):
        assert part.low[0, 0] <= part.value[0, 0] <= part.high[0, 0]
        assert part.floor_low[0, 0] <= part.floor[0, 0] <= part.floor_high[0, 0] < part.low[0, 0]
        assert part.p[0, 0] < 1e-4


def test_fitted_tail_continues_the_permutations():
    null = np.random.default_rng(5).gamma(3.0, 1.0, (2000, 1))
    # Well beyond 2000 draws: the fit's third moment alone errs by tens of percent there, so a factor of 3 is asked for.
    assert 1 / 3 < tail_p(np.array([14.0]), null)[0] / stats.gamma.sf(14.0, 3.0) < 3
    assert tail_p(np.array([3.0]), null)[0] == pytest.approx(stats.gamma.sf(3.0, 3.0), abs=0.04)


def test_sets_without_a_common_class_are_compared_as_they_are():
    rng = np.random.default_rng(6)
    found = compare(_sample(rng.normal(size=50)), _sample(rng.normal(size=60), ["unknown"] * 60), rng)
    assert found.scopes == ("all",)
    assert np.isfinite(found.ks.value).all()


def test_a_feature_that_nobody_has_stays_undefined():
    rng = np.random.default_rng(7)
    empty = np.column_stack([rng.normal(size=40), np.full(40, np.nan)])
    found = compare(_sample(empty), _sample(empty), rng)
    assert np.isnan(found.ks.value[0, 1]) and np.isnan(found.ks.p[0, 1])
    assert found.ks.value[0, 0] == 0.0


def test_a_few_undefined_draws_leave_interval_and_floor():
    """Of a feature that six of 60 images have, some draws hold none."""
    rng = np.random.default_rng(8)
    sides = []
    for _ in range(2):
        values = np.full(60, np.nan)
        values[:6] = rng.normal(size=6)
        sides.append(_sample(values))
    found = compare(*sides, rng)
    for part in (found.ks, found.wasserstein):
        assert part.low[0, 0] <= part.value[0, 0]
        assert np.isfinite(part.high[0, 0])
        assert part.floor_low[0, 0] <= part.floor[0, 0] <= part.floor_high[0, 0]
        assert 0 < part.p[0, 0] <= 1


def test_undefined_permutations_do_not_count():
    null = np.random.default_rng(9).gamma(3.0, 1.0, (400, 1))
    holed = np.concatenate([null, np.full((100, 1), np.nan)])
    for observed in (3.0, 12.0):
        assert tail_p(np.array([observed]), holed) == pytest.approx(tail_p(np.array([observed]), null))
    assert np.isnan(tail_p(np.array([3.0]), np.concatenate([null, np.full((401, 1), np.nan)])))[0]


@pytest.mark.filterwarnings("error")
def test_what_only_one_group_has_gets_no_floor_and_no_interval():
    rng = np.random.default_rng(10)
    values = np.full(40, np.nan)
    values[:6] = rng.normal(size=6)
    groups = np.maximum(np.arange(40), 5)
    found = compare(_sample(values, groups=groups), _sample(values, groups=groups), rng)
    assert np.isnan(found.ks.floor[0, 0])
    # Each side draws the group with probability 1 - 1/e: three draws of five hold no distance.
    assert np.isnan(found.ks.low[0, 0])
    assert found.ks.value[0, 0] == 0.0
