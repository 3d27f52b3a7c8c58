from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from fedllm.data.check import REFUSED, REPEATED, check_file
from fedllm.data.sites import site_from_file
from fedllm.errors import DataError
from fedllm.models.load import load_tokenizer
from fedllm.settings import DataSettings, ModelSettings

ROWS = [
    ("short", "x", "north", "p1"),
    ("short", "x", "north ", "p1 "),
    ("short", "x", "north", "p2"),
    ("short", "y", "south", "p3"),
    ("z" * 500, "x", "south", "p3"),
    ("", "x", "south", "p4"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "a.csv"
    made.write_text("text,label,ward,patient\n" + "".join(",".join(row) + "\n" for row in ROWS))
    return made


def test_a_report_counts_what_is_wrong(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    report = check_file(path, DataSettings(source="file", site="ward", unit="patient"), tokenizer, 128)
    assert report.rows == 6
    assert report.columns == ("text", "label", "ward", "patient")
    assert report.labels == {"x": 4, "y": 1}
    assert (report.duplicates, report.conflicting, report.empty) == (1, 1, 1)
    assert report.truncated == 0.2
    assert report.sites == {"north": 3, "south": 3}
    assert report.units == (4, 2)
    assert report.warnings == (
        f"1 records lack a value; {REFUSED}.",
        f"1 records {REPEATED}.",
        "1 texts occur with more than one label.",
        "2 of 2 labels have fewer than 10 records.",
        "20.0% of texts lose their end at train.max_length=128.",
        "one 'patient' owns up to 2 records; a private run protects it as a whole.",
    )


def test_what_is_not_asked_is_not_reported(path: Path) -> None:
    report = check_file(path, DataSettings(source="file"))
    assert (report.sites, report.units, report.truncated) == (None, None, None)


def test_a_clean_file_has_no_warnings(tmp_path: Path) -> None:
    made = tmp_path / "a.csv"
    made.write_text("text,label\n" + "".join(f"text {i},{'xy'[i % 2]}\n" for i in range(40)))
    assert check_file(made, DataSettings(source="file")).warnings == ()
    listed = check_file(made, DataSettings(source="file", labels="x"))
    assert listed.warnings == (f"20 records have a label outside data.labels; {REFUSED}.",)


def test_pairs_of_answers_are_counted_and_not_shown(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    made = tmp_path / "a.csv"
    rows = [
        ("why", "because of it", "no"),
        ("why", "no", "because of it"),
        ("why", "because of it", " no "),
        ("how", "so", "so "),
        ("when", "now", "later on " * 20),
        ("where", "here", ""),
    ]
    made.write_text("text,label,rejected\n" + "".join(",".join(row) + "\n" for row in rows))
    data = DataSettings(source="file", rejected="rejected", task="generate")
    report = check_file(made, data, tokenizer, 256)
    found = report.preferences
    assert found is not None
    assert (report.rows, report.duplicates, report.empty, report.conflicting) == (6, 1, 1, 0)
    assert (found.prompts, found.ties, found.contradictory) == (3, 1, 3)
    assert found.longer == pytest.approx(2 / 5)
    assert report.labels == {}
    assert report.truncated == 0.0
    assert report.warnings == (
        f"1 records lack a value; {REFUSED}.",
        f"1 records {REPEATED}.",
        "1 pairs have two equal answers and teach nothing.",
        "3 pairs are preferred both ways round.",
    )
    with pytest.raises(DataError, match="no column 'worse'"):
        check_file(made, DataSettings(source="file", rejected="worse", task="generate"))


def test_repeated_records_of_several_units_are_all_trained_on(tmp_path: Path) -> None:
    made = tmp_path / "a.csv"
    rows = [("same", "x", "p1"), ("same", "x", "p2"), ("same", "x", "p1"), ("other", "y", "p1")]
    made.write_text("text,label,patient\n" + "".join(",".join(row) + "\n" for row in rows))
    data = DataSettings(source="file", heldout=0.0)
    for unit, repeated in (("", 2), ("patient", 1)):
        own = replace(data, unit=unit)
        assert check_file(made, own).duplicates == repeated
        assert len(site_from_file(own, path=str(made), name="north", seed=1).train) == 4 - repeated


def test_records_that_do_not_fit_are_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    made = tmp_path / "a.csv"
    rows = [(f"text {n}", "x" * (300 if n in (2, 4) else 5)) for n in range(8)]
    made.write_text("text,label\n" + "".join(",".join(row) + "\n" for row in rows))
    report = check_file(made, DataSettings(source="file", task="generate"), tokenizer, 128)
    assert (report.unfit, report.truncated) == ((2, 3), 0.0)
    assert report.warnings == (
        "2 records (the first: record 3) do not fit in train.max_length=128, even without their text; "
        f"{REFUSED}.",
    )


def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        check_file(tmp_path / "none.csv", DataSettings(source="file"))


def test_an_encoders_tokenizer_needs_no_token_that_ends_an_answer(tmp_path: Path) -> None:
    made = tmp_path / "rows.csv"
    made.write_text("text,label\n" + "word " * 50 + ",a\nshort,b\n")
    tokenizer = load_tokenizer(ModelSettings(name="tiny-bert", kind="encoder"))
    tokenizer.eos_token = None
    data = DataSettings(source="file", labels="a | b")
    assert check_file(made, data, tokenizer, 16, encodes=True).truncated == 0.5
