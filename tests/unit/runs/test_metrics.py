from __future__ import annotations

import csv

from fedllm.runs.events import append_event, read_events
from fedllm.runs.folder import RunFolder
from fedllm.runs.metrics import COLUMNS, round_metrics, site_gap, worst_site, write_metrics
from fedllm.runs.report import write_report


def rows(folder: RunFolder) -> list[dict[str, str]]:
    with write_metrics(folder).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def finish(folder: RunFolder, number: int, seconds: float = 9.0) -> None:
    append_event(
        folder, "round_finished", round=number, accepted=1, bytes_up=0, bytes_down=0, seconds=seconds
    )


def test_federation_row_is_means_sums_and_the_largest_epsilon(make_run, reply) -> None:
    folder = make_run()
    append_event(folder, "round_started", round=1, sites=["a", "b", "c"])
    reply(folder, 1, "a", loss=1.0, accuracy=0.25, epsilon=0.5)
    reply(folder, 1, "b", loss=2.0, accuracy=0.75, epsilon=1.5)
    reply(folder, 1, "c", accepted=False, reason="late", loss=None, accuracy=None, macro_f1=None, bytes_up=0)
    finish(folder, 1)
    table = rows(folder)
    assert tuple(table[0]) == COLUMNS
    assert [row["site"] for row in table] == ["a", "b", "c", "federation"]
    assert table[2] | {"accepted": "0", "reason": "late", "loss": "", "epsilon": ""} == table[2]
    expected = {
        "accepted": "2",
        "loss": "1.5",
        "accuracy": "0.5",
        "macro_f1": "0.25",
        "epsilon": "1.5",
        "bytes_up": "200",
        "bytes_down": "600",
        "seconds": "9.0",
    }
    assert table[3] | expected == table[3]


def test_table_is_rebuilt_from_the_events(make_run, reply) -> None:
    folder = make_run()
    reply(folder, 1, "a")
    first = write_metrics(folder).read_bytes()
    folder.metrics_file.unlink()
    assert write_metrics(folder).read_bytes() == first
    reply(folder, 2, "a")
    assert write_metrics(folder).read_bytes().startswith(first)


def test_a_run_without_replies_has_only_the_header(make_run) -> None:
    assert write_metrics(make_run()).read_text() == ",".join(COLUMNS) + "\n"


def test_after_a_resume_the_newest_attempt_wins(make_run, reply) -> None:
    folder = make_run()
    for number in (1, 2, 3):
        append_event(folder, "round_started", round=number, sites=["a", "b"])
        reply(folder, number, "a", loss=float(number))
        reply(folder, number, "b", loss=float(number))
        finish(folder, number)
    append_event(folder, "run_resumed", round=2)
    append_event(folder, "round_started", round=2, sites=["a"])
    reply(folder, 2, "a", loss=20.0)
    assert [(row["round"], row["site"], row["loss"]) for row in rows(folder)] == [
        ("1", "a", "1.0"),
        ("1", "b", "1.0"),
        ("1", "federation", "1.0"),
        ("2", "a", "20.0"),
        ("2", "federation", "20.0"),
    ]
    assert round_metrics(read_events(folder))[1].federation.seconds is None


def test_withheld_is_said_in_private_runs_only(make_run, reply) -> None:
    nothing = {"loss": None, "accuracy": None, "macro_f1": None}
    private = {"privacy__enabled": True, "privacy__epsilon": 8.0}
    cases = [
        (make_run("plain"), ""),
        (make_run("private", **private), "withheld"),
        (make_run("public", **private, data__heldout_public=True), ""),
    ]
    for folder, expected in cases:
        reply(folder, 1, "a", **nothing)
        reply(folder, 1, "b", accepted=False, reason="NaN in the adapter", **nothing)
        site, aside, federation = rows(folder)
        assert site["loss"] == site["accuracy"] == site["macro_f1"] == expected
        assert federation["loss"] == expected
        assert aside["loss"] == ""


def test_metrics_that_real_sites_sent_were_not_withheld(make_run, reply) -> None:
    folder = make_run(privacy__enabled=True, privacy__epsilon=8.0)
    reply(folder, 1, "a", loss=None, accuracy=None, macro_f1=None)
    assert rows(folder)[0]["accuracy"] == "withheld"
    # this site's policy names public records to evaluate on
    reply(folder, 1, "b", accuracy=0.75)
    a, b, federation = rows(folder)
    assert (a["accuracy"], b["accuracy"], federation["accuracy"]) == ("", "0.75", "0.75")
    page = write_report(folder).read_text()
    assert "declares public" in page
    assert "their results stay at the sites" not in page


def test_no_text_of_another_party_becomes_a_formula(make_run, reply) -> None:
    folder = make_run()
    reply(folder, 1, '=HYPERLINK("x")', reason="@SUM(1)")
    assert rows(folder)[0]["site"] == '\'=HYPERLINK("x")'
    assert rows(folder)[0]["reason"] == "'@SUM(1)"


def test_the_worst_site_and_the_gap() -> None:
    scores = {"b": 0.5, "a": 0.75, "c": 0.25}
    assert worst_site(scores) == ("c", 0.25)
    assert worst_site(scores, best="lowest") == ("a", 0.75)
    assert worst_site({"b": 1.0, "a": 1.0}) == ("a", 1.0)
    assert site_gap(scores) == 0.5


def test_what_a_task_does_not_measure_is_not_said_to_be_withheld(make_run, reply) -> None:
    folder = make_run(privacy__enabled=True, privacy__epsilon=8.0)
    reply(folder, 1, "a", loss=None, accuracy=None, macro_f1=None)
    row = rows(folder)[0]
    assert {row[name] for name in ("loss", "accuracy", "macro_f1", "brier", "ece")} == {"withheld"}
    assert {row[name] for name in ("perplexity", "exact_match", "token_f1", "rouge_l", "unended")} == {""}


def test_noised_counts_of_one_site_stay_told_beside_clear_metrics_of_another(make_run) -> None:
    folder = make_run(privacy__enabled=True, privacy__epsilon=8.0, evaluation__noise_multiplier=4.0)
    for site, spent in (("a", None), ("b", 0.93)):
        for stage in ("base", "final"):
            fields = {
                "loss": None,
                "accuracy": 0.5,
                "macro_f1": None,
                "records": 40,
                "heldout_epsilon": spent,
            }
            majority = {"majority_accuracy": None, "majority_macro_f1": None}
            append_event(folder, "evaluated", stage=stage, site=site, **fields, **majority)
    page = " ".join(write_report(folder).read_text().split())
    assert "declares public; at other sites the accuracy on private held-out records, from counts" in page
    assert "0.93 at delta 1e-05" in page
