"""The table and picture of a comparison, from run folders written by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedllm.runs.compare import columns, row_cells, write_comparison
from fedllm.runs.compare_picture import draw
from fedllm.runs.events import append_event
from fedllm.runs.folder import RunFolder
from fedllm.runs.outcomes import Estimate, Outcome, estimate, make_rows, read_outcome

MakeRun = Callable[..., RunFolder]
Finished = Callable[..., Outcome]


def evaluated(folder: RunFolder, site: str, stage: str, accuracy: float | None) -> None:
    append_event(
        folder,
        "evaluated",
        stage=stage,
        site=site,
        records=10,
        accuracy=accuracy,
        macro_f1=None if accuracy is None else accuracy / 2,
        loss=None if accuracy is None else 2 - accuracy,
        exact_match=None if accuracy is None else accuracy / 4,
        majority_accuracy=None if accuracy is None else 0.25,
        majority_macro_f1=None if accuracy is None else 0.125,
    )


@pytest.fixture
def finished(make_run: MakeRun, reply: Callable[..., None]) -> Finished:
    """Write a finished run of two sites and two rounds, and read its outcome."""

    def make(
        method: str = "A",
        seed: int = 1,
        accuracy: float | None = 0.6,
        *,
        group: str = "all",
        sent: int = 100,
        epsilon: float | None = None,
        metric: str = "accuracy",
        elsewhere: float | None = None,
        **settings: str,
    ) -> Outcome:
        folder = make_run(f"{group}-{method}-{seed}", **settings)
        append_event(
            folder, "traffic", stage="basis", round=0, site="site-0", bytes_up=7 * sent, bytes_down=3 * sent
        )
        for round in (1, 2):
            append_event(folder, "round_started", round=round, sites=["s0", "s1"])
            for site in ("s0", "s1"):
                spent = None if epsilon is None else epsilon * round / 2
                reply(folder, round, site, bytes_up=sent, bytes_down=2 * sent, epsilon=spent)
            append_event(
                folder, "round_finished", round=round, accepted=2, bytes_up=999, bytes_down=999, seconds=1.0
            )
        for site, gap in (("s0", -0.1), ("s1", 0.1)):
            evaluated(folder, site, "base", None if accuracy is None else 0.3)
            evaluated(folder, site, "final", None if accuracy is None else accuracy + gap)
            if elsewhere is not None:
                evaluated(folder, site, "elsewhere", elsewhere)
        append_event(folder, "run_finished", seconds=12.5)
        return read_outcome(folder, group=group, method=method, seed=seed, metric=metric)

    return make


def test_an_outcome_averages_over_sites_and_counts_bytes_once(finished: Finished) -> None:
    found = finished()
    assert found.tuned.means["accuracy"] == pytest.approx(0.6)
    assert found.tuned.means["macro_f1"] == pytest.approx(0.3)
    assert found.tuned.worst == pytest.approx(0.5)
    assert found.tuned.gap == pytest.approx(0.2)
    assert found.base.means["accuracy"] == pytest.approx(0.3)
    assert found.majority.means["accuracy"] == pytest.approx(0.25)
    assert (found.bytes_up, found.bytes_down) == (100, 200)
    # 4 replies of 300 bytes and the basis; what round_finished sums up is not added again
    assert found.bytes_total == 4 * 300 + 1000
    assert found.seconds == 12.5
    assert finished("B", metric="macro_f1").tuned.worst == pytest.approx(0.25)


def test_sites_that_train_alone_have_a_row_of_the_other_sites_records(finished: Finished) -> None:
    alone = [finished("local only", seed, elsewhere=value) for seed, value in ((1, 0.4), (2, 0.5))]
    assert [run.elsewhere.worst for run in alone] == [0.4, 0.5]
    rows = make_rows([*alone, finished("A")], baselines=())
    assert [row.method for row in rows] == ["local only", "local only, elsewhere", "A"]
    assert rows[1].is_line
    score = rows[1].scores["accuracy"]
    assert score is not None
    assert score.mean == pytest.approx(0.45)


def test_seconds_of_earlier_sessions_count(make_run: MakeRun) -> None:
    folder = make_run()
    append_event(folder, "warning", text="begins")
    append_event(folder, "warning", text="ends")
    append_event(folder, "run_resumed", round=1)
    append_event(folder, "run_finished", seconds=3.0)
    lines = folder.events_file.read_text().splitlines()
    events = [json.loads(line) for line in lines]
    for event, minute in zip(events, (0, 2, 9, 10), strict=True):
        event["time"] = f"2026-01-01T00:{minute:02}:00.000+00:00"
    folder.events_file.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert read_outcome(folder, group="", method="", seed=1, metric="accuracy").seconds == 123


def test_the_interval_is_student_t() -> None:
    assert estimate([None]) is None
    assert estimate([0.5, None]) == Estimate(0.5, None)
    found = estimate([0.4, 0.5, 0.6])
    assert found is not None
    # t(0.975, 2) = 4.303, deviation 0.1, 3 seeds
    assert found.half == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)


def test_rows_hold_the_baselines_once_a_group(finished: Finished) -> None:
    runs = [
        finished(method, seed, value, group=group)
        for group in ("IID", "Dirichlet")
        for method, value in (("A", 0.6), ("B", 0.7))
        for seed in (1, 2)
    ]
    rows = make_rows(runs, baselines=("majority", "base"))
    names = ["untuned base", "majority class", "A", "B"]
    assert [(row.group, row.method) for row in rows] == [(g, n) for g in ("IID", "Dirichlet") for n in names]
    assert {row.seeds for row in rows} == {2}
    assert [row.is_line for row in rows[:3]] == [True, True, False]
    cells = dict(zip(columns("accuracy"), row_cells(rows[2], "accuracy"), strict=True))
    assert cells["accuracy %"] == "60.0 ± 0.0"
    assert (cells["worst site %"], cells["gap"]) == ("50.0", "20.0")
    assert cells["run total"] == "2.2 kB"
    assert cells["epsilon"] == "none"


def test_private_runs_have_a_majority_class_of_their_own_where_it_differs(finished: Finished) -> None:
    runs = [finished("A"), finished("B", epsilon=8.0)]
    assert [row.method for row in make_rows(runs, baselines=("majority",))] == ["majority class", "A", "B"]
    other = replace(runs[1].majority, means={**runs[1].majority.means, "accuracy": 0.375})
    rows = make_rows([runs[0], replace(runs[1], majority=other)], baselines=("majority",))
    assert [row.method for row in rows] == ["majority class", "majority class, private runs", "A", "B"]
    assert [row_cells(row, "accuracy")[3] for row in rows[:2]] == ["25.0", "37.5"]
    assert rows[1].is_line
    assert draw(rows, title="t", metric="accuracy")


def test_the_base_of_an_encoder_is_named_an_untrained_head(finished: Finished) -> None:
    runs = [finished("A"), finished("B", model__kind="encoder", model__name="tiny-bert")]
    rows = make_rows(runs, baselines=("base", "majority"))
    assert [row.method for row in rows] == ["untuned base", "untrained head", "majority class", "A", "B"]
    assert [row.is_line for row in rows] == [True, True, True, False, False]
    assert draw(rows, title="t", metric="accuracy")


def test_what_was_never_measured_is_not_called_withheld(finished: Finished) -> None:
    (row,) = make_rows([finished(epsilon=8.0)], baselines=())
    # a private run on pairs of answers, with public held-out records: it has no macro-F1
    row = replace(row, scores={**row.scores, "macro_f1": None})
    cells = dict(zip(columns("accuracy"), row_cells(row, "accuracy"), strict=True))
    assert (cells["accuracy %"], cells["macro-F1 %"]) == ("60.0", "-")


def test_what_a_private_run_withheld_is_said_so(finished: Finished) -> None:
    run = finished(accuracy=None, epsilon=8.0)
    (row,) = make_rows([run], baselines=("base", "majority"))
    cells = dict(zip(columns("accuracy"), row_cells(row, "accuracy"), strict=True))
    assert (cells["accuracy %"], cells["worst site %"], cells["epsilon"]) == ("withheld", "withheld", "8.00")
    assert draw([row], title="nothing to show", metric="accuracy")


def test_all_files_are_written(finished: Finished, tmp_path: Path) -> None:
    runs = [finished("A|x", seed, 0.5 + seed / 10) for seed in (1, 2)]
    runs += [finished("private", 1, 0.4, sent=5000, epsilon=3.0), finished("local only", 1, 0.45, sent=0)]
    folder = tmp_path / "out"
    rows = write_comparison(
        folder,
        runs,
        title="Two $ methods",
        metric="macro_f1",
        baselines=("base", "majority"),
        missing=["all, C, seed 1"],
        aside=["all, private, seed 1 (s1)"],
        source=b"recipe = 'demo/smoke'\n",
        digests={"all/a-x/1": "ff"},
    )
    assert len(rows) == 5
    page = (folder / "compare.md").read_text()
    assert page.startswith("# Two $ methods\n")
    assert r"A\|x" in page
    assert "Not finished: all, C, seed 1." in page
    assert "replies were set aside: all, private, seed 1 (s1)." in page
    assert "lowest macro-F1" in page
    table = list(csv.DictReader((folder / "compare.csv").open()))
    assert [(row["method"], row["seed"]) for row in table][:2] == [("A|x", "1"), ("A|x", "2")]
    assert table[2]["epsilon"] == "3.0"
    assert float(table[2]["tuned_gap"]) == pytest.approx(0.2)
    assert table[3]["bytes_total"] == "0"
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "compare.svg").read_text()
    assert (folder / "comparison.toml").read_bytes() == b"recipe = 'demo/smoke'\n"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["config_sha256"] == {"all/a-x/1": "ff"}
    assert "torch" in manifest["versions"]


def test_the_picture_is_the_same_when_drawn_again(finished: Finished, tmp_path: Path) -> None:
    runs = [finished("A", seed, 0.5 + seed / 10) for seed in (1, 2)]
    for name in ("one", "two"):
        write_comparison(
            tmp_path / name,
            runs,
            title="t",
            metric="accuracy",
            baselines=(),
            missing=(),
            source=b"",
            digests={},
        )
    assert (tmp_path / "one/compare.svg").read_bytes() == (tmp_path / "two/compare.svg").read_bytes()


def test_a_loss_is_no_share_and_its_worst_is_the_highest(finished: Finished, tmp_path: Path) -> None:
    runs = [finished("A", seed, 0.6, metric="loss") for seed in (1, 2)]
    assert runs[0].tuned.means["loss"] == pytest.approx(1.4)
    assert runs[0].tuned.worst == pytest.approx(1.5)
    assert runs[0].majority.means["loss"] is None
    rows = make_rows(runs, baselines=("base",))
    cells = dict(zip(columns("loss"), row_cells(rows[1], "loss"), strict=True))
    assert (cells["loss"], cells["worst site"]) == ("1.400 ± 0.000", "1.500")
    (panel,) = draw(rows, title="t", metric="loss").axes
    low, high = panel.get_ylim()
    assert 0 < low < 1.4 < 1.7 < high < 2
    options = {"title": "t", "metric": "loss", "baselines": (), "missing": (), "source": b"", "digests": {}}
    write_comparison(tmp_path / "out", runs, **options)
    assert "highest loss of a site" in (tmp_path / "out/compare.md").read_text()


def test_written_answers_are_compared_by_metrics_of_their_kind(finished: Finished) -> None:
    (row,) = make_rows([finished("A", 1, 0.6, metric="exact_match")], baselines=())
    cells = dict(zip(columns("exact_match"), row_cells(row, "exact_match"), strict=True))
    assert cells | {"exact match %": "15.0", "token F1 %": "-", "worst site %": "12.5"} == cells
    assert "accuracy %" not in cells
    assert draw([row], title="t", metric="exact_match")


def test_points_with_the_same_bytes_do_not_hide_each_other(finished: Finished) -> None:
    rows = make_rows([finished("A", 1, 0.6), finished("B", 1, 0.602)], baselines=())
    (panel,) = draw(rows, title="t", metric="accuracy").axes
    marked = [line for line in panel.get_lines() if line.get_marker() == "o"]
    first, second = (float(line.get_xdata()[0]) for line in marked)
    assert first == 2200
    assert 1.02 < second / first < 1.1


def test_three_groups_get_a_panel_each(finished: Finished) -> None:
    runs = [finished("A", 1, 0.5, group=group) for group in ("x", "y", "z")]
    figure = draw(make_rows(runs, baselines=("base",)), title="t", metric="accuracy")
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["x", "y", "z"]


def test_privacy_of_whole_sites_is_privacy_too(make_run: MakeRun, finished: Finished) -> None:
    plain = finished()
    hidden = replace(finished("B"), sites_epsilon=3.0)
    rows = make_rows([plain, hidden], baselines=[])
    assert [row_cells(row, "accuracy")[columns("accuracy").index("epsilon")] for row in rows] == [
        "none",
        "3.00 (whole sites)",
    ]
    assert [row.is_private for row in rows] == [False, True]
    folder = make_run("C")
    spent = {"noise_multiplier": 1.0, "clipping_norm": 1.0, "epsilon": 2.5}
    append_event(folder, "site_noise", round=1, **spent)
    assert read_outcome(folder, group="all", method="C", seed=1, metric="accuracy").sites_epsilon == 2.5
