"""FlowerTune's finance and medical question sets: prompts, answers and scores, as its code has them.

``leaderboard`` repeats what the public evaluation code does, flaws included, so that its figures can
be compared. ``fixed`` keeps the prompts, and mends reading and scoring: an answer that names no label
is wrong, a letter counts only where it names an option, and two different ones name none.

Source: github.com/adap/flower, benchmarks/flowertune-llm/evaluation/{finance,medical}. The prompts
are data of that benchmark (Apache-2.0); the medical ones go back to Meditron's instructions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedllm.errors import DataError

Row = Mapping[str, Any]
SENTIMENTS = ("negative", "neutral", "positive")
_WORDS = {"sentiment": SENTIMENTS, "boolean": ("yes", "no", "maybe")}
#: What the leaderboard's parser takes for an answer to a medical question; ``maybe`` is not in it.
_READABLE = ("a", "b", "c", "d", "e", "yes", "no")
_CONTINUED = (("yesyes", "yes"), ("nono", "no"), ("yesno", "yes"), ("noyes", "no"))
# where a letter may name an option: it opens a line, follows such a word, or is joined to another letter
_PLACE = re.compile(
    r"""
    (?: ^\W*
      | \b (?:answer|option|choice|either|both) s? \b
        (?:\W+ (?:is|are|would|be|the|correct|best|option|choice|letter) \b)* \W*
      | (?<=\b[A-E]) \s* (?:[,;&] | /(?-i:(?![a-z])) | and\b | or\b) \s* (?:(?:and|or)\b \s*)? )
    ([A-E]) \b
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
# and what stands behind it if it does. "A patient", "A CT scan", "B cell" and "C-reactive" name no option
_BEHIND = re.compile(
    r"""
    (?! [./] (?-i:[a-z]) )                                 # e.g., d/c, B.i.d.
    (?: \W*\Z
      | \s* [).:,;/&*"\]\n]
      | \s+ [-–—] \s
      | \s+ (?-i: [A-Z] (?: [a-z] | [^a-z\n]*$ ))          # B Asthma, A ASTHMA
      | (?<!a) \s+ (?-i: [A-Z])                            # B COPD of long standing
      | \s+ (?:because|since|as|and|or|is) \b )
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_REJECTED = re.compile(r"[^\w\n]*\bis(?:n['’]t|\s+(?:not|wrong|incorrect|false))\b", re.IGNORECASE)

_PUBMEDQA = (
    "As an expert doctor in clinical science and medical knowledge, can you tell me if the following "
    "statement is correct? Answer yes, no, or maybe."
)
_EXAM = (
    "You are a medical doctor answering realworld medical entrance exam questions. Based on your "
    "understanding of basic and clinical science, medical knowledge, and mechanisms underlying health, "
    "disease, patient care, and modes of therapy, answer the following multiple-choice question. Select "
    "one correct answer from A to D. Base your answer on the current and standard practices referenced in "
    "medical guidelines."
)
_MEDQA = (
    "You are a medical doctor taking the US Medical Licensing Examination. You need to demonstrate your "
    "understanding of basic and clinical science, medical knowledge, and mechanisms underlying health, "
    "disease, patient care, and modes of therapy. Show your ability to apply the knowledge essential for "
    "medical practice. For the following multiple-choice question, select one correct answer from A to E. "
    "Base your answer on the current and standard practices referenced in medical guidelines."
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt, ready for the tokenizer, the right answer, and a multiple choice's texts from A on."""

    prompt: str
    gold: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Task:
    """One question set.

    Attributes
    ----------
    domain : str
        finance or medical.
    kind : str
        sentiment, boolean or choice: how an answer is read.
    hub, config : str
        The data set's name at the Hugging Face hub, and its configuration (may be empty).
    splits : tuple[str, ...]
        Splits that are joined.
    quarter : bool
        A quarter of them is asked, drawn with seed 42.
    converted : bool
        The data set is a script, so the hub's own conversion to parquet is read.
    columns : tuple[str, ...]
        What a local file has to have.
    question : Callable
        Row -> question; raises ValueError or KeyError for a row without a valid answer.
    """

    name: str
    domain: str
    kind: str
    hub: str
    config: str = ""
    splits: tuple[str, ...]
    quarter: bool = False
    converted: bool = False
    columns: tuple[str, ...]
    question: Callable[[Row], Question]


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and whether one could be read at all."""

    right: bool
    read: bool


def questions(task: Task, rows: Sequence[Row]) -> list[Question]:
    """Return the rows' questions.

    Raises
    ------
    DataError
        Naming the first row that lacks a column or whose answer is not one of the task's; it quotes
        nothing of the row.
    """
    found = []
    for number, row in enumerate(rows, start=1):
        missing = [name for name in task.columns if row.get(name) is None]
        if missing:
            raise DataError(
                f"task {task.name}: row {number} has no '{missing[0]}'. The columns are "
                f"{', '.join(task.columns)}, as in {task.hub}."
            )
        try:
            found.append(task.question(row))
        except (ValueError, KeyError, TypeError, IndexError):
            raise DataError(
                f"task {task.name}: row {number} cannot be read: one of {', '.join(task.columns)} does not "
                f"hold what {task.hub} has there."
            ) from None
    return found


def leaderboard_verdict(task: Task, answer: str, question: Question) -> Verdict:
    """Score an answer as the leaderboard does.

    Parameters
    ----------
    answer : str
        Finance: prompt and answer as decoded. Medical: the answer alone.

    >>> leaderboard_verdict(TASKS["fpb"], "Answer: no idea", Question(prompt="", gold="neutral"))
    Verdict(right=True, read=False)
    """
    gold = question.gold
    if task.kind == "sentiment":
        parts = answer.split("Answer: ")
        said = parts[1] if len(parts) > 1 else "None"
        guess = _sentiment(said)
        return Verdict(guess == _sentiment(gold), guess != "neutral" or "neutral" in said.lower())
    whole = answer.lower()
    said = whole.split("\n##")[1].split("\n")[0] if "\n##" in whole else whole
    said = re.sub(" +", " ", re.sub(r"[^a-zA-Z0-9]", " ", said).strip())
    if task.kind == "choice":
        said = said[:1]
    else:
        said = next((said.replace(*pair) for pair in _CONTINUED if pair[0] in said), said)
    read = said in _READABLE
    # unread, the whole answer is compared: this is how "maybe" can be right
    return Verdict((said if read else whole) == gold.lower(), read or whole == gold.lower())


def fixed_verdict(task: Task, answer: str, question: Question) -> Verdict:
    """Score an answer by the first label, or the one letter, that it names.

    An answer that names no label is unread, and so wrong; one that names two different letters is, too.
    Where an option's text stands in a letter's place, as "E. coli" may, that option is named. A letter that
    is said to be wrong is not named, nor is one of an abbreviation ("e.g.", "d/c").

    Parameters
    ----------
    answer : str
        Without the prompt.

    >>> asked = Question(prompt="", gold="B", options=("S. aureus", "E. coli"))
    >>> [fixed_verdict(TASKS["medqa"], said, asked) for said in ("The answer is B.", "E. coli", "A or B")]
    [Verdict(right=True, read=True), Verdict(right=True, read=True), Verdict(right=False, read=False)]
    """
    if task.kind == "choice":
        named = _named(answer, question.options)
        said = named.pop() if len(named) == 1 else ""
    else:
        found = re.search(rf"\b({'|'.join(_WORDS[task.kind])})\b", answer, re.IGNORECASE)
        said = found[1].lower() if found is not None else ""
    return Verdict(said == question.gold.lower(), read=bool(said))


def _named(answer: str, options: Sequence[str]) -> set[str]:
    """Return the letters of the options that an answer names, by letter or text, and does not reject."""
    found = set()
    for place in _PLACE.finditer(answer):
        start, end = place.span(1)
        letter = _spelt(answer[start:], options)
        if letter:
            end = start + len(options[ord(letter) - ord("a")])
        elif _BEHIND.match(answer, end):
            letter = place[1].lower()
        if letter and not _REJECTED.match(answer, end):
            found.add(letter)
    return found


def _spelt(answer: str, options: Sequence[str]) -> str:
    """Return the letter of the longest option that an answer begins with; one of one sign is no text."""
    found = [
        (-len(option), chr(ord("a") + place))
        for place, option in enumerate(options)
        if len(option) > 1 and re.match(rf"{re.escape(option)}(?!\w)", answer, re.IGNORECASE)
    ]
    return min(found)[1] if found else ""


def _sentiment(text: str) -> str:
    for label in ("positive", "negative"):
        if label in text or label.capitalize() in text:
            return label
    return "neutral"


def _finance(text: str, gold: str, *, kind: str = "news") -> Question:
    asked = (
        f"What is the sentiment of this {kind}? Please choose an answer from {{negative/neutral/positive}}."
    )
    given = f"Input: {text}\n" if text else ""
    return Question(prompt=f"Instruction: {asked}\n{given}Answer: ", gold=gold)


def _label(value: object, names: Sequence[str]) -> str:
    """Return a class by its number, or by its name where a file has names."""
    text = str(value).strip()
    if text.lower() in names:
        return text.lower()
    number = int(text)
    if not 0 <= number < len(names):
        raise ValueError
    return names[number]


def _fiqa(row: Row) -> Question:
    score = float(row["sentiment_score"])
    if not math.isfinite(score):
        raise ValueError
    gold = "negative" if score < -0.1 else "neutral" if score < 0.1 else "positive"
    return _finance(str(row["sentence"]), gold, kind="tweet" if row["format"] == "post" else "news")


def _medical(instruction: str, text: str, gold: str) -> Question:
    asked = f"{instruction}\n{text}\nThe answer is:\n"
    return Question(prompt=f"<|im_start|>question\n{asked}<|im_end|>\n<|im_start|>answer\n", gold=gold)


def _choice(instruction: str, question: str, options: Sequence[str], gold: str) -> Question:
    if not question.endswith(("?", ".")):
        question += "?"
    listed = "\n".join(f"{chr(ord('A') + place)}. {option}" for place, option in enumerate(options))
    return replace(
        _medical(instruction, f"Question: {question}\n\nOptions:\n{listed}", gold), options=tuple(options)
    )


def _listed(value: object) -> list[Any]:
    """Return a list column; in a csv file it is a list in JSON."""
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, list) or not found:
        raise ValueError
    return found


def _pubmedqa(row: Row) -> Question:
    context = "\n".join(_listed(row["CONTEXTS"]))
    gold = _label(row["final_decision"], _WORDS["boolean"])
    return _medical(_PUBMEDQA, f"{context}\n{row['QUESTION']}", gold)


def _medqa(row: Row) -> Question:
    options = _listed(row["options"])
    # of options with the same text the first counts
    gold = {str(option["value"]): str(option["key"]) for option in reversed(options)}[str(row["answer"])]
    return _choice(_MEDQA, str(row["question"]), [str(option["value"]) for option in options], gold)


def _four_options(names: Sequence[str], *, first: int) -> Callable[[Row], Question]:
    """Return the reader of rows with an option a column, and the right one's number from ``first``."""

    def question(row: Row) -> Question:
        gold = _label(int(row["cop"]) - first, "ABCD")
        return _choice(_EXAM, str(row["question"]), [str(row[name]) for name in names], gold)

    return question


_MEDMCQA_OPTIONS = ("opa", "opb", "opc", "opd")
_CAREQA_OPTIONS = ("op1", "op2", "op3", "op4")

#: Registry of the question sets; a new one adds one entry here.
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="fpb",
            domain="finance",
            kind="sentiment",
            hub="takala/financial_phrasebank",
            config="sentences_50agree",
            splits=("train",),
            quarter=True,
            converted=True,
            columns=("sentence", "label"),
            question=lambda row: _finance(str(row["sentence"]), _label(row["label"], SENTIMENTS)),
        ),
        Task(
            name="fiqa",
            domain="finance",
            kind="sentiment",
            hub="pauri32/fiqa-2018",
            splits=("train", "validation", "test"),
            quarter=True,
            columns=("sentence", "sentiment_score", "format"),
            question=_fiqa,
        ),
        Task(
            name="tfns",
            domain="finance",
            kind="sentiment",
            hub="zeroshot/twitter-financial-news-sentiment",
            splits=("validation",),
            columns=("text", "label"),
            question=lambda row: _finance(
                str(row["text"]), _label(row["label"], ("negative", "positive", "neutral")), kind="tweet"
            ),
        ),
        Task(
            name="pubmedqa",
            domain="medical",
            kind="boolean",
            hub="bigbio/pubmed_qa",
            config="pubmed_qa_labeled_fold0_source",
            splits=("test",),
            converted=True,
            columns=("CONTEXTS", "QUESTION", "final_decision"),
            question=_pubmedqa,
        ),
        Task(
            name="medmcqa",
            domain="medical",
            kind="choice",
            hub="medmcqa",
            splits=("validation",),
            columns=("question", *_MEDMCQA_OPTIONS, "cop"),
            question=_four_options(_MEDMCQA_OPTIONS, first=0),
        ),
        Task(
            name="medqa",
            domain="medical",
            kind="choice",
            hub="bigbio/med_qa",
            config="med_qa_en_4options_source",
            splits=("test",),
            converted=True,
            columns=("question", "options", "answer"),
            question=_medqa,
        ),
        Task(
            name="careqa",
            domain="medical",
            kind="choice",
            hub="HPAI-BSC/CareQA",
            config="CareQA_en",
            splits=("test",),
            columns=("question", *_CAREQA_OPTIONS, "cop"),
            question=_four_options(_CAREQA_OPTIONS, first=1),
        ),
    )
}
