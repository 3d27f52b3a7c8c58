"""``fedllm evaluate`` on made-up rows of the public sets' columns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

from fedllm.cli.app import app
from fedllm.errors import ConfigError, DataError, RunError
from fedllm.evaluation.flowertune import (
    TASKS,
    Question,
    Task,
    Verdict,
    fixed_verdict,
    leaderboard_verdict,
    questions,
)
from fedllm.federation import flowertune
from fedllm.federation.flowertune import evaluate_run
from fedllm.federation.generate import export_adapter
from fedllm.models.load import load_base, load_tokenizer
from fedllm.settings import ModelSettings

ROWS: dict[str, list[dict[str, Any]]] = {
    "fpb": [{"sentence": "Sales rose again. " * (1 + n % 3), "label": n % 3} for n in range(5)],
    "fiqa": [{"sentence": f"X is {n}", "sentiment_score": n / 2 - 1, "format": "post"} for n in range(3)],
    "tfns": [{"text": f"$X {n}", "label": n} for n in range(3)],
    "pubmedqa": [
        {"CONTEXTS": ["One.", "Two."], "QUESTION": f"Does {n}?", "final_decision": gold}
        for n, gold in enumerate(("maybe", "no", "yes"))
    ],
    "medmcqa": [
        {"question": f"Q{n}", "opa": "p", "opb": "q", "opc": "r", "opd": "s", "cop": n} for n in (0, 3)
    ],
    "medqa": [{"question": "Q", "options": [{"key": "A", "value": "p"}], "answer": "p"}],
    "careqa": [{"question": "Q", "op1": "p", "op2": "q", "op3": "r", "op4": "s", "cop": 1}],
}


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(task: str) -> Path:
        path = tmp_path / f"{task}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[task]))
        return path

    return write


def loaded(run: Path, folder: Path) -> tuple[PeftModel, Any]:
    """Return the run's tuned model and its tokenizer, loaded by hand."""
    settings = ModelSettings(name="tiny-llama", dtype="float32")
    adapter = export_adapter(run, folder / "adapter")
    return PeftModel.from_pretrained(load_base(settings), adapter).eval(), load_tokenizer(settings)


def alone(model: PeftModel, tokenizer: Any, prompt: str, most: int) -> str:
    ids = torch.tensor([tokenizer(prompt).input_ids])
    out = model.generate(input_ids=ids, max_new_tokens=most, do_sample=False, pad_token_id=0)  # type: ignore[no-untyped-call]
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that fills with the texts a run's model is scored by."""
    said: list[str] = []

    def watched(verdict: Callable[..., Verdict]) -> Callable[..., Verdict]:
        def score(task: Task, text: str, question: Question) -> Verdict:
            said.append(text)
            return verdict(task, text, question)

        return score

    monkeypatch.setattr(flowertune, "leaderboard_verdict", watched(leaderboard_verdict))
    monkeypatch.setattr(flowertune, "fixed_verdict", watched(fixed_verdict))
    return said


def test_finance_is_padded_and_read_as_in_the_public_code(
    run: Path, file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flowertune, "_LENGTH", 230)
    said = written(monkeypatch)
    evaluate_run(run, ["fpb"], mode="leaderboard", file=file("fpb"))
    model, tokenizer = loaded(run, tmp_path)
    prompts = [question.prompt for question in questions(TASKS["fpb"], ROWS["fpb"])]
    torch.manual_seed(2024)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model.resize_token_embeddings(len(tokenizer))
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    widths = batch["attention_mask"].sum(dim=1)
    assert len(set(widths.tolist())) == 3
    assert batch["attention_mask"][0, -1] == 0, "padding is on the right"
    out = model.generate(**batch, max_length=230, eos_token_id=tokenizer.eos_token_id)  # type: ignore[no-untyped-call]
    assert said == [tokenizer.decode(row, skip_special_tokens=True) for row in out]


def test_medical_answers_are_as_long_as_the_first_right_one(
    run: Path, file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = written(monkeypatch)
    evaluate_run(run, ["pubmedqa"], mode="leaderboard", file=file("pubmedqa"))
    model, tokenizer = loaded(run, tmp_path)
    prompts = [question.prompt for question in questions(TASKS["pubmedqa"], ROWS["pubmedqa"])]
    # five bytes: maybe
    assert said == [alone(model, tokenizer, prompt, 5) for prompt in prompts]


def test_of_equal_medical_prompts_the_last_answer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def write(model: object, tokenizer: object, prompts: list[str], *, new: int) -> list[str]:
        lengths.append(new)
        return [f"{prompts[0]} {new}"]

    monkeypatch.setattr(flowertune, "_write", write)
    monkeypatch.setattr(flowertune, "_BATCHES", {"medical": 2})
    asked = [Question(prompt=p, gold=g) for p, g in (("p", "no"), ("q", "maybe"), ("p", "yes"))]
    tokenizer = load_tokenizer(ModelSettings(name="tiny-llama"))
    found = flowertune._leaderboard_answers(None, tokenizer, TASKS["pubmedqa"], asked)  # type: ignore[arg-type]
    assert lengths == [2, 2, 3]
    assert found == ["p 3", "q 2", "p 3"]


@pytest.mark.parametrize("task", ["fpb", "medmcqa"])
@pytest.mark.parametrize("untuned", [False, True])
def test_mended_answers_do_not_depend_on_the_batch(
    run: Path,
    file: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    untuned: bool,
) -> None:
    said = written(monkeypatch)
    evaluate_run(run, [task], mode="fixed", file=file(task), untuned=untuned)
    model, tokenizer = loaded(run, tmp_path)
    prompts = [question.prompt for question in questions(TASKS[task], ROWS[task])]
    tuned = [alone(model, tokenizer, prompt, 16) for prompt in prompts]
    with model.disable_adapter():
        base = [alone(model, tokenizer, prompt, 16) for prompt in prompts]
    assert tuned != base
    assert said == (base if untuned else tuned)


def test_a_bases_repetition_penalty_holds_in_leaderboard_mode_alone(
    run: Path, file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded(run, tmp_path)
    prompts = [question.prompt for question in questions(TASKS["pubmedqa"], ROWS["pubmedqa"])]
    plain = [alone(model, tokenizer, prompt, 16) for prompt in prompts]

    def with_penalty(settings: ModelSettings) -> Any:
        base = load_base(settings)
        base.generation_config.repetition_penalty = 5.0
        return base

    monkeypatch.setattr(flowertune, "load_base", with_penalty)
    said = written(monkeypatch)
    evaluate_run(run, ["pubmedqa"], mode="fixed", file=file("pubmedqa"))
    assert said == plain
    said.clear()
    evaluate_run(run, ["pubmedqa"], mode="leaderboard", file=file("pubmedqa"))
    # five bytes: maybe
    assert said != [alone(model, tokenizer, prompt, 5) for prompt in prompts]


def test_scores_are_means_over_questions_and_sets(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_hub = {task.hub: ROWS[name] for name, task in TASKS.items()}
    monkeypatch.setattr(flowertune, "hub_rows", lambda name, **options: by_hub[name])

    def right_in_the_first(model: object, tokenizer: object, task: Any, asked: list[Question]) -> list[str]:
        return [asked[0].gold, *["?"] * (len(asked) - 1)]

    monkeypatch.setattr(flowertune, "_fixed_answers", right_in_the_first)
    found = evaluate_run(run, ["medical"], mode="fixed")
    assert [(one.task, one.records, one.accuracy, one.unread) for one in found.results] == [
        ("pubmedqa", 3, pytest.approx(1 / 3), pytest.approx(2 / 3)),
        ("medmcqa", 2, 0.5, 0.5),
        ("medqa", 1, 1.0, 0.0),
        ("careqa", 1, 1.0, 0.0),
    ]
    assert found.mean == pytest.approx((1 / 3 + 0.5 + 1 + 1) / 4)
    assert found.traffic_mib > 0
    assert all(one.complete for one in found.results)
    kept = json.loads((run / "flowertune" / "pubmedqa-medmcqa-medqa-careqa-fixed.json").read_text())
    assert kept["mean"] == found.mean
    assert kept["quantization"] == "none"
    assert "torch" in kept["versions"]
    limited = evaluate_run(run, ["medmcqa"], mode="fixed", limit=1)
    assert [(one.records, one.complete) for one in limited.results] == [(1, False)]
    assert json.loads((run / "flowertune" / "medmcqa-fixed-part.json").read_text())["limit"] == 1
    assert not (run / "flowertune" / "medmcqa-fixed.json").exists()


def test_the_command_prints_scores_traffic_and_what_is_no_leaderboard_figure(
    run: Path, file: Callable[[str], Path]
) -> None:
    words = ["evaluate", str(run), "--task", "pubmedqa", "--file", str(file("pubmedqa")), "--limit", "2"]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "150"})
    assert done.exit_code == 0, done.output
    assert "no label found %" in done.output
    assert "MiB of 200,000" in done.output
    assert "no leaderboard figure" in done.output


def test_wrong_input_is_refused(
    run: Path, file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="'fpd' is not one of fpb, fiqa"):
        evaluate_run(run, ["fpd"], mode="fixed")
    with pytest.raises(ConfigError, match="ranked apart"):
        evaluate_run(run, ["fpb", "medqa"], mode="fixed")
    with pytest.raises(ConfigError, match="--mode: 'best'"):
        evaluate_run(run, ["fpb"], mode="best")
    with pytest.raises(ConfigError, match="rows of one task"):
        evaluate_run(run, ["finance"], mode="fixed", file=file("fpb"))
    with pytest.raises(ConfigError, match="at least one"):
        evaluate_run(run, [], mode="fixed")
    with pytest.raises(DataError, match="row 1 has no 'sentence'"):
        evaluate_run(run, ["fpb"], mode="fixed", file=file("tfns"))
    with pytest.raises(RunError):
        evaluate_run(tmp_path / "nothing", ["fpb"], mode="fixed")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "events.jsonl").unlink()
    with pytest.raises(RunError, match="no finished adapter yet"):
        evaluate_run(unfinished, ["fpb"], mode="fixed")
    with pytest.raises(RunError, match="no adapter of site 'north'"):
        evaluate_run(run, ["fpb"], mode="fixed", site="north")
    with pytest.raises(DataError, match="cannot be read"):
        evaluate_run(run, ["fpb"], mode="fixed", file=tmp_path / "none.csv")

    def offline(path: str, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"takala/financial_phrasebank .* --file"):
        evaluate_run(run, ["fpb"], mode="fixed")
