"""Model cards: their lines of code are run as they are written, in the folder they describe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.data.sources import public_labels
from fedllm.federation.generate import answer, export_adapter, export_gguf, export_merged
from fedllm.models.load import resolve
from fedllm.runs.folder import load_config
from fedllm.settings import ModelSettings

ENCODER = {"model__kind": "encoder", "model__name": "tiny-bert", "adapter__method": "lora"}
SHORT = {"federation__rounds": 1, "federation__sites": 1, "train__lr": 0.1}


def run_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a card's lines of code in its folder, as they are, and return what they define."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    lines = card.partition("```python\n")[2].partition("```\n")[0]
    assert lines
    defined: dict[str, Any] = {}
    with monkeypatch.context() as there:
        there.chdir(folder)
        exec(compile(lines, "README.md", "exec"), defined)
    return defined


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_an_encoders_card_gives_the_runs_labels(
    federate: Any,
    scored: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pooling: str,
) -> None:
    folder = federate(**ENCODER, **SHORT, model__pooling=pooling)
    capsys.readouterr()
    defined = run_card(folder.adapter_dir, monkeypatch)
    _, labels, expected = scored(folder, "A text.")
    found = torch.log_softmax(defined["logits"][0].detach(), dim=-1)
    assert torch.allclose(found, expected, atol=1e-5)
    assert defined["logits"].abs().max() > 0.01
    assert tuple(defined["labels"]) == labels
    assert capsys.readouterr().out.strip() == labels[int(expected.argmax())]


@pytest.mark.parametrize("method", ["fed-sb", "ia3", "prompt"])
def test_a_causal_models_card_scores_labels_as_the_run_did(
    federate: Any,
    scored: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
) -> None:
    strategy = "fed-sb" if method == "fed-sb" else "average"
    folder = federate(**SHORT, adapter__method=method, strategy__name=strategy)
    capsys.readouterr()
    defined = run_card(folder.adapter_dir, monkeypatch)
    _, labels, expected = scored(folder, "A text.")
    assert tuple(defined["labels"]) == labels
    found = torch.tensor([defined["score"](label) for label in labels])
    assert torch.allclose(found, expected, atol=1e-3)
    assert capsys.readouterr().out.strip() == labels[int(expected.argmax())]


def test_a_card_for_options_scores_their_letters(
    federate: Any, scored: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [{"text": f"Which is {n}?", "options": ["this", "that"], "label": n % 2} for n in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = {"data__source": "file", "data__path": str(path), "data__options": "options"}
    folder = federate(**SHORT, **file, data__task="choose", data__answers="index")
    defined = run_card(folder.adapter_dir, monkeypatch)
    _, _, expected = scored(folder, "A text.", options=("the first option", "the second"))
    found = torch.tensor([defined["score"](label) for label in defined["labels"]])
    assert torch.allclose(found, expected, atol=1e-3)


def test_a_card_for_free_text_writes_what_the_run_would(
    federate: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = federate(**SHORT, adapter__method="lora", data__task="generate", data__prompt="Say: {text}")
    capsys.readouterr()
    run_card(folder.adapter_dir, monkeypatch)
    said = capsys.readouterr().out.strip()
    _, tuned = answer(folder.path, "A text.")
    assert said == tuned
    assert said


@pytest.mark.parametrize("form", ["merged", "gguf"])
def test_a_whole_models_card_scores_as_the_adapter_did(
    federate: Any, scored: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str
) -> None:
    folder = federate(**SHORT, adapter__method="lora")
    target = tmp_path / form
    if form == "merged":
        export_merged(folder.path, target)
    else:
        export_gguf(folder.path, target, quantization="f32")
    defined = run_card(target, monkeypatch)
    _, labels, expected = scored(folder, "A text.")
    found = torch.tensor([defined["score"](label) for label in labels])
    assert torch.allclose(found, expected, atol=1e-3)
    card = (target / "README.md").read_text(encoding="utf-8")
    assert "`tiny-llama` with an adapter merged into it, trained together by 1 simulated site" in card
    assert "| site-0 | 4 |" in card


def test_a_merged_encoders_card_answers(
    federate: Any, scored: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = federate(**ENCODER, **SHORT)
    defined = run_card(export_merged(folder.path, tmp_path / "merged"), monkeypatch)
    _, _, expected = scored(folder, "A text.")
    assert torch.allclose(torch.log_softmax(defined["logits"][0].detach(), dim=-1), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["hydra", "dora"])
def test_where_peft_needs_the_base_the_card_says_how_to_get_it(
    federate: Any, scored: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    folder = federate(**SHORT, adapter__method=method, strategy__name="average")
    card = (folder.adapter_dir / "README.md").read_text(encoding="utf-8")
    assert "PeftModel" not in card
    assert "`fedllm export RUN DIR` reads the base's weights and writes an adapter that PEFT loads." in card
    defined = run_card(export_adapter(folder.path, tmp_path / "out"), monkeypatch)
    _, labels, expected = scored(folder, "A text.")
    found = torch.tensor([defined["score"](label) for label in labels])
    assert torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy__name": "fedsa", "adapter__method": "lora"},
        {"federation__mode": "local", "strategy__name": "fedit", "adapter__method": "lora"},
    ],
)
def test_a_sites_own_adapter_has_a_card_of_its_own(
    federate: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, str]
) -> None:
    folder = federate(**SHORT | {"federation__sites": 2} | settings)
    card = (folder.adapter_dir / "README.md").read_text(encoding="utf-8")
    assert "PeftModel" not in card
    assert "`fedllm export RUN DIR --site NAME` writes a site's own adapter" in card
    there = folder.site_dir("site-1") / "adapter"
    assert run_card(there, monkeypatch)["labels"]
    assert "told by the report of the run" in (there / "README.md").read_text(encoding="utf-8")
    target = export_adapter(folder.path, tmp_path / "out", site="site-1")
    assert run_card(target, monkeypatch)["labels"]
    exported = (target / "README.md").read_text(encoding="utf-8")
    assert "# LoRA adapter of tiny-llama, site site-1\n" in exported
    assert "| site-1 | 4 |" in exported
    assert "| site-0 | 4 |" not in exported
    alone = "each alone: a baseline" in exported
    assert alone == ("federation__mode" in settings)


def test_a_card_says_what_the_model_is_asked(federate: Any) -> None:
    asked = {"data__instruction": "Name it | briefly.", "data__prompt": "Seller:\n{text}"}
    folder = federate(**SHORT, **asked)
    card = (folder.adapter_dir / "README.md").read_text(encoding="utf-8")
    labels = " \\| ".join(public_labels(load_config(folder).data))
    assert f"| labels, in order | {labels} |\n" in card
    assert "| instruction | `'Name it \\| briefly.'` |\n" in card
    assert "| prompt | `'Seller:\\n{text}'` |\n" in card


def test_labels_that_only_the_records_name_stay_out_of_the_card(federate: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"text {n},{'ab'[n % 2]}-secret\n" for n in range(60)))
    folder = federate(**SHORT, data__source="file", data__path=str(path))
    card = (folder.adapter_dir / "README.md").read_text(encoding="utf-8")
    assert "| labels, in order | those found in the sites' records; the recipe lists none |" in card
    assert "-secret" not in card
    assert "| instruction | none |" in card


def test_a_card_of_a_base_in_a_folder_says_where_to_put_it(
    federate: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = shutil.copytree(resolve(ModelSettings(name="tiny-llama")), tmp_path / "ward-model")
    folder = federate(**SHORT, model__name=ModelSettings().name, model__path=str(model))
    place = folder.adapter_dir / "path" / "to"
    place.mkdir(parents=True)
    (place / "ward-model").symlink_to(model)
    assert run_card(folder.adapter_dir, monkeypatch)["labels"]
