"""Scores of a written answer against the reference: exact match, token F1, ROUGE-L."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD = re.compile(r"[^\W_]+")
# behind a word, number or bracket a minus is a dash or subtracts; a comma groups exactly three digits
_NUMBER = re.compile(r"(?:(?<![\w)%\]])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_MARK = "####"
_Overlap = Callable[[Sequence[str], Sequence[str]], int]


def normalised_answer(text: str) -> str:
    """Return the text in lower case, without punctuation, articles and extra white space.

    References
    ----------
    Rajpurkar et al., "SQuAD", arXiv 1606.05250, section 6.1.

    >>> normalised_answer("The  Cat,\\n an owl!")
    'cat owl'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(truth: str, guess: str) -> float:
    """Return 1 if both are the same text after :func:`normalised_answer`, else 0."""
    return float(normalised_answer(truth) == normalised_answer(guess))


def token_f1(truth: str, guess: str) -> float:
    """Return the F1 of the normalised words, order aside (SQuAD).

    >>> token_f1("the left lung", "left lung base")
    0.8
    """
    return _f1(
        normalised_answer(truth).split(),
        normalised_answer(guess).split(),
        lambda one, two: (Counter(one) & Counter(two)).total(),
    )


def rouge_l(truth: str, guess: str) -> float:
    """Return ROUGE-L: the F1 of the longest common subsequence of words, in lower case.

    Words are runs of letters and digits of any script, not stemmed.

    References
    ----------
    Lin, "ROUGE: a package for automatic evaluation of summaries", 2004, section 3.

    >>> rouge_l("police killed the gunman", "police kill the gunman")
    0.75
    """
    return _f1(_WORD.findall(truth.lower()), _WORD.findall(guess.lower()), common_subsequence)


def common_subsequence(one: Sequence[str], two: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    >>> common_subsequence("abcbdab", "bdcaba")
    4
    """
    row = [0] * (len(two) + 1)
    for left in one:
        diagonal = 0
        for place, right in enumerate(two, start=1):
            above = row[place]
            row[place] = diagonal + 1 if left == right else max(above, row[place - 1])
            diagonal = above
    return row[-1]


def final_number(text: str) -> str:
    """Return the number an arithmetic answer ends in: after the last ``####``, else the last one.

    Commas before groups of exactly three digits, and zeros behind the point, are dropped; any other
    comma ends a number, and a minus right behind another number is no sign. A text without a number
    is returned as it is. The mark is that of GSM8K (arXiv 2110.14168).

    >>> final_number("6 * 7 = 42, so #### 42 apples"), final_number("It is $1,250.00.")
    ('42', '1250')
    """
    _, mark, tail = text.rpartition(_MARK)
    found = _NUMBER.findall(tail)
    if not found:
        found = _NUMBER.findall(text)
        mark = ""
    if not found:
        return text
    number = found[0 if mark else -1].replace(",", "")
    whole, point, rest = number.partition(".")
    return f"{whole or '0'}.{rest.rstrip('0')}" if point and rest.strip("0") else whole or "0"


def _f1(truth: Sequence[str], guess: Sequence[str], common: _Overlap) -> float:
    if not truth or not guess:
        return float(truth == guess)
    return 2 * common(truth, guess) / (len(truth) + len(guess))
