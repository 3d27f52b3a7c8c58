"""Score a finished run's adapter and its base on tasks of the Language Model Evaluation Harness.

The harness (github.com/EleutherAI/lm-evaluation-harness, the package ``lm-eval``) is optional. It gets the
very model object that the product loads; prompts, parsing and metrics are its own.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedllm.errors import ConfigError, DataError
from fedllm.federation.generate import tuned_model
from fedllm.models.load import load_tokenizer
from fedllm.runs.folder import RunFolder, atomic_write, load_config, open_run
from fedllm.runs.manifest import versions

#: What a task's name begins with on the command line.
PREFIX = "lm-eval:"
_RESAMPLES = 1000
_LONGEST = 300
#: Parts of the harness's results that say what was asked and how.
_KEPT = ("n-samples", "n-shot", "versions", "higher_is_better", "lm_eval_version")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One metric of one task; None where the harness gives no number.

    Attributes
    ----------
    error : float or None
        The harness's standard error of ``tuned``.
    """

    task: str
    metric: str
    base: float | None
    tuned: float | None
    error: float | None


@dataclass(frozen=True, kw_only=True)
class HarnessEvaluation:
    """All metrics of one call, and the file that keeps them."""

    measures: tuple[Measure, ...]
    file: Path


def harness_tasks(words: Sequence[str]) -> list[str]:
    """Return the harness's tasks that command line words name.

    Raises
    ------
    ConfigError
        If no task is named, or words for FlowerTune's sets stand among them.

    >>> harness_tasks(["lm-eval:pubmedqa,medqa_4options"])
    ['pubmedqa', 'medqa_4options']
    """
    others = [word for word in words if not word.startswith(PREFIX)]
    if others:
        raise ConfigError(
            f"--task: '{others[0]}' and {PREFIX} tasks are scored apart; give one kind at a time."
        )
    lists = (word.removeprefix(PREFIX).split(",") for word in words)
    names = list(dict.fromkeys(name.strip() for names in lists for name in names if name.strip()))
    if not names:
        raise ConfigError(f"--task: {PREFIX} needs the name of a task, such as {PREFIX}pubmedqa.")
    return names


def evaluate_with_harness(
    folder: Path, names: Sequence[str], *, limit: int = 0, site: str = ""
) -> HarnessEvaluation:
    """Score a run's tuned model and its base, and keep the results in ``evaluations/`` of its folder.

    Parameters
    ----------
    names : sequence of str
        Tasks or groups of the harness, or paths of task files (YAML); a task file may run code.
    limit : int
        Ask only the first questions of a task; 0: all.
    site : str
        A simulated site whose personal adapter is meant (fedsa, local).

    Raises
    ------
    ConfigError
        If the harness is not installed, a task is unknown, or the model is of no kind it can score.
    DataError
        If the harness cannot load or score a task.
    RunError
        If the run has no finished adapter.
    ModelError
        If the base cannot be loaded.
    """
    run = open_run(folder)
    config = load_config(run)
    if config.model.kind == "encoder":
        raise ConfigError(f"{run.path}: its model is an encoder; the harness scores causal models.")
    if config.adapter.method == "prompt":
        raise ConfigError(
            f"{run.path}: its adapter is virtual tokens, which the harness would take for the question."
        )
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{PREFIX} tasks need the package lm-eval (no '{error.name}' here): "
            "pip install 'lm-eval>=0.4.13,<0.5'."
        ) from None
    tasks = TaskManager()
    _require_known(names, tasks.all_tasks)
    tokenizer = load_tokenizer(config.model)
    model = tuned_model(folder, site=site)
    scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.evaluation.batch_size)
    found: dict[str, Mapping[str, Any]] = {}
    for kind in ("base", "tuned"):
        with model.disable_adapter() if kind == "base" else nullcontext():
            try:
                found[kind] = simple_evaluate(
                    model=scorer,
                    tasks=list(names),
                    task_manager=tasks,
                    limit=limit or None,
                    bootstrap_iters=_RESAMPLES,
                    log_samples=False,
                )
            except Exception as error:
                # hub, network and task code each raise kinds of their own, and all mean the same here
                raise DataError(
                    f"{PREFIX}{','.join(names)} cannot be scored ({type(error).__name__}: "
                    f"{str(error)[:_LONGEST]}). Check the network and the task, or name a task file over "
                    f"local data: --task {PREFIX}FILE.yaml."
                ) from None
    measures = _measures(found["base"]["results"], found["tuned"]["results"])
    facts = {
        "tasks": list(names),
        "limit": limit,
        "site": site,
        "quantization": config.model.quantization,
        "versions": versions(),
        "harness": {key: found["tuned"].get(key) for key in _KEPT},
    }
    return HarnessEvaluation(measures=measures, file=_keep(run, measures, facts))


def _require_known(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name in known:
            continue
        if name.endswith((".yaml", ".yml")):
            if Path(name).is_file():
                continue
            raise ConfigError(f"--task {PREFIX}{name}: no such task file.")
        near = difflib.get_close_matches(name, known, n=3)
        hint = f" Did you mean {', '.join(near)}?" if near else " `lm-eval ls tasks` lists them."
        raise ConfigError(f"--task {PREFIX}{name}: the harness has no such task.{hint}")


def _measures(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> tuple[Measure, ...]:
    """Return the numbers of all tasks; the harness names a metric ``name,filter``."""
    return tuple(
        Measure(
            task=task,
            metric=name if filter == "none" else f"{name} ({filter})",
            base=_number(base[task].get(key)),
            tuned=_number(value),
            error=_number(values.get(f"{name}_stderr,{filter}")),
        )
        for task, values in tuned.items()
        for key, value in values.items()
        for name, comma, filter in [key.partition(",")]
        if comma and not name.endswith("_stderr")
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _keep(run: RunFolder, measures: Sequence[Measure], facts: Mapping[str, Any]) -> Path:
    words = ["lm-eval", *(Path(name).stem for name in facts["tasks"])]
    words += [f"limit{facts['limit']}"] * bool(facts["limit"]) + [facts["site"]] * bool(facts["site"])
    name = re.sub(r"[^\w.-]+", "_", "-".join(words))[:150]
    file = run.path / "evaluations" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    content = {**facts, "measures": [asdict(measure) for measure in measures]}
    atomic_write(file, json.dumps(content, indent=2, default=str).encode() + b"\n")
    return file
