"""The result in words and as a table: headlines, order, baselines, Markdown."""

import io
import math
import re

import numpy as np
import pytest
from rich.console import Console

from gmel.evaluation.report import headline
from gmel.evaluation.statistics import Interval
from gmel.evaluation.table import (
    COLUMNS,
    best_decentralised,
    format_interval,
    markdown_table,
    print_table,
    rows,
    table_notes,
    worst_to_best,
)
from test_report import POLICIES, synthetic_evaluation, the, without

# --- honest words


def test_headline_of_a_result():
    text = headline(synthetic_evaluation(1.36, 12))
    assert "It beats every baseline that needs no messages and closes 16 %" in text
    assert "between 7-parameter softmax (L3) and the per-slot optimum (L5)" in text
    assert text.endswith("Interval over 12 training seeds.")
    assert "not a headline claim" not in text


@pytest.mark.parametrize("seeds", [2, 9])
def test_headline_with_few_training_seeds(seeds: int):
    text = headline(synthetic_evaluation(1.36, seeds))
    assert f"Interval over {seeds} training seeds; with fewer than 10 this is not a headline claim." in text


def test_headline_with_one_training_seed():
    text = headline(synthetic_evaluation(1.36))
    assert "over 8 traffic episodes" in text and "not a headline claim" in text
    assert "over 1 training seed" not in text


def test_headline_that_beats_only_the_weak():
    text = headline(synthetic_evaluation(1.70))
    assert "It beats only Local only, Greedy and Random proportional (L0), which shows nothing about learning" in text
    assert "slower than LED(2) (L1), Tuned softmax (L2) and 7-parameter softmax (L3)" in text
    assert "closes" not in text


def test_headline_between_the_tuned_rules():
    text = headline(synthetic_evaluation(1.475))
    assert "Tuned softmax (L2); it is slower than 7-parameter softmax (L3)." in text
    assert "closes" not in text and "shows nothing" not in text


def test_headline_level_with_the_reference():
    text = headline(synthetic_evaluation(1.442))
    assert "level with 7-parameter softmax (L3) (difference not resolved)" in text
    assert "closes" not in text


def test_headline_that_beats_nothing():
    text = headline(without(synthetic_evaluation(3.0), "local"))
    assert "It beats none of the baselines" in text


def test_headline_compares_over_training_seeds_not_over_episodes():
    # On the same traffic the episodes agree to a hair, the training seeds do not: the saving is not resolved.
    evaluation = synthetic_evaluation(1.42, 3)
    latency = the(evaluation, "amarl")["metrics"]["mean_latency_s"]
    assert "every baseline" in headline(evaluation)
    spread = np.array([-0.3, 0.0, 0.3])[:, None]
    latency["by_training_seed"] = (np.asarray(latency["values"])[None, :] + spread).tolist()
    assert "level with" in headline(evaluation)


def test_headline_of_an_unstable_policy():
    evaluation = synthetic_evaluation()
    the(evaluation, "amarl")["unstable"] = True
    text = headline(evaluation)
    assert "AMARL is unstable" in text and "±" not in text


def test_headline_names_messages():
    evaluation = synthetic_evaluation(1.0)
    the(evaluation, "amarl").update(mode="communicating", information="in-slot messages")
    assert "It uses messages (in-slot messages), which the baselines it is compared with do not." in headline(
        evaluation
    )


def test_headline_suspects_a_leak():
    assert "suspect leaked information" in headline(synthetic_evaluation(0.80))
    assert "leak" not in headline(synthetic_evaluation(1.2))


def test_headline_without_a_trained_policy():
    assert "no trained policy" in headline(without(synthetic_evaluation(), "amarl"))


# --- the table


def test_rows_go_from_worst_to_best_and_one_is_best():
    evaluation = synthetic_evaluation()
    names = [policy["name"] for policy in worst_to_best(evaluation)]
    assert names[0] == "local" and names[-1] == "optimum"
    assert names.index("softmax7") < names.index("amarl") < names.index("eft")
    assert [row.name for row in rows(evaluation) if row.emphasis == "best"] == ["amarl"]
    best = best_decentralised(synthetic_evaluation(1.5))
    assert best is not None and best["name"] == "softmax7"


def test_an_overloaded_plant_says_its_load_in_place_of_a_mean():
    evaluation = {**synthetic_evaluation(), "load": 1.24}
    row = next(row for row in rows(evaluation) if row.name == "local")
    assert row.cells[COLUMNS.index("mean latency s")] == "overloaded: load 1.24"
    assert any(note.startswith("Overloaded: ") for note in table_notes(evaluation))
    the(evaluation, "amarl")["unstable"] = True
    assert "AMARL is overloaded" in headline(evaluation)


def test_unstable_rows_show_no_latency():
    row = next(row for row in rows(synthetic_evaluation()) if row.name == "local")
    assert dict(zip(COLUMNS, row.cells, strict=True)) == {
        "ladder": "",
        "policy": "Local only",
        "information": "none",
        "mean latency s": "unstable: load 0.70",
        "P95 s": "-",
        "P99 s": "-",
        "completion %": "0.90",
        "energy J/task": "110.0",
        "gap closed %": "-",
    }


@pytest.mark.parametrize("width", [100, 120])
def test_terminal_table_keeps_its_numbers_whole(width: int):
    console = Console(width=width, record=True, file=io.StringIO())
    print_table(synthetic_evaluation(), console)
    text = console.export_text()
    for number in ("1.442 ± 0.015", "unstable", "-181 ± 6", "100 ± 0", "7-parameter softmax"):
        assert number in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_terminal_table_sets_off_best_and_baselines():
    console = Console(width=120, record=True, force_terminal=True, file=io.StringIO())
    print_table(synthetic_evaluation(), console)
    lines = console.export_text(styles=True).splitlines()
    assert "\x1b[1m" in next(line for line in lines if "AMARL" in line)
    assert "\x1b[2m" in next(line for line in lines if "LED(2)" in line)


def test_markdown_table_is_a_table():
    evaluation = synthetic_evaluation()
    the(evaluation, "led2")["label"] = "LED|2"
    lines = markdown_table(evaluation).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(POLICIES)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {len(COLUMNS) + 1}
    assert "**AMARL**" in "".join(table) and "LED\\|2" in "".join(table)
    assert any("95 % interval over 8 traffic episodes" in line for line in lines)


@pytest.mark.parametrize(
    ("interval", "digits", "scale", "text"),
    [
        (Interval(1.4423, 1.432, 1.4526), None, 1.0, "1.442 ± 0.010"),
        (Interval(0.12, 0.03, 0.40), 0, 100.0, "12 [3, 40]"),
        (Interval(0.12, -math.inf, math.inf), 0, 100.0, "12"),
        (Interval(2.0, math.nan, math.nan), None, 1.0, "2.000"),
        (Interval(math.nan, math.nan, math.nan), None, 1.0, "-"),
        (Interval(-0.0001, -0.0001, -0.0001), 0, 100.0, "0 ± 0"),
    ],
)
def test_intervals_in_words(interval: Interval, digits: int | None, scale: float, text: str):
    assert format_interval(interval, digits, scale) == text
