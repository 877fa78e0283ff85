"""Protocols, rankings, metrics, floors, intervals and reports.

From data to a table: :func:`split` a catalogue, :func:`evaluate` a ranker on it (:func:`most_popular`,
:func:`item_knn`, or a closure around :func:`rank`), :func:`compare` two results, :func:`write_report`.
"""

from .beyond import beyond_accuracy, popularity_groups
from .candidates import CandidateSets, candidate_sets
from .evaluate import evaluate
from .factorial import Effect, factorial, level_means
from .floors import FLOORS, item_knn, most_popular
from .intervals import Interval, bootstrap, paired_bootstrap
from .judge_agreement import (
    Reliability,
    StarCalibration,
    expected_calibration_error,
    kendall_tau,
    spearman,
    weighted_kappa,
)
from .judge_bias import PlantedJudge, Pull
from .judge_report import CalibrationError, JudgeReport, judge_report
from .judges import Judge, Judgements, PairwiseJudge, ask_judge, pairs_within_users
from .leakage import Leakage, leakage
from .metrics import DEFAULT_METRICS, Metric, evaluate_rankings, per_user
from .modality import Curve, Dominance, dominance, missing, missing_curve
from .protocols import Seen, Split, Stage, hold_out_items, split
from .ragged import Ragged
from .ranking import Ranker, rank, rank_scores
from .report import write_report
from .results import Result, Row, compare, interval
from .tables import format_table, print_table

__all__ = [
    "DEFAULT_METRICS",
    "FLOORS",
    "CalibrationError",
    "CandidateSets",
    "Curve",
    "Dominance",
    "Effect",
    "Interval",
    "Judge",
    "JudgeReport",
    "Judgements",
    "Leakage",
    "Metric",
    "PairwiseJudge",
    "PlantedJudge",
    "Pull",
    "Ragged",
    "Ranker",
    "Reliability",
    "Result",
    "Row",
    "Seen",
    "Split",
    "Stage",
    "StarCalibration",
    "ask_judge",
    "beyond_accuracy",
    "bootstrap",
    "candidate_sets",
    "compare",
    "dominance",
    "evaluate",
    "evaluate_rankings",
    "expected_calibration_error",
    "factorial",
    "format_table",
    "hold_out_items",
    "interval",
    "item_knn",
    "judge_report",
    "kendall_tau",
    "leakage",
    "level_means",
    "missing",
    "missing_curve",
    "most_popular",
    "paired_bootstrap",
    "pairs_within_users",
    "per_user",
    "popularity_groups",
    "print_table",
    "rank",
    "rank_scores",
    "spearman",
    "split",
    "weighted_kappa",
    "write_report",
]
