from vocojax.evaluation.metrics import accuracy_by_kind, exact_match
from vocojax.evaluation.retention import Score, format_table, mean_retention, retention, table


def test_retention_of_the_paper():
    """Paper Table 1, GQA: 57.0 between 37.7 and 61.1."""
    assert round(100 * retention(57.0, 37.7, 61.1), 1) == 82.5
    assert retention(0.5, 0.4, 0.4) is None


def test_exact_match_forgives_case_space_and_a_period():
    assert exact_match(" Red. ", "red") and not exact_match("reddish", "red") and not exact_match("", "red")


def test_accuracy_by_kind():
    assert accuracy_by_kind([True, False, True], ["shape", "shape", "colour"]) == {"colour": 1.0, "shape": 0.5}


def test_table_means_over_seeds():
    score = lambda x: Score(x, {"colour": x, "yes/no": 1.0})
    rows = table({"up": [score(1.0), score(0.8)], "voco": [score(0.75), score(0.7)], "low": [score(0.5), score(0.4)]},
                 "low", "up")
    assert rows["voco"]["accuracy"] == 0.725 and rows["voco"]["accuracy_by_question_type"]["colour"] == 0.725
    assert round(rows["voco"]["retention"], 6) == 0.625  # of 0.5 and 0.75
    assert rows["up"]["retention"] == 1.0 and rows["low"]["retention"] == 0.0
    assert format_table(rows).splitlines()[3].split() == [
        "voco", "72.5", "%", "72.5", "%", "100.0", "%", "62.5", "%"]


def test_both_retentions_of_the_papers_table_1():
    """Table 1, N = 1: seven benchmarks, mean retention 83.7 %; as a share of the upper bound 93.4 %."""
    names = ("GQA", "MMB", "MME", "POPE", "SEED", "SQA", "VQA")
    row = lambda *figures: dict(zip(names, figures, strict=True))
    found = mean_retention(row(57.0, 58.8, 1323.3, 81.4, 53.7, 65.4, 72.3),
                           row(37.7, 22.3, 617.3, 53.9, 36.9, 60.7, 41.2),
                           row(61.1, 64.0, 1487.2, 85.0, 57.9, 66.5, 77.7))
    assert round(100 * found.mean_retention, 1) == 83.7 and round(100 * found.mean_of_upper, 1) == 93.4
    assert round(found.retention["GQA"], 3) == 0.825 and round(found.of_upper["GQA"], 3) == 0.933
    assert mean_retention({"x": 1.0}, {"x": 2.0}, {"x": 2.0}).mean_retention is None
