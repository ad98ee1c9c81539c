"""The supervisor can die and be replaced without the pod noticing; nothing is left when a pod ends."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from driver import SYSTEM_PYTHON, Pod, Podtree, until
from pod_fixtures import parent, start, status, supervisor_of, wait_gone
from terminal import Terminal

COUNT = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"


def kill_supervisor(pod: Pod) -> None:
    """SIGKILL, and wait until another one answers."""
    pid = supervisor_of(pod)
    assert status(pid)["Name"] == "podtree-superv"
    os.kill(pid, signal.SIGKILL)
    pod.sh("true")


def assert_counts(text: str) -> list[int]:
    """Every number once, in order."""
    numbers = [int(word) for word in text.split()]
    assert numbers == list(range(1, len(numbers) + 1))
    return numbers


def test_terminal_pod_survives(podtree: Podtree) -> None:
    """Output goes on without a gap, the new supervisor can be attached to, stop works, the exit code is known."""
    pod = podtree.run("bash", "-c", f"trap 'exit 9' TERM; {COUNT}", options=["-t"])
    pod.wait_log("10\n")
    init = int(pod.info()["pid"])
    started = Path(f"/proc/{init}/stat").read_text().split()[21]
    kill_supervisor(pod)
    assert status(parent(init))["Name"] == "podtree-keeper"
    before = len(assert_counts(pod.logs()))
    until(lambda: len(assert_counts(pod.logs())) > before + 20, "the log goes on")
    screen = Terminal([str(podtree.program), "attach", pod.name], podtree.env)
    screen.expect(r"\d+\r\n\d+\r\n")
    screen.type("\x10\x11")
    screen.expect("detached")
    screen.close()
    assert Path(f"/proc/{init}/stat").read_text().split()[21] == started
    podtree("stop", "-t", "5", pod.name)
    assert pod.wait() == 9


def test_log_pod_survives(podtree: Podtree) -> None:
    pod = podtree.run("sh", "-c", COUNT)
    pod.wait_log("10\n")
    for _ in range(3):
        pid = supervisor_of(pod)
        if status(pid)["Name"] == "podtree-keeper":  # once orphaned, it stays the keeper's child
            break
        kill_supervisor(pod)
    before = len(assert_counts(pod.logs()))
    until(lambda: len(assert_counts(pod.logs())) > before + 10, "the log goes on")
    pod.kill()
    assert pod.wait() == 137


def test_attached_client_survives(podtree: Podtree) -> None:
    """A `podtree run` in the foreground goes on with the new supervisor, and passes the exit code on."""
    script = "import sys\nfor line in sys.stdin:\n    print(int(line) * 2, flush=True)\nsys.exit(11)"
    process = start(podtree, "run", "--name", "front", "--", SYSTEM_PYTHON, "-c", script)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"1\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"2\n"
    kill_supervisor(Pod(podtree, "front"))
    process.stdin.write(b"21\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"42\n"
    process.stdin.close()
    assert process.wait(20) == 11


def test_exec_survives(podtree: Podtree) -> None:
    """A process of `exec` runs on, and leaves no zombie behind it."""
    pod = podtree.run("sleep", "1000")
    pid = podtree.json("exec", "-d", pod.name, "--", "sleep", "1000")["pid"]
    kill_supervisor(pod)
    assert status(pid)["Name"] == "sleep"
    os.kill(pid, signal.SIGTERM)
    until(lambda: not Path(f"/proc/{pid}").exists(), "it has ended and was reaped")
    assert pod.running()


def test_attached_exec_survives(podtree: Podtree) -> None:
    """Its client gets every line once, also those of while nobody supervised the pod, and the exit code."""
    pod = podtree.run("sleep", "1000")
    script = "i=0; while [ $i -lt 150 ]; do i=$((i+1)); echo $i; sleep 0.02; done; exit 9"
    process = start(podtree, "exec", pod.name, "--", "sh", "-c", script)
    assert process.stdout is not None and process.stdout.readline() == b"1\n"
    kill_supervisor(pod)
    out, err = process.communicate(timeout=60)
    assert [int(word) for word in out.split()] == list(range(2, 151))
    assert process.returncode == 9 and b"may be missing" in err


def test_foreground_run_ends_while_nobody_supervises(podtree: Podtree, tmp_path: Path) -> None:
    """What it wrote last reaches the client, and the log; so do the exit codes of it and of an exec."""
    script = "echo ready; while [ ! -e /mnt/go ]; do sleep 0.02; done; echo last words; exit 7"
    front = start(podtree, "run", "--name", "last", "-v", f"{tmp_path}:/mnt", "--", "sh", "-c", script)
    assert front.stdout is not None and front.stdout.readline() == b"ready\n"
    pod = Pod(podtree, "last")
    inside = start(podtree, "exec", "last", "--", "sh", "-c", "echo up; exec sleep 1000")
    assert inside.stdout is not None and inside.stdout.readline() == b"up\n"
    init, supervisor = int(pod.info()["pid"]), supervisor_of(pod)
    (child,) = {int(pid) for pid in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()} - {init}
    os.kill(supervisor, signal.SIGSTOP)
    try:
        (tmp_path / "go").touch()
        wait_gone(child)  # the kernel has killed it with the first process, which waits until it is reaped
    finally:
        os.kill(supervisor, signal.SIGKILL)
    assert front.communicate(timeout=60)[0] == b"last words\n" and front.returncode == 7
    assert inside.wait(60) == 137
    assert pod.logs() == "ready\nlast words\n" and pod.wait() == 7


def test_init_ends_while_nobody_supervises(podtree: Podtree) -> None:
    """Supervisor and pod are killed at the same instant: the keeper knows the exit code."""
    pod = podtree.run("sleep", "1000")
    init, supervisor = int(pod.info()["pid"]), supervisor_of(pod)
    os.kill(supervisor, signal.SIGSTOP)
    os.kill(init, signal.SIGKILL)
    os.kill(supervisor, signal.SIGKILL)
    assert pod.wait() == 137
    until(lambda: pod.info()["state"] == "exited", "it is known to have ended")


def test_keeper_dies(podtree: Podtree) -> None:
    """Without its keeper a supervisor goes on."""
    pod = podtree.run("sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.05; done")
    keeper = parent(supervisor_of(pod))
    assert status(keeper)["Name"] == "podtree-keeper"
    os.kill(keeper, signal.SIGKILL)
    wait_gone(keeper)
    assert pod.sh("echo still") == "still"
    podtree("stop", pod.name)
    assert pod.wait() == 3


def test_random_kills_under_load(podtree: Podtree) -> None:
    """exec and output while supervisors die, new ones before they are ready too: commands may fail, the pod doesn't."""
    pod = podtree.run("bash", "-c", COUNT, options=["-t"])
    pod.wait_log("5\n")
    init = int(pod.info()["pid"])
    run_dir = next((podtree.home / "run").iterdir())
    stop = threading.Event()

    def shoot() -> None:
        for pause in (0.0, 0.1, 0.3, 0.7, 0.2, 1.0):
            if stop.wait(pause):
                return
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit():
                    try:
                        ours = os.readlink(entry / "fd" / "2").startswith(str(run_dir))
                        if ours and status(int(entry.name))["Name"] == "podtree-superv":
                            os.kill(int(entry.name), signal.SIGKILL)
                    except OSError:
                        continue

    shooter = threading.Thread(target=shoot)
    shooter.start()
    try:
        codes = [podtree("exec", pod.name, "--", "true", code=None).code for _ in range(12)]
    finally:
        stop.set()
        shooter.join()
    assert set(codes) <= {0, 1, 5}, codes
    assert podtree("exec", pod.name, "--", "echo", "well").out == "well\n"
    assert int(pod.info()["pid"]) == init
    assert_counts(pod.logs())


def test_nothing_left(podtree: Podtree) -> None:
    """After a pod's end: no process, no cgroup, no run directory, no mount; after rm: no volume."""
    pod = podtree.run("sh", "-c", "sleep 1000 & wait", options=["--memory", "100m", "--pids", "50", "--cpus", "1"])
    pod.sh("true")
    pod_id = pod.info()["id"]
    keeper = parent(supervisor_of(pod))
    assert list(Path("/sys/fs/cgroup").rglob(pod_id))
    pod.kill()
    wait_gone(keeper)
    assert not list(Path("/sys/fs/cgroup").rglob(pod_id))
    assert not (podtree.home / "run" / pod_id).exists()
    assert pod_id not in Path("/proc/self/mountinfo").read_text()
    podtree("rm", pod.name)
    assert not (podtree.home / "pool" / "pods" / pod_id).exists()


def test_supervisor_keeps_to_itself(podtree: Podtree) -> None:
    """Not in the pod's cgroup, not in the starter's session, nothing of the starter's open."""
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    process = start(podtree, "run", "-d", "--name", "apart", "--", "sleep", "1000")
    process.communicate(timeout=20)
    os.close(write_end)
    assert os.read(read_end, 1) == b""  # nobody has it open any more
    os.close(read_end)
    pod = Pod(podtree, "apart")
    supervisor = supervisor_of(pod)
    assert os.getsid(supervisor) not in (os.getsid(0), process.pid)
    assert Path(f"/proc/{supervisor}/cgroup").read_text() == Path("/proc/self/cgroup").read_text()
    assert os.readlink(f"/proc/{supervisor}/cwd") == "/"
