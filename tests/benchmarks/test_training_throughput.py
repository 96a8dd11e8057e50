"""The plain loop reads what ours reads, and the documents ask for rows that are measured."""

import re
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import default_collate

from benchmarks import readme, training_throughput
from benchmarks.machine import REPOSITORY
from benchmarks.result import Hardware, Result
from benchmarks.training_courses import items_apart, of_pairs, users_apart
from benchmarks.training_rows import PairRows, Rows
from prerank.models.rankers import build_ranker
from prerank.train.distill import Taught
from prerank.train.lessons import Lessons
from prerank.train.ranking import Impressions

TINY = training_throughput.Sizes(
    ready_steps=1, ours=2_500, plain=600, lessons=400, plain_lessons=100, large_table=1_000, rounds=1, market_ads=400
)
MARKER = re.compile(r"<!-- measured:(training_throughput.*?) -->")


def test_rows_one_by_one_collate_to_our_batch(world, trained):
    config = replace(world.config, features=replace(world.config.features, interaction={}))
    impressions = Impressions(trained.prepared, config, np.arange(0, 4_000, 50))
    rows = Rows(impressions)
    plain, ours = default_collate([rows[k] for k in range(len(rows))]), impressions.batch(np.arange(len(rows)))
    np.testing.assert_array_equal(plain["labels"].numpy(), ours.labels.numpy())
    for theirs, features in ((plain["user"], ours.user), (plain["item"], ours.items)):
        assert set(theirs) == set(features)
        for name, column in features.items():
            np.testing.assert_array_equal(theirs[name].numpy(), column.numpy(), err_msg=name)


def test_pairs_one_by_one_collate_to_our_lessons_and_to_their_loss(world, trained):
    config = replace(world.config, features=replace(world.config.features, interaction={}))
    draw = np.random.default_rng(0)
    events, (tasks, width) = np.arange(0, 4_000, 90), (len(config.tasks), 3)
    rows = draw.integers(-1, len(trained.prepared.item_ids), (len(events), width)).astype(np.int32)
    winner, candidate = (
        torch.from_numpy(draw.normal(size=(len(events), *shape, tasks)).astype(np.float32)) for shape in ((), (width,))
    )
    taught = Taught(trained.prepared, config, Lessons(events, winner, rows, candidate))
    pairs, whole = PairRows(taught), taught.batch(np.arange(len(events)))
    plain = default_collate([pairs[k] for k in range(len(pairs))])
    for name, column in whole.user.items():
        np.testing.assert_array_equal(plain["user"][name].numpy(), column.repeat_interleave(1 + width, 0).numpy())
    for name, column in whole.items.items():
        np.testing.assert_array_equal(plain["item"][name].numpy(), column[whole.place].flatten(0, 1).numpy())
    ranker = build_ranker(config, trained.prepared.transforms.sizes()).eval()
    theirs = of_pairs(ranker, plain)
    for made in (lambda batch: batch, users_apart, items_apart, lambda batch: items_apart(users_apart(batch))):
        torch.testing.assert_close(made(whole).loss(ranker), theirs, rtol=1e-4, atol=1e-6)


def test_every_way_is_measured_and_every_marker_of_the_docs_names_one():
    measured = training_throughput.throughput(None, TINY)
    result = Result(
        "training_throughput", "2026-01-05T10:00:00Z", "0123456789ab", Hardware("Some CPU", 2, 24.0), {},
        measured.config, measured.ceilings, tuple(measured.rows),
    )  # fmt: skip
    assert Result.from_json(result.to_json()) == result
    # a wait of less than a millisecond is told as none
    assert all(row.value > 0 or "waiting" in row.name for row in measured.rows)
    markers = [name for page in (REPOSITORY / "docs").rglob("*.md") for name in MARKER.findall(page.read_text())]
    # the market's own ranker has larger batches than KuaiRand's, which the docs tell of
    markers = [name.replace("batch 256 of 9 pairs", "batch 1,024 of 9 pairs") for name in markers]
    assert len(markers) >= 4
    for name in markers:
        assert readme.said(name, [result])
