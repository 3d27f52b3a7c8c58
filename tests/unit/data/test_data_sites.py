from __future__ import annotations

import math
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedllm.data.heldout import split
from fedllm.data.records import Example, normalised
from fedllm.data.sites import SiteData, elsewhere, simulated_site, site_from_file, site_names
from fedllm.data.sources import load_records
from fedllm.errors import ConfigError, DataError
from fedllm.settings import DataSettings

FILES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
WORDS = st.text(alphabet="abAB \t", min_size=1, max_size=4).filter(str.strip)
EXAMPLES = st.lists(st.builds(Example, WORDS, st.sampled_from("xy"), st.sampled_from(["p", "q", "r", "s"])))


def fresh(folder: Path) -> Path:
    """Return a path of its own: files rewritten within one clock tick look unchanged."""
    return Path(tempfile.mkdtemp(dir=folder)) / "a.csv"


def write(folder: Path, examples: list[Example]) -> str:
    path = fresh(folder)
    rows = "".join(f'"{example.text}",{example.label},{example.unit}\n' for example in examples)
    path.write_text("text,label,unit\n" + rows)
    return str(path)


def many(count: int) -> list[Example]:
    return [Example(f"text {i}", "xyz"[i % 3], f"p{i}") for i in range(count)]


def texts(examples: tuple[Example, ...]) -> set[str]:
    return {normalised(example.text) for example in examples}


FILE = DataSettings(source="file")


@given(examples=EXAMPLES, extra=EXAMPLES, seed=st.integers(0, 99), by_unit=st.booleans())
def test_a_new_record_moves_no_other(
    examples: list[Example], extra: list[Example], seed: int, by_unit: bool
) -> None:
    before = split(examples, by_unit=by_unit, share=0.4, seed=seed)
    after = split(extra + examples, by_unit=by_unit, share=0.4, seed=seed)
    for old, new in zip(before, after, strict=True):
        assert not Counter(old) - Counter(new)
    assert sum(map(len, before)) == len(examples)


def test_pairs_of_one_prompt_stay_together_and_all_of_them_count(tmp_path: Path) -> None:
    path = fresh(tmp_path)
    rows = [f"prompt {i // 3},better {i % 3},worse {i % 2} \n" for i in range(60)]
    path.write_text("text,label,rejected\n" + "".join(rows) + rows[0])
    data = replace(FILE, path=str(path), rejected="rejected", task="generate", heldout=0.4)
    site = simulated_site(data, sites=1, seed=1, index=0)
    other = simulated_site(data, sites=1, seed=1, index=0, fold="validation")
    held = (*site.heldout, *other.heldout)
    assert len(site.train) + len(held) == 60
    assert not texts(site.train) & texts(held)
    assert {example.rejected for example in site.train} == {"worse 0", "worse 1"}
    # the rejected answer is part of the record: another one is other data
    path.write_text(("text,label,rejected\n" + "".join(rows)).replace("worse 0", "bad"))
    changed = simulated_site(data, sites=1, seed=1, index=0)
    assert changed.fingerprint != site.fingerprint
    with pytest.raises(ConfigError, match="data.rejected=no: data.source=icd10 has no such column"):
        load_records(DataSettings(rejected="no", task="generate"))


@given(examples=EXAMPLES, seed=st.integers(0, 99), by_unit=st.booleans())
def test_groups_stay_whole(examples: list[Example], seed: int, by_unit: bool) -> None:
    train, heldout = split(examples, by_unit=by_unit, share=0.4, seed=seed)

    def groups(part: list[Example]) -> set[str]:
        return {example.unit if by_unit else normalised(example.text) for example in part}

    assert not groups(train) & groups(heldout)


@FILES
@given(examples=EXAMPLES, unit=st.sampled_from(["", "unit"]), public=st.booleans(), seed=st.integers(0, 9))
def test_no_text_is_in_training_and_held_out(
    tmp_path: Path, examples: list[Example], unit: str, public: bool, seed: int
) -> None:
    path = write(tmp_path, examples + many(12))
    data = replace(FILE, unit=unit, heldout=0.4, heldout_public=public)
    folds = [
        site_from_file(data, path=path, name="a", seed=seed, fold=fold) for fold in ("test", "validation")
    ]
    assert folds[0].train == folds[1].train
    assert not set(folds[0].heldout) & set(folds[1].heldout)
    for site in folds:
        assert not texts(site.train) & texts(site.heldout)
        # with units, each keeps its own copy
        pairs = Counter((example.text, example.label, example.unit) for example in site.train)
        assert set(pairs.values()) == {1}


@FILES
@given(
    examples=EXAMPLES,
    record=st.builds(Example, WORDS, st.sampled_from("xy"), st.just("p")),
)
def test_one_record_changes_training_by_at_most_itself(
    tmp_path: Path, examples: list[Example], record: Example
) -> None:
    # what DP-SGD's sensitivity rests on: adding a record adds at most that record
    data = replace(FILE, unit="unit", heldout=0.4)
    rows = examples + many(12)

    def trained(rows: list[Example]) -> set[tuple[str, str]]:
        site = site_from_file(data, path=write(tmp_path, rows), name="a", seed=1)
        return {(example.text, example.label) for example in site.train}

    before, after = trained(rows), trained([*rows, record])
    assert before <= after <= before | {(record.text, record.label)}


@FILES
@given(order=st.permutations(many(20)))
def test_the_order_of_rows_does_not_matter(tmp_path: Path, order: list[Example]) -> None:
    data = replace(FILE, unit="unit", heldout=0.3)
    first = site_from_file(data, path=write(tmp_path, many(20)), name="a", seed=1)
    second = site_from_file(data, path=write(tmp_path, order), name="a", seed=1)
    assert first == second


def test_the_fingerprint_follows_the_training_records(tmp_path: Path) -> None:
    def site(rows: list[Example]) -> SiteData:
        return site_from_file(replace(FILE, heldout=0.0), path=write(tmp_path, rows), name="a", seed=1)

    rows = many(10)
    changed = [*rows[:-1], replace(rows[-1], label="other")]
    assert site(rows).fingerprint != site(changed).fingerprint
    assert len(site(rows).fingerprint) == 64


def test_units_are_counted(tmp_path: Path) -> None:
    rows = [Example(f"text {i}", "x", f"p{i // 2}") for i in range(10)]
    path = write(tmp_path, rows)
    grouped = site_from_file(replace(FILE, unit="unit", heldout=0.0), path=path, name="a", seed=1)
    assert len(grouped.train) == 10
    assert sorted(sum(grouped.units, ())) == list(range(10))
    owners = [{grouped.train[position].unit for position in unit} for unit in grouped.units]
    assert sorted(map(sorted, owners)) == [["p0"], ["p1"], ["p2"], ["p3"], ["p4"]]
    single = site_from_file(replace(FILE, heldout=0.0), path=path, name="a", seed=1)
    assert single.units == tuple((position,) for position in range(10))
    assert single.train[0].unit == ""
    distinct = site_from_file(
        replace(FILE, unit="unit", heldout=0.0), path=write(tmp_path, many(10)), name="a", seed=1
    )
    assert sorted(map(len, distinct.units)) == [1] * 10


def test_a_unit_that_leaves_takes_only_its_own_records(tmp_path: Path) -> None:
    # both units own the same text: were one copy dropped, the other's owner would decide about it
    rows = [*many(6), Example("shared", "x", "p-a"), Example("shared", "x", "p-b")]
    data = replace(FILE, unit="unit", heldout=0.0)
    whole = site_from_file(data, path=write(tmp_path, rows), name="a", seed=1)
    without = site_from_file(data, path=write(tmp_path, [*rows[:6], rows[7]]), name="a", seed=1)
    assert set(whole.train) - set(without.train) == {rows[6]}
    assert len(whole.train) == 8


def test_a_public_file_replaces_the_held_out_share(tmp_path: Path) -> None:
    own = write(tmp_path, many(20))
    public = tmp_path / "public.csv"
    shown = [f"public {i}" for i in range(30)] + ["TEXT  3"]
    public.write_text("text,label\n" + "".join(f"{text},{'vw'[i % 2]}\n" for i, text in enumerate(shown)))
    data = replace(FILE, unit="unit", heldout=0.5, max_per_label=1)
    folds = [
        site_from_file(data, path=own, name="a", seed=1, fold=fold, heldout_path=str(public))
        for fold in ("test", "validation")
    ]
    # all public records are scored whatever the site holds, and the site does not train on them
    assert {example.text for site in folds for example in site.heldout} == set(shown)
    assert len(folds[0].train) == 19
    assert folds[0].labels == ("v", "w")


def test_a_real_site_keeps_records_the_recipes_limits_would_drop(tmp_path: Path) -> None:
    data = replace(FILE, max_per_label=1, min_per_label=50, heldout=0.0)
    assert len(site_from_file(data, path=write(tmp_path, many(20)), name="a", seed=1).train) == 20


def test_a_site_needs_two_records(tmp_path: Path) -> None:
    path = write(tmp_path, [Example("same", "x", "p")] * 5)
    with pytest.raises(DataError, match="site north: fewer than 2 different training records"):
        site_from_file(replace(FILE, heldout=0.0), path=path, name="north", seed=1)


def test_free_text_has_no_labels(tmp_path: Path) -> None:
    path = write(tmp_path, many(20))
    assert site_from_file(replace(FILE, task="generate"), path=path, name="a", seed=1).labels == ()


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
@pytest.mark.parametrize("sites", [1, 3])
def test_a_partition_covers_every_record_once(partition: str, sites: int) -> None:
    data = DataSettings(source="mcc", partition=partition, heldout=0.0)
    shares = [simulated_site(data, sites=sites, seed=5, index=index) for index in range(sites)]
    found = Counter(example.text for share in shares for example in share.train)
    assert found == Counter(load_records(data)["text"])
    assert [share.name for share in shares] == [f"site-{index}" for index in range(sites)]


@FILES
@given(
    names=st.lists(st.sampled_from(["north", "south", "west"]), min_size=12, max_size=30),
    partition=st.sampled_from(["iid", "dirichlet", "column"]),
    seed=st.integers(0, 9),
)
def test_every_partition_of_a_file_covers_it(
    tmp_path: Path, names: list[str], partition: str, seed: int
) -> None:
    rows = ["north", "south", "west"] * 2 + names
    path = fresh(tmp_path)
    path.write_text(
        "text,label,ward\n" + "".join(f"text {i},{'xy'[i % 2]},{name}\n" for i, name in enumerate(rows))
    )
    data = replace(FILE, path=str(path), partition=partition, site="ward", heldout=0.0)
    shares = [simulated_site(data, sites=3, seed=seed, index=index) for index in range(3)]
    assert sorted(example.text for share in shares for example in share.train) == sorted(
        f"text {i}" for i in range(len(rows))
    )
    if partition == "column":
        assert [share.name for share in shares] == ["north", "south", "west"]
        assert [len(share.train) for share in shares] == [rows.count(share.name) for share in shares]


def test_a_partition_depends_on_the_seed() -> None:
    data = DataSettings(source="mcc")
    one, same, other = (simulated_site(data, sites=2, seed=seed, index=0) for seed in (1, 1, 2))
    assert one == same
    assert one.fingerprint != other.fingerprint


def test_dirichlet_skews_labels() -> None:
    def largest_share(partition: str) -> float:
        data = DataSettings(partition=partition, dirichlet_alpha=0.1, min_per_label=800, max_per_label=200)
        counts = Counter(example.label for example in simulated_site(data, sites=4, seed=1, index=0).train)
        return max(counts.values()) / sum(counts.values())

    assert largest_share("dirichlet") > 2 * largest_share("iid")


def test_what_is_held_out_at_one_site_trains_at_none(tmp_path: Path) -> None:
    path = write(tmp_path, many(30) + many(30))
    data = replace(FILE, path=path, heldout=0.3)
    shares = [simulated_site(data, sites=3, seed=1, index=index) for index in range(3)]
    assert not set().union(*(texts(s.train) for s in shares)) & set().union(
        *(texts(s.heldout) for s in shares)
    )


@pytest.mark.parametrize(("records", "each"), [(0, 0), (5, 3), (1, 1), (99, 50)])
def test_elsewhere_are_as_many_records_of_each_other_site(records: int, each: int, tmp_path: Path) -> None:
    path = tmp_path / "wards.csv"
    rows = "".join(f"{ward} {i},{'xy'[i % 2]},{ward}\n" for ward in "abc" for i in range(40))
    path.write_text("text,label,ward\n" + rows)
    data = replace(FILE, path=str(path), partition="column", site="ward", heldout=0.3)
    found = elsewhere(data, sites=3, seed=1, index=1, records=records)
    shares = [simulated_site(data, sites=3, seed=1, index=index) for index in range(3)]
    each = each or math.ceil(len(shares[1].heldout) / 2)
    assert found.heldout == shares[0].heldout[:each] + shares[2].heldout[:each]
    assert (found.name, found.train, found.units, found.labels) == ("b", (), (), shares[1].labels)


def test_site_names() -> None:
    assert site_names(DataSettings(), sites=2) == ("site-0", "site-1")


@pytest.mark.parametrize(
    ("wards", "message"),
    [
        (["a", "b", "c"], r"'ward' \(data.site\) names 3 sites, federation.sites asks for 2"),
        (["a", "../b"], "1 names cannot be folder names"),
    ],
)
def test_site_columns_that_do_not_fit(tmp_path: Path, wards: list[str], message: str) -> None:
    path = fresh(tmp_path)
    path.write_text("text,label,ward\n" + "".join(f"text {i},x,{wards[i % len(wards)]}\n" for i in range(12)))
    with pytest.raises(DataError, match=message):
        site_names(replace(FILE, path=str(path), partition="column", site="ward"), sites=2)


def test_too_many_sites(tmp_path: Path) -> None:
    path = write(tmp_path, many(5))
    with pytest.raises(DataError, match="5 records cannot be shared among federation.sites=4"):
        simulated_site(replace(FILE, path=path), sites=4, seed=1, index=0)


def test_free_text_has_no_label_mix(tmp_path: Path) -> None:
    path = write(tmp_path, many(20))
    with pytest.raises(ConfigError, match="data.partition=dirichlet"):
        simulated_site(
            replace(FILE, path=path, task="generate", partition="dirichlet"), sites=2, seed=1, index=0
        )


def test_an_extreme_mix_is_refused_with_advice(tmp_path: Path) -> None:
    path = fresh(tmp_path)
    path.write_text("text,label\n" + "".join(f"text {i},x\n" for i in range(40)))
    data = replace(FILE, path=str(path), partition="dirichlet", dirichlet_alpha=1e-3)
    with pytest.raises(DataError, match=r"data.dirichlet_alpha=0.001 leaves a site of 4 without"):
        simulated_site(data, sites=4, seed=1, index=0)


def test_a_lenient_site_counts_every_record_whatever_the_recipe_asks_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*many(20), Example("a secret", "", ""), Example(" ", "x", ""), Example("text 99", "z", "")]
    path = write(tmp_path, rows)
    for labels, heldout, usable in (("", 0.9, 21), ("x|y", 0.2, 14), ("none such", 0.0, 0)):
        data = replace(FILE, labels=labels, heldout=heldout)
        site = site_from_file(data, path=path, name="north", seed=1, lenient=True)
        assert (len(site.train), len(site.units), len(site.heldout)) == (23, 23, 0)
        assert site.labels == tuple(filter(None, labels.split("|")))
        assert sum(example.usable for example in site.train) == usable
        assert f"{23 - usable} of 23 records do not train" in caplog.text
    assert "secret" not in caplog.text
    with pytest.raises(DataError, match="1 of 23 records have an empty"):
        site_from_file(FILE, path=path, name="north", seed=1)


def test_a_lenient_site_drops_no_row(tmp_path: Path) -> None:
    path = write(tmp_path, [*many(6), *many(6), Example("public", "x", "p0")])
    public = write(tmp_path, [Example(text, "x", "") for text in ("Public", "other", "more", "four")])
    site = site_from_file(FILE, path=path, name="a", seed=1, heldout_path=public, lenient=True)
    assert (len(site.train), len(site.units)) == (13, 13)
    assert [example.text for example in site.train if not example.usable] == ["public"]
    assert len(texts(site.train)) == 7
    other = site_from_file(FILE, path=path, name="a", seed=1, lenient=True)
    assert len(other.units) == len(site.units)


def test_public_records_are_scored_record_by_record_where_a_site_has_units(tmp_path: Path) -> None:
    path = write(tmp_path, many(20))
    public = fresh(tmp_path)
    public.write_text("text,label\n" + "".join(f"public {i},x\n" for i in range(40)))
    data = replace(FILE, unit="unit")
    folds = [
        site_from_file(data, path=path, name="a", seed=1, fold=fold, heldout_path=str(public)).heldout
        for fold in ("test", "validation")
    ]
    assert all(folds)
    assert sum(map(len, folds)) == 40


MODES = ({}, {"pooled": True})


def notes(patients: int, kept: int) -> list[Example]:
    """Return four notes of each patient: some are written again and again, one is the patient's own."""
    rows = [(f"note {(3 * p + i) % kept}", f"p{p}") for p in range(patients) for i in range(3)]
    rows += [(f"of patient {p} alone", f"p{p}") for p in range(patients)]
    return [Example(text, "xyz"[len(text) % 3], owner) for text, owner in rows]


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
@pytest.mark.parametrize("public", [False, True])
def test_with_units_what_is_held_out_at_one_site_trains_at_none(
    tmp_path: Path, partition: str, public: bool
) -> None:
    path = write(tmp_path, notes(200, 450))
    data = replace(FILE, path=path, unit="unit", partition=partition, heldout=0.3, heldout_public=public)
    alone, central = (
        [simulated_site(data, sites=4, seed=1, index=index, **mode) for index in range(4)] for mode in MODES
    )
    held = set().union(*(texts(site.heldout) for site in alone))
    assert held
    assert not held & set().union(*(texts(site.train) for site in (*alone, *central)))
    # every mode scores the same records, and the central one trains on those of all sites
    assert [site.heldout for site in alone] == [site.heldout for site in central]
    everyone = Counter(example for site in alone for example in site.train)
    assert all(Counter(site.train) == everyone for site in central)


@FILES
@given(
    owners=st.lists(st.sampled_from("abcdefgh"), min_size=20, max_size=60),
    partition=st.sampled_from(["iid", "dirichlet"]),
    seed=st.integers(0, 9),
)
def test_a_unit_is_at_one_site(tmp_path: Path, owners: list[str], partition: str, seed: int) -> None:
    rows = [Example(f"text {i}", "xy"[i % 2], owner) for i, owner in enumerate("abcdefgh" * 2)]
    rows += [Example(f"more {i}", "xy"[i % 2], owner) for i, owner in enumerate(owners)]
    data = replace(FILE, path=write(tmp_path, rows), unit="unit", partition=partition, heldout=0.0)
    shares = [simulated_site(data, sites=2, seed=seed, index=index) for index in range(2)]
    assert Counter(example for site in shares for example in site.train) == Counter(rows)
    assert not set.intersection(*({example.unit for example in site.train} for site in shares))


def test_dirichlet_skews_the_labels_of_whole_units(tmp_path: Path) -> None:
    # a patient's commonest label decides, whatever the first record says
    rows = [
        Example(f"{p} {i}", "z" if i == 0 else "xy"[p % 2], f"p{p}") for p in range(120) for i in range(4)
    ]
    path = write(tmp_path, rows)

    def largest_share(partition: str) -> float:
        data = replace(FILE, path=path, unit="unit", partition=partition, dirichlet_alpha=0.1, heldout=0.0)
        counts = Counter(
            e.label for e in simulated_site(data, sites=2, seed=1, index=0).train if e.label != "z"
        )
        return max(counts.values()) / sum(counts.values())

    assert largest_share("iid") < 0.7 < largest_share("dirichlet")


def test_too_few_units(tmp_path: Path) -> None:
    path = write(tmp_path, [Example(f"text {i}", "x", f"p{i % 3}") for i in range(60)])
    with pytest.raises(DataError, match=r"3 units \(data.unit\) cannot be shared among federation.sites=2"):
        simulated_site(replace(FILE, path=path, unit="unit"), sites=2, seed=1, index=0)


def cards(folder: Path, *, asked: str = "Answer this.", count: int = 90, first: int = 0) -> str:
    """Write records whose first text is one of few sentences; the question is the second one."""
    path = fresh(folder)
    rows = "".join(f"{asked},question {i},{'xy'[i % 2]}\n" for i in range(first, first + count))
    path.write_text("ask,question,label\n" + rows)
    return str(path)


CARDS = replace(FILE, text="ask", pair="question")
SHARED = r"(\d+) of \1 different records share their text in the column 'ask' \(data.text\) with others"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("pooled", [False, True])
def test_a_split_that_shared_texts_forbid_is_refused(tmp_path: Path, seed: int, pooled: bool) -> None:
    data = replace(CARDS, path=cards(tmp_path), heldout=0.5)
    folds = ("test", "validation")
    # whichever side the one sentence falls on
    with pytest.raises(DataError, match=SHARED):
        [simulated_site(data, sites=9, seed=seed, index=0, fold=fold, pooled=pooled) for fold in folds]
    with pytest.raises(DataError, match=f"site north: .*{SHARED}.*the column that tells records apart"):
        [site_from_file(data, path=data.path, name="north", seed=seed, fold=fold) for fold in folds]
    told = replace(data, text="question", pair="")
    assert simulated_site(told, sites=3, seed=seed, index=0, pooled=pooled).heldout
    assert len(simulated_site(replace(data, heldout=0.0), sites=1, seed=seed, index=0).train) == 90


def test_a_fold_that_the_texts_of_units_leave_empty_is_refused(tmp_path: Path) -> None:
    rows = [Example(f"note {(3 * p + i) % 40}", "xy"[i % 2], f"p{p}") for p in range(100) for i in range(3)]
    data = replace(FILE, path=write(tmp_path, rows), unit="unit", heldout=0.3)
    with pytest.raises(DataError, match="300 of 300 different records share their text"):
        simulated_site(data, sites=4, seed=1, index=0)
    # public ones stay, and training records yield
    assert simulated_site(replace(data, heldout_public=True, heldout=0.1), sites=2, seed=1, index=0).heldout


def test_a_fold_may_be_empty_by_chance(tmp_path: Path) -> None:
    rows = [*many(5), replace(many(1)[0], label="other")]
    data = replace(FILE, path=write(tmp_path, rows), heldout=0.2)
    found = [simulated_site(data, sites=1, seed=seed, index=0).heldout for seed in range(6)]
    assert () in found


def test_a_public_file_that_forbids_all_training_is_refused(tmp_path: Path) -> None:
    own, public = cards(tmp_path), cards(tmp_path, first=500)
    for kind in ("heldout_path", "private_heldout_path"):
        with pytest.raises(DataError, match=f"site north: .*{SHARED}"):
            [
                site_from_file(CARDS, path=own, name="north", seed=1, fold=fold, **{kind: public})
                for fold in ("test", "validation")
            ]


@pytest.mark.parametrize("lenient", [False, True])
def test_the_sites_log_says_what_a_public_file_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lenient: bool
) -> None:
    own, public = (
        write(tmp_path, many(20)),
        write(tmp_path, [Example(f"Text {i}", "x", "") for i in range(5)]),
    )
    for _ in range(2):
        site_from_file(FILE, path=own, name="north", seed=1, heldout_path=public, lenient=lenient)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "site north: 5 of 20 training records do not train: their text, in the column 'text', is in the "
        "public held-out file."
    ]


def test_a_private_site_is_not_refused_for_what_its_records_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own, public = cards(tmp_path), cards(tmp_path, first=500)
    site = site_from_file(CARDS, path=own, name="north", seed=1, heldout_path=public, lenient=True)
    assert (len(site.units), sum(example.usable for example in site.train)) == (90, 0)
    assert "90 of 90 training records do not train" in caplog.text
