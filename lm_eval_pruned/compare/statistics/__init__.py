"""Paired tests, intervals, correlations and trends, from scipy.

Everything works on arrays, draws no random numbers, and adds up exactly: a permutation
of the documents changes nothing, and swapping the two runs flips the sign of every
number.
"""

from __future__ import annotations

from lm_eval_pruned.compare.statistics.across import (
    MOST_PERMUTED,
    Correlation,
    Trend,
    correlate,
    trend,
)
from lm_eval_pruned.compare.statistics.correction import (
    false_discovery_levels,
    false_discovery_rate,
)
from lm_eval_pruned.compare.statistics.differences import (
    paired_difference,
    relative_change,
    unpaired_difference,
)
from lm_eval_pruned.compare.statistics.paired_test import (
    ALTERNATIVES,
    LEAST_UNITS,
    POWER,
    Alternative,
    PairedTest,
)
from lm_eval_pruned.compare.statistics.power import (
    claim_power_of_means,
    claim_power_of_shares,
    difference_power_of_means,
    difference_power_of_shares,
    documents_for,
)
