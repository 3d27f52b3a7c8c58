"""``fedllm classify``: a finished classifier tried on one text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from fedllm.cli.app import app
from fedllm.errors import ConfigError
from fedllm.federation.classify import classify
from fedllm.federation.generate import answer
from fedllm.federation.membership import attack_membership

ENCODER = {"model__kind": "encoder", "model__name": "tiny-bert", "model__pooling": "mean"}


def test_a_run_of_real_sites_is_asked_by_its_labels_and_not_by_what_the_recipe_names(federate: Any) -> None:
    folder = federate(federation__rounds=1, train__local_steps=1)
    manifest = json.loads(folder.manifest_file.read_text())
    folder.manifest_file.write_text(json.dumps(manifest | {"simulated": False}))
    with pytest.raises(ConfigError, match="its labels are known to the sites alone"):
        classify(folder.path, "A text.")
    with pytest.raises(ConfigError, match="its sites were real"):
        attack_membership(folder.path)
    with pytest.raises(ConfigError, match="has one text, data.pair is empty; leave out --pair"):
        answer(folder.path, "A text.", pair="another", max_new_tokens=2)


@pytest.mark.parametrize("model", [{}, ENCODER])
def test_probabilities_are_those_that_the_run_scores(
    federate: Any, scored: Any, model: dict[str, str]
) -> None:
    folder = federate(**model, federation__rounds=1, train__lr=0.1)
    record, labels, scores = scored(folder)
    found = {row.label: row for row in classify(folder.path, record.text)}
    assert set(found) == set(labels)
    for label, value in zip(labels, scores.softmax(dim=0).tolist(), strict=True):
        assert found[label].tuned == pytest.approx(value, abs=1e-4)
    assert sum(row.tuned for row in found.values()) == pytest.approx(1)
    untuned = [row.base for row in found.values()]
    if model:
        assert untuned == [None] * len(untuned)
    else:
        assert sum(untuned) == pytest.approx(1)  # type: ignore[arg-type]
        assert untuned != [row.tuned for row in found.values()]


def test_the_command_shows_the_likeliest_first(federate: Any) -> None:
    folder = federate(federation__rounds=1)
    shown = CliRunner().invoke(app, ["classify", str(folder.path), "hotel", "--most", "2"])
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert lines[0].split() == ["label", "untuned", "base", "%", "tuned", "%"]
    assert float(lines[1].split()[-1]) >= float(lines[2].split()[-1])
    assert "more labels; see --most" in lines[3]


def test_what_cannot_be_classified_is_said_before_a_model_loads(federate: Any) -> None:
    folder = federate(federation__rounds=1)
    with pytest.raises(ConfigError, match="the text is empty"):
        classify(folder.path, " ")
    with pytest.raises(ConfigError, match="leave out --pair 'a hotel'"):
        classify(folder.path, "hotel", pair="a hotel")
    text = (folder.path / "config.toml").read_text()
    (folder.path / "config.toml").write_text(text.replace('task = "classify"', 'task = "generate"'))
    with pytest.raises(ConfigError, match="ask it with `fedllm generate`"):
        classify(folder.path, "hotel")
