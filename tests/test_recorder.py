"""The recorder: rules as pure functions, then real pods that are recorded while they work, rest or misbehave."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver import SYSTEM_PYTHON, Pod, Podtree, until
from pod_fixtures import supervisor_of
from podtree.errors import UsageError
from podtree.pool.records import CheckpointId, Moment
from podtree.recorder import settings
from podtree.recorder.settings import KEEP_DEFAULT, Keep
from podtree.recorder.thinning import surplus

SECOND = 10**9
COUNTER = """
import os, time
n = 0
while True:
    n += 1
    with open("/tmp/count.new", "w") as file:
        file.write(str(n))
    os.rename("/tmp/count.new", "/tmp/count")
    print(n, flush=True)
    time.sleep(0.02)
"""


# ---- rules


def test_settings_from_words() -> None:
    made = settings.make("1s", "2%", last=3)
    assert (made.every_ns, made.budget) == (SECOND, 0.02)
    assert made.keep == Keep(last=3)
    assert settings.make("100ms").keep == KEEP_DEFAULT
    assert settings.make("1h", within="10m").keep == Keep(last=1, within_ns=600 * SECOND)


@pytest.mark.parametrize(
    "words",
    [
        {"every": "10ms"},
        {"every": "soon"},
        {"every": "0s"},
        {"every": "1s", "budget": "2"},
        {"every": "1s", "budget": "0%"},
        {"every": "1s", "budget": "101%"},
        {"every": "1s", "last": -1},
        {"every": "1s", "marks": -1},
        {"every": "1s", "max_size": "much"},
        {"every": "1s", "max_size": "0"},
        {"every": "1s", "within": "x"},
    ],
)
def test_senseless_settings(words: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        settings.make(**words)


def moments(times: list[int]) -> list[Moment]:
    return [Moment(at, CheckpointId(f"{number:012x}")) for number, at in enumerate(times)]


NUMBERS = st.integers(0, 20)
KEEPS = st.builds(
    Keep, last=NUMBERS, within_ns=st.integers(0, 7200 * SECOND), minutely=NUMBERS, hourly=NUMBERS, daily=NUMBERS
)


@given(st.lists(st.integers(0, 10 * 86400 * SECOND), max_size=60), KEEPS)
def test_thinning(times: list[int], keep: Keep) -> None:
    """What each rule says is kept, nothing else is, and thinning what is left again changes nothing."""
    all_of_them = moments(times)
    now = max(times, default=0) + 1
    gone = set(surplus(all_of_them, keep, now))
    left = sorted(((at, one) for at, one, *_ in all_of_them if one not in gone), reverse=True)
    newest = sorted(((at, one) for at, one, *_ in all_of_them), reverse=True)
    assert left[: keep.last] == newest[: keep.last]
    assert {m for m in newest if m[0] > now - keep.within_ns} <= set(left)
    for number, unit in ((keep.minutely, 60), (keep.hourly, 3600), (keep.daily, 86400)):
        units = sorted({at // (unit * SECOND) for at, _ in newest}, reverse=True)[:number]
        assert all(next(m for m in newest if m[0] // (unit * SECOND) == one) in left for one in units)
    most = keep.last + keep.minutely + keep.hourly + keep.daily
    assert len(left) <= most + sum(at > now - keep.within_ns for at, _ in newest)
    assert surplus([Moment(*one) for one in left], keep, now) == []


def test_thinning_of_a_day() -> None:
    """The default rules after a day of a checkpoint a second."""
    day = 86400
    left = day - len(surplus(moments([n * SECOND for n in range(day)]), KEEP_DEFAULT, day * SECOND))
    assert left == 599 + 50 + 23  # ten of the minutes, and an hour and a day, have theirs among the first


def test_thinning_of_marks() -> None:
    """The latest marks stay, each with the one before; a limit to the size goes before all else."""
    ids = [CheckpointId(f"{number:012x}") for number in range(10)]
    found = [Moment(n, one, 100) for n, one in enumerate(ids)]
    for n in (2, 5, 8):
        found[n] = Moment(n, ids[n], 100, ids[n - 1], True)
    gone = surplus(found, Keep(last=1, marks=2), 100)
    assert [one for one in ids if one not in gone] == [ids[n] for n in (4, 5, 7, 8, 9)]
    assert surplus(found, Keep(last=1, marks=0), 100) == ids[:9]
    assert surplus(found, Keep(last=10, max_bytes=350), 100) == ids[:7]
    assert surplus(found, Keep(last=10, max_bytes=1), 100) == ids[:9]
    made = settings.make("1s", marks=3, max_size="1.5k")
    assert (made.keep.marks, made.keep.max_bytes) == (3, 1536)
    assert made.keep.within_ns == KEEP_DEFAULT.within_ns


# ---- pods


def recorded(pod: Pod) -> dict[str, Any]:
    """`podtree record POD --json`."""
    answer: dict[str, Any] = pod.podtree.json("record", pod.name)
    return answer


def taken(pod: Pod, number: int) -> dict[str, Any]:
    """Waits until the recorder has taken so many."""

    def probe() -> dict[str, Any] | None:
        state = recorded(pod)
        return state if state["taken"] >= number else None

    return until(probe, f"{number} recorded checkpoints of {pod.name}", 60, 0.1, lambda: str(recorded(pod)))


def log(pod: Pod) -> list[dict[str, Any]]:
    """`podtree log POD --json`, newest first."""
    answer: list[dict[str, Any]] = pod.podtree.json("log", pod.name)
    return answer


def test_any_moment_comes_back(podtree: Podtree) -> None:
    """Every recorded moment can be branched; memory, output and files of a branch are of the same instant."""
    pod = podtree.run(SYSTEM_PYTHON, "-c", COUNTER, options=["--every", "200ms"])
    taken(pod, 5)
    found = log(pod)
    assert all(one["recorded"] for one in found)
    numbers = []
    for one in (found[-1], found[-3], found[0]):
        branch = podtree.branch(one["id"])
        first = int(branch.logs().split()[-1])
        branch.wait_log(f"\n{first + 20}\n")
        counted = [int(line) for line in branch.logs().split()]
        assert counted == list(range(1, len(counted) + 1))
        assert int(branch.read("/tmp/count")) >= first + 19
        assert not recorded(branch)["recorded"]  # unless that is asked for
        numbers.append(first)
        branch.remove()
    assert numbers == sorted(set(numbers))
    assert pod.running()


def test_rest_is_not_recorded(podtree: Podtree) -> None:
    """Nothing is taken of a pod that does nothing; the first thing that it does is there in the next one."""
    pod = podtree.run("sh", "-c", "mkfifo /tmp/fifo; exec 3<> /tmp/fifo; while read line <&3; do echo $line; done")
    until(lambda: "p" in pod.sh("stat -c %A /tmp/fifo; true"), "the fifo is there")
    podtree("record", pod.name, "--every", "100ms")
    taken(pod, 1)

    def resting() -> bool:
        before = recorded(pod)
        after = until(
            lambda: (now := recorded(pod))["skipped"] + now["taken"] > before["skipped"] + before["taken"] + 5 and now,
            "ticks go by",
        )
        return bool(after["taken"] == before["taken"])

    until(resting, "nothing is recorded of a pod at rest", 60)
    before = recorded(pod)["taken"]
    pod.sh("echo wake > /tmp/fifo")
    taken(pod, before + 1)
    until(resting, "it rests again", 60)
    branch = podtree.branch(f"{pod.name}@latest")
    assert branch.logs() == "wake\n"


def test_refused_for_a_while(podtree: Podtree) -> None:
    """What can't be saved is told, harms nobody, and recording goes on when it is gone."""
    pod = podtree.run("sleep", "1000", options=["--every", "100ms"])
    taken(pod, 1)
    watcher = """
import fcntl, os, time
fcntl.fcntl(os.open("/tmp", os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_DELETE)
while not os.path.exists("/tmp/enough"):
    time.sleep(0.05)
"""
    podtree("exec", "-d", pod.name, "--", SYSTEM_PYTHON, "-c", watcher)
    state = until(lambda: (now := recorded(pod))["error"] and now, "the recorder tells of the watcher", 30)
    assert "dnotify" in state["error"]
    assert "dnotify" in podtree("record", pod.name).out
    pod.sh("touch /tmp/enough")
    until(lambda: recorded(pod)["taken"] > state["taken"] and not recorded(pod)["error"], "it is recorded again", 30)


def test_goes_on_with_a_new_supervisor(podtree: Podtree) -> None:
    pod = podtree.run(SYSTEM_PYTHON, "-c", COUNTER, options=["--every", "100ms", "--keep-last", "50"])
    taken(pod, 2)
    os.kill(supervisor_of(pod), signal.SIGKILL)
    state = until(lambda: podtree("record", pod.name, code=None).code == 0 and taken(pod, 2), "a new supervisor", 60)
    assert (state["every_ms"], state["keep"]["last"]) == (100, 50)


def test_on_and_off(podtree: Podtree) -> None:
    pod = podtree.run(SYSTEM_PYTHON, "-c", COUNTER)
    assert podtree.json("record", pod.name) == {"pod": pod.name, "recorded": False}
    assert "isn't recorded" in podtree("record", pod.name).out
    assert "isn't recorded" in podtree("record", pod.name, "--off").out
    podtree("record", pod.name, "--every", "100ms")
    taken(pod, 2)
    podtree("record", pod.name, "--off")
    number = len(log(pod))
    assert not recorded(pod)["recorded"]
    pod.sh("sleep 0.5")
    assert len(log(pod)) == number
    podtree("record", pod.name, "--off", "--every", "1s", code=2)
    podtree("record", pod.name, "--keep-last", "3", code=2)
    podtree("run", "--budget", "3%", "--", "true", code=2)
    podtree("kill", pod.name)
    pod.wait()
    podtree("record", pod.name, "--every", "1s", code=5)


def test_thinned_while_it_goes_on(podtree: Podtree) -> None:
    """Only recorded checkpoints go: not those of a person, not tagged ones, not a branch's origin."""
    pod = podtree.run(SYSTEM_PYTHON, "-c", COUNTER)
    asked_for = pod.checkpoint()
    podtree("record", pod.name, "--every", "100ms", "--keep-last", "3")
    taken(pod, 2)
    found = log(pod)
    tagged, origin = found[1]["id"], found[0]["id"]
    podtree("tag", tagged, "thin-not-me")
    branch = podtree.branch(origin)
    until(lambda: recorded(pod)["thinned"] >= 10, "checkpoints are thinned", 60)
    left = {one["id"] for one in log(pod)}
    assert {asked_for, tagged, origin} <= left
    assert len(left) <= 3 + 3 + 10
    podtree("record", pod.name, "--off")
    podtree("fsck")
    again = podtree.branch("thin-not-me")
    assert branch.running() and again.running()
    podtree("rewind", pod.name, asked_for)
    podtree("branch", f"{pod.name}@latest")
    podtree("untag", "thin-not-me")


def test_beside_other_commands(podtree: Podtree) -> None:
    """A recorded pod is checkpointed, rewound and branched by a person as any other."""
    pod = podtree.run(SYSTEM_PYTHON, "-c", COUNTER, options=["--every", "100ms", "--budget", "100%"])
    taken(pod, 2)
    mine = pod.checkpoint("-m", "mine")
    for _ in range(5):
        pod.checkpoint()
    podtree("rewind", pod.name, mine)
    before = recorded(pod)["taken"]
    taken(pod, before + 3)
    counted = [int(line) for line in pod.logs().split()]
    assert counted == list(range(1, len(counted) + 1))
    assert recorded(pod)["error"] is None
