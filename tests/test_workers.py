"""Worker processes: whatever one item does to its worker, the others have their results, in order."""

import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from worker_functions import act

from data_pipelines.workers import WINDOW, Failure, run_bounded


def run(items, **options):
    return list(run_bounded(act, items, **(dict(processes=2) | options)))


def alive(pids):
    stats = {pid: pathlib.Path(f"/proc/{pid}/stat") for pid in pids}
    return [pid for pid, stat in stats.items() if stat.exists() and " Z " not in stat.read_text()]


def gone(pids, seconds=10.0):
    end = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < end:
        time.sleep(0.1)
    return not alive(pids)


def test_results_come_in_the_order_of_the_items():
    items = [("sleep", 0.3 if i % 4 == 0 else 0.0) for i in range(12)]
    items = [(verb, value + i / 1000) for i, (verb, value) in enumerate(items)]
    assert run(items) == [(item, item[1]) for item in items]


def test_an_item_that_harms_its_worker_costs_itself_only():
    bad = [("exit", 3), ("signal", signal.SIGKILL), ("segfault", 0), ("sleep", 60), ("raise", "something")]
    items = [("return", 0)]
    for i, item in enumerate(bad):
        items += [item, ("return", i), ("return", -i)]
    outcomes = run(items, time_limit=1.0)
    assert [item for item, _ in outcomes] == items
    assert [result for item, result in outcomes if item[0] == "return"] == [v for verb, v in items if verb == "return"]
    reasons = [result.reason for _, result in outcomes if isinstance(result, Failure)]
    assert reasons == [
        "worker died: exit code 3", "worker died: signal 9", "worker died: signal 11", "too slow: stopped after 1 s",
        "error: RuntimeError: of something and more",
    ]  # fmt: skip


def test_a_single_worker_is_replaced_as_often_as_it_dies():
    items = [("exit", 1), ("exit", 1), ("exit", 1), ("return", 1), ("exit", 1), ("return", 2)]
    outcomes = run(items, processes=1, time_limit=5.0)
    assert [getattr(result, "reason", result) for _, result in outcomes] == [*["worker died: exit code 1"] * 3, 1,
                                                                             "worker died: exit code 1", 2]  # fmt: skip


def test_a_worker_that_is_deaf_to_signals_is_stopped():
    began = time.monotonic()
    (_, result), (_, other) = run([("hang", 60), ("return", 1)], time_limit=1.0)
    assert result.reason == "too slow: stopped after 1 s" and other == 1
    assert time.monotonic() - began < 30


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not limit the address space")
def test_memory_is_limited_above_what_a_worker_starts_with():
    outcomes = run([("allocate", 1 << 26), ("allocate", 1 << 29), ("return", 1)], memory_limit=1 << 28)
    assert [result for _, result in outcomes] == [
        1 << 26, Failure("out of memory: it needs more than a worker may take"), 1,
    ]  # fmt: skip


def test_items_are_taken_only_as_workers_need_them():
    taken = []
    items = (("return", i) for i in itertools.count() if taken.append(i) is None)
    results = run_bounded(act, items, processes=2)
    assert [next(results)[1] for _ in range(5)] == list(range(5))
    results.close()
    assert len(taken) <= WINDOW + 5


def test_no_items_start_no_workers():
    assert run([]) == []


def test_closing_ends_the_workers(tmp_path):
    results = run_bounded(act, [("pid", str(tmp_path / "pids"))] * 4 + [("sleep", 60)] * 4, processes=2)
    next(results)
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 10
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert pids and gone(pids)


SCRIPT = """
import sys
from worker_functions import act
from data_pipelines.workers import run_bounded
if __name__ == "__main__":
    items = [("pid", sys.argv[1])] * 2 + [("sleep", 60)] * 8
    for item, result in run_bounded(act, items, processes=2):
        print(item[0], flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_do_not_outlive_an_interrupted_or_killed_parent(tmp_path, how):
    path = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "pids")]
    with subprocess.Popen(command, env=os.environ | dict(PYTHONPATH=path), stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as parent:  # fmt: skip
        assert parent.stdout.readline() == "pid\n"
        began = time.monotonic()
        parent.send_signal(how)
        parent.wait(timeout=20)
        assert time.monotonic() - began < 10 and parent.returncode not in (0, None)
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert pids and gone(pids)


def test_a_script_without_a_main_guard_is_told(tmp_path):
    path = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])
    (tmp_path / "script.py").write_text(SCRIPT.replace('if __name__ == "__main__":', "if True:"))
    done = subprocess.run([sys.executable, str(tmp_path / "script.py"), str(tmp_path / "pids")], text=True, timeout=60,
                          env=os.environ | dict(PYTHONPATH=path), capture_output=True)  # fmt: skip
    assert done.returncode == 1 and '`if __name__ == "__main__":`' in done.stderr


def test_workers_know_nothing_of_the_parents_libraries():
    import jax

    assert jax and run([("modules", ("jax", "flax", "pytest"))]) == [(("modules", ("jax", "flax", "pytest")), [])]
