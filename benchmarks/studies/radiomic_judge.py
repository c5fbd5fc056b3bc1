"""Does a classifier that training knows nothing of tell a set from real images? Ridge regression on radiomic ranks.

python benchmarks/studies/radiomic_judge.py out/mine --data prepared/

The decoder is finished on statistics of the family that the audit's own classifier looks at, which is therefore no
stranger to it. This one sees the ranks of the audit's radiomic features instead, with the audit's folds: the first 500
lesion images of each set against the held-out ones (val and test), overlays painted over in both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from polars import selectors
from scipy.stats import norm, rankdata

from busigen.data.prepared import Prepared
from busigen.evaluation.context import ImageSet
from busigen.evaluation.physics import features as radiomics
from busigen.evaluation.reading.sets import from_prepared, read_set
from busigen.evaluation.realness.classifiers import Ridge, auc, folds
from busigen.evaluation.realness.section import FOLDS, _synthetic_groups, _task

LIMIT = 500


def judged(synthetic: ImageSet, real: ImageSet) -> tuple[int, float]:
    """Number of features, and the AUC."""
    # Groups are numbers, too, and no feature.
    wanted = selectors.numeric() - selectors.by_name("group", "lesions", require_all=False)
    tables = [radiomics.features(part).select(wanted) for part in (synthetic, real)]
    values = np.nan_to_num(np.concatenate([table.to_numpy().astype(float) for table in tables]))
    ranks = np.stack([norm.ppf((rankdata(column) - 0.5) / len(column)) for column in values.T], axis=1)
    task = _task(synthetic, real, (_synthetic_groups(synthetic), real.groups))
    fold = folds(task, FOLDS, 0)
    return ranks.shape[1], auc(Ridge(ranks.astype(np.float32), task, fold).scores(task.side), task, fold)


def main() -> None:
    """Judge every set and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("synthetic", type=Path, nargs="+", help="what `busigen generate` wrote")
    parser.add_argument("--data", type=Path, required=True, help="what `busigen prepare` wrote")
    options = parser.parse_args()
    real = from_prepared(Prepared.open(options.data), ("val", "test"), lesions_only=True).without_overlays()
    for folder in options.synthetic:
        images = read_set(folder).with_lesions().without_overlays()
        images = images.take(np.arange(min(LIMIT, len(images))))
        features, value = judged(images, real)
        print(f"{folder}: {len(images)} images against {len(real)}, {features} features, AUC {value:.3f}", flush=True)


if __name__ == "__main__":
    main()
