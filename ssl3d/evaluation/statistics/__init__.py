"""Metrics as functions of resampling weights, and what is built on them: intervals, tests, subsets, folds.

A bootstrap resample is a vector of counts, one per row. Every metric here takes such weights, (R, N), and
gives R values at once, equal to the plain metric of the resampled rows; so two thousand resamples of an
AUC are one sort and a few cumulative sums, the jackknife is another weight matrix, and a paired
difference is a difference of two calls on the same weights.
"""

from __future__ import annotations

from ssl3d.evaluation.statistics.differences import (
    Difference as Difference,
)
from ssl3d.evaluation.statistics.differences import (
    freedom as freedom,
)
from ssl3d.evaluation.statistics.differences import (
    holm as holm,
)
from ssl3d.evaluation.statistics.differences import (
    joint_draws as joint_draws,
)
from ssl3d.evaluation.statistics.differences import (
    minimum_detectable_difference as minimum_detectable_difference,
)
from ssl3d.evaluation.statistics.differences import (
    paired_difference as paired_difference,
)
from ssl3d.evaluation.statistics.differences import (
    without_interval as without_interval,
)
from ssl3d.evaluation.statistics.intervals import (
    LEAST_SUPPORT as LEAST_SUPPORT,
)
from ssl3d.evaluation.statistics.intervals import (
    LEVEL as LEVEL,
)
from ssl3d.evaluation.statistics.intervals import (
    RESAMPLES as RESAMPLES,
)
from ssl3d.evaluation.statistics.intervals import (
    Interval as Interval,
)
from ssl3d.evaluation.statistics.intervals import (
    Part as Part,
)
from ssl3d.evaluation.statistics.intervals import (
    Runs as Runs,
)
from ssl3d.evaluation.statistics.intervals import (
    at_bound_note as at_bound_note,
)
from ssl3d.evaluation.statistics.intervals import (
    class_support as class_support,
)
from ssl3d.evaluation.statistics.intervals import (
    interval as interval,
)
from ssl3d.evaluation.statistics.intervals import (
    nested_interval as nested_interval,
)
from ssl3d.evaluation.statistics.intervals import (
    reach_of as reach_of,
)
from ssl3d.evaluation.statistics.intervals import (
    resample as resample,
)
from ssl3d.evaluation.statistics.intervals import (
    resampling_weights as resampling_weights,
)
from ssl3d.evaluation.statistics.intervals import (
    runs_of as runs_of,
)
from ssl3d.evaluation.statistics.intervals import (
    standard_error as standard_error,
)
from ssl3d.evaluation.statistics.intervals import (
    summarise as summarise,
)
from ssl3d.evaluation.statistics.intervals import (
    variances as variances,
)
from ssl3d.evaluation.statistics.intervals import (
    why_no_interval as why_no_interval,
)
from ssl3d.evaluation.statistics.metrics import (
    Array as Array,
)
from ssl3d.evaluation.statistics.metrics import (
    Statistic as Statistic,
)
from ssl3d.evaluation.statistics.metrics import (
    auc as auc,
)
from ssl3d.evaluation.statistics.metrics import (
    balanced_accuracy as balanced_accuracy,
)
from ssl3d.evaluation.statistics.metrics import (
    bounds_of as bounds_of,
)
from ssl3d.evaluation.statistics.metrics import (
    mean as mean,
)
from ssl3d.evaluation.statistics.metrics import (
    multiclass_auc as multiclass_auc,
)
from ssl3d.evaluation.statistics.metrics import (
    r_squared as r_squared,
)
from ssl3d.evaluation.statistics.metrics import (
    spearman as spearman,
)
from ssl3d.evaluation.statistics.subsets import (
    grouped_folds as grouped_folds,
)
from ssl3d.evaluation.statistics.subsets import (
    nested_subsets as nested_subsets,
)
