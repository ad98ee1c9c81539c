"""`podtree exec`: another process in a running pod."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from driver import Pod, Podtree, until
from pod_fixtures import piped, start, status
from podtree.kernel.namespaces import POD_NAMESPACES, namespace_id
from terminal import Terminal


@pytest.fixture
def sleeper(podtree: Podtree) -> Pod:
    return podtree.run("sleep", "1000", name="sleeper", options=["-e", "FROM_POD=1", "-w", "/usr"])


def test_exit_code_and_output(podtree: Podtree, sleeper: Pod) -> None:
    done = podtree("exec", sleeper.name, "--", "sh", "-c", "echo out; echo err >&2; exit 5", code=5)
    assert (done.out, done.err) == ("out\n", "err\n")
    assert "no such program" in podtree("exec", sleeper.name, "--", "no-such-program", code=127).err
    podtree("exec", sleeper.name, "--", "/etc/passwd", code=126)
    podtree("exec", sleeper.name, "--", "sh", "-c", "kill -9 $$", code=137)


def test_same_world(sleeper: Pod) -> None:
    """Parent 0 in the pid namespace, and no namespace, group, capability or filter of the host's."""
    init = int(sleeper.info()["pid"])
    script = "cat /proc/self/status; echo; for n in mnt net ipc uts cgroup time pid; do readlink /proc/self/ns/$n; done"
    out = sleeper.sh(script)
    fields, _, namespaces = out.partition("\n\n")
    assert namespaces.split() == [namespace_id(init, kind) for kind in POD_NAMESPACES]
    of_init = status(init)
    seen = dict(line.split(":\t", 1) for line in fields.splitlines() if ":\t" in line)
    for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "Seccomp", "Seccomp_filters", "NoNewPrivs"):
        assert seen[key] == of_init[key], key
    assert sleeper.sh("sh -c 'ps -o ppid= -p $PPID'").strip() == "0"


def test_environment(podtree: Podtree, sleeper: Pod) -> None:
    assert sleeper.sh("echo $FROM_POD; pwd") == "1\n/usr"
    options = ["-e", "B=c", "-w", "/etc", "--user", "nobody"]
    done = podtree("exec", *options, sleeper.name, "--", "sh", "-c", "echo $B; pwd; id -u")
    assert done.out == "c\n/etc\n65534\n"


def test_where_it_starts(podtree: Podtree, sleeper: Pod) -> None:
    """A directory that isn't there is not made: only `run` does that."""
    done = podtree("exec", "-w", "/no/such/place", sleeper.name, "--", "pwd", code=126)
    assert "/no/such/place" in done.err
    sleeper.sh("test ! -e /no")


def test_what_could_not_be_executed(podtree: Podtree, sleeper: Pod) -> None:
    """Errors name the program and say what to do."""
    sleeper.sh("printf '#!/no/interpreter\\n' > /tmp/script; printf x > /tmp/data; chmod 755 /tmp/script /tmp/data")
    for program, code, hint in (
        ("/tmp/script", 127, "interpreter"),
        ("/tmp/data", 126, "sh FILE"),
        ("/etc/passwd", 126, "executable"),
    ):
        err = podtree("exec", sleeper.name, "--", program, code=code).err
        assert f"podtree: {program}: " in err and hint in err


def test_stdin(podtree: Podtree, sleeper: Pod) -> None:
    data = os.urandom(2_000_000)
    assert piped(podtree, ["exec", "-i", sleeper.name, "--", "cat"], data).stdout == data
    assert piped(podtree, ["exec", sleeper.name, "--", "cat"], data).stdout == b""


def test_terminal(podtree: Podtree, sleeper: Pod) -> None:
    screen = Terminal([str(podtree.program), "exec", "-it", sleeper.name, "--", "bash", "--norc"], podtree.env)
    screen.expect("[#$] ")
    screen.type("tty; stty size\n")
    screen.expect("/dev/pts/0\r\n40 120")
    screen.type("exit 8\n")
    assert screen.process.wait(20) == 8
    screen.close()


def test_detached(podtree: Podtree, sleeper: Pod) -> None:
    answer = podtree.json("exec", "-d", sleeper.name, "--", "sh", "-c", "echo x > /tmp/made; exec sleep 1001")
    sleeper.wait_output("cat /tmp/made", lambda out: out == "x\n", "it has run")
    assert status(answer["pid"])["Name"] == "sleep"
    assert "sleep 1001" in sleeper.sh("ps -e -o args=")


def test_ends_with_the_pod(podtree: Podtree, sleeper: Pod) -> None:
    process = start(podtree, "exec", sleeper.name, "--", "sh", "-c", "echo up; sleep 1000")
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    sleeper.kill()
    assert process.wait(20) == 137


def test_many(podtree: Podtree, sleeper: Pod) -> None:
    """Twenty at once, and no descriptor of them is left in the supervisor."""
    fds = Path(f"/proc/{status(int(sleeper.info()['pid']))['PPid']}/fd")
    sleeper.sh("true")
    before = len(list(fds.iterdir()))
    processes = [start(podtree, "exec", sleeper.name, "--", "echo", str(n)) for n in range(20)]
    outs = [process.communicate(timeout=60) for process in processes]
    assert [out for out, _ in outs] == [f"{n}\n".encode() for n in range(20)], outs
    until(lambda: len(list(fds.iterdir())) == before, "the descriptors are closed")


def test_not_running(podtree: Podtree, sleeper: Pod) -> None:
    sleeper.kill()
    podtree("exec", sleeper.name, "--", "true", code=5)
