from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.runs.calibration import pooled_curve
from fedllm.runs.events import append_event, read_events
from fedllm.runs.folder import RunFolder, load_config
from fedllm.runs.manifest import write_manifest
from fedllm.runs.measures import judged_by
from fedllm.runs.plots import bytes_plot, epsilon_plot, metric_plot
from fedllm.runs.privacy_text import best_guess
from fedllm.runs.report import write_report
from fedllm.runs.style import STYLE

HOSTILE = '<script>alert("x")</script>$\\frac{'
PRIVATE = {"privacy__enabled": True, "privacy__epsilon": 8.0}
VOID = {"meta", "path", "use", "rect", "line", "br"}


class Page(HTMLParser):
    """Collects tags, ids and text, and checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self.open else ""


def fill(
    folder: RunFolder, reply, *, sites=("north", "south"), hidden: bool = False, end: bool = True
) -> None:
    """Write the events of a small run in which the last site fails in round 2."""
    config = load_config(folder)
    metrics = {"loss": None, "accuracy": None, "macro_f1": None} if hidden else {}
    spent = {"epsilon": 2.5} if config.privacy.enabled else {}
    append_event(
        folder,
        "run_started",
        run_id="r1",
        sites=len(sites),
        rounds=3,
        config={},
        versions={},
    )
    for number, site in enumerate(sites):
        append_event(folder, "site_joined", site=site, node=number, simulated=True)
    for number in (1, 2, 3):
        append_event(folder, "round_started", round=number, sites=list(sites))
        for site in sites:
            if number == 2 and site == sites[-1]:
                reply(folder, 2, site, accepted=False, reason=f"late {HOSTILE}", **(metrics | spent))
            else:
                reply(folder, number, site, **(metrics | spent))
        if end or number < 3:
            append_event(
                folder, "round_finished", round=number, accepted=1, bytes_up=1, bytes_down=1, seconds=1.0
            )
    if end:
        for stage, accuracy in (("base", 0.125), ("final", 0.875)):
            for site in sites:
                append_event(
                    folder,
                    "evaluated",
                    stage=stage,
                    site=site,
                    records=None if hidden else 40,
                    accuracy=None if hidden else accuracy,
                    macro_f1=None if hidden else accuracy,
                    loss=None,
                    majority_accuracy=None if hidden else 0.25,
                    majority_macro_f1=None if hidden else 0.0625,
                )
        append_event(folder, "run_finished", seconds=125.0)


def page(folder: RunFolder) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def row(folder: RunFolder, name: str, *, table: int = 0) -> list[str]:
    """Return the cells of a row that a report has in several tables of sites."""
    source = folder.report_file.read_text(encoding="utf-8")
    found = re.findall(rf'<th scope="row">(?:<bdi>)?{name}(?:</bdi>)?</th>(.*?)</tr>', source, re.DOTALL)
    return re.findall("<td[^>]*>([^<]*)</td>", found[table])


def test_finished_run(make_run, reply) -> None:
    folder = make_run(federation__rounds=3, train__lr=0.25)
    fill(folder, reply)
    write_manifest(folder, config=load_config(folder), model={"weights": "cafe"}, data={}, simulated=True)
    text = page(folder).text
    for expected in (
        "On average, yes.",
        "finished after 2 min",
        "5 of 6 replies were used",
        "Against the untuned base it was better at 2 of 2 sites.",
        "most frequent label it was better at 2 of 2 sites.",
        "tuned 87.5\u00a0%, untuned base 12.5\u00a0%, most frequent label 25.0\u00a0%",
        "at the site with fewest, 40, one record makes 2.5 points",
        "600 B in all from all sites",
        "None: this run used no differential privacy.",
        "3 of 3",
        "2 of 3",
        "Single records are not protected by this run",
        "Macro-F1",
        "train.lr",
        "0.25",
        "cafe",
    ):
        assert expected in text
    source = folder.report_file.read_text(encoding="utf-8")
    assert re.search(r'<tfoot><tr><th scope="row">in all</th><td class="num">600</td>', source)
    assert re.search(r">simulated</th><td><code>true</code>", source)
    assert "withheld" not in text
    assert "Epsilon" not in text
    assert str(folder.path.parent) not in text


def test_page_stands_alone_and_ids_are_unique(make_run, reply) -> None:
    folder = make_run(**PRIVATE, data__heldout_public=True)
    fill(folder, reply)
    parsed = page(folder)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert all(link.startswith("#") for link in parsed.links)
    text = folder.report_file.read_text()
    assert text.count("<svg") == 4
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"(fill|stroke): #0[1-5]0", text), "a placeholder colour was left"


def test_headings_are_in_order_and_every_picture_has_words(make_run, reply) -> None:
    folder = make_run(**PRIVATE, data__heldout_public=True)
    fill(folder, reply)
    text = write_report(folder).read_text()
    levels = [int(level) for level in re.findall(r"<h([1-6])", text)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    labels = re.findall(r'<svg [^>]*role="img" aria-label="([^"]*)"', text)
    assert len(labels) == text.count("<svg")
    assert "Held-out accuracy a round, 2 sites and their mean; the mean goes from 50.0 % to 50.0 %." in labels
    assert any("largest is 2.50, budget 8" in label for label in labels)


def test_colours_contrast_in_light_dark_and_print() -> None:
    """WCAG 2.2: 4.5 for text, 3 for lines and bars of a picture."""
    themes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{([^}]*)\}", STYLE)
    ]
    assert len(themes) == 3
    for theme in themes:
        for ground in ("page", "card"):
            for name in ("text", "muted", "good", "wait", "bad"):
                assert contrast(theme[name], theme[ground]) >= 4.5, (name, ground, theme)
            for name in ("accent", "second", "site"):
                assert contrast(theme[name], theme[ground]) >= 3, (name, ground, theme)


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_policy_in_the_run_folder_stands_beside_what_was_spent(make_run, reply) -> None:
    folder = make_run(**PRIVATE, data__heldout_public=True)
    fill(folder, reply, sites=("north", "south", "west"))
    for site, policy in (
        ("north", "max_epsilon = 4.0\nmax_delta = 1e-06\n"),
        ("south", "max_epsilon = 1e9\nmax_delta = 1e-5\n"),
        ("west", "max_epsilon = "),
    ):
        folder.site_dir(site).mkdir(parents=True)
        (folder.site_dir(site) / "policy.toml").write_text(policy)
    words = " ".join(page(folder).text.split())
    assert "north 2.50 1e-05 8 epsilon 4, delta 1e-06" in words
    assert "south 2.50 1e-05 8 any epsilon, delta 1e-05" in words
    assert "west 2.50 1e-05 8 kept at the site" in words


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"federation__mode": "central"}, "This baseline needs all records in one place."),
        ({"federation__mode": "central"}, "those of all sites are pooled for this baseline"),
        ({"federation__mode": "central", **PRIVATE}, "nothing is hidden from where they are"),
        ({"federation__mode": "local"}, "each alone: this is a baseline"),
        ({"federation__mode": "local"}, "no update leaves it; metrics do"),
        ({"federation__mode": "local", **PRIVATE}, "Each site trains alone, and clips and noises"),
        ({"data__unit": "patient", **PRIVATE}, "each patient (all records of one 'patient' at a site)"),
        ({"site_privacy__enabled": True, "site_privacy__epsilon": 3.0}, "Whole sites are protected"),
    ],
)
def test_the_summary_says_what_kind_of_run_it_was(make_run, reply, settings, expected) -> None:
    folder = make_run(**settings)
    fill(folder, reply)
    assert expected in page(folder).text


@pytest.mark.parametrize(
    ("base", "majority", "expected"),
    [
        (0.25, 0.4, "On average, yes."),
        (0.25, None, "On average, yes."),
        (0.25, 0.5, "On average, only against the untuned base."),
        (0.25, 0.75, "On average, only against the untuned base."),
        (0.5, 0.25, "On average, no."),
        (0.75, 0.9, "On average, no."),
    ],
)
def test_the_verdict_weighs_base_and_most_frequent_label(
    make_run, base: float, majority: float | None, expected: str
) -> None:
    folder = make_run()
    for stage, accuracy in (("base", base), ("final", 0.5)):
        append_event(
            folder,
            "evaluated",
            stage=stage,
            site="north",
            records=200,
            accuracy=accuracy,
            macro_f1=None,
            loss=None,
            majority_accuracy=majority,
            majority_macro_f1=None,
        )
    assert expected in page(folder).text


@pytest.mark.parametrize(
    ("majority", "expected"),
    [
        (0.4, "On average, yes."),
        (0.5, "On average, no."),
        (0.6, "On average, no."),
        (None, "Not measured yet"),
    ],
)
def test_an_untrained_head_is_no_baseline(make_run, majority: float | None, expected: str) -> None:
    folder = make_run(model__kind="encoder", model__name="tiny-bert", adapter__method="lora")
    for stage, accuracy in (("base", 0.1), ("final", 0.5)):
        scores = {
            "macro_f1": 0.1,
            "brier": 0.5,
            "ece": 0.1,
            "calibration": curve({9: (200.0, 1.0, accuracy)}),
        }
        labelled(folder, stage, "north", accuracy=accuracy, majority_accuracy=majority, **scores)
    words = page(folder).text
    assert expected in words
    assert "untuned" not in words
    assert words.count("untrained head") >= 3
    if majority is not None:
        assert "tuned 50.0\u00a0%, untrained head 10.0\u00a0%, most frequent label" in words
        assert "An untrained head answers at random" in words


def test_records_from_files_are_named_in_plain_words(make_run, reply) -> None:
    folder = make_run(data__source="file", data__path="records.csv", data__labels="no|yes")
    fill(folder, reply)
    assert ", on records from files." in page(folder).text


def test_free_text_is_judged_by_its_loss(make_run, reply) -> None:
    folder = make_run(data__task="generate")
    fill(folder, reply, hidden=True)
    for stage, loss in (("base", 2.0), ("final", 1.5)):
        append_event(
            folder,
            "evaluated",
            stage=stage,
            site="north",
            records=4,
            accuracy=None,
            macro_f1=None,
            loss=loss,
            majority_accuracy=None,
            majority_macro_f1=None,
        )
    assert (
        "Mean loss on held-out records: tuned 1.500, untuned base 2.000 (lower is better)."
        in page(folder).text
    )


def answered(
    folder: RunFolder, stage: str, *, site: str = "north", records: int = 200, **scores: float
) -> None:
    """Write one site's final evaluation of written answers."""
    append_event(
        folder,
        "evaluated",
        stage=stage,
        site=site,
        records=records,
        majority_accuracy=None,
        majority_macro_f1=None,
        **({"loss": 1.0, "accuracy": None, "macro_f1": None} | scores),
    )


def test_extracted_numbers_are_judged_by_exact_match(make_run) -> None:
    numbers = {"data__task": "generate", "evaluation__generate": True, "evaluation__extract": "number"}
    folder = make_run(**numbers)
    answered(folder, "base", exact_match=0.0, token_f1=0.1, rouge_l=0.1)
    answered(
        folder,
        "final",
        exact_match=0.0,
        token_f1=0.6,
        rouge_l=0.6,
        interval_low=0.0,
        interval_high=0.04,
    )
    words = page(folder).text
    assert "On average, no." in words
    assert "Mean exact match on held-out records: tuned 0.0\u00a0%" in words
    assert "0.0 % (0 to 4)" in words
    assert "95 % interval of exact match" in words
    assert list(judged_by(load_config(folder))) == ["exact_match", "token_f1"]


def labelled(folder: RunFolder, stage: str, site: str, **scores: object) -> None:
    """Write one site's final evaluation of a classifier."""
    append_event(
        folder,
        "evaluated",
        stage=stage,
        site=site,
        records=200,
        **({"loss": 1.0, "majority_accuracy": 0.25, "majority_macro_f1": 0.1} | scores),
    )


def test_the_worst_site_and_the_gap_stand_in_summary_and_table(make_run) -> None:
    folder = make_run()
    for site, base, final in (("north", 0.3, 0.5), ("south", 0.2, 0.875)):
        labelled(folder, "base", site, accuracy=base, macro_f1=base)
        labelled(folder, "final", site, accuracy=final, macro_f1=final / 2)
    words = page(folder).text.replace("\u00a0", " ")
    assert "The worst site is north with 50.0 %, 37.5 points from the best." in words
    # of each metric: majority, base, final
    assert row(folder, "Worst site")[:6] == ["25.0 %", "20.0 %", "50.0 %", "10.0 %", "20.0 %", "25.0 %"]
    assert row(folder, "Gap")[:6] == ["0.0", "10.0", "37.5", "0.0", "10.0", "18.8"]
    assert len(row(folder, "Gap")) == len(row(folder, "All sites"))


def test_one_site_has_no_gap(make_run) -> None:
    folder = make_run()
    for stage in ("base", "final"):
        labelled(folder, stage, "north", accuracy=0.5, macro_f1=0.5)
    assert "The worst site is" not in page(folder).text
    assert '<th scope="row">Gap</th>' not in folder.report_file.read_text()


def test_a_classifiers_calibration_has_a_table(make_run, reply) -> None:
    folder = make_run()
    for site, shift in (("north", 0.0), ("south", 0.1)):
        labelled(folder, "base", site, accuracy=0.3, macro_f1=0.3, brier=0.8 + shift, ece=0.4)
        labelled(folder, "final", site, accuracy=0.5, macro_f1=0.5, brier=0.5 + shift, ece=0.125)
    assert "Brier score" in page(folder).text
    assert row(folder, "north", table=1) == ["0.800", "0.500", "0.400", "0.125"]
    assert row(folder, "All sites", table=1) == ["0.850", "0.550", "0.400", "0.125"]
    bare = make_run("bare")
    fill(bare, reply)
    assert "Calibration" not in page(bare).text


def curve(parts: dict[int, tuple[float, float, float]]) -> list[float]:
    return [value for place in range(10) for value in parts.get(place, (0.0, 0.0, 0.0))]


def test_the_calibration_curve_is_that_of_all_records_together(make_run) -> None:
    folder = make_run()
    for site, parts in (
        ("north", {4: (30.0, 0.45, 0.2), 9: (10.0, 0.9, 1.0)}),
        ("south", {9: (30.0, 1.0, 0.8)}),
    ):
        for stage in ("base", "final"):
            scores = {"accuracy": 0.5, "macro_f1": 0.5, "brier": 0.5, "ece": 0.1}
            labelled(folder, stage, site, calibration=curve(parts), **scores)
    assert pooled_curve(read_events(folder), "final") == [
        (30.0, pytest.approx(0.45), pytest.approx(0.2)),
        (40.0, pytest.approx(0.975), pytest.approx(0.85)),
    ]
    page(folder)
    source = folder.report_file.read_text()
    assert "45.0 % sure, 20.0 % right of 30 records; 97.5 % sure, 85.0 % right of 40 records." in source
    assert "Confidence and right answers" in source


def test_free_text_is_judged_by_token_f1_with_its_interval(make_run) -> None:
    folder = make_run(data__task="generate", evaluation__generate=True)
    answered(folder, "base", exact_match=0.0, token_f1=0.1, rouge_l=0.1)
    answered(folder, "final", exact_match=0.5, token_f1=0.6, rouge_l=0.6, interval_low=0.4, interval_high=0.6)
    words = page(folder).text
    assert "Mean token F1 on held-out records: tuned 60.0\u00a0%" in words
    assert "60.0 % (40 to 60)" in words
    assert "95 % interval of token F1" in words


@given(epsilon=st.floats(0, 50), delta=st.floats(0, 1e-3))
def test_best_guess_is_the_bound_of_the_test_region(epsilon: float, delta: float) -> None:
    """The corner of the region (Kairouz et al. 2015): false alarms and misses equal."""
    error = (1 - delta) / (1 + math.exp(epsilon))
    assert best_guess(epsilon, delta) == pytest.approx(1 - error)
    assert 0.5 <= best_guess(epsilon, delta) <= 1


def test_text_of_other_parties_is_escaped(make_run, reply) -> None:
    folder = make_run(federation__rounds=3)
    fill(folder, reply, sites=(HOSTILE, "south", f"{HOSTILE}\ud800"))
    append_event(folder, "warning", text=HOSTILE)
    parsed = page(folder)
    assert "script" not in parsed.tags
    assert "<script" not in folder.report_file.read_text()
    assert parsed.text.count(HOSTILE) >= 4


def test_private_run_states_its_terms_and_withholds(make_run, reply) -> None:
    folder = make_run(**PRIVATE, data__unit="patient", privacy__clipping_norm=0.5)
    fill(folder, reply, hidden=True)
    text = page(folder).text
    for expected in (
        "withheld",
        "Withheld: the sites keep these values",
        "all records of one 'patient' at a site",
        "one unit is added or removed",
        "Poisson",
        "PLD",
        "2.50 of 8",
        "budget 8",
        "delta 1e-05",
        "largest epsilon",
        "kept at the site",
        "tell in at most 92.4\u00a0% of cases",
        "What is not protected",
        "derived by each site",
    ):
        assert expected in text
    assert "Mean accuracy on held-out records" not in text
    assert "results stay at the sites" in text


def test_unfinished_run(make_run, reply) -> None:
    folder = make_run(federation__rounds=3)
    fill(folder, reply, end=False)
    text = page(folder).text
    assert "No end is recorded" in text
    assert "2 of 3" in text
    assert "has not written its manifest" in text


@pytest.mark.parametrize("started", [False, True])
def test_run_without_replies(make_run, started: bool) -> None:
    folder = make_run()
    if started:
        append_event(folder, "run_started", run_id="r1", sites=2, rounds=1, config={}, versions={})
    text = page(folder).text
    assert "No reply has arrived yet" in text
    assert ("running" if started else "not started") in text


def test_failed_and_resumed_run(make_run, reply) -> None:
    folder = make_run()
    fill(folder, reply, end=False)
    append_event(folder, "run_failed", reason="round 3: 1 of 2 replies.")
    assert "The run failed: round 3: 1 of 2 replies." in page(folder).text
    append_event(folder, "run_resumed", round=3)
    text = page(folder).text
    assert "The run failed" not in text
    assert "resumed at round 3" in text
    assert re.search(r"Failures\s+Failed, .* UTC: round 3: 1 of 2 replies\.", text)


def test_bytes_count_repeated_rounds(make_run, reply) -> None:
    folder = make_run()
    for _ in range(2):
        append_event(folder, "round_started", round=1, sites=["a"])
        reply(folder, 1, "a", bytes_up=1000, bytes_down=0)
    text = page(folder).text
    assert "2.00 kB" in text
    assert "1 of 1" in text


def test_epsilon_of_a_reply_set_aside_counts_as_spent(make_run, reply) -> None:
    folder = make_run(**PRIVATE, data__heldout_public=True)
    reply(folder, 1, "a", epsilon=1.25)
    reply(folder, 2, "a", epsilon=3.75, accepted=False, reason="late", loss=9.0)
    assert "3.75 of 8" in page(folder).text


@pytest.mark.parametrize(
    ("settings", "measured", "title"),
    [
        ({"evaluation__generate": True}, "token_f1", "Held-out token F1"),
        (
            {"evaluation__generate": True, "evaluation__extract": "number"},
            "exact_match",
            "Held-out exact match",
        ),
        ({}, "perplexity", ""),
    ],
)
def test_the_curves_are_loss_and_what_judges_the_run(make_run, reply, settings, measured, title) -> None:
    folder = make_run(data__task="generate", **settings)
    for number, score in ((1, 0.25), (2, 0.5)):
        scores = {"accuracy": None, "macro_f1": None, measured: score}
        reply(folder, number, "north", **scores)
    page(folder)
    source = folder.report_file.read_text(encoding="utf-8")
    expected = ["Held-out loss", *([title] if title else []), "Bytes, all sites together"]
    assert re.findall(r"<figcaption>([^<]*)</figcaption>", source) == expected
    assert source.count("<svg") == len(expected)
    assert not title or "the mean goes from 25.0 % to 50.0 %" in source
    assert "round by round" not in source


def test_plots_of_many_rounds_and_sites() -> None:
    rounds = list(range(1, 101))
    lines = {f"<{number}>": [number / 60] * 100 for number in range(60)}
    for svg in (
        metric_plot("Loss", rounds=rounds, sites=lines, mean=[None] * 99 + [0.5]),
        epsilon_plot("Epsilon", rounds=rounds, sites=lines, budget=None),
    ):
        assert "<title>&lt;59&gt;</title>" in svg
        assert "<59>" not in svg
    assert bytes_plot("Bytes", rounds=rounds, up=[1] * 100, down=[2] * 100).startswith("<svg viewBox=")


def test_single_round_with_one_site_and_no_bytes(make_run, reply) -> None:
    folder = make_run(federation__rounds=1)
    reply(folder, 1, "a", accepted=False, reason="", bytes_up=0, bytes_down=0, loss=None, accuracy=None)
    assert "Not measured round by round (loss and accuracy)." in page(folder).text
    assert folder.report_file.read_text().count("<figure") == 1


def test_where_no_record_was_held_out_the_page_says_so(make_run, reply) -> None:
    folder = make_run(data__heldout=0.0)
    fill(folder, reply, hidden=True)
    text = page(folder).text
    assert "no held-out records were scored" in text
    assert "are private" not in text


def test_records_of_real_sites_are_their_own_whatever_the_recipe_names(make_run) -> None:
    folder = make_run(data__source="icd10")
    started = {"run_id": "r", "sites": 1, "rounds": 1, "config": {}, "versions": {}}
    append_event(folder, "run_started", **started)
    append_event(folder, "site_joined", site="north", node=1, simulated=False)
    text = page(folder).text
    assert "on records from files" in text
    assert "icd10 records" not in text
