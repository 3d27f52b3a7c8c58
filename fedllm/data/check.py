"""What a site should know about its file before it joins a run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fedllm.data.encode import ClassEncoder, PromptEncoder
from fedllm.data.files import read_table
from fedllm.data.options import fault, letter_of, letters, option_columns
from fedllm.data.records import Example
from fedllm.data.sources import column_roles, default_instruction
from fedllm.errors import DataError
from fedllm.settings import DataSettings

_MEASURED = 2000
_FEW = 10
REFUSED = "a run refuses the file (a private one at a real site goes without them)"
REPEATED = "repeat an earlier one; a site trains on one of them (in a private run a real site on all)"


@dataclass(frozen=True, kw_only=True)
class PreferenceReport:
    """Counts over pairs of answers.

    Attributes
    ----------
    prompts : int
        Different prompts.
    ties : int
        Pairs of equal answers, which teach nothing.
    contradictory : int
        Pairs whose answers stand the other way round in another record of the same prompt.
    longer : float
        Share of pairs whose preferred answer has more characters: what a model may learn instead.
    """

    prompts: int
    ties: int
    contradictory: int
    longer: float


@dataclass(frozen=True, kw_only=True)
class ChoiceReport:
    """Counts over multiple-choice records.

    Attributes
    ----------
    fewest, most : int
        Options of a usable record; 0 where there is none.
    repeated : int
        Usable records with two options of the same text.
    faults : Mapping[str, tuple[int, int]]
        Why records cannot be asked -> how many of them, and the first one's number.
    """

    fewest: int
    most: int
    repeated: int
    faults: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """Counts over one file; none of its texts.

    Attributes
    ----------
    rows : int
        Records in the file.
    columns : tuple[str, ...]
        All column names.
    labels : Mapping[str, int]
        Label, or letter of the right option -> records, most frequent first; empty for free text.
    duplicates : int
        Records that repeat the texts, options and answers of an earlier one, with units of the same unit.
    conflicting : int
        Texts that occur with more than one label, or with the same options in any order and another
        right one; 0 for free text.
    empty : int
        Records that lack a text, an answer, or a site or unit the settings name.
    truncated : float or None
        Share of records whose text is cut at ``train.max_length``, measured on at most 2000 of
        them spread over the file; None without a tokenizer.
    unfit : tuple[int, int]
        Those of them that do not fit even without their text, such as one with a long answer: how many,
        and the first one's number.
    sites : Mapping[str, int] or None
        Site -> records; None without ``data.site``.
    units : tuple[int, int] or None
        Number of units and the most records of one; None without ``data.unit``.
    preferences : PreferenceReport or None
        Of pairs of answers; None without ``data.rejected``.
    choices : ChoiceReport or None
        Of multiple choice; None for other tasks.
    warnings : tuple[str, ...]
        What to look at before a run.
    """

    rows: int
    columns: tuple[str, ...]
    labels: Mapping[str, int]
    duplicates: int
    conflicting: int
    empty: int
    truncated: float | None
    unfit: tuple[int, int]
    sites: Mapping[str, int] | None
    units: tuple[int, int] | None
    preferences: PreferenceReport | None
    choices: ChoiceReport | None
    warnings: tuple[str, ...]


def check_file(
    path: str | Path,
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 128,
    *,
    encodes: bool = False,
) -> FileReport:
    """Read a site's file as a run would and report on it.

    Parameters
    ----------
    encodes : bool
        Whether the tokenizer is an encoder's (``model.kind``), which reads texts and writes no answer.

    Raises
    ------
    DataError
        If the file cannot be read or lacks a column.
    """
    table = read_table(Path(path).expanduser(), column_roles(data), option_columns(data.options))
    values = table.values
    none = [""] * len(values["text"])
    optional = (values.get(role, none) for role in ("unit", "pair", "rejected"))
    options = table.options or [()] * len(values["text"])
    examples = [
        Example(text, label.strip(), unit.strip(), pair, rejected.strip(), own)
        for text, label, unit, pair, rejected, own in zip(
            values["text"], values["label"], *optional, options, strict=True
        )
    ]
    filled = {
        number: example
        for number, example in enumerate(examples, start=1)
        if example.text.strip() and example.label and (example.rejected or not data.rejected)
    }
    choices = None
    if data.task == "choose":
        filled, choices = _choices(filled, data.answers)
    usable = list(filled.values())
    labelled = usable if data.labelled else []
    labels_of = defaultdict(set)
    for example in labelled:
        labels_of[example.text, example.pair, *sorted(example.options)].add(_right(example))
    sites = Counter(map(str.strip, values["site"])) if "site" in values else None
    owners = Counter(example.unit for example in examples) if "unit" in values else None
    truncated, unfit = _measured(filled, data, tokenizer, max_length, encodes=encodes)
    report = FileReport(
        rows=len(examples),
        columns=table.columns,
        labels=dict(Counter(example.label for example in labelled).most_common()),
        duplicates=len(usable) - len(set(usable)),
        conflicting=sum(len(labels) > 1 for labels in labels_of.values()),
        empty=sum(not all(value.strip() for value in row) for row in zip(*values.values(), strict=True)),
        truncated=truncated,
        unfit=unfit,
        sites=None if sites is None else dict(sorted(sites.items())),
        units=None if owners is None else (len(owners), max(owners.values())),
        preferences=_preferences(usable) if data.rejected else None,
        choices=choices,
        warnings=(),
    )
    return replace(report, warnings=tuple(_warnings(report, data, max_length)))


def _choices(filled: Mapping[int, Example], kind: str) -> tuple[dict[int, Example], ChoiceReport]:
    """Return the records that can be asked, with the right option's letter for a label, and the counts."""
    faults: dict[str, tuple[int, int]] = {}
    asked = {}
    for number, example in filled.items():
        reason = fault(example.options, example.label, kind)
        if reason:
            count, first = faults.get(reason, (0, number))
            faults[reason] = (count + 1, first)
        else:
            asked[number] = replace(example, label=letter_of(example.options, example.label, kind))
    sizes = [len(example.options) for example in asked.values()]
    return asked, ChoiceReport(
        fewest=min(sizes, default=0),
        most=max(sizes, default=0),
        repeated=sum(len(set(example.options)) < len(example.options) for example in asked.values()),
        faults=faults,
    )


def _right(example: Example) -> str:
    """Return the label, or the text of the right option: letters change when options change places."""
    if not example.options:
        return example.label
    return example.options[letters(len(example.options)).index(example.label)]


def _preferences(filled: list[Example]) -> PreferenceReport:
    said = {(item.text, item.pair, item.label, item.rejected) for item in filled}
    tied = [item for item in filled if item.label == item.rejected]
    turned = [item for item in filled if (item.text, item.pair, item.rejected, item.label) in said]
    return PreferenceReport(
        prompts=len({(item.text, item.pair) for item in filled}),
        ties=len(tied),
        contradictory=len(turned) - len(tied),
        longer=sum(len(item.label) > len(item.rejected) for item in filled) / max(1, len(filled)),
    )


def _measured(
    filled: Mapping[int, Example],
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    *,
    encodes: bool,
) -> tuple[float | None, tuple[int, int]]:
    """Return the share of texts that are cut, and of records that cannot fit the count and the first."""
    if tokenizer is None or not filled:
        return None, (0, 0)
    encoder: ClassEncoder | PromptEncoder = (
        ClassEncoder(tokenizer, labels=sorted({one.label for one in filled.values()}), max_length=max_length)
        if encodes
        else PromptEncoder(
            tokenizer, instruction=default_instruction(data), prompt=data.prompt, max_length=max_length
        )
    )
    sample = list(filled.items())[:: -(-len(filled) // _MEASURED)]
    cut, unfit = 0, []
    for number, example in sample:
        try:
            cut += encoder.encode(example).truncated
        except DataError:
            unfit.append(number)
    return cut / len(sample), (len(unfit), unfit[0] if unfit else 0)


def _warnings(report: FileReport, data: DataSettings, max_length: int) -> list[str]:
    found = []
    if report.empty:
        found.append(f"{report.empty} records lack a value; {REFUSED}.")
    if report.duplicates:
        found.append(f"{report.duplicates} records {REPEATED}.")
    if data.task == "classify":
        found += _label_warnings(report, data)
    if report.choices is not None:
        found += _choice_warnings(report, report.choices)
    if report.preferences is not None and report.preferences.ties:
        found.append(f"{report.preferences.ties} pairs have two equal answers and teach nothing.")
    if report.preferences is not None and report.preferences.contradictory:
        found.append(f"{report.preferences.contradictory} pairs are preferred both ways round.")
    if report.truncated:
        found.append(f"{report.truncated:.1%} of texts lose their end at train.max_length={max_length}.")
    if report.unfit[0]:
        count, first = report.unfit
        found.append(
            f"{count} records (the first: record {first}) do not fit in train.max_length={max_length}, even "
            f"without their text; {REFUSED}."
        )
    if report.units is not None and report.units[1] > 1:
        found.append(
            f"one '{data.unit}' owns up to {report.units[1]} records; a private run protects it as a whole."
        )
    return found


def _choice_warnings(report: FileReport, choices: ChoiceReport) -> list[str]:
    found = [
        f"{count} records have {reason} (the first: record {first}); {REFUSED}."
        for reason, (count, first) in choices.faults.items()
    ]
    if report.conflicting:
        found.append(f"{report.conflicting} texts with the same options have more than one right one.")
    if choices.repeated:
        found.append(f"{choices.repeated} records have two options of the same text.")
    if len(report.labels) == 1:
        found.append("the right option has the same letter in all records.")
    return found


def _label_warnings(report: FileReport, data: DataSettings) -> list[str]:
    found = []
    if report.conflicting:
        found.append(f"{report.conflicting} texts occur with more than one label.")
    if len(report.labels) == 1:
        found.append("all records have the same label.")
    rare = sum(count < _FEW for count in report.labels.values())
    if rare:
        found.append(f"{rare} of {len(report.labels)} labels have fewer than {_FEW} records.")
    listed = {label.strip() for label in data.labels.split("|") if label.strip()}
    foreign = sum(count for label, count in report.labels.items() if label not in listed)
    if listed and foreign:
        found.append(f"{foreign} records have a label outside data.labels; {REFUSED}.")
    return found
