"""Scores of written answers, against examples worked by hand and slower definitions."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.evaluation.answers import (
    common_subsequence,
    exact_match,
    final_number,
    normalised_answer,
    rouge_l,
    token_f1,
)

WORDS = st.lists(st.sampled_from(["a", "b", "c", "the", "Ärzte", "2"]), max_size=7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The U.S. dollar", "us dollar"),
        ("an  Anthem of the theatre", "anthem of theatre"),
        ("", ""),
        ("the", ""),
        ("Lungenentzündung!", "lungenentzündung"),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalised_answer(text) == expected


def test_exact_match_and_token_f1() -> None:
    assert exact_match("The left lung.", "left lung") == 1
    assert exact_match("left lung", "right lung") == 0
    # 2 of 3 words of each
    assert token_f1("acute left lung", "lung left side") == pytest.approx(2 / 3)
    # a repeated word counts as often as both have it
    assert token_f1("no no no", "no") == pytest.approx(2 * 1 / 4)
    assert token_f1("the", "an") == 1
    assert token_f1("the", "lung") == 0


def test_rouge_l_of_the_papers_example() -> None:
    # Lin 2004, section 3: S2 and S3 share the same bigrams, but not their order
    reference = "police killed the gunman"
    assert rouge_l(reference, "police kill the gunman") == pytest.approx(3 / 4)
    assert rouge_l(reference, "the gunman kill police") == pytest.approx(2 / 4)
    assert rouge_l("one two", "") == 0
    assert rouge_l("Ärzte_ohne-Grenzen", "ärzte ohne grenzen") == 1


def slow_subsequence(one: list[str], two: list[str]) -> int:
    """Return the longest common subsequence by trying all subsequences."""
    mine, yours = (
        {found for size in range(len(words) + 1) for found in combinations(words, size)}
        for words in (one, two)
    )
    return max(len(found) for found in mine & yours)


@given(WORDS, WORDS)
def test_common_subsequence_equals_its_definition(one: list[str], two: list[str]) -> None:
    assert common_subsequence(one, two) == slow_subsequence(one, two)


@given(WORDS, WORDS)
def test_scores_are_symmetric_shares_and_ordered(one: list[str], two: list[str]) -> None:
    truth, guess = " ".join(one), " ".join(two)
    for score in (exact_match, token_f1, rouge_l):
        assert score(truth, truth) == 1
        assert 0 <= score(truth, guess) <= 1
        assert score(truth, guess) == pytest.approx(score(guess, truth))
    assert exact_match(truth, guess) <= token_f1(truth, guess) + 1e-12


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Each has 3, so 3*4 = 12.\n#### 12", "12"),
        ("#### -1,250", "-1250"),
        ("#### $ 7.50 in all, of 9", "7.5"),
        ("first #### 3, no: #### 4", "4"),
        ("It takes 5 days, 40 hours.", "40"),
        ("She pays 18.0", "18"),
        (".5", "0.5"),
        ("####", "####"),
        ("5 ####", "5"),
        ("no number", "no number"),
        ("the range is 5-3", "3"),
        ("10%-20%", "20"),
        ("(2)-3", "3"),
        ("step-4", "4"),
        ("x = -3", "-3"),
        ("5 - -3", "-3"),
        ("1,2", "2"),
        ("1,2500", "2500"),
        ("1234,567", "567"),
        ("in all 1,234,567.80", "1234567.8"),
        ("so 7, 8,", "8"),
    ],
)
def test_final_number(text: str, number: str) -> None:
    assert final_number(text) == number
