"""Scores of written answers, against examples worked by hand and slower definitions."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable
from itertools import combinations

import pytest
from hypothesis import assume, given
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
    assert token_f1("the", "lung") == 0


@pytest.mark.parametrize(
    ("truth", "guess"),
    [
        ("2.5", "25"),
        ("2.5 mg", "25 mg"),
        (".5", "5"),
        ("2,5", "25"),
        ("0,250", "0250"),
        ("-5", "5"),
        ("(-5)", "(5)"),
        ("-.5", ".5"),
        ("5-10", "510"),
        ("120/80", "12080"),
        # nothing is left of these
        ("+", "-"),
        ("A", ""),
        ("A", "the"),
        ("A+", "A-"),
    ],
)
def test_different_numbers_and_what_is_normalised_to_nothing_are_no_match(truth: str, guess: str) -> None:
    for one, two in ((truth, guess), (guess, truth)):
        assert exact_match(one, two) == 0
        assert token_f1(one, two) < 1
    assert exact_match(truth, truth) == token_f1(truth, truth) == 1


@pytest.mark.parametrize(
    ("truth", "guess"),
    [
        ("1,250 mg.", "1250 mg"),
        ("12,500,000.5", "12500000.5"),
        ("It is 2.5.", "it is 2.5"),
        ("$5, or +5 %", "5 or 5"),
        ("COVID-19", "covid19"),
        ("No.5 ...", "no5"),
        ("\u22125", "-5"),
        ("A", "a "),
        ("Is it 1, 2?", "is it 1 2"),
    ],
)
def test_the_same_number_and_all_other_signs_are_squads(truth: str, guess: str) -> None:
    assert exact_match(truth, guess) == exact_match(guess, truth) == token_f1(truth, guess) == 1


def test_rouge_l_of_the_papers_example() -> None:
    # Lin 2004, section 3: S2 and S3 share the same bigrams, but not their order
    reference = "police killed the gunman"
    assert rouge_l(reference, "police kill the gunman") == pytest.approx(3 / 4)
    assert rouge_l(reference, "the gunman kill police") == pytest.approx(2 / 4)
    assert rouge_l("one two", "") == 0
    assert rouge_l("+", "-") == 0
    assert rouge_l("Ärzte_ohne-Grenzen", "ärzte ohne grenzen") == 1


@given(st.text(alphabet=st.sampled_from("aethnx .,;-+$%()'2é"), max_size=40))
def test_without_numbers_with_signs_it_is_squads_rule(text: str) -> None:
    signs = str.maketrans("", "", string.punctuation)
    squad = " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(signs)).split())
    assume(not re.search(r"[-.]2|2[^\w\s]+2", text))
    assert normalised_answer(text) == squad


def test_vowel_signs_belong_to_words() -> None:
    # Devanagari: "dose of the medicine", and two words of it with other vowels
    assert rouge_l("दवा की मात्रा", "दवा का मित्र") == pytest.approx(1 / 3)
    assert rouge_l("दवा की मात्रा", "दवा, की मात्रा।") == 1
    # a mark behind a sign, as emoji have it, is no word
    assert rouge_l("good \u2764\ufe0f", "good") == 1


@pytest.mark.parametrize("score", [exact_match, token_f1, rouge_l])
def test_how_an_accent_is_encoded_does_not_count(score: Callable[[str, str], float]) -> None:
    assert score("fièvre", unicodedata.normalize("NFD", "Fièvre")) == 1
    assert score("fièvre", "fievre") == 0


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
        ("-.5", "-0.5"),
        ("-0.50", "-0.5"),
        ("-0.0", "0"),
        ("05", "5"),
        ("007.0", "7"),
        ("100", "100"),
        ("x = \u22125", "-5"),
        ("5\u22123", "3"),
        ("9" * 40 + ".10", "9" * 40 + ".1"),
    ],
)
def test_final_number(text: str, number: str) -> None:
    assert final_number(text) == number
