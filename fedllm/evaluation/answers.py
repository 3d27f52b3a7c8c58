"""Scores of a written answer against the reference: exact match, token F1, ROUGE-L."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_GROUPED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
# a sign stays between two digits, a point or minus also before one: 2.5 is not 25, -5 not 5, 5-10 not 510
_PUNCTUATION = re.compile(
    rf"(?! (?<=\d).(?=\d) | (?<![\w.])\.(?=\d) | (?<![\w)%\]])-(?=\.?\d) ) [{re.escape(string.punctuation)}]",
    re.VERBOSE,
)
# behind a word, number or bracket a minus is a dash or subtracts; a comma groups exactly three digits
_NUMBER = re.compile(r"(?:(?<![\w)%\]])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_MINUS = "\N{MINUS SIGN}"
_MARK = "####"
_Words = Callable[[str], Sequence[str]]
_Overlap = Callable[[Sequence[str], Sequence[str]], int]


def normalised_answer(text: str) -> str:
    """Return the text in lower case, without punctuation, articles and extra white space.

    SQuAD's rule but for numbers, because 2.5 mg and 25 mg are different doses: a sign between two digits,
    a point before a number and its minus stay. A plus and commas before groups of three digits are dropped,
    as there. Letters are composed (NFC).

    References
    ----------
    Rajpurkar et al., "SQuAD", arXiv 1606.05250, section 6.1.

    >>> normalised_answer("The  Cat,\\n an owl!"), normalised_answer("-2.5, or 1,250.")
    ('cat owl', '-2.5 or 1250')
    """
    kept = _GROUPED.sub(lambda found: found[0].replace(",", ""), _folded(text).replace(_MINUS, "-"))
    return " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub("", kept)).split())


def exact_match(truth: str, guess: str) -> float:
    """Return 1 if both are the same text after :func:`normalised_answer`, else 0.

    Where that leaves nothing of either, the texts are compared as they are, in lower case.

    >>> exact_match("The left lung.", "left lung"), exact_match("+", "-")
    (1.0, 0.0)
    """
    one, two = normalised_answer(truth), normalised_answer(guess)
    return float(one == two) if one and two else _same(truth, guess)


def token_f1(truth: str, guess: str) -> float:
    """Return the F1 of the normalised words, order aside (SQuAD).

    Where either has none it is that of :func:`exact_match`.

    >>> token_f1("the left lung", "left lung base")
    0.8
    """
    return _f1(
        truth,
        guess,
        words=lambda text: normalised_answer(text).split(),
        common=lambda one, two: (Counter(one) & Counter(two)).total(),
    )


def rouge_l(truth: str, guess: str) -> float:
    """Return ROUGE-L: the F1 of the longest common subsequence of words, in lower case.

    Words are runs of letters and digits of any script with their marks, composed (NFC), not stemmed. In
    a script without spaces a whole run is one word. Where either text has none it is that of
    :func:`exact_match`.

    References
    ----------
    Lin, "ROUGE: a package for automatic evaluation of summaries", 2004, section 3.

    >>> rouge_l("police killed the gunman", "police kill the gunman")
    0.75
    """
    return _f1(truth, guess, words=_words, common=common_subsequence)


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

    Commas before groups of exactly three digits are dropped; any other comma ends a number, and a minus
    right behind another number is no sign. The number is written without needless zeros. A text without
    a number is returned as it is. The mark is that of GSM8K (arXiv 2110.14168).

    >>> final_number("6 * 7 = 42, so #### 42 apples"), final_number("It is $1,250.00."), final_number("-.50")
    ('42', '1250', '-0.5')
    """
    plain = text.replace(_MINUS, "-")
    _, mark, tail = plain.rpartition(_MARK)
    found = _NUMBER.findall(tail)
    if not found:
        found = _NUMBER.findall(plain)
        mark = ""
    if not found:
        return text
    number = f"{Decimal(found[0 if mark else -1].replace(',', '')):f}"
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return "0" if number == "-0" else number


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).lower()


def _same(truth: str, guess: str) -> float:
    return float(_folded(truth).strip() == _folded(guess).strip())


def _words(text: str) -> list[str]:
    """Return the runs of letters and digits; a combining mark goes on with the letter before it."""
    signs, inside = [], False
    for sign in _folded(text):
        inside = sign.isalnum() or (inside and unicodedata.category(sign) in ("Mn", "Mc"))
        signs.append(sign if inside else " ")
    return "".join(signs).split()


def _f1(truth: str, guess: str, *, words: _Words, common: _Overlap) -> float:
    one, two = words(truth), words(guess)
    return 2 * common(one, two) / (len(one) + len(two)) if one and two else _same(truth, guess)
