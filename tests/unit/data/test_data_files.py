"""Every way a file can be wrong, and what a person is told."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedllm.data.sources import load_records
from fedllm.errors import DataError
from fedllm.settings import DataSettings

SECRET = "zebra"
GOOD = f"text,label\n{SECRET} one,x\n{SECRET} two,y\n"


def settings(path: Path, **changes: object) -> DataSettings:
    return DataSettings(**({"source": "file", "path": str(path)} | changes))  # type: ignore[arg-type]


def load(path: Path, **changes: object) -> dict[str, list[str]]:
    records = load_records(settings(path, **changes))
    return {name: list(records[name]) for name in records.column_names}


def refusal(path: Path, **changes: object) -> str:
    with pytest.raises(DataError) as caught:
        load(path, **changes)
    message = str(caught.value)
    assert SECRET not in message
    assert path.name in message
    return message


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_the_three_kinds_of_file_read_alike(tmp_path: Path) -> None:
    columns = {"text": ["a, b", "line\nbreak", "ä"], "label": ["1", "2", "1"]}
    made = [
        write(tmp_path, "a.csv", 'text,label\n"a, b",1\n\n"line\nbreak",2\nä,1\n'),
        write(
            tmp_path,
            "a.jsonl",
            "\n".join(
                json.dumps({"label": int(label), "text": text})
                for text, label in zip(columns["text"], columns["label"], strict=True)
            ),
        ),
        tmp_path / "a.parquet",
    ]
    pq.write_table(pa.table({"text": columns["text"], "label": [1.0, 2.0, 1.0]}), made[2])
    for path in made:
        assert load(path) == columns, path.name


def test_site_and_unit_columns_come_along_as_strings(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "note,code,ward,patient\na,x, north ,007\nb,y,south,7\n")
    found = load(path, text="note", label="code", site="ward", unit="patient")
    assert found == {
        "text": ["a", "b"],
        "label": ["x", "y"],
        "site": ["north", "south"],
        "unit": ["007", "7"],
    }


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path) -> None:
    assert load(write(tmp_path, "a.csv", b"\xef\xbb\xbf" + GOOD.encode()))["label"] == ["x", "y"]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", GOOD)
    assert len(load(path)["text"]) == 2
    write(tmp_path, "a.csv", GOOD + "three,x\n")
    assert len(load(path)["text"]) == 3


def test_missing_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.csv").endswith("none.csv: no such file.")


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "a.csv").mkdir()
    assert "cannot be read (Is a directory)" in refusal(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    assert refusal(write(tmp_path, name, "")).endswith("the file is empty.")


def test_file_without_records(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, "a.csv", "text,label\n")).endswith("the file has no records.")
    assert refusal(write(tmp_path, "a.jsonl", "\n \n")).endswith("the file has no records.")
    pq.write_table(pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}),
                   tmp_path / "a.parquet")  # fmt: skip
    assert refusal(tmp_path / "a.parquet").endswith("the file has no records.")


def test_wrong_extension(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "a.xlsx", GOOD))
    assert message.endswith("unknown kind of file '.xlsx'; use .csv, .jsonl, .parquet.")


def test_missing_column_lists_the_columns_and_the_nearest(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "a.csv", "text,labels,other\na,x,1\n"))
    assert "no column 'label' (data.label). Its columns are text, labels, other." in message
    assert message.endswith("Did you mean 'labels'?")
    message = refusal(write(tmp_path, "a.jsonl", '{"text": "a", "zzz": 1}'))
    assert message.endswith("Its columns are text, zzz.")


def test_a_file_without_header_is_not_quoted(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "a.csv", f"{SECRET * 20},x\nb,y\n"))
    assert "no column 'text' (data.text); its first line looks like no header." in message


def test_a_column_that_occurs_twice(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "a.csv", "text,label,text\na,x,b\n"))
    assert "the column 'text' (data.text) occurs twice" in message


def test_not_utf8_names_the_byte(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "a.csv", b"text,label\nf\xfcr,x\n"))
    assert "not UTF-8 text (byte 0xfc at position 12)" in message


def test_ragged_csv_names_the_line(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "a.csv", GOOD + f"{SECRET}, and more,x\n"))
    assert "line 4 has 3 values, the header names 2 columns" in message


def test_open_quote(tmp_path: Path) -> None:
    assert "not valid csv near line" in refusal(write(tmp_path, "a.csv", GOOD + f'"{SECRET},x\n'))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f'{{"text": "{SECRET}"', "line 2 is not valid JSON"),
        (f'["{SECRET}", "x"]', "line 2 is not a JSON object"),
        (f'{{"text": ["{SECRET}"], "label": "x"}}', "the column 'text' holds list values"),
        (f'{{"text": "{SECRET} \\ud800", "label": "x"}}', "the column 'text' holds half a surrogate pair"),
        (f'{{"text": "{SECRET}"}}', "1 of 2 records have an empty 'label' (data.label): record 2."),
    ],
    ids=["cut", "array", "list", "surrogate", "missing"],
)
def test_bad_json_lines(tmp_path: Path, line: str, reason: str) -> None:
    assert reason in refusal(write(tmp_path, "a.jsonl", '{"text": "a", "label": "x"}\n' + line))


def test_damaged_parquet(tmp_path: Path) -> None:
    assert "not a readable parquet file" in refusal(write(tmp_path, "a.parquet", b"PAR1" + b"x" * 50))


def test_empty_values_are_counted_not_quoted(tmp_path: Path) -> None:
    rows = "".join(f"{SECRET},x\n   ,y\n" for _ in range(4))
    message = refusal(write(tmp_path, "a.csv", "text,label\n" + rows))
    assert (
        "4 of 8 records have an empty 'text' (data.text): record 2, 4, 6, .... Fill or remove them."
        in message
    )


def test_missing_numbers_are_empty(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "label": [1.0, float("nan")]}), tmp_path / "a.parquet")
    assert "1 of 2 records have an empty 'label'" in refusal(tmp_path / "a.parquet")


def test_labels_outside_the_list_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", f"text,label\na,x\nb,{SECRET}\nc,y\n")
    assert "1 of 3 records have a label that is not among the 2 of data.labels" in refusal(path, labels="y|x")


def test_nothing_left(tmp_path: Path) -> None:
    assert "no record is left" in refusal(write(tmp_path, "a.csv", GOOD), min_per_label=5)


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    letter = f"{SECRET} " * 30_000
    path = write(tmp_path, "long.csv", f"text,label\n{letter},x\nshort,y\n")
    assert load(path)["text"][0].split() == letter.split()
