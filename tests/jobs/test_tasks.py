"""The jobs' data and models, and what train.py decides before it loads them."""

from __future__ import annotations

import os
import sys
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpidist.nn import EVAL


def test_digits_are_the_uci_test_set(job: SimpleNamespace) -> None:
    data = job.digits_task.load_digits()
    assert data.inputs.shape == (1797, 1, 8, 8)
    assert data.inputs.dtype == np.float32
    assert (data.inputs.min(), data.inputs.max()) == (0.0, 1.0)
    # Images per digit, as the documentation of the data set lists them.
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    np.testing.assert_array_equal(np.bincount(data.targets), counts)


def test_damaged_digits_are_refused(job: SimpleNamespace, tmp_path: Path) -> None:
    damaged = bytearray(job.digits_task.DIGITS.read_bytes())
    damaged[1000] ^= 1
    (tmp_path / "digits.csv.gz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"SHA-256 is .* expected 09f66e"):
        job.digits_task.load_digits(tmp_path / "digits.csv.gz")


@pytest.mark.parametrize("name", ["digits", "text"])
def test_split_is_the_same_for_every_seed(job: SimpleNamespace, name: str) -> None:
    make: Any = getattr(getattr(job, f"{name}_task"), f"{name}_task")
    one, other = make(0), make(1)
    np.testing.assert_array_equal(one.held_out.inputs, other.held_out.inputs)
    total = len(one.train) + len(one.held_out)
    assert len(one.held_out) == round(total / 10)
    first, second = (next(iter(task.model.parameters())).data for task in (one, other))
    assert not np.array_equal(first, second)
    y, _ = one.model.forward(one.held_out.inputs[:3], EVAL)
    assert y.shape == (*one.held_out.targets[:3].shape, 10 if name == "digits" else 256)


def test_text_has_no_paragraph_twice(job: SimpleNamespace) -> None:
    text = job.text_task.load_text()
    paragraphs = text.tobytes().decode().split("\n\n")
    assert len(text) > 200_000
    assert len(set(paragraphs)) == len(paragraphs)


def test_windows_predict_the_next_byte(job: SimpleNamespace) -> None:
    data = job.text_task.windows(np.frombuffer(b"abcdefgh", np.uint8), 3)
    assert [bytes(row.astype(np.uint8)) for row in data.inputs] == [b"abc", b"def"]
    assert [bytes(row.astype(np.uint8)) for row in data.targets] == [b"bcd", b"efg"]


def test_unigram_entropy(job: SimpleNamespace) -> None:
    text = np.frombuffer(b"aabc", np.uint8)
    expected = 0.5 * log(2) + 2 * 0.25 * log(4)
    assert job.text_task.unigram_entropy(text) == pytest.approx(expected)


def test_missing_text_is_explained(job: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(RuntimeError, match="use --task digits"):
        job.text_task.load_text()


@pytest.mark.parametrize("chosen", [None, "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"])
def test_threads_are_limited_unless_the_user_chose(
    job: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    for name in names:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it whatever happens
        monkeypatch.delenv(name)
    if chosen:
        monkeypatch.setenv(chosen, "3")
    job.train.limit_threads()
    expected = [("3" if name == chosen else None) if chosen else "1" for name in names]
    assert [os.environ.get(name) for name in names] == expected


def test_plan_follows_epochs_or_steps(job: SimpleNamespace) -> None:
    task = job.digits_task.digits_task(0)
    parse = job.train.parser().parse_args
    plan = job.train.make_plan(parse(["--epochs", "2", "--batch-size", "100"]), task)
    assert (plan.steps, plan.batch_size, plan.evaluate_every) == (34, 100, 4)
    plan = job.train.make_plan(parse(["--steps", "7"]), task)
    assert (plan.steps, plan.batch_size) == (7, task.defaults.batch_size)
