"""Paired tests, intervals, correlations and trends, from scipy.

Everything works on arrays and draws no random numbers: a permutation of the documents
changes nothing but the rounding, and swapping the two runs flips the sign of every number.
"""

from __future__ import annotations

from lm_eval_pruned.compare.statistics.correction import false_discovery
from lm_eval_pruned.compare.statistics.differences import (
    paired_difference,
    relative_change,
    unpaired_difference,
)
from lm_eval_pruned.compare.statistics.means import power_of_means
from lm_eval_pruned.compare.statistics.paired_test import (
    LEAST_UNITS,
    POWER,
    PairedTest,
)
from lm_eval_pruned.compare.statistics.shares import Shares, power_of_shares
from lm_eval_pruned.compare.statistics.trend import Correlation, Trend, correlate, trend
