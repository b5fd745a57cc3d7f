"""Exactly once: whoever reads an epoch, however often they are stopped and whoever goes on, each sample comes once."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_examples import Examples, ids

from data_pipelines.loader import make_loader
from data_pipelines.rows import RowSource

COUNT, BATCH = 60, 4


def row_source(**options):
    settings_ = dict(row_tokens=20, row_text=24, batch_size=BATCH, seed=1, ranks=2, chunk=16, window=9) | options
    return RowSource(Examples(COUNT), **settings_)


def read(state, hosts, steps, *, num_workers=0, **options):
    """Rows of some steps as their sample ids, read by so many hosts; the state after them, as a checkpoint holds it."""
    parts, states = [], []
    for host in range(hosts):  # each builds all from the data and its settings, as a new process does
        loader = make_loader(row_source(**options), process_index=host, process_count=hosts, num_workers=num_workers)
        if state:
            loader.set_state(json.loads(state))
        parts.append([ids(next(loader)) for _ in range(steps)])
        states.append(json.dumps(loader.get_state()))
        loader.close()
    assert len(set(states)) == 1  # any host may write it
    return [row for step in zip(*parts) for part in step for row in part], states[0]


def check_epochs(rows, source, epochs):
    """Each epoch's rows, but for those that the plan names as repeated, hold the data set; all are the plan's rows."""
    index = 0
    for epoch in range(epochs):
        plan = source.plan(epoch)
        there = rows[index : index + len(plan)]
        new = [row for r, row in enumerate(there) if r not in plan.repeated_rows]
        assert sorted(sample for row in new for sample in row) == list(range(COUNT))
        assert all(there[r] in new for r in plan.repeated_rows.tolist()) and plan.repeated < BATCH
        assert there == [plan.row(r).tolist() for r in range(len(plan))]
        index += len(plan)


segments = st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 6)), max_size=4)


@settings(deadline=None, max_examples=12)
@given(segments, st.sampled_from([1, 2, 4]), st.integers(0, 100), st.sampled_from([16, 1000]))
def test_whoever_reads_and_wherever_they_are_stopped(segments, last_hosts, seed, chunk):
    options = dict(seed=seed, chunk=chunk)
    source = row_source(**options)
    left = source.plan(0).num_steps + source.plan(1).num_steps
    straight, _ = read(None, 1, left, **options)
    check_epochs(straight, source, 2)
    rows, state = [], None
    for hosts, steps in segments:
        some, state = read(state, hosts, min(steps, left), **options)
        rows, left = rows + some, left - min(steps, left)
    rows += read(state, last_hosts, left, **options)[0]
    assert rows == straight


@pytest.mark.parametrize("first, then, last", [((1, 4), (2, 1), (4, 0))])
def test_hosts_and_workers_that_change_at_every_checkpoint(first, then, last):
    """(hosts, worker processes of each): 1 with 4, then 2 with 1, then 4 with none."""
    source = row_source()
    steps = source.plan(0).num_steps
    rows, state = read(None, first[0], 5, num_workers=first[1])
    some, state = read(state, then[0], 4, num_workers=then[1])
    rest, _ = read(state, last[0], steps - 9, num_workers=last[1])
    check_epochs(rows + some + rest, source, 1)


def test_equal_settings_give_equal_batches_and_others_do_not():
    steps = row_source().plan(0).num_steps
    one, two = (read(None, 1, steps)[0] for _ in range(2))
    assert one == two
    assert read(None, 1, steps, seed=2)[0] != one
    arrays = [next(make_loader(row_source())) for _ in range(2)]
    assert all(np.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[0])
