"""Multiple choice: options of every kind of file, the right one's letter, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fedllm.config import Config
from fedllm.data.check import REFUSED, REPEATED, check_file
from fedllm.data.encode import PromptEncoder
from fedllm.data.options import fault, letter_of, letters, listed, record_options
from fedllm.data.records import Example
from fedllm.data.sites import simulated_site, site_from_file
from fedllm.data.sources import load_records
from fedllm.errors import ConfigError, DataError
from fedllm.settings import DataSettings

ROWS: list[dict[str, Any]] = [
    {"text": "Which pumps?", "options": ["heart", "lung", "skin"], "label": 0},
    {"text": "Which breathes?", "options": ["heart", "lung"], "label": 1},
    {"text": "Which covers?", "options": ["heart", "lung", "skin", "bone"], "label": 2},
]
RIGHT = ["A", "B", "C"]


def settings(path: Path | str, **changes: Any) -> DataSettings:
    values = {"source": "file", "path": str(path), "task": "choose", "options": "options", "answers": "index"}
    return DataSettings(**values | changes)


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def csv_file(path: Path) -> Path:
    lines = [f"{row['text']},{'|'.join(row['options'])},{row['label']}" for row in ROWS]
    path.write_text("\n".join(["text,options,label", *lines]) + "\n")
    return path


def parquet_file(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def columns_file(path: Path) -> Path:
    wide = [
        {"text": row["text"], "label": row["label"]}
        | {f"op{n}": dict(enumerate(row["options"])).get(n) for n in range(4)}
        for row in ROWS
    ]
    pq.write_table(pa.Table.from_pylist(wide), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "columns"])
def test_options_come_from_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    match kind:
        case "jsonl":
            data = settings(jsonl(tmp_path / "a.jsonl", ROWS))
        case "csv":
            data = settings(csv_file(tmp_path / "a.csv"))
        case "parquet":
            data = settings(parquet_file(tmp_path / "a.parquet"))
        case _:
            data = settings(columns_file(tmp_path / "a.parquet"), options="op0, op1,op2,op3")
    found = load_records(data)
    assert found["label"][:] == RIGHT
    assert found["options"][:] == [row["options"] for row in ROWS]


@pytest.mark.parametrize(
    ("answers", "labels"),
    [
        ("index", [0, 1, 2]),
        ("number", ["1", "2", "3"]),
        ("letter", ["a", "B", " c "]),
        ("text", ["heart", "lung", "skin"]),
    ],
)
def test_answers_are_named_in_four_ways(tmp_path: Path, answers: str, labels: list[Any]) -> None:
    rows = [row | {"label": label} for row, label in zip(ROWS, labels, strict=True)]
    found = load_records(settings(jsonl(tmp_path / "a.jsonl", rows), answers=answers))
    assert found["label"][:] == RIGHT


def test_a_hubs_class_names_are_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "opa": datasets.Value("string"),
            "opb": datasets.Value("string"),
            "cop": datasets.ClassLabel(names=["a", "b"]),
        }
    )
    made = datasets.Dataset.from_dict(
        {"text": ["x"], "opa": ["p"], "opb": ["q"], "cop": [1]}, features=features
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split: made)
    data = settings("", source="hub", name="a/b", options="opa,opb", label="cop", answers="letter")
    assert load_records(data)[0] == {"text": "x", "label": "B", "options": ["p", "q"]}


@given(st.lists(st.text("xyz|", min_size=1), min_size=2, max_size=26, unique=True), st.data())
def test_every_way_of_naming_means_the_same_option(options: list[str], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(options) - 1))
    names = {
        "index": str(place),
        "number": str(place + 1),
        "letter": letters(26)[place],
        "text": options[place],
    }
    for kind, answer in names.items():
        assert fault(options, answer, kind) == ""
        assert letter_of(options, answer, kind) == letters(26)[place]
    assert listed(options).split("\n")[place] == f"{letters(26)[place]}. {options[place]}"


def test_options_missing_at_the_end_are_none() -> None:
    assert record_options(["x", "y", None, float("nan")]) == ("x", "y")
    assert record_options(["x|y| "]) == ("x", "y")
    assert record_options([["x", 2]]) == ("x", "2")
    assert record_options([[]]) == record_options([""]) == record_options([None]) == ()
    assert record_options([float("nan")]) == ()


def test_a_number_is_written_alike_in_options_and_answers(tmp_path: Path) -> None:
    # an integer column with gaps arrives as floats
    table = {"text": ["q", "r"], "a": [1.0, 3.0], "b": [2.5, 4.0], "label": [1.0, 4.0]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    found = load_records(settings(tmp_path / "a.parquet", options="a,b", answers="text"))
    assert found["options"][:] == [["1", "2.5"], ["3", "4"]]
    assert found["label"][:] == ["A", "B"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_private_site_keeps_a_record_without_options(tmp_path: Path, kind: str) -> None:
    rows = [*ROWS, {"text": "Which?", "options": None, "label": 0}]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        csv_file(path)
        path.write_text(path.read_text() + "Which?,,0\n")
    else:
        jsonl(path, rows)
    site = site_from_file(settings(""), path=str(path), name="north", seed=1, lenient=True)
    assert [example.text for example in site.train if not example.usable] == ["Which?"]
    report = check_file(path, settings(""))
    assert report.choices is not None
    assert report.choices.faults == {"fewer than two options": (1, 4)}
    with pytest.raises(DataError, match="record 4 has fewer than two options"):
        load_records(settings(path))


@pytest.mark.parametrize(
    ("row", "answers", "reason"),
    [
        ({"options": ["secret"], "label": 0}, "index", "fewer than two options"),
        ({"options": [], "label": 0}, "index", "fewer than two options"),
        ({"options": ["secret"] * 27, "label": 0}, "index", "more than 26 options"),
        ({"options": ["secret", "", "y"], "label": 0}, "index", "an empty option before the last one"),
        ({"options": ["secret", "y"], "label": 2}, "index", "not the index of one of its options"),
        ({"options": ["secret", "y"], "label": -1}, "index", "not the index of one"),
        ({"options": ["secret", "y"], "label": 0}, "number", "not the number of one"),
        ({"options": ["secret", "y"], "label": "C"}, "letter", "not the letter of one"),
        ({"options": ["secret", "y"], "label": "secre"}, "text", "not the text of one"),
        ({"options": ["secret", "secret"], "label": "secret"}, "text", "the text of two options"),
        ({"options": {"A": "secret"}, "label": "A"}, "letter", "no readable options in 'options'"),
        ({"options": [["secret"], "y"], "label": "A"}, "letter", "no readable options"),
        ({"options": 7, "label": "A"}, "letter", "no readable options"),
        ({"label": "A"}, "letter", "fewer than two options"),
        ({"options": None, "label": "A"}, "letter", "fewer than two options"),
    ],
)
def test_a_wrong_record_is_named_and_not_quoted(
    tmp_path: Path, row: dict[str, Any], answers: str, reason: str
) -> None:
    good = {"text": "secret", "options": ["secret", "y"], "label": letter(answers)}
    path = jsonl(tmp_path / "a.jsonl", [good, {"text": "secret", **row}])
    with pytest.raises(DataError) as caught:
        load_records(settings(path, answers=answers))
    message = str(caught.value)
    assert str(path) in message
    assert "record 2" in message
    assert reason in message
    assert "secret" not in message.replace(str(path), "")


def letter(answers: str) -> str:
    return {"index": "0", "number": "1", "letter": "A", "text": "y"}[answers]


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'option' \(data.options\).* Did you mean 'options'"):
        load_records(settings(jsonl(tmp_path / "a.jsonl", ROWS), options="option"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.options": " , "}, "needs the column of each record's options"),
        ({"data.task": "classify"}, "reads none; use choose"),
        ({"data.task": "classify", "data.options": "", "data.prompt": "{text}{options}"}, "reads none"),
        ({"data.labels": "A | B"}, "leave it empty"),
        ({"data.source": "icd10"}, "has no options"),
        ({"data.partition": "dirichlet"}, "name no kind of record"),
        ({"model.kind": "encoder"}, "data.task=choose needs a causal model"),
        ({"evaluation.generate": True}, "nothing is written"),
        ({"data.answers": "roman"}, "'roman' is not one of letter, index"),
    ],
)
def test_settings_that_cannot_hold_are_refused(changes: dict[str, Any], message: str) -> None:
    values = {"data.source": "file", "data.task": "choose", "data.options": "options"}
    Config.from_flat(values)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        Config.from_flat(values | changes)


def test_a_site_keeps_units_and_drops_exact_repetitions(tmp_path: Path) -> None:
    rows = [
        {
            "text": f"q {n // 2}",
            "options": ["x", "y", "z"][: 2 + n % 2],
            "label": n % 2,
            "patient": f"p{n % 5}",
        }
        for n in range(40)
    ]
    turned = {"text": "q 1", "options": ["y", "x"], "label": 1, "patient": "p1"}
    data = settings(jsonl(tmp_path / "a.jsonl", [*rows, rows[0], turned]), unit="patient", heldout=0.0)
    site = simulated_site(data, sites=1, seed=1, index=0)
    assert site.labels == ("A", "B", "C")
    # the same question with its options in another order is a record of its own
    assert len(site.train) == 41
    assert len(site.units) == 5
    without_order = {(item.text, item.unit, item.options) for item in site.train}
    assert ("q 1", "p1", ("y", "x")) in without_order
    own = site_from_file(data, path=str(tmp_path / "a.jsonl"), name="north", seed=1)
    assert own.fingerprint == site.fingerprint


def test_repetitions_and_held_out_questions_never_meet(tmp_path: Path) -> None:
    rows = [{"text": f"q {n // 3}", "options": ["x", "y", str(n % 3)], "label": n % 3} for n in range(120)]
    site = simulated_site(settings(jsonl(tmp_path / "a.jsonl", rows), heldout=0.4), sites=1, seed=3, index=0)
    assert site.heldout
    assert not {item.text for item in site.train} & {item.text for item in site.heldout}


def test_a_check_counts_what_is_wrong(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        *ROWS,
        ROWS[0],
        {"text": "Which breathes?", "options": ["lung", "heart"], "label": 1},
        {"text": "z" * 500, "options": ["x", "x"], "label": 0},
        {"text": "few", "options": ["x"], "label": 0},
        {"text": "outside", "options": ["x", "y"], "label": 2},
        {"text": "outside", "options": ["x", "y"], "label": 3},
    ]
    report = check_file(jsonl(tmp_path / "a.jsonl", rows), settings(""), tokenizer, 128)
    assert report.labels == {"A": 3, "B": 2, "C": 1}
    assert (report.rows, report.duplicates, report.conflicting) == (9, 1, 1)
    assert report.truncated == pytest.approx(1 / 6)
    assert report.choices is not None
    assert (report.choices.fewest, report.choices.most, report.choices.repeated) == (2, 4, 1)
    assert report.warnings == (
        f"1 records {REPEATED}.",
        f"1 records have fewer than two options (the first: record 7); {REFUSED}.",
        "2 records have an answer that is not the index of one of its options (the first: record 8); "
        f"{REFUSED}.",
        "1 texts with the same options have more than one right one.",
        "1 records have two options of the same text.",
        "16.7% of texts lose their end at train.max_length=128.",
    )


def encoder(tokenizer: PreTrainedTokenizerFast, prompt: str, max_length: int) -> PromptEncoder:
    return PromptEncoder(tokenizer, instruction="", prompt=prompt, max_length=max_length)


@pytest.mark.parametrize("prompt", ["{text}\n{options}", "{text}"])
def test_a_prompt_shows_lettered_options(tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
    record = encoder(tokenizer, prompt, 200).encode(Example("Which?", "B", "", options=("{text}", "lung")))
    assert "user\nWhich?\nA. {text}\nB. lung<|im_end|>" in tokenizer.decode(record.prompt)
    assert tokenizer.decode(record.answer) == "B<|im_end|>"
    assert record.options == 2


@given(length=st.integers(80, 200), size=st.integers(0, 300))
def test_only_the_question_is_cut(tokenizer: PreTrainedTokenizerFast, length: int, size: int) -> None:
    made = encoder(tokenizer, "{text}\n{options}", length)
    example = Example("ab " * size, "A", "", options=("heart", "lung"))
    record = made.encode(example)
    assert "\nA. heart\nB. lung<|im_end|>" in tokenizer.decode(record.prompt)
    assert len(record.prompt) + len(record.answer) <= length
    whole = made.prompt_ids(example.text, "", example.options)
    assert record.truncated == (len(whole) + len(record.answer) > length)


def test_options_that_cannot_fit_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="template and options do not fit in train.max_length=100") as caught:
        encoder(tokenizer, "{text}", 100).encode(Example("?", "A", "", options=("secret" * 20, "y")))
    assert "secret" not in str(caught.value)
