import numpy as np
import pytest
from sklearn.linear_model import Ridge as ReferenceRidge
from sklearn.metrics import roc_auc_score

from busigen.evaluation.realness import classifiers as separation
from busigen.evaluation.realness.classifiers import Ridge, Task, auc, bootstrap_auc, folds, shuffled_sides


def _task(count, classes=2, per_group=2):
    rows = np.arange(2 * count)
    return Task(side=rows // count, label=rows // per_group % classes, group=rows // per_group)


def test_auc_of_one_class_and_fold_is_the_usual_one():
    rng = np.random.default_rng(0)
    task = _task(40, classes=1)
    scores = np.round(rng.normal(size=80) + 0.5 * task.side, 1)  # rounded, so that there are ties
    none = np.zeros(80, np.int64)
    assert auc(scores, task, none) == pytest.approx(roc_auc_score(task.side, scores))
    assert auc(scores, task, none, np.ones(80)) == pytest.approx(auc(scores, task, none))


def test_weights_count_as_repeats():
    scores, side = np.array([0.1, 0.4, 0.3, 0.8]), np.array([0, 0, 1, 1])
    task = Task(side, np.zeros(4, np.int64), np.arange(4))
    repeated = roc_auc_score([0, 0, 0, 1, 1], [0.1, 0.4, 0.4, 0.3, 0.8])
    assert auc(scores, task, np.zeros(4, np.int64), np.array([1.0, 2, 1, 1])) == pytest.approx(repeated)


def test_another_mix_of_classes_tells_nothing():
    label = np.array([0] * 30 + [1] * 10 + [0] * 10 + [1] * 30)
    task = Task(np.repeat([0, 1], 40), label, np.arange(80))
    assert auc(label.astype(float), task, np.zeros(80, np.int64)) == 0.5
    fold = folds(task, 4, 0)
    assert auc(Ridge(np.float32(label)[:, None], task, fold).scores(task.side), task, fold) == pytest.approx(0.5)


def test_scores_of_different_folds_are_not_compared():
    task = _task(4, classes=1, per_group=1)
    fold = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    assert auc(task.side + 10.0 * fold, task, fold) == 1.0


def test_folds_keep_groups_together_and_spread_both_sides():
    task = _task(40)
    fold = folds(task, 5, 0)
    assert all(len(set(fold[task.group == group])) == 1 for group in np.unique(task.group))
    assert all(set(task.side[fold == k]) == {0, 1} for k in range(5))


def test_ridge_scores_are_those_of_a_plain_ridge_regression():
    rng = np.random.default_rng(1)
    task = _task(30, classes=1)
    features = rng.normal(size=(60, 12)).astype(np.float32)
    fold = folds(task, 3, 0)
    scaled = (features - features.mean(0)) / features.std(0)
    train, test = fold != 1, fold == 1
    reference = ReferenceRidge(alpha=separation.RIDGE * 12).fit(scaled[train], task.side[train])
    expected = reference.predict(scaled[test]) - task.side[train].mean()
    np.testing.assert_allclose(
        Ridge(features, task, fold).scores(task.side)[test], expected, atol=1e-5
    )  # float32 input


def test_shuffling_moves_whole_groups_within_their_class():
    task = _task(40)
    side = shuffled_sides(task, np.random.default_rng(0))
    assert (side != task.side).any()
    assert all(len(set(side[task.group == group])) == 1 for group in np.unique(task.group))
    for label in (0, 1):
        assert side[task.label == label].sum() == task.side[task.label == label].sum()


def test_the_interval_of_noise_holds_one_half_and_that_of_a_difference_does_not():
    rng = np.random.default_rng(3)
    task = _task(60)
    fold = folds(task, 5, 0)
    noise = rng.normal(size=120)
    low, high = bootstrap_auc(noise, task, fold, rng, 200)
    assert low < 0.5 < high
    assert bootstrap_auc(noise + 2 * task.side, task, fold, rng, 200)[0] > 0.75  # two sigma apart: AUC 0.92
