from __future__ import annotations

from collections import Counter
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.data.sources import default_instruction, label_names, load_records
from fedllm.data.terminology import chapter_label
from fedllm.errors import ConfigError, DataError
from fedllm.settings import DataSettings


def test_icd10_texts_are_distinct_and_labels_short() -> None:
    records = load_records(DataSettings())
    texts = list(records["text"])
    assert len(texts) == len(set(texts)) > 30_000
    assert min(map(len, texts)) >= 10
    labels = label_names(DataSettings(), records)
    assert len(labels) == len(set(labels)) == 22
    assert all(len(label.split()) <= 6 and label == label.lower() for label in labels)
    assert {"neoplasms", "circulatory system", "eye", "blood", "injury"} <= set(labels)


def test_icd10_leaves_the_encounter_twins_out() -> None:
    assert not any(text.endswith("subsequent encounter") for text in load_records(DataSettings())["text"])


@pytest.mark.parametrize(
    ("description", "label"),
    [
        ("Neoplasms (C00-D49)", "neoplasms"),
        ("Diseases of the eye and adnexa (H00-H59)", "eye"),
        ("Certain infectious and parasitic diseases (A00-B99)", "infectious"),
        ("Factors influencing health status and contact with health services (Z00-Z99)",
         "factors influencing health status"),
    ],
)  # fmt: skip
def test_chapter_labels(description: str, label: str) -> None:
    assert chapter_label(description) == label


def test_mcc_has_every_network_and_no_reserved_range() -> None:
    data = DataSettings(source="mcc", unit="mcc")
    records = load_records(data)
    texts = list(records["text"])
    assert len(texts) == len(set(texts)) > 1000
    assert all(texts)
    assert not any("eserved" in label for label in records["label"])
    assert len(label_names(data, records)) == 14
    assert max(Counter(records["unit"]).values()) > 1
    assert load_records(DataSettings(source="mcc")).column_names == ["text", "label"]


def test_loading_twice_is_loading_once() -> None:
    assert load_records(DataSettings()) is load_records(DataSettings())


def test_limits_by_label() -> None:
    data = DataSettings(min_per_label=800, max_per_label=800)
    records = load_records(data)
    assert set(Counter(records["label"]).values()) == {800}
    assert len(label_names(data, records)) == 14
    assert set(records["text"]) <= set(load_records(DataSettings())["text"])


def test_data_labels_restricts_and_orders() -> None:
    data = DataSettings(labels="neoplasms | circulatory system", max_per_label=5)
    records = load_records(data)
    assert label_names(data, records) == ("neoplasms", "circulatory system")
    assert Counter(records["label"]) == {"neoplasms": 5, "circulatory system": 5}


def test_a_mistyped_label_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'neoplasm' is not a label .* Did you mean 'neoplasms'\?"):
        load_records(DataSettings(labels="neoplasm"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataSettings(site="ward"), "data.source=icd10 has no such column"),
        (DataSettings(unit="patient"), "data.source=icd10 has no column of units"),
        (DataSettings(source="mcc", unit="patient"), "no column of units but 'mcc'"),
    ],
)
def test_terminologies_have_no_other_columns(data: DataSettings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_records(data)


def test_instructions() -> None:
    assert default_instruction(DataSettings()) == "Name the ICD-10-CM chapter."
    assert default_instruction(DataSettings(source="mcc")) == "Name the merchant category."
    assert default_instruction(DataSettings(source="file")) == ""
    assert default_instruction(DataSettings(instruction="Mine.")) == "Mine."


@given(order=st.permutations(range(24)))
def test_the_limit_does_not_depend_on_the_order_of_rows(
    order: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("order") / "a.csv"
    path.write_text("text,label\n" + "".join(f"text {i},{'xyz'[i % 3]}\n" for i in order))
    records = load_records(DataSettings(source="file", path=str(path), max_per_label=3))
    kept = sorted(records["text"])
    path.write_text("text,label\n" + "".join(f"text {i},{'xyz'[i % 3]}\n" for i in range(24)) + "\n")
    assert kept == sorted(load_records(DataSettings(source="file", path=str(path), max_per_label=3))["text"])


def test_max_per_label_is_stable_when_records_join(tmp_path: Path) -> None:
    def kept(count: int) -> set[str]:
        path = tmp_path / f"{count}.csv"
        path.write_text("text,label\n" + "".join(f"text {i},x\n" for i in range(count)))
        return set(load_records(DataSettings(source="file", path=str(path), max_per_label=10))["text"])

    assert len(kept(100) - kept(101)) <= 1


def test_hub_class_numbers_become_names(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {"note": datasets.Value("string"), "y": datasets.ClassLabel(names=["no", "yes"])}
    )
    made = datasets.Dataset.from_dict({"note": ["a", "b"], "y": [1, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split: made)
    data = DataSettings(source="hub", name="some/set-1", text="note", label="y")
    assert load_records(data)[:] == {"text": ["a", "b"], "label": ["yes", "no"]}


def test_hub_errors_point_to_a_local_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(path: str, name: str | None, split: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"some/set-2 \(split train\) cannot be loaded .* data.source=file"):
        load_records(DataSettings(source="hub", name="some/set-2"))


@pytest.mark.parametrize("subset", ["", "other"])
def test_a_configuration_that_is_missing_or_unknown_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subset: str
) -> None:
    data = DataSettings(source="hub", name=str(_two_configurations(tmp_path, monkeypatch)), subset=subset)
    with pytest.raises(DataError, match=r"^data.subset: .* the configurations 'main', 'socratic'; name one"):
        load_records(data)


def test_subset_names_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(_two_configurations(tmp_path, monkeypatch))
    for subset in ("main", "socratic"):
        assert load_records(DataSettings(source="hub", name=name, subset=subset))["text"][:] == [subset]


def _two_configurations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a data set as a hub keeps one with two configurations, and a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    hub = folder / "hub"
    hub.mkdir()
    configs = ""
    for name in ("main", "socratic"):
        (hub / f"{name}.jsonl").write_text(f'{{"text": "{name}", "label": "x"}}\n')
        configs += f"- config_name: {name}\n  data_files: {name}.jsonl\n"
    (hub / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return hub


def test_hub_needs_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split: datasets.DatasetDict())
    with pytest.raises(DataError, match=r"data.split must name one split"):
        load_records(DataSettings(source="hub", name="some/set-3", split=""))
