"""Options of a multiple-choice record: read from a file, lettered, and the right one's letter."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

from fedllm.data.records import written

MOST = len(ascii_uppercase)


def option_columns(options: str) -> tuple[str, ...]:
    """Return the columns that ``data.options`` names.

    >>> option_columns("opa, opb"), option_columns("options")
    (('opa', 'opb'), ('options',))
    """
    return tuple(name.strip() for name in options.split(",") if name.strip())


def letters(count: int) -> tuple[str, ...]:
    """Return the first letters.

    >>> letters(3)
    ('A', 'B', 'C')
    """
    return tuple(ascii_uppercase[:count])


def listed(options: Sequence[str]) -> str:
    """Return the options as a prompt shows them, one a line.

    >>> listed(["heart", "lung"])
    'A. heart\\nB. lung'
    """
    return "\n".join(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False))


def record_options(values: Sequence[object]) -> tuple[str, ...]:
    """Return one record's options from the values of its option columns.

    One column holds a list, or a text with ``|`` between the options; several hold one option each.
    What is missing at the end, or instead of a list, is no option: a question may have fewer than others.

    Raises
    ------
    ValueError
        If the values are neither texts nor numbers, or a list of them.
    """
    found = list(values)
    if len(found) == 1:
        (cell,) = found
        if isinstance(cell, list | tuple):
            found = list(cell)
        elif isinstance(cell, str) or not written(cell):
            found = list(written(cell).split("|"))
        else:
            raise ValueError
    if not all(value is None or isinstance(value, str | int | float) for value in found):
        raise ValueError
    texts = [written(value).strip() for value in found]
    while texts and not texts[-1]:
        texts.pop()
    return tuple(texts)


def fault(options: Sequence[str], answer: str, kind: str) -> str:
    """Return why a record cannot be used, quoting nothing of it; empty if it can.

    Parameters
    ----------
    answer : str
        What the label column holds.
    kind : {"letter", "index", "number", "text"}
        How it names the right option (``data.answers``).
    """
    if len(options) < 2:
        return "fewer than two options"
    if len(options) > MOST:
        return f"more than {MOST} options"
    if not all(options):
        return "an empty option before the last one"
    if kind == "text" and options.count(answer) > 1:
        return "an answer that is the text of two options"
    if _place(options, answer, kind) is None:
        return f"an answer that is not the {kind} of one of its options"
    return ""


def letter_of(options: Sequence[str], answer: str, kind: str) -> str:
    """Return the letter of the right option of a record without :func:`fault`.

    >>> letter_of(["x", "y"], "b", "letter"), letter_of(["x", "y"], "1", "index")
    ('B', 'B')
    >>> letter_of(["x", "y"], "1", "number"), letter_of(["x", "y"], "y", "text")
    ('A', 'B')
    """
    place = _place(options, answer, kind)
    assert place is not None, "the record has been checked"
    return ascii_uppercase[place]


def _place(options: Sequence[str], answer: str, kind: str) -> int | None:
    if kind == "text":
        names = list(options)
    elif kind == "letter":
        names, answer = list(letters(len(options))), answer.upper()
    else:
        first = 0 if kind == "index" else 1
        names = [str(place) for place in range(first, first + len(options))]
    return names.index(answer) if answer in names else None
