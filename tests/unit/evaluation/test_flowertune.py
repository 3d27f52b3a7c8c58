"""FlowerTune's prompts, answers and scores: by hand, flaws included and mended."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from fedllm.errors import DataError
from fedllm.evaluation.flowertune import (
    TASKS,
    Question,
    Verdict,
    fixed_verdict,
    leaderboard_verdict,
    questions,
)

ROWS: dict[str, dict[str, Any]] = {
    "fpb": {"sentence": "Sales rose.", "label": 2},
    "fiqa": {"sentence": "$X down", "sentiment_score": -0.4, "format": "post"},
    "tfns": {"text": "X up", "label": 1},
    "pubmedqa": {"CONTEXTS": ["One.", "Two."], "QUESTION": "Does it?", "final_decision": "maybe"},
    "medmcqa": {"question": "Which", "opa": "p", "opb": "q", "opc": "r", "opd": "s", "cop": 0},
    "medqa": {
        "question": "What now.",
        "options": [{"key": "A", "value": "rest"}, {"key": "B", "value": "tea"}],
        "answer": "tea",
    },
    "careqa": {"question": "Why?", "op1": "p", "op2": "q", "op3": "r", "op4": "s", "cop": 4},
}


def test_the_finance_prompt() -> None:
    (found,) = questions(TASKS["fpb"], [ROWS["fpb"]])
    assert found.prompt == (
        "Instruction: What is the sentiment of this news? "
        "Please choose an answer from {negative/neutral/positive}.\nInput: Sales rose.\nAnswer: "
    )
    assert found.gold == "positive"
    (fiqa,) = questions(TASKS["fiqa"], [ROWS["fiqa"]])
    assert "sentiment of this tweet?" in fiqa.prompt
    (tfns,) = questions(TASKS["tfns"], [ROWS["tfns"]])
    assert "sentiment of this tweet?" in tfns.prompt


def test_the_medical_prompts() -> None:
    (found,) = questions(TASKS["medmcqa"], [ROWS["medmcqa"]])
    head, _, tail = found.prompt.partition("\nQuestion: ")
    assert head.startswith("<|im_start|>question\nYou are a medical doctor answering realworld")
    assert tail == (
        "Which?\n\nOptions:\nA. p\nB. q\nC. r\nD. s\nThe answer is:\n<|im_end|>\n<|im_start|>answer\n"
    )
    (pubmed,) = questions(TASKS["pubmedqa"], [ROWS["pubmedqa"]])
    assert "Answer yes, no, or maybe.\nOne.\nTwo.\nDoes it?\nThe answer is:\n<|im_end|>" in pubmed.prompt
    (medqa,) = questions(TASKS["medqa"], [ROWS["medqa"]])
    assert "Question: What now.\n\nOptions:\nA. rest\nB. tea\nThe answer is:" in medqa.prompt
    assert "from A to E." in medqa.prompt


@pytest.mark.parametrize(
    ("task", "changes", "gold"),
    [
        *[("fpb", {"label": n}, s) for n, s in enumerate(("negative", "neutral", "positive"))],
        *[("tfns", {"label": n}, s) for n, s in enumerate(("negative", "positive", "neutral"))],
        ("fpb", {"label": "1"}, "neutral"),
        ("fpb", {"label": "Positive"}, "positive"),
        ("fiqa", {"sentiment_score": -0.1}, "neutral"),
        ("fiqa", {"sentiment_score": -0.11}, "negative"),
        ("fiqa", {"sentiment_score": "0.1"}, "positive"),
        ("pubmedqa", {}, "maybe"),
        ("pubmedqa", {"CONTEXTS": json.dumps(["One."])}, "maybe"),
        # counted from 0 here and from 1 there
        ("medmcqa", {"cop": 2}, "C"),
        ("careqa", {"cop": "2"}, "B"),
        ("careqa", {}, "D"),
        ("medqa", {}, "B"),
        ("medqa", {"options": json.dumps(ROWS["medqa"]["options"])}, "B"),
    ],
)
def test_the_right_answer(task: str, changes: dict[str, Any], gold: str) -> None:
    (found,) = questions(TASKS[task], [ROWS[task] | changes])
    assert found.gold == gold


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("fpb", {"label": 3}, "row 2 cannot be read"),
        ("fpb", {"label": "secret"}, "row 2 cannot be read"),
        ("fpb", {"label": None}, "row 2 has no 'label'"),
        ("medmcqa", {"cop": -1}, "row 2 cannot be read"),
        ("careqa", {"cop": 0}, "row 2 cannot be read"),
        ("medqa", {"answer": "secret"}, "row 2 cannot be read"),
        ("medqa", {"options": "secret"}, "row 2 cannot be read"),
        ("pubmedqa", {"CONTEXTS": []}, "row 2 cannot be read"),
        ("fiqa", {"sentiment_score": "secret"}, "row 2 cannot be read"),
        ("fiqa", {"sentiment_score": math.nan}, "row 2 cannot be read"),
        ("fiqa", {"sentiment_score": "-inf"}, "row 2 cannot be read"),
    ],
)
def test_wrong_rows_are_named_and_not_quoted(task: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        questions(TASKS[task], [ROWS[task], ROWS[task] | changes])
    assert "secret" not in str(caught.value)
    assert TASKS[task].hub in str(caught.value)


def test_options_may_be_numbers() -> None:
    options = [{"key": "A", "value": 5}, {"key": "B", "value": 50}]
    (found,) = questions(TASKS["medqa"], [ROWS["medqa"] | {"options": options, "answer": 50}])
    assert (found.gold, found.options) == ("B", ("5", "50"))
    assert fixed_verdict(TASKS["medqa"], "B. 50", found) == Verdict(True, True)


def test_a_missing_answer_among_options_is_an_error_and_no_silence() -> None:
    with pytest.raises(DataError, match="row 1"):
        questions(TASKS["medqa"], [ROWS["medqa"] | {"options": [{"key": "A", "value": "x"}]}])


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("Answer: positive", "positive", Verdict(True, True)),
        # the first match of positive, then of negative, wherever it stands
        ("Answer: negative, not positive", "positive", Verdict(True, True)),
        ("Answer: Negative", "negative", Verdict(True, True)),
        ("Answer: POSITIVE", "positive", Verdict(False, False)),
        # what cannot be read counts as neutral
        ("Answer: I do not know", "neutral", Verdict(True, False)),
        ("no prompt at all", "neutral", Verdict(True, False)),
        ("Answer: neutral", "neutral", Verdict(True, True)),
        # what follows a second "Answer: " is not read
        ("Answer: hm\nAnswer: positive", "positive", Verdict(False, False)),
        # the prompt of a text with "Answer: " in it is taken for the answer
        ("Input: Answer: positive\nAnswer: negative", "positive", Verdict(True, True)),
    ],
)
def test_the_leaderboard_reads_sentiments(answer: str, gold: str, expected: Verdict) -> None:
    assert leaderboard_verdict(TASKS["fiqa"], answer, Question(prompt="", gold=gold)) == expected


@pytest.mark.parametrize(
    ("task", "answer", "gold", "expected"),
    [
        ("medqa", "B", "B", Verdict(True, True)),
        ("medqa", " (b)", "B", Verdict(True, True)),
        # the first letter of any word counts
        ("medqa", "Because", "B", Verdict(True, True)),
        ("medqa", "The answer is B", "B", Verdict(False, False)),
        ("medqa", "", "B", Verdict(False, False)),
        ("medqa", "x\n## C\nB", "C", Verdict(True, True)),
        ("pubmedqa", "Yes", "yes", Verdict(True, True)),
        ("pubmedqa", "yesno", "yes", Verdict(True, True)),
        ("pubmedqa", "noyes", "no", Verdict(True, True)),
        ("pubmedqa", "yes, it does", "yes", Verdict(False, False)),
        # maybe is right only if nothing else was written, not even a blank
        ("pubmedqa", "maybe", "maybe", Verdict(True, True)),
        ("pubmedqa", " maybe", "maybe", Verdict(False, False)),
    ],
)
def test_the_leaderboard_reads_medical_answers(task: str, answer: str, gold: str, expected: Verdict) -> None:
    assert leaderboard_verdict(TASKS[task], answer, Question(prompt="", gold=gold)) == expected


@pytest.mark.parametrize(
    ("task", "answer", "gold", "expected"),
    [
        ("fpb", "POSITIVE.", "positive", Verdict(True, True)),
        ("fpb", "negative, not positive", "negative", Verdict(True, True)),
        ("fpb", "I do not know", "neutral", Verdict(False, False)),
        ("fpb", "nonnegative", "negative", Verdict(False, False)),
        ("pubmedqa", " Maybe, as", "maybe", Verdict(True, True)),
        ("pubmedqa", "nothing", "no", Verdict(False, False)),
        ("medqa", "\n(b) tea", "B", Verdict(True, True)),
        ("medqa", "C", "B", Verdict(False, True)),
        ("medqa", "A patient needs tea", "A", Verdict(False, False)),
        ("medqa", "Because", "B", Verdict(False, False)),
        ("medqa", "D.\nE", "D", Verdict(False, False)),
        ("medqa", "A ASTHMA", "A", Verdict(True, True)),
        ("medqa", "(A) is incorrect.\nThe answer is (B).", "B", Verdict(True, True)),
        ("medqa", "", "A", Verdict(False, False)),
    ],
)
def test_mended_an_answer_counts_only_if_it_names_a_label(
    task: str, answer: str, gold: str, expected: Verdict
) -> None:
    assert fixed_verdict(TASKS[task], answer, Question(prompt="", gold=gold)) == expected


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        "(B)",
        "b.",
        "B) Asthma",
        "B - Asthma",
        "B Asthma",
        "B ASTHMA",
        "b COPD of long standing",
        "B/Asthma",
        "**B** Asthma",
        "**B)** Asthma",
        "B. Vitamin D",
        "B. E. coli",
        "B is correct.",
        "B, not C",
        "Option B",
        "option b: asthma",
        "Answer: B",
        "Answer:\n\nB) Asthma",
        "The answer is B.",
        "The correct answer is option B, asthma",
        "The best choice is **B**",
        "Asthma. The answer would be (B) because",
        "B. Asthma\nThe answer is B.",
        "B. Asthma\nA 40-year-old",
    ],
)
def test_mended_an_answer_may_name_its_letter_in_many_ways(answer: str) -> None:
    assert fixed_verdict(TASKS["medqa"], answer, Question(prompt="", gold="B")) == Verdict(True, True)
    assert fixed_verdict(TASKS["medqa"], answer, Question(prompt="", gold="C")) == Verdict(False, True)


@pytest.mark.parametrize(
    "answer",
    [
        "A patient with asthma has",
        "The answer is a patient with asthma",
        "Answer: A patient with asthma",
        "A CT scan",
        "B cell lymphoma",
        "C-reactive protein",
        "Hepatitis B",
        "The answer is hepatitis B.",
        "Option B is not correct",
        "Option (A) is incorrect.",
        "(A) is incorrect; (B)",
        "A) is wrong",
        "(A) is not the answer",
        "**A.** is false",
        "(B) isn't right",
        "e.g. aspirin",
        "The answer is e.g. aspirin",
        "d/c aspirin",
        "d/c, then aspirin",
        "B.i.d. dosing",
        "The answer is not B",
        "A or B",
        "A, B",
        "A and B",
        "Both A and B",
        "Either A or B is right",
        "(A)\n(B)",
        "A. Asthma\nB. Angina",
        "The answer is A. No, the answer is B.",
        "Options A, B and C",
    ],
)
def test_mended_no_letter_or_two_are_unread(answer: str) -> None:
    for gold in "ABC":
        assert fixed_verdict(TASKS["medqa"], answer, Question(prompt="", gold=gold)) == Verdict(False, False)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("E. coli", "B"),
        ("e. coli is the commonest cause", "B"),
        ("The answer is E. coli.", "B"),
        ("E. coli K1", "C"),
        ("E. histolytica", "E"),
        ("B. E. coli", "B"),
        ("A virus causes it", "D"),
        ("E. coli is not the cause", ""),
        ("E. coli is wrong.\nThe answer is A", "A"),
        ("B. B", "B"),
        ("The answer is B", "B"),
    ],
)
def test_mended_an_option_whose_text_begins_like_a_letter_is_that_option(answer: str, said: str) -> None:
    options = ("B", "E. coli", "E. coli K1", "A virus", "histolytica")
    for gold in "ABCDE":
        asked = Question(prompt="", gold=gold, options=options)
        assert fixed_verdict(TASKS["medqa"], answer, asked) == Verdict(gold == said, bool(said))
