"""Requests as the harness makes them, in 0.4 and 0.5."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from lm_eval.api.instance import Instance
from packaging.version import Version


#: Releases from here on ask for a text as for a continuation of nothing.
IS_NEXT = Version(version("lm_eval")) >= Version("0.5.dev0")
#: Tests that fail with lm-eval 0.5.0.dev1, by the reason; docs/architecture.md says what users notice of it.
UNLIKE_NEXT = {
    "0.5 refuses a metric that it knows from tasks of another kind": """
        test_a_run_reports_errors_by_block
        test_answers_are_written_in_the_chat_template_and_end_as_the_generation_config_says
        test_long_text_is_judged_by_position_and_other_kinds_of_text_by_kind
        test_a_file_that_changes_answers_is_named_in_the_first_line_and_never_ships
        test_text_that_one_long_pass_answers_has_the_harness_s_scores""",
    "0.5 names members of a group after it, and does not look for tasks that two groups share": """
        test_a_group_with_a_score_is_one_unit_and_one_that_collects_is_its_members
        test_groups_are_the_harness_s_own_tasks_with_the_study_s_shots
        test_groups_that_share_tasks_are_refused_and_some_can_be_combined_freely
        test_units_are_results_of_the_harness""",
    "0.5.0.dev1 has no logger for Trackio": """
        test_a_failure_of_tracking_is_only_a_warning
        test_a_missing_package_ends_the_command_before_a_model_is_loaded
        test_each_finished_unit_becomes_a_run
        test_options_of_the_harness_are_those_of_lm_eval_run""",
    "0.5.0.dev1 lacks corrections of 0.4.13": """
        test_a_quantiser_that_this_machine_cannot_run_is_tried_before_the_base_is_evaluated
        test_an_answer_without_a_language_is_no_error
        test_an_argument_is_taken_or_named
        test_answers_without_a_language_are_scored_alike_and_are_no_errors
        test_what_is_published_of_a_model_has_no_folders_of_this_machine""",
}


def request(
    kind: str, *arguments: Any, place: int = 0, task: str = "t", number: int = 0
) -> Instance:
    """Return a request about the document `number` of a task, at its `place` among those about it."""
    if IS_NEXT and kind == "loglikelihood_rolling":
        arguments = ("", *arguments[:1])
    named = {"task_name": task, "doc_id": number, "metadata": (task, number, 1)}
    return Instance(kind, {}, arguments, idx=place, **named)  # type: ignore[arg-type]
