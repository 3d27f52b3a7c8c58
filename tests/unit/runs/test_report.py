from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from fedllm.runs.events import append_event
from fedllm.runs.folder import RunFolder, load_config
from fedllm.runs.manifest import write_manifest
from fedllm.runs.plots import bytes_plot, epsilon_plot, metric_plot
from fedllm.runs.report import write_report

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


def test_finished_run(make_run, reply) -> None:
    folder = make_run(federation__rounds=3, train__lr=0.25)
    fill(folder, reply)
    write_manifest(folder, config=load_config(folder), model={"weights": "cafe"}, data={}, simulated=True)
    text = page(folder).text
    for expected in (
        "finished after 2 min",
        "5 of 6 replies were used",
        "from 12.5 % (base model) to 87.5 %",
        "3 of 3",
        "2 of 3",
        "Single records are not protected by this run",
        "train.lr",
        "0.25",
        "cafe",
    ):
        assert expected in text
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
        "north: 2.50, south: 2.50",
        "derived by each site",
    ):
        assert expected in text
    assert "Mean held-out accuracy" not in text


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
    assert "Not measured." in page(folder).text
