"""Rows of a question set: from files of each kind, from the hub, and errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedllm.data.benchmarks import file_rows, hub_rows
from fedllm.errors import DataError

ROW = {"question": 'Why, "so"?\u2028', "options": [{"key": "A", "value": "x"}]}
PLAIN = {"config": "", "splits": ("train",), "quarter": False, "converted": False}


def test_lists_stay_lists(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\ufeff" + json.dumps(ROW, ensure_ascii=False) + "\n\n")
    pq.write_table(pa.Table.from_pylist([ROW]), tmp_path / "a.parquet")
    assert file_rows(tmp_path / "a.jsonl") == file_rows(tmp_path / "a.parquet") == [ROW]


def test_a_csv_holds_texts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"a, b\nc",1\n')
    assert file_rows(tmp_path / "a.csv") == [{"text": "a, b\nc", "label": "1"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x", "unknown kind of file"),
        ("missing.csv", None, "cannot be read"),
        ("a.jsonl", b"secret", "not a readable .jsonl"),
        ("a.jsonl", b"[1]\n", "no rows with named columns"),
        ("a.jsonl", b"", "no rows"),
        ("a.csv", b"text,label\n", "no rows"),
        ("a.csv", b"text\n\xff\n", "not a readable .csv"),
        ("a.csv", b"label,secret,secret\na,x,y\n", "columns 2 and 3 have one name; rename one"),
        ("a.parquet", b"secret", "not a readable .parquet"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        file_rows(tmp_path / name)
    assert "secret" not in str(caught.value)


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="columns 1 and 2 have one name"):
        file_rows(tmp_path / "a.parquet")


def test_columns_without_a_name_may_be_many(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label,,\na,1,,\n")
    assert file_rows(tmp_path / "a.csv")[0]["label"] == "1"


def hub(**splits: int) -> datasets.DatasetDict:
    columns = {name: {"n": [f"{name} {i}" for i in range(count)]} for name, count in splits.items()}
    return datasets.DatasetDict({name: datasets.Dataset.from_dict(own) for name, own in columns.items()})


def test_hub_splits_are_joined_and_a_quarter_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(path: str, **options: Any) -> datasets.DatasetDict:
        asked.append((path, options))
        return hub(train=5, test=3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    both = PLAIN | {"splits": ("train", "test")}
    rows = hub_rows("a/b", **both)
    assert [row["n"] for row in rows] == [*(f"train {i}" for i in range(5)), *(f"test {i}" for i in range(3))]
    joined = datasets.concatenate_datasets([hub(train=5)["train"], hub(test=3)["test"]])
    expected = joined.train_test_split(0.25, seed=42)["test"]["n"]
    assert [row["n"] for row in hub_rows("a/b", **both | {"quarter": True})] == list(expected)
    hub_rows("a/b", **PLAIN | {"config": "c"})
    hub_rows("a/b", **PLAIN | {"config": "c", "converted": True})
    assert asked[2:] == [
        ("a/b", {"name": "c"}),
        ("a/b", {"data_dir": "c", "revision": "refs/convert/parquet"}),
    ]


def test_without_a_network_a_local_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(path: str, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"a/b \(train\) cannot be loaded .* --file"):
        hub_rows("a/b", **PLAIN)
