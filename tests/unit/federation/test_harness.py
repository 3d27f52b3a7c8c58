"""``fedllm evaluate --task lm-eval:...``.

The harness is not among the packages of the tests (it brings 140 MB): a module of its name takes its place,
scores with the model it is given, and remembers what it was asked.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

from fedllm.cli.app import app
from fedllm.errors import ConfigError, DataError, RunError
from fedllm.federation import harness
from fedllm.federation.generate import export_adapter
from fedllm.federation.harness import evaluate_with_harness
from fedllm.models.load import load_base, load_tokenizer
from fedllm.runs.folder import load_config, open_run
from fedllm.settings import ModelSettings

TEXT = "The heart pumps blood."


def log_likelihood(model: Any, tokenizer: Any) -> float:
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    with torch.no_grad():
        logs = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), dim=-1)
    return float(logs.gather(1, ids[0, 1:, None]).sum())


class Scorer:
    """Takes the place of the harness's wrapper of a model object."""

    def __init__(self, *, pretrained: Any, tokenizer: Any, batch_size: int) -> None:
        assert isinstance(pretrained, PeftModel)
        assert not pretrained.training
        self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size


class Tasks:
    """Takes the place of the harness's registry of tasks."""

    all_tasks = ("pubmedqa", "medqa_4options", "broken")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put a harness in place and return what it is asked."""
    calls: list[dict[str, Any]] = []

    def simple_evaluate(*, model: Scorer, tasks: list[str], **options: Any) -> dict[str, Any]:
        calls.append({"tasks": tasks, "batch_size": model.batch_size, **options})
        if "broken" in tasks:
            raise ConnectionError("no route to the data set")
        value = log_likelihood(model.model, model.tokenizer)
        results = {
            name: {
                "alias": name,
                "sample_len": 2,
                "acc,none": value,
                "acc_stderr,none": 0.25,
                "f1,strict": "N/A",
            }
            for name in tasks
        }
        return {"results": results, "n-shot": dict.fromkeys(tasks, 0), "lm_eval_version": "9"}

    for name, content in (
        ("lm_eval", {"simple_evaluate": simple_evaluate}),
        ("lm_eval.models", {}),
        ("lm_eval.models.huggingface", {"HFLM": Scorer}),
        ("lm_eval.tasks", {"TaskManager": Tasks}),
    ):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_base_and_tuned_model_are_scored_side_by_side(
    run: Path, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    found = evaluate_with_harness(run, ["pubmedqa", "medqa_4options"], limit=5)
    settings = ModelSettings(name="tiny-llama", dtype="float32")
    tokenizer = load_tokenizer(settings)
    base = log_likelihood(load_base(settings).eval(), tokenizer)
    adapter = export_adapter(run, tmp_path / "adapter")
    tuned = log_likelihood(PeftModel.from_pretrained(load_base(settings), adapter).eval(), tokenizer)
    assert abs(tuned - base) > 0.1
    first, blank, *_ = found.measures
    assert (first.task, first.metric, first.error) == ("pubmedqa", "acc", 0.25)
    assert (first.base, first.tuned) == pytest.approx((base, tuned), abs=1e-4)
    assert (blank.metric, blank.base, blank.tuned, blank.error) == ("f1 (strict)", None, None, None)
    assert len(found.measures) == 4
    assert [call["limit"] for call in asked] == [5, 5]
    assert {call["batch_size"] for call in asked} == {3}
    assert found.file == run / "evaluations" / "lm-eval-pubmedqa-medqa_4options-limit5.json"
    kept = json.loads(found.file.read_text())
    assert kept["measures"][0]["tuned"] == first.tuned
    assert kept["harness"]["lm_eval_version"] == "9"
    assert kept["harness"]["n-shot"] == {"pubmedqa": 0, "medqa_4options": 0}
    assert "torch" in kept["versions"]


def test_the_command_prints_one_table(run: Path, asked: list[dict[str, Any]], tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("task: own\n")
    words = ["evaluate", str(run), "--task", f"lm-eval:pubmedqa,{own}", "--limit", "2"]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "150"})
    assert done.exit_code == 0, done.output
    assert asked[0]["tasks"] == ["pubmedqa", str(own)]
    head = done.output.splitlines()[0].split()
    assert head == ["task", "metric", "base", "tuned", "standard", "error"]
    assert "only the first 2 questions" in done.output
    assert "lm-eval-pubmedqa-own-limit2.json" in done.output
    whole = CliRunner().invoke(app, words[:-2], env={"COLUMNS": "150"})
    assert whole.exit_code == 0, whole.output
    assert "only the first" not in whole.output
    assert asked[-1]["limit"] is None


def test_without_the_package_the_command_to_install_it_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'lm-eval>="):
        evaluate_with_harness(run, ["pubmedqa"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "lm-eval:pubmedqa", "--file", "a.csv"], "are for FlowerTune's sets"),
        (["--task", "lm-eval:pubmedqa", "--untuned"], "are for FlowerTune's sets"),
        (["--task", "lm-eval:pubmedqa", "--mode", "fixed"], "are for FlowerTune's sets"),
        (["--task", "lm-eval:pubmedqa", "--task", "fpb"], "'fpb' and lm-eval: tasks are scored apart"),
        (["--task", "lm-eval:"], "needs the name of a task"),
        (["--task", "lm-eval:pubmed_qa"], "no such task. Did you mean pubmedqa"),
        (["--task", "lm-eval:zzz"], "lm-eval ls tasks"),
        (["--task", "lm-eval:none.yaml"], "no such task file"),
    ],
)
def test_wrong_words_are_refused(
    run: Path, asked: list[dict[str, Any]], words: list[str], message: str
) -> None:
    done = CliRunner().invoke(app, ["evaluate", str(run), *words])
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)
    assert not asked


def test_what_the_harness_cannot_load_is_said(run: Path, asked: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match=r"broken cannot be scored \(ConnectionError: no route"):
        evaluate_with_harness(run, ["broken"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter__method": "prompt", "strategy__name": "average"}, "virtual tokens"),
        ({"model__kind": "encoder"}, "is an encoder"),
    ],
)
def test_models_it_cannot_score_are_refused(
    run: Path,
    asked: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    config = load_config(open_run(run)).replace(**changes)
    monkeypatch.setattr(harness, "load_config", lambda folder: config)
    with pytest.raises(ConfigError, match=message):
        evaluate_with_harness(run, ["pubmedqa"])


def test_a_folder_without_a_run_is_refused(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(RunError):
        evaluate_with_harness(tmp_path / "nothing", ["pubmedqa"])
