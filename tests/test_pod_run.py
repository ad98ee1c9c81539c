"""`podtree run` and its relatives, as a person or a script uses them: exit codes, stdio, signals, limits."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from driver import SLOW, SYSTEM_PYTHON, Pod, Podtree, until
from pod_fixtures import piped, start, status, wait_gone
from podtree.pod.spec import HOST_ENVIRONMENT


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_exit_code(podtree: Podtree, code: int) -> None:
    done = podtree("run", "--rm", "--", "sh", "-c", f"echo out; echo err >&2; exit {code}", code=code)
    assert (done.out, done.err) == ("out\n", "err\n")


def test_command_not_found(podtree: Podtree) -> None:
    """127 and 126 as in a shell; no pod is left of it."""
    assert "no such program" in podtree("run", "--", "no-such-program", code=127).err
    assert "/no/such/program: No such" in podtree("run", "--", "/no/such/program", code=127).err
    assert "/etc/passwd: Permission denied" in podtree("run", "--", "/etc/passwd", code=126).err
    podtree("run", "-d", "--", "no-such-program", code=127)
    podtree("run", code=2)
    assert podtree.pods() == []


def test_outputs_in_order(podtree: Podtree) -> None:
    """With stdout and stderr at the same place, lines come in the order in which they were written."""
    wanted = "".join(f"out {n}\nerr {n}\n" for n in range(200))
    program = "import os\nfor n in range(200): os.write(1, b'out %d\\n' % n); os.write(2, b'err %d\\n' % n)"
    pod = podtree.run("sleep", "1000")
    for verb in (["run", "--rm"], ["exec", pod.name]):
        command = [str(podtree.program), *verb, "--", SYSTEM_PYTHON, "-c", program]
        done = subprocess.run(
            command, env=podtree.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=60 * SLOW,
        )  # fmt: skip
        assert done.stdout == wanted


def test_outputs_at_one_place_in_a_branch(podtree: Podtree) -> None:
    script = "echo ready; read x; echo out; echo err >&2; sleep 1000"
    command = [str(podtree.program), "run", "--name", "one-place", "--", "sh", "-c", script]
    process = subprocess.Popen(
        command, env=podtree.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdin is not None and process.stdout is not None and process.stdout.readline() == b"ready\n"
    podtree("checkpoint", "one-place")
    branch = podtree.branch("one-place@1")
    piped_in = start(podtree, "attach", branch.name)
    assert piped_in.stdin is not None and piped_in.stdout is not None
    piped_in.stdin.write(b"\n")
    piped_in.stdin.flush()
    assert piped_in.stdout.readline() + piped_in.stdout.readline() == b"out\nerr\n"
    branch.kill()
    assert piped_in.wait(20) == 137
    podtree("kill", "one-place")
    assert process.wait(20) == 137


def test_removed_when_it_ends(podtree: Podtree) -> None:
    """--rm, but not what was saved: a checkpoint that was reported is there."""
    gone = podtree.run("sleep", "1000", options=["--rm"])
    gone.kill()
    assert podtree.pods() == []
    pod = podtree.run("sleep", "1000", options=["--rm"])
    pod.checkpoint("--stop")
    assert pod.info()["state"] == "stopped"
    branch = podtree.branch(f"{pod.name}@1")
    branch.kill()
    assert [one["name"] for one in podtree.pods()] == [pod.name]


def test_ignored_signals_stay_ignored(podtree: Podtree) -> None:
    """As with nohup(1): the command doesn't pass on what it was told to ignore."""
    script = "trap 'echo hup' HUP; trap 'echo usr1' USR1; echo ready; while :; do sleep 0.05; done"
    command = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", str(podtree.program), "run", "--name", "hup", "--"]
    process = subprocess.Popen(
        [*command, "sh", "-c", script], env=podtree.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == b"usr1\n"
    podtree("kill", "hup")
    assert process.wait(20) == 137


def test_killed_by_signal(podtree: Podtree) -> None:
    done = start(podtree, "run", "--rm", "--name", "dies", "--", "sleep", "1000")
    until(lambda: any(p["name"] == "dies" and p["state"] == "running" for p in podtree.pods()), "it runs")
    podtree("kill", "dies")
    assert done.wait(20) == 137


def test_stdin_is_binary_clean_and_ends(podtree: Podtree) -> None:
    data = os.urandom(3_000_000)
    done = piped(podtree, ["run", "--rm", "--", "cat"], data)
    assert done.stdout == data and done.returncode == 0


def test_big_output_while_stdin_waits(podtree: Podtree) -> None:
    """Neither side reads before it has written: no deadlock."""
    program = "import sys; sys.stdout.write('x' * 8_000_000); sys.stdout.flush(); print(len(sys.stdin.read()))"
    done = piped(podtree, ["run", "--rm", "--", SYSTEM_PYTHON, "-c", program], b"y" * 8_000_000)
    assert done.stdout == b"x" * 8_000_000 + b"8000000\n"


def test_stdin_nobody_reads(podtree: Podtree) -> None:
    done = piped(podtree, ["run", "--rm", "--", "head", "-c", "3"], b"abc" * 3_000_000)
    assert (done.stdout, done.returncode) == (b"abc", 0)


def test_closed_stdout_reaches_the_program(podtree: Podtree) -> None:
    """`podtree run -- yes | head -1` ends, as `yes | head -1` does."""
    process = start(podtree, "run", "--rm", "--", "yes", stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    assert process.wait(20) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_are_forwarded(podtree: Podtree, number: signal.Signals) -> None:
    script = f"trap 'echo got {int(number)}; exit 9' {int(number)}; echo ready; while :; do sleep 0.05; done"
    process = start(podtree, "run", "--rm", "--", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert (out, process.returncode) == (f"got {int(number)}\n".encode(), 9)


def test_detached(podtree: Podtree) -> None:
    answer = podtree.json("run", "-d", "--name", "back", "--", "sh", "-c", "echo hello; sleep 1000")
    assert set(answer) >= {"pod", "id", "pid"} and answer["pod"] == "back"
    assert status(answer["pid"])["NSpid"].split()[1] == "1"
    until(lambda: podtree("logs", "back").out == "hello\n", "its output is in the log")
    (listed,) = podtree.pods()
    assert (listed["name"], listed["state"], listed["pid"]) == ("back", "running", answer["pid"])
    podtree("run", "-d", "--name", "back", "--", "true", code=5)


def test_ps_is_quick(podtree: Podtree) -> None:
    """A whole command is under 0.1 s, or, on a busy machine, hardly more than what its libraries cost to import."""
    libraries = [str(podtree.program.parent / "python3"), "-c", "import click, msgspec, sqlite3, pathlib"]

    def cost(run: Callable[[], object]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    least = min(cost(lambda: subprocess.run(libraries, check=True)) for _ in range(10))
    ours = min(cost(lambda: podtree("ps")) for _ in range(10))
    assert ours < max(0.1 * SLOW, 2.5 * least), (ours, least)


def test_environment_and_directory(podtree: Podtree) -> None:
    podtree.env["SECRET_OF_TEST"] = "x"
    try:
        script = "env; pwd; hostname"
        done = podtree("run", "--rm", "-e", "A=b c", "-w", "/usr/share", "--hostname", "box", "--", "sh", "-c", script)
    finally:
        del podtree.env["SECRET_OF_TEST"]
    lines = done.out.splitlines()
    assert {"A=b c", "HOSTNAME=box", "HOME=/root"} <= set(lines)
    assert lines[-2:] == ["/usr/share", "box"]
    names = {line.partition("=")[0] for line in lines[:-2]}
    allowed = {"A", "HOSTNAME", "HOME", "PATH", "PWD", "OLDPWD", "SHLVL", "_"} | set(HOST_ENVIRONMENT)
    assert names <= allowed


def test_new_working_directory(podtree: Podtree) -> None:
    assert podtree("run", "--rm", "-w", "/srv/new/dir", "--", "pwd").out == "/srv/new/dir\n"
    assert not Path("/srv/new").exists()


@pytest.mark.parametrize(
    ("user", "wanted"),
    [
        ("nobody", "uid=65534(nobody) gid=65534(nogroup) groups=65534(nogroup)"),
        ("65534", "uid=65534(nobody) gid=65534(nogroup) groups=65534(nogroup)"),
        ("1234:5678", "uid=1234 gid=5678 groups=5678"),
        ("daemon:adm", "uid=1(daemon) gid=4(adm) groups=4(adm)"),
    ],
)
def test_user(podtree: Podtree, user: str, wanted: str) -> None:
    assert podtree("run", "--rm", "--user", user, "-w", "/", "--", "id").out.strip() == wanted


def test_unknown_user(podtree: Podtree) -> None:
    assert "no-such-user" in podtree("run", "--user", "no-such-user", "--", "id", code=2).err


def test_volumes(podtree: Podtree, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("from outside")
    script = "cat /mnt/new/a/f; echo x > /mnt/new/a/g"
    done = podtree("run", "--rm", "-v", f"{tmp_path}:/mnt/new/a", "--", "sh", "-c", script)
    assert done.out == "from outside" and (tmp_path / "g").read_text() == "x\n"
    script = "cat /mnt/f; echo x > /mnt/h"
    done = podtree("run", "--rm", "-v", f"{tmp_path}:/mnt:ro", "--", "sh", "-c", script, code=2)
    assert done.out == "from outside" and "Read-only" in done.err and not (tmp_path / "h").exists()
    done = podtree("run", "--rm", "-v", f"{tmp_path}/f:/etc/hostname:ro", "--", "cat", "/etc/hostname")
    assert done.out == "from outside"
    podtree("run", "-v", "/no/such/place:/mnt", "--", "true", code=2)
    assert f"-v {tmp_path}/f:/etc" in podtree("run", "-v", f"{tmp_path}/f:/etc", "--", "true", code=2).err


def test_volumes_inside_of_volumes(podtree: Podtree, tmp_path: Path) -> None:
    """The inner one is seen, in whatever order they are given."""
    outer, inner = tmp_path / "outer dir", tmp_path / "inner"
    (outer / "sub").mkdir(parents=True)
    inner.write_text("inner")
    both = ["-v", f"{inner}:/mnt/x/sub/file:ro"], ["-v", f"{outer}:/mnt/x"]
    for one, other in (both, both[::-1]):
        assert podtree("run", "--rm", *one, *other, "--", "cat", "/mnt/x/sub/file").out == "inner"


def test_names(podtree: Podtree, tmp_path: Path) -> None:
    """The host name is the pod's name, /etc knows it; a host file that -v shows there isn't written to."""
    out = podtree("run", "--rm", "--name", "some_box", "--", "cat", "/proc/sys/kernel/hostname", "/etc/hostname").out
    assert out == "some-box\nsome-box\n"
    script = 'test "$(hostname)" != pod && getent hosts "$(hostname)"'
    assert "127.0.0.1" in podtree("run", "--rm", "--", "sh", "-c", script).out
    for name in ("hosts", "hostname"):
        (tmp_path / name).write_text("the host's\n")
        options = ["-v", f"{tmp_path / name}:/etc/{name}"]
        assert podtree("run", "--rm", *options, "--", "cat", f"/etc/{name}").out == "the host's\n"
    podtree("run", "--rm", "-v", f"{tmp_path}:/etc", "--", "true")
    assert {(tmp_path / name).read_text() for name in ("hosts", "hostname")} == {"the host's\n"}


def test_writes_stay_apart(podtree: Podtree) -> None:
    pod = podtree.run("sh", "-c", "echo pod > /etc/podtree-test; rm /etc/hostname; sleep 1000")
    pod.wait_output("cat /etc/podtree-test", lambda out: out == "pod\n", "it has written")
    assert not Path("/etc/podtree-test").exists() and Path("/etc/hostname").exists()
    other = podtree("run", "--rm", "--", "ls", "/etc/hostname", "/etc/podtree-test", code=2)
    assert other.out == "/etc/hostname\n"


def test_memory_limit(podtree: Podtree) -> None:
    program = "x = bytearray(300 << 20); print('got it')"
    done = podtree("run", "--rm", "--memory", "64m", "--", SYSTEM_PYTHON, "-c", program, code=137)
    assert done.out == ""


FORKS = """
import os, time
made = 0
try:
    for _ in range(50):
        if os.fork() == 0:
            time.sleep(1000)
        made += 1
except BlockingIOError:
    print(made, flush=True)
"""


def test_pids_limit(podtree: Podtree) -> None:
    """What builds the pod doesn't count."""
    assert podtree("run", "--rm", "--pids", "10", "--", SYSTEM_PYTHON, "-c", FORKS).out == "9\n"
    podtree("run", "--rm", "--pids", "1", "--", "true")


def test_pids_limit_of_a_branch(podtree: Podtree) -> None:
    """A pod with all the tasks that it may have can be looked into, saved and branched; the limit is still there."""
    pod = podtree.run(SYSTEM_PYTHON, "-c", FORKS + "time.sleep(1000)", options=["--pids", "10"])
    pod.wait_log("9\n")
    assert pod.exec("echo", "inside") == "inside\n"
    pod.checkpoint()
    for branch in (podtree.branch(f"{pod.name}@1"), pod):
        if branch is pod:
            podtree("rewind", pod.name, f"{pod.name}@1")
        done = podtree("exec", branch.name, "--", SYSTEM_PYTHON, "-c", FORKS)
        assert done.out == "0\n"


def test_cpu_limit(podtree: Podtree) -> None:
    program = "import time; t = time.monotonic()\nwhile time.monotonic() < t + 2: pass\nprint(time.process_time())"
    used = float(podtree("run", "--rm", "--cpus", "0.25", "--", SYSTEM_PYTHON, "-c", program).out)
    assert used < 1.2


def cpu_quotas(pod: Pod) -> list[int]:
    """What the pod's groups allow, in microseconds of each 100,000."""
    init = str(pod.info()["pid"])
    every = Path("/sys/fs/cgroup").rglob(f"{pod.info()['id']}*")
    groups = [group for group in every if init in (group / "cgroup.procs").read_text().split()]
    files = [group / name for group in groups for name in ("cpu.max", "cpu.cfs_quota_us")]
    return [int(file.read_text().split()[0]) for file in files if file.exists()]


def test_cpu_limit_stays_out_of_the_engines_way(podtree: Podtree) -> None:
    """Tasks with next to no CPU time are saved and restored as others are, and have the limit afterwards."""
    pod = podtree.run("sh", "-c", "for i in 1 2 3 4; do (while :; do :; done) & done; wait", options=["--cpus", "0.02"])
    assert cpu_quotas(pod) == [2000]
    first = pod.checkpoint()
    assert cpu_quotas(pod) == [2000]
    branch = podtree.branch(first)
    assert cpu_quotas(branch) == [2000]
    podtree("check", branch.name)
    podtree("rewind", pod.name, first)
    assert cpu_quotas(pod) == cpu_quotas(branch) == [2000]


def test_stop_asks_first(podtree: Podtree) -> None:
    pod = podtree.run("sh", "-c", "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.05; done")
    pod.wait_log("ready")
    podtree("stop", pod.name)
    assert pod.wait() == 3 and pod.logs() == "ready\nbye\n"
    assert pod.info()["exit_code"] == 3


def test_stop_insists(podtree: Podtree) -> None:
    pod = podtree.run("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done")
    pod.wait_log("ready")
    began = time.monotonic()
    podtree("stop", "-t", "0.5", pod.name)
    assert 0.4 < time.monotonic() - began < 8 and pod.wait() == 137


def test_kill_is_no_stop(podtree: Podtree) -> None:
    """SIGKILL alone: a handler of SIGTERM has no part in it. stop can send another signal, and wait for ever."""
    pod = podtree.run("sh", "-c", "trap 'echo term; exit 3' TERM; echo ready; while :; do sleep 0.01; done")
    pod.wait_log("ready")
    podtree("kill", pod.name)
    assert pod.wait() == 137 and pod.logs() == "ready\n"
    pod = podtree.run("sh", "-c", "trap 'exit 4' USR1; trap '' TERM; echo ready; while :; do sleep 0.05; done")
    pod.wait_log("ready")
    podtree("stop", "-s", "USR1", "-t", "-1", pod.name)
    assert pod.wait() == 4
    for timeout in ("nan", "-2", "x"):
        podtree("stop", "-t", timeout, pod.name, code=2)


def test_wait_waits(podtree: Podtree) -> None:
    pod = podtree.run("sh", "-c", "sleep 0.7; exit 6")
    assert pod.wait() == 6
    assert pod.wait() == 6
    assert pod.info()["state"] == "exited"


def test_whole_tree_ends_with_init(podtree: Podtree) -> None:
    pod = podtree.run("sh", "-c", "sleep 1000 & setsid sleep 1001 & echo $!; wait")
    until(lambda: len(pod.processes()) == 3, "three processes")
    pids = [int(p) for p in Path(f"/proc/{pod.info()['pid']}/task/{pod.info()['pid']}/children").read_text().split()]
    pod.kill()
    for pid in pids:
        wait_gone(pid)


def test_logs(podtree: Podtree) -> None:
    pod = podtree.run("sh", "-c", "seq 1 20000; printf unfinished")
    pod.wait()
    everything = "".join(f"{n}\n" for n in range(1, 20001)) + "unfinished"
    assert pod.logs() == everything
    assert podtree("logs", "--tail", "3", pod.name).out == "19999\n20000\nunfinished"
    assert podtree("logs", "--tail", "0", pod.name).out == ""
    assert podtree("logs", "--tail", "99999", pod.name).out == everything
    assert podtree("logs", "-f", "--tail", "1", pod.name).out == "unfinished"


def test_logs_follow(podtree: Podtree) -> None:
    pod = podtree.run("sh", "-c", "for i in 1 2 3 4 5; do echo $i; sleep 0.2; done")
    assert podtree("logs", "-f", pod.name).out == "1\n2\n3\n4\n5\n"


def test_attach_to_pipes(podtree: Podtree) -> None:
    podtree("run", "-d", "-i", "--name", "calc", "--", "sh", "-c", "while read x; do echo $((x * 2)); done")
    done = piped(podtree, ["attach", "calc"], b"21\n50\n")
    # With -i stdin stays open when the client leaves, but this client's own stdin ended: so did the pod's.
    assert done.stdout == b"42\n100\n" and done.returncode == 0
    assert podtree("logs", "calc").out == "42\n100\n"


def test_attach_to_a_log(podtree: Podtree) -> None:
    pod = podtree.run("sh", "-c", "sleep 1; echo late; exit 4")
    assert podtree("attach", pod.name, code=4).out == "late\n"


def test_client_dies_pod_stays(podtree: Podtree) -> None:
    """SIGKILL to the command that started it."""
    process = start(podtree, "run", "--name", "stays", "--", "sh", "-c", "echo a; sleep 1; echo b; sleep 1000")
    assert process.stdout is not None and process.stdout.readline() == b"a\n"
    process.kill()
    process.wait()
    until(lambda: podtree("logs", "stays").out == "a\nb\n", "it goes on")


def test_errors_as_json(podtree: Podtree) -> None:
    done = podtree("checkpoint", "--json", "no-such-pod", code=4)
    assert "no-such-pod" in json.loads(done.out)["error"] and json.loads(done.out)["problems"] == []
    # A word of the pod's own command isn't an option of ours.
    assert podtree("run", "--", "no-such-program", "--json", code=127).out == ""


def test_rm(podtree: Podtree) -> None:
    pod = podtree.run("sleep", "1000")
    podtree("rm", pod.name, code=5)
    podtree("rm", "--force", pod.name)
    assert podtree.pods() == []
    podtree("logs", pod.name, code=4)


def test_many_at_once(podtree: Podtree) -> None:
    """Ten commands that start a pod at the same time."""
    processes = [start(podtree, "run", "--rm", "--", "sh", "-c", f"echo {n}") for n in range(10)]
    outs = [process.communicate(timeout=60) for process in processes]
    assert [out for out, _ in outs] == [f"{n}\n".encode() for n in range(10)], outs
