"""Public data sets in their authors' files -> csv and jsonl files with clean columns, for the recipes.

Run with ``python tests/benchmarks/prepare_data.py SHARED_DATA_DIR OUT_DIR``: a folder a data set in, a file a
split out. Prints rows and labels of each file, and stops where they are not the rows its README states.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

Rows = list[dict[str, str]]
#: Column whose values are counted on the terminal.
LABELS = ("label", "section_header", "source")
SHOWN = 6

NLI = ("entailment", "neutral", "contradiction")
SENTIMENT = ("bearish", "bullish", "neutral")


def snli(raw: Path) -> dict[str, Rows]:
    """Return premise, hypothesis, label.

    Three files with three numberings: train18k has 1 neutral, 2 contradiction, 3 entailment (twice), test has
    0 entailment, 1 neutral, 2 contradiction, dev has words. The test file is lower-cased and has no
    punctuation.
    """
    numbers = {"1": "neutral", "2": "contradiction", "3": "entailment"}
    train = []
    for first, second, premise, hypothesis in _tabs(raw / "train18k.tsv"):
        _require(first == second, "snli: the two label columns of train18k.tsv differ")
        train.append({"premise": premise, "hypothesis": hypothesis, "label": numbers[first]})
    test = [
        {"premise": premise, "hypothesis": hypothesis, "label": NLI[int(label)]}
        for premise, hypothesis, label in _tabs(raw / "test.txt")
    ]
    dev = [{key: row[key] for key in ("premise", "hypothesis", "label")} for row in _jsonl(raw / "dev.jsonl")]
    _require({row["label"] for row in dev} == set(NLI), "snli: unknown label in dev.jsonl")
    return _checked("snli", {"train": train, "dev": dev, "test": test}, train=18000, dev=9842, test=9824)


def twitter_financial_news(raw: Path) -> dict[str, Rows]:
    """Return text, label: 0 bearish, 1 bullish, 2 neutral."""
    found = {
        split: [
            {"text": row["text"], "label": SENTIMENT[int(row["label"])]}
            for row in _csv(raw / f"sent_{split}.csv")
        ]
        for split in ("train", "valid")
    }
    return _checked("twitter_financial_news", found, train=9543, valid=2388)


def banking77(raw: Path) -> dict[str, Rows]:
    """Return text, label: a customer's question and its intent, of 77."""
    intents = set(json.loads((raw / "categories.json").read_text(encoding="utf-8")))
    found = {
        split: [
            {"text": row["text"].strip(), "label": row["category"].strip()}
            for row in _csv(raw / f"{split}.csv")
        ]
        for split in ("train", "test")
    }
    for split, rows in found.items():
        _require({row["label"] for row in rows} == intents, f"banking77: {split}.csv lacks an intent")
    return _checked("banking77", found, train=10003, test=3080)


def cfpb_complaints(raw: Path) -> dict[str, Rows]:
    """Return text, label: a complaint's words and its product, of 5.

    Train prompts read "Narrative: ... Product:", test prompts "(instruction) Comment: ... Product:". The
    sample of 200 is part of train and left out.
    """
    shape = re.compile(r"(?:Narrative|.*\nComment): (.*)\nProduct:\n", re.DOTALL)
    found = {}
    for split in ("train", "test"):
        path = raw / f"cfpb_{split}.json"
        found[split] = [
            {"text": _inside(shape, row["input"], path), "label": row["output"].strip()}
            for row in json.loads(path.read_text(encoding="utf-8"))
        ]
    return _checked("cfpb_complaints", found, train=700, test=300)


def pubmedqa(raw: Path) -> dict[str, Rows]:
    """Return question, context (the abstract's parts joined), label yes, no or maybe, and pmid as the unit.

    The official 500 test questions are test, the other 500 train.
    """
    records = json.loads((raw / "ori_pqal.json").read_text(encoding="utf-8"))
    held = json.loads((raw / "test_ground_truth.json").read_text(encoding="utf-8"))
    found: dict[str, Rows] = {"train": [], "test": []}
    for pmid, record in records.items():
        _require(
            held.get(pmid, record["final_decision"]) == record["final_decision"],
            f"pubmedqa: the two files differ on the label of {pmid}",
        )
        found["test" if pmid in held else "train"].append(
            {
                "question": record["QUESTION"],
                "context": " ".join(record["CONTEXTS"]),
                "label": record["final_decision"],
                "pmid": pmid,
            }
        )
    counts = Counter(row["label"] for rows in found.values() for row in rows)
    _require(counts == {"yes": 552, "no": 338, "maybe": 110}, f"pubmedqa: labels are {dict(counts)}")
    return _checked("pubmedqa", found, train=500, test=500)


def medquad(raw: Path) -> dict[str, Rows]:
    """Return question, answer, source (the NIH institute, as the site), focus (the disease), type.

    Three MedlinePlus subsets have no answers, for copyright, and are not in the file. The 14 records of the
    CDC that name no disease are left out: most of their questions have a gap in its place. ``short`` holds
    the answers of at most 80 words, which a small model can learn whole. ``pairs`` are preferences:
    prompt and chosen (a short record) and rejected (an answer on its disease to another type of question).
    """
    with gzip.open(raw / "medquad.jsonl.gz", "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    rows = [
        {
            "question": record["question"].strip(),
            "answer": " ".join(record["answer"].split()),
            # 8_NHLBI_QA_XML -> NHLBI
            "source": re.sub(r"^\d+_|_QA(_XML)?$", "", record["source"]),
            "focus": record["focus"].strip(),
            "type": record["qtype"],
        }
        for record in records
        if record["focus"].strip()
    ]
    short = [row for row in rows if len(row["answer"].split()) <= 80]
    found = {"all": rows, "short": short, "pairs": _preferences(short)}
    return _checked("medquad", found, all=16407 - 14, short=4705, pairs=4057)


def _preferences(rows: Rows) -> Rows:
    """Return a pair for every record that has another one on its disease to reject."""
    pairs = []
    together = defaultdict(list)
    for row in rows:
        together[row["source"], row["focus"]].append(row)
    for mine in together.values():
        for place, row in enumerate(mine):
            others = (
                other["answer"]
                for other in (*mine[place + 1 :], *mine[:place])
                if other["type"] != row["type"] and other["answer"] != row["answer"]
            )
            rejected = next(others, None)
            if rejected is not None:
                pairs.append({"prompt": row["question"], "chosen": row["answer"], "rejected": rejected})
    return pairs


def mts_dialog(raw: Path) -> dict[str, Rows]:
    """Return dialogue, section_header (of 20) and section_text, as the authors name them."""
    names = {
        "train": "TrainingSet",
        "valid": "ValidationSet",
        "test1": "TestSet-1-MEDIQA-Chat-2023",
        "test2": "TestSet-2-MEDIQA-Sum-2023",
    }
    found = {
        split: [{**row, "dialogue": _lines(row["dialogue"])} for row in _csv(raw / f"MTS-Dialog-{name}.csv")]
        for split, name in names.items()
    }
    headers = {row["section_header"] for rows in found.values() for row in rows}
    _require(len(headers) == 20, f"mts_dialog: {len(headers)} section headers")
    return _checked("mts_dialog", found, train=1201, valid=100, test1=200, test2=200)


def xbrl_term(raw: Path) -> dict[str, Rows]:
    """Return term, definition: an XBRL tag's name and what it means."""
    shape = re.compile(r"Explain this XBRL term briefly in one sentence: (.*)\. Answer:", re.DOTALL)
    found = {}
    for split in ("train", "test"):
        path = raw / f"xbrl_term_{split}.jsonl"
        found[split] = [
            {"term": _inside(shape, row["context"].strip(), path), "definition": row["target"].strip()}
            for row in _jsonl(path)
        ]
    return _checked("xbrl_term", found, train=5856, test=651)


def gsm8k(raw: Path) -> dict[str, Rows]:
    """Return question, answer (the worked solution, its number behind ####), and result, the number alone."""
    found = {}
    for split in ("train", "test"):
        rows = []
        for row in _jsonl(raw / f"{split}.jsonl"):
            _, mark, result = row["answer"].rpartition("\n#### ")
            _require(bool(mark), f"gsm8k: an answer of {split}.jsonl has no result")
            rows.append(
                {
                    "question": row["question"].strip(),
                    "answer": row["answer"].strip(),
                    "result": result.strip().replace(",", ""),
                }
            )
        found[split] = rows
    return _checked("gsm8k", found, train=7473, test=1319)


#: Function -> kind of file; long texts with line breaks are easier to read as jsonl.
SETS: dict[Callable[[Path], dict[str, Rows]], str] = {
    snli: "csv",
    twitter_financial_news: "csv",
    banking77: "csv",
    cfpb_complaints: "csv",
    pubmedqa: "jsonl",
    medquad: "jsonl",
    mts_dialog: "jsonl",
    xbrl_term: "jsonl",
    gsm8k: "jsonl",
}


def _tabs(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line]


def _jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _csv(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def _lines(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def _inside(shape: re.Pattern[str], prompt: str, path: Path) -> str:
    """Return what a prompt frames."""
    match = shape.fullmatch(prompt)
    if match is None:
        raise SystemExit(f"{path.name}: a prompt has another shape than this script was written for.")
    return match[1].strip()


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise SystemExit(f"{message}; these are not the files this script was written for.")


def _checked(name: str, found: dict[str, Rows], **expected: int) -> dict[str, Rows]:
    """Refuse other numbers of rows than the README states, and empty cells."""
    for split, rows in found.items():
        _require(len(rows) == expected[split], f"{name}: {split} has {len(rows)} rows, not {expected[split]}")
        for row in rows:
            empty = next((column for column, value in row.items() if not value.strip()), None)
            _require(empty is None, f"{name}: {split} has an empty {empty}")
    return found


def _write(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _summary(rows: Iterable[dict[str, str]]) -> str:
    counts = Counter(row[column] for row in rows for column in LABELS if column in row).most_common()
    shown = ", ".join(f"{label} {count:,}" for label, count in counts[:SHOWN])
    return shown + (f", and {len(counts) - SHOWN} more" if len(counts) > SHOWN else "")


def main() -> None:
    """Convert every data set that is there, and say which are not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("raw", type=Path, help="a folder with one folder a data set")
    parser.add_argument("out", type=Path, help="where the files go, a folder a data set")
    given = parser.parse_args()
    for convert, kind in SETS.items():
        name = convert.__name__
        if not (given.raw / name).is_dir():
            print(f"{name}: not there, left out")
            continue
        for split, rows in convert(given.raw / name).items():
            path = given.out / name / f"{split}.{kind}"
            _write(path, rows)
            print(f"{name}/{path.name}: {len(rows):,} rows  {_summary(rows)}".rstrip())


if __name__ == "__main__":
    main()
