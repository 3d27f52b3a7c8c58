"""Score a finished run's adapter on FlowerTune's question sets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedllm.data.benchmarks import file_rows, hub_rows
from fedllm.errors import ConfigError
from fedllm.evaluation.flowertune import TASKS, Question, Task, fixed_verdict, leaderboard_verdict, questions
from fedllm.federation.generate import write_adapter
from fedllm.models.load import load_base, load_tokenizer
from fedllm.models.quiet import quiet
from fedllm.runs.events import read_events
from fedllm.runs.folder import RunFolder, atomic_write, load_config, open_run
from fedllm.runs.manifest import versions
from fedllm.runs.traffic import flowertune_mib, traffic

#: MiB a run may send to be ranked.
TRAFFIC_LIMIT = 200_000
MODES = ("leaderboard", "fixed")
_SEED = 2024
_LENGTH = 512
_BATCHES = {"finance": 32, "medical": 16}
#: Tokens of an answer in fixed mode, whatever the right one's length.
_ANSWER = 16
#: Greedy and nothing else: some bases' own settings punish repetition, and a label stands in the prompt.
_PLAIN: Mapping[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One question set's score.

    Attributes
    ----------
    unread : float
        Share of answers in which no label was found; the leaderboard counts them as neutral in
        finance, as wrong in medicine.
    complete : bool
        Whether all questions of the public set were asked.
    """

    task: str
    domain: str
    records: int
    accuracy: float
    unread: float
    complete: bool


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All scores of one call.

    Attributes
    ----------
    mean : float
        Plain mean of the sets' accuracies, which ranks runs where it is over all sets of a domain.
    traffic_mib : float
        What the run's training messages took, both ways.
    """

    mode: str
    untuned: bool
    results: tuple[Result, ...]
    mean: float
    traffic_mib: float


def chosen_tasks(names: Sequence[str]) -> list[Task]:
    """Return tasks by name; ``finance`` and ``medical`` stand for all of their domain.

    Raises
    ------
    ConfigError
        If a name is unknown, or both domains are named.
    """
    domains = {task.domain for task in TASKS.values()}
    for name in names:
        if name not in TASKS and name not in domains:
            raise ConfigError(
                f"--task: '{name}' is not one of {', '.join(TASKS)}, or {' or '.join(sorted(domains))}."
            )
    found = [task for task in TASKS.values() if task.name in names or task.domain in names]
    if len({task.domain for task in found}) > 1:
        raise ConfigError("--task: finance and medical sets are ranked apart; name those of one domain.")
    return found


def evaluate_run(
    folder: Path,
    names: Sequence[str],
    *,
    mode: str,
    file: Path | None = None,
    limit: int = 0,
    site: str = "",
    untuned: bool = False,
) -> Evaluation:
    """Ask a run's model the questions of some sets, and keep the scores in the run's folder.

    Parameters
    ----------
    names : sequence of str
        Tasks or domains.
    mode : {"leaderboard", "fixed"}
        As the public code has it, or with its flaws mended.
    file : Path or None
        Rows to take in place of the hub's data set; for one task.
    limit : int
        Ask only so many questions of a set; 0: all.
    site : str
        A simulated site whose personal adapter is meant (fedsa, local).
    untuned : bool
        Score the base without the adapter.

    Raises
    ------
    ConfigError
        If mode or a name is unknown, a file is given for several tasks, or the model is an encoder.
    DataError
        If rows cannot be loaded or read.
    RunError
        If the run has no finished adapter.
    ModelError
        If the base cannot be loaded.
    """
    tasks = chosen_tasks(names)
    if mode not in MODES:
        raise ConfigError(f"--mode: '{mode}' is not one of {', '.join(MODES)}.")
    if not tasks:
        raise ConfigError(f"--task: name at least one of {', '.join(TASKS)}.")
    if file is not None and len(tasks) > 1:
        raise ConfigError("--file holds the rows of one task; name one with --task.")
    run = open_run(folder)
    config = load_config(run)
    if config.model.kind == "encoder":
        raise ConfigError(f"{run.path}: its model is an encoder; it classifies and writes no text.")
    with TemporaryDirectory() as scratch:
        # adapter and questions first: a large base takes long to load
        adapter = write_adapter(folder, Path(scratch) / "adapter", site=site)
        asked = {task.name: questions(task, _rows(task, file)[: limit or None]) for task in tasks}
        tokenizer = load_tokenizer(config.model)
        base = load_base(config.model)
        with quiet():
            model = PeftModel.from_pretrained(base, adapter).eval()
    results = []
    with quiet(), torch.no_grad(), model.disable_adapter() if untuned else nullcontext():
        for task in tasks:
            answers = _leaderboard_answers if mode == "leaderboard" else _fixed_answers
            verdict = leaderboard_verdict if mode == "leaderboard" else fixed_verdict
            found = asked[task.name]
            said = answers(model, tokenizer, task, found)
            verdicts = [verdict(task, text, question) for text, question in zip(said, found, strict=True)]
            results.append(
                Result(
                    task=task.name,
                    domain=task.domain,
                    records=len(found),
                    accuracy=fmean(one.right for one in verdicts),
                    unread=fmean(not one.read for one in verdicts),
                    complete=file is None and not limit,
                )
            )
    evaluation = Evaluation(
        mode=mode,
        untuned=untuned,
        results=tuple(results),
        mean=fmean(result.accuracy for result in results),
        traffic_mib=flowertune_mib(traffic(read_events(run))),
    )
    facts = {"quantization": config.model.quantization, "site": site, "limit": limit}
    _keep(run, evaluation, site=site, facts=facts)
    return evaluation


def _rows(task: Task, file: Path | None) -> list[dict[str, Any]]:
    if file is not None:
        return file_rows(file)
    return hub_rows(
        task.hub, config=task.config, splits=task.splits, quarter=task.quarter, converted=task.converted
    )


def _leaderboard_answers(
    model: PeftModel, tokenizer: Any, task: Task, asked: Sequence[Question]
) -> list[str]:
    """Return what the public code would read: finance with the prompt, medical without."""
    size = _BATCHES[task.domain]
    chunks = [asked[start : start + size] for start in range(0, len(asked), size)]
    if task.domain == "medical":
        # one at a time, as long as the batch's first right answer; of equal prompts the last answer counts
        said: dict[str, str] = {}
        for chunk in chunks:
            most = len(tokenizer(chunk[0].gold, add_special_tokens=False)["input_ids"])
            for question in chunk:
                (said[question.prompt],) = _write(model, tokenizer, [question.prompt], new=most)
        return [said[question.prompt] for question in asked]
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        torch.manual_seed(_SEED)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model.resize_token_embeddings(len(tokenizer))
    # on the side the tokenizer itself names: on the right, answers follow the padding of shorter prompts
    side = tokenizer.init_kwargs.get("padding_side", type(tokenizer).padding_side)
    return [
        text
        for chunk in chunks
        for text in _write(model, tokenizer, [q.prompt for q in chunk], whole=True, side=side)
    ]


def _fixed_answers(model: PeftModel, tokenizer: Any, task: Task, asked: Sequence[Question]) -> list[str]:
    size = _BATCHES[task.domain]
    prompts = [question.prompt for question in asked]
    return [
        text
        for start in range(0, len(prompts), size)
        for text in _write(model, tokenizer, prompts[start : start + size], new=_ANSWER, settings=_PLAIN)
    ]


def _write(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    new: int = 0,
    side: str = "left",
    whole: bool = False,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> list[str]:
    """Return greedy answers of a batch.

    Parameters
    ----------
    new : int
        Most tokens of an answer; 0: up to a length of 512 with the prompt.
    whole : bool
        Return the prompt, too.
    settings : Mapping[str, Any]
        What replaces the base's own generation settings.
    """
    batch = tokenizer(
        list(prompts), return_tensors="pt", padding=True, padding_side=side, return_token_type_ids=False
    ).to(model.device)
    width = int(batch["input_ids"].shape[1])
    out = model.generate(  # type: ignore[no-untyped-call]
        **batch,
        max_new_tokens=new or max(_LENGTH - width, 1),
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    return [str(tokenizer.decode(row[0 if whole else width :], skip_special_tokens=True)) for row in out]


def _keep(run: RunFolder, evaluation: Evaluation, *, site: str, facts: Mapping[str, Any]) -> None:
    """Write the scores to the run's folder; each kind of call has its own file.

    Scores of a local file or of some questions alone never replace those of the whole set.
    """
    words = [*(result.task for result in evaluation.results), evaluation.mode]
    words += ["untuned"] * evaluation.untuned + [site] * bool(site)
    words += ["part"] * (not all(result.complete for result in evaluation.results))
    content: Mapping[str, Any] = {**asdict(evaluation), **facts, "versions": versions()}
    file = run.path / "flowertune" / f"{'-'.join(words)}.json"
    file.parent.mkdir(exist_ok=True)
    atomic_write(file, json.dumps(content, indent=2).encode() + b"\n")
