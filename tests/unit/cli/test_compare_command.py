"""``fedllm compare`` as a user meets it: what runs, what is skipped, what is said."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedllm.cli.app import app
from fedllm.cli.compare import set_aside
from fedllm.cli.comparison import read_comparison
from fedllm.cli.jobs import Job, core_shares, plan
from fedllm.config import Config, parse_overrides, read_toml
from fedllm.data.sources import load_records
from fedllm.errors import ConfigError
from fedllm.federation.inprocess import run
from fedllm.resources import find_recipe
from fedllm.runs.events import append_event
from fedllm.runs.folder import open_run

ROOT = Path(__file__).parents[3]
HEAD = [sys.executable, "-W", "ignore", "-m", "fedllm.cli.app", "compare"]
ENVIRONMENT = {"PYTHONPATH": str(ROOT)}
FILE = """\
recipe = "demo/smoke"
seeds = [1, 2]
title = "Two adapters"

[settings]
federation.rounds = 1
train.local_steps = 1
evaluation.final_records = 8

[baselines]
chance = true
base = true
majority = true

[[cells]]
name = "Fed-SB r=4"

[[cells]]
name = "Fed-SB r=8"
settings.adapter.rank = 8
settings.adapter.targets = "q_proj"
"""


Compare = Callable[..., Result]


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compare:
    """Call the command in this process; its runs are processes of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return lambda *words: CliRunner().invoke(app, ["compare", *map(str, words)])


def stamps(folder: Path) -> dict[str, int]:
    return {
        path.parent.relative_to(folder).as_posix(): path.stat().st_mtime_ns
        for path in folder.rglob("events.jsonl")
    }


def test_runs_what_is_missing_skips_what_is_finished_and_reruns_what_changed(
    tmp_path: Path, compare: Compare
) -> None:
    file, folder = tmp_path / "two.toml", tmp_path / "runs" / "two"
    file.write_text(FILE)
    first = compare(file)
    assert first.exit_code == 0, first.output
    assert "[4/4] all, Fed-SB r=8, seed 2: done" in first.output
    assert "untuned base" in first.output
    labels = len(set(load_records(Config.from_toml(find_recipe("demo/smoke")).data)["label"]))
    assert f"| all | chance | - | {100 / labels:.1f} | - |" in (folder / "compare.md").read_text()
    runs = ["all/fed-sb-r-4/1", "all/fed-sb-r-4/2", "all/fed-sb-r-8/1", "all/fed-sb-r-8/2"]
    before = stamps(folder)
    assert sorted(before) == runs
    table = list(csv.DictReader((folder / "compare.csv").open()))
    assert [row["seed"] for row in table] == ["1", "2", "1", "2"]
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        "compare.csv", "compare.md", "compare.png", "compare.svg", "comparison.toml", "manifest.json",
    }  # fmt: skip

    again = compare(file)
    assert again.exit_code == 0, again.output
    assert "done" not in again.output
    assert stamps(folder) == before

    page = (folder / "compare.md").read_text()
    drawn = compare(file, "--dir", tmp_path / "drawn", "--figures", folder / "compare.csv")
    assert drawn.exit_code == 0, drawn.output
    assert (tmp_path / "drawn/compare.md").read_text() == page
    assert (tmp_path / "drawn/compare.svg").read_bytes() == (folder / "compare.svg").read_bytes()
    assert not stamps(tmp_path / "drawn")

    file.write_text(FILE.replace("adapter.rank = 8", "adapter.rank = 6"))
    listed = compare(file, "--dry-run")
    assert listed.output.count("finished") == 2
    assert listed.output.count("changed") == 2
    assert "adapter.rank=6 'adapter.targets=\"q_proj\"'" in listed.output
    changed = compare(file, "--only", "Fed-SB r=8", "--seeds", "2")
    assert changed.exit_code == 0, changed.output
    assert (
        "[1/1] all, Fed-SB r=8, seed 2: anew, its settings changed (adapter.rank: 8, now 6); "
        "the old run is kept as 2.1" in changed.output
    )
    after = stamps(folder)
    assert after["all/fed-sb-r-8/2.1"] == before["all/fed-sb-r-8/2"]
    assert [name for name in runs if after[name] != before[name]] == ["all/fed-sb-r-8/2"]


def test_chance_is_refused_before_anything_runs_where_there_is_none(tmp_path: Path, compare: Compare) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('metric = "loss"\n' + FILE)
    assert "baselines.chance is for metric" in str(compare(file).exception)
    assert not (tmp_path / "runs").exists()


def test_a_failing_cell_is_named_and_the_others_finish(tmp_path: Path, compare: Compare) -> None:
    file = tmp_path / "bad.toml"
    text = FILE.replace("[1, 2]", "[1]").replace("majority = true", "local = true\ncentral = true")
    file.write_text(text.replace("q_proj", "q_prj").replace("r=8", "bad"))
    done = compare(file, "--dir", "out")
    assert done.exit_code == 1, done.output
    assert "failed: all, Fed-SB bad, seed 1: " in done.output
    assert "Did you mean 'q_proj'" in done.output
    page = (tmp_path / "out" / "compare.md").read_text()
    named = [line.split(" | ")[1] for line in page.splitlines() if line.startswith("| all |")]
    assert named == ["chance", "untuned base", "Fed-SB r=4", "local only", "local only, elsewhere", "central"]
    assert "Not finished: all, Fed-SB bad, seed 1." in page


def test_a_run_that_cannot_be_read_or_begun_costs_the_others_nothing(
    tmp_path: Path, compare: Compare
) -> None:
    file, folder = tmp_path / "two.toml", tmp_path / "out"
    file.write_text(FILE.replace("[1, 2]", "[1]"))
    (folder / "all").mkdir(parents=True)
    # a file where the second run's folder has to be
    (folder / "all" / "fed-sb-r-8").write_text("")
    first = compare(file, "--dir", "out")
    assert first.exit_code == 1, first.output
    assert "[1/2] all, Fed-SB r=4, seed 1: done" in first.output
    assert "failed: all, Fed-SB r=8, seed 1: " in first.output
    assert (folder / "compare.md").is_file()
    config = folder / "all" / "fed-sb-r-4" / "1" / "config.toml"
    config.write_text("of another version")
    again = compare(file, "--dir", "out", "--only", "Fed-SB r=4")
    assert "settings cannot be read; it is kept as 1.1" in again.output
    assert (config.parent.with_name("1.1") / "config.toml").read_text() == "of another version"
    assert Config.from_toml(config).adapter.rank == 4


def begin(folder: Path, jobs: int = 1) -> tuple[subprocess.Popen[str], Path, list[Path]]:
    """Start a comparison in its own session; return it, its file and its runs once those have checkpoints."""
    file = folder / "long.toml"
    file.write_text(FILE.replace("rounds = 1", "rounds = 15\nevaluation.every = 0"))
    seeds = [str(seed + 1) for seed in range(jobs)]
    runs = [folder / "out" / "all" / "fed-sb-r-4" / seed for seed in seeds]
    wanted = ["--seeds", ",".join(seeds), "--only", "Fed-SB r=4", "--jobs", str(jobs)]
    process = subprocess.Popen(
        [*HEAD, str(file), "--dir", "out", *wanted],
        cwd=folder,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell's background job inherits that interrupts are ignored
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 240
    while not all(list(run.glob("checkpoints/*")) for run in runs) and time.monotonic() < deadline:
        time.sleep(0.05)
    return process, file, runs


def test_runs_side_by_side_have_cores_of_their_own(tmp_path: Path, compare: Compare) -> None:
    mine = os.sched_getaffinity(0)
    for parts in range(1, len(mine) + 1):
        shares = core_shares(parts)
        assert sorted(core for share in shares for core in share) == sorted(mine)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    (tmp_path / "file.toml").write_text(FILE)
    for wrong in (0, len(mine) + 1):
        refused = compare("file.toml", "--jobs", wrong)
        assert isinstance(refused.exception, ConfigError)
        assert f"--jobs must be 1 to {len(mine)}" in str(refused.exception)


def test_interrupted_runs_side_by_side_go_on(tmp_path: Path, compare: Compare) -> None:
    jobs = min(2, len(os.sched_getaffinity(0)))
    process, file, runs = begin(tmp_path, jobs)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in said
    assert all("run_failed" in (run / "events.jsonl").read_text() for run in runs)
    rest = compare(file, "--dir", "out", "--only", "Fed-SB r=4", "--jobs", jobs)
    assert rest.exit_code == 0, rest.output
    assert rest.output.count("goes on: done") == jobs
    assert compare(file, "--dir", "out", "--only", "Fed-SB r=4", "--dry-run").output.count("finished") == 2


def test_an_interrupted_run_goes_on(tmp_path: Path, compare: Compare) -> None:
    process, file, (run,) = begin(tmp_path)
    # as a terminal's Ctrl-C: to the command and the run it started
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in said
    assert "run_failed" in (run / "events.jsonl").read_text()
    rest = compare(file, "--dir", "out", "--seeds", "1", "--only", "Fed-SB r=4")
    assert rest.exit_code == 0, rest.output
    assert "Fed-SB r=4, seed 1: goes on: done" in rest.output
    assert "run_resumed" in (run / "events.jsonl").read_text()


def test_a_run_ends_with_the_comparison_that_was_killed(tmp_path: Path) -> None:
    process, _, (run,) = begin(tmp_path)
    process.kill()
    process.wait(timeout=60)
    # whoever holds the pipe's other end would keep this from ending
    assert process.stdout is not None
    process.stdout.read()
    done = (run / "events.jsonl").read_text()
    assert "run_finished" not in done
    time.sleep(1)
    assert (run / "events.jsonl").read_text() == done


CELL = '[[cells]]\nname = "a"\n'
GOOD = 'recipe = "demo/smoke"\nseeds = [1]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe = ", "not valid TOML"),
        (GOOD, "'cells' is missing"),
        ('seeds = [1]\nrecipe = "demo/smok"\n' + CELL, "Did you mean 'demo/smoke'"),
        (GOOD + "seed = 1\n" + CELL, "unknown key 'seed'. Did you mean 'seeds'?"),
        (GOOD + 'metric = "f1"\n' + CELL, "metric 'f1' is not one of accuracy, macro_f1, exact_match"),
        (GOOD + 'minutes = "ten"\n' + CELL, "'minutes' must be a number"),
        (GOOD + "[baselines]\nbases = true\n" + CELL, "unknown key 'bases' in [baselines]"),
        (GOOD + "[baselines]\nbase = 1\n" + CELL, "'base' must be true or false"),
        (GOOD + "[baselines.base]\nsettings.train.lr = 1.0\n" + CELL, "'base' must be true or false"),
        (GOOD + "[baselines.central]\nlr = 1.0\n" + CELL, "unknown key 'lr' in [baselines.central]"),
        (GOOD + CELL + "rank = 2\n", "unknown key 'rank' in [cells]"),
        (GOOD + "[[cells]]\nsettings.adapter.rank = 2\n", "needs a name"),
        (GOOD + CELL + '[[cells]]\nname = "A"\n', "called 'a' and 'A'; rename one"),
        (GOOD + CELL + '[[cells]]\nname = "central"\n', "called 'central' and 'central'"),
        (GOOD + CELL + "settings.adapter.rnk = 2\n", "cell 'a', group 'all': unknown setting 'adapter.rnk'"),
        (
            GOOD + CELL + "settings.rank = 2\n",
            "settings have a section, such as settings.train.lr; got 'rank'",
        ),
        (GOOD + CELL + "settings.run.seed = 2\n", "run.seed is set by the comparison"),
        (GOOD + CELL + 'settings.adapter.rank = "x"\n', "adapter.rank: needs a value of type int"),
        (GOOD + CELL + '[[groups]]\nname = "g"\nsettings.train.lr = -1\n', "group 'g': train.lr"),
        (GOOD.replace("[1]", "[1, 1]") + CELL, "different whole numbers"),
        (GOOD.replace("[1]", "3") + CELL, "different whole numbers"),
    ],
)
def test_a_bad_file_is_named_in_a_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "file.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        plan(read_comparison(file), file, tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_comparison_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "file.toml"
    file.write_text(GOOD + CELL, encoding="utf-8-sig")
    assert read_comparison(file).seeds == (1,)


def test_unknown_cells_seeds_and_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "file.toml").write_text(GOOD + CELL)
    command = [*HEAD, "file.toml", "--only", "b", "--dry-run"]
    unknown = subprocess.run(
        command, cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert unknown.returncode == 2
    assert unknown.stderr == "error: --only: file.toml has no cell 'b'. There are a.\n"
    with pytest.raises(ConfigError, match="--seeds: seeds must be"):
        read_comparison(tmp_path / "file.toml", seeds="1,x")
    with pytest.raises(ConfigError, match="no such file"):
        read_comparison(tmp_path / "none.toml")


def test_a_baseline_has_settings_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "file.toml"
    file.write_text(
        GOOD
        + "[settings]\ntrain.lr = 0.5\n"
        + "[baselines]\nbase = true\nlocal = true\ncentral.settings.train.lr = 0.25\n"
        + CELL
    )
    found = read_comparison(file)
    assert found.baselines == ("base", "local", "central")
    rates = {
        job.cell: (job.config.train.lr, job.config.federation.mode) for job in plan(found, file, tmp_path)
    }
    assert rates == {"a": (0.5, "federated"), "local only": (0.5, "local"), "central": (0.25, "central")}


def test_every_cell_runs_in_every_group_with_its_settings(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text((ROOT / "recipes/demo/smoke.toml").read_text())
    file = tmp_path / "file.toml"
    file.write_text(
        GOOD.replace("demo/smoke", "own.toml")
        + "[settings]\ntrain.lr = 0.5\ntrain.local_steps = 3\n"
        + CELL
        + 'settings = { train.lr = 0.25, data.path = "records.csv" }\n'
        + '[[groups]]\nname = "IID"\n[[groups]]\nname = "Dirichlet 0.5"\n'
        + 'settings.data.partition = "dirichlet"\nsettings.data.dirichlet_alpha = 0.5\n'
    )
    jobs = plan(read_comparison(file, seeds="7"), file, tmp_path / "out")
    assert [job.folder.relative_to(tmp_path).as_posix() for job in jobs] == [
        "out/iid/a/7",
        "out/dirichlet-0.5/a/7",
    ]
    config = jobs[1].config
    assert (config.train.lr, config.train.local_steps, config.run.seed) == (0.25, 3, 7)
    assert (jobs[0].config.data.partition, config.data.partition) == ("iid", "dirichlet")
    assert config.data.path == str(Path("records.csv").resolve())
    # what the command line reads is what was planned
    words = jobs[1].command("missing")
    given = parse_overrides(word for word in words[2:] if "=" in word)
    assert Config.from_flat(read_toml(tmp_path / "own.toml") | given) == config


def test_a_finished_cell_whose_records_changed_is_run_anew(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "\n".join(f"record {i},{'ab'[i % 2]}" for i in range(60)) + "\n")
    values = {**read_toml(find_recipe("demo/smoke")), "data.source": "file", "data.partition": "iid"}
    config = Config.from_flat(values | {"data.path": str(rows), "run.dir": str(tmp_path / "run")})
    job = Job(
        group="all", cell="A", seed=1, recipe=tmp_path, folder=tmp_path / "run", changes={}, config=config
    )
    run(config)
    assert job.state() == "finished"
    assert set_aside([job]) == []
    refused = {"accepted": False, "reason": "too long", "bytes_up": 1, "bytes_down": 1, "epsilon": None}
    nothing = {"loss": None, "accuracy": None, "macro_f1": None, "seconds": 0.0}
    append_event(open_run(job.folder), "site_reply", round=1, site="south", **refused, **nothing)
    assert set_aside([job]) == ["all, A, seed 1 (south)"]
    # written again as it was, and then with another label
    rows.write_text(rows.read_text())
    assert job.state() == "finished"
    rows.write_text(rows.read_text().replace("record 5,b", "record 5,a"))
    assert job.state() == "changed"
