from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.errors import RunError
from fedllm.runs.checkpoints import (
    Checkpoint,
    checkpoint_digest,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from fedllm.runs.folder import RunFolder

texts = st.text(st.characters(codec="utf-8"), max_size=8)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda n: n != "__metadata__")
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=2, max_side=4))
specs = st.builds(
    AdapterSpec,
    method=texts,
    rank=st.integers(1, 64),
    scale=st.floats(allow_nan=False, allow_infinity=False),
    shapes=st.dictionaries(texts, st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=3),
    basis=texts,
    base=texts,
)
checkpoints = st.builds(
    Checkpoint,
    st.integers(0, 9999),
    st.builds(AdapterState, specs, st.dictionaries(names, matrices, max_size=4)),
    st.dictionaries(texts, texts, max_size=3),
)


def same(left: Checkpoint, right: Checkpoint) -> bool:
    return (
        (left.round, left.state.spec, dict(left.extra)) == (right.round, right.state.spec, dict(right.extra))
        and list(left.state.layout.items()) == list(right.state.layout.items())
        and all(left.state.tensors[k].tobytes() == v.tobytes() for k, v in right.state.tensors.items())
    )


@settings(max_examples=60, deadline=None)
@given(checkpoints)
def test_round_trip(checkpoint: Checkpoint) -> None:
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_checkpoint(save_checkpoint(RunFolder(Path(folder)), checkpoint))
    assert same(loaded, checkpoint)
    assert checkpoint_digest(loaded) == checkpoint_digest(checkpoint)


def test_a_flipped_bit_in_any_byte_is_detected(make_checkpoint, tmp_path) -> None:
    whole = save_checkpoint(RunFolder(tmp_path), make_checkpoint(3)).read_bytes()
    file = tmp_path / "round-0003.safetensors"
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        with pytest.raises(RunError, match=r"round-0003\.safetensors: damaged checkpoint"):
            load_checkpoint(file)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncation_is_detected(make_checkpoint, tmp_path, share: float) -> None:
    file = save_checkpoint(RunFolder(tmp_path), make_checkpoint(3))
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(
        RunError, match=r"damaged checkpoint: it is truncated .* Other rounds are separate files"
    ):
        load_checkpoint(file)


def test_wrong_keys_and_foreign_files_are_refused(tmp_path) -> None:
    file = tmp_path / "foreign.safetensors"
    values = {"b": np.zeros(2, dtype=np.float32)}
    save_file(values, file)
    with pytest.raises(RunError, match="its header is unreadable"):
        load_checkpoint(file)
    save_file(values, file, metadata={"format": "fedllm-checkpoint-1", "keys": json.dumps(["a"])})
    with pytest.raises(RunError, match="its matrices are not those its header lists"):
        load_checkpoint(file)
    with pytest.raises(RunError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(RunError, match="cannot be read"):
        load_checkpoint(tmp_path)


def test_latest_skips_damaged_ones_and_says_so(make_run, make_checkpoint) -> None:
    folder = make_run()
    assert latest_checkpoint(folder) == (None, ())
    files = [save_checkpoint(folder, make_checkpoint(number)) for number in (1, 2, 3)]
    checkpoint, warnings = latest_checkpoint(folder)
    assert checkpoint is not None
    assert (checkpoint.round, warnings) == (3, ())
    files[2].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:-1])
    checkpoint, warnings = latest_checkpoint(folder)
    assert checkpoint is not None
    assert same(checkpoint, make_checkpoint(1))
    assert ["round-0003" in warnings[0], "round-0002" in warnings[1]] == [True, True]
    files[0].write_bytes(b"")
    checkpoint, warnings = latest_checkpoint(folder)
    assert checkpoint is None
    assert len(warnings) == 3


def kept(folder: RunFolder) -> list[int]:
    return sorted(int(path.stem.removeprefix("round-")) for path in folder.checkpoints_dir.iterdir())


def test_newest_three_and_every_tenth_are_kept(make_run, make_checkpoint) -> None:
    folder = make_run()
    for number in range(1, 25):
        save_checkpoint(folder, make_checkpoint(number))
    assert kept(folder) == [10, 20, 22, 23, 24]


def test_a_resumed_round_drops_what_came_after_it(make_run, make_checkpoint) -> None:
    folder = make_run()
    for number in (1, 2, 3, 2):
        save_checkpoint(folder, make_checkpoint(number))
    assert kept(folder) == [1, 2]


@pytest.mark.parametrize("step", ["write", "replace"])
def test_no_space_keeps_older_checkpoints(monkeypatch, make_run, make_checkpoint, step: str) -> None:
    folder = make_run()
    for number in (1, 2, 3):
        save_checkpoint(folder, make_checkpoint(number))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(RunError, match=r"round-0004\.safetensors.*no space left on device"):
            save_checkpoint(folder, make_checkpoint(4))
    assert kept(folder) == [1, 2, 3]
    checkpoint, warnings = latest_checkpoint(folder)
    assert checkpoint is not None
    assert (checkpoint.round, warnings) == (3, ())
