"""What a pod can't do, and what it can't see: code nobody trusts may run in one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from driver import SYSTEM_PYTHON, Pod, Podtree
from pod_fixtures import status
from podtree.kernel.namespaces import POD_NAMESPACES, namespace_id


@pytest.fixture
def pod(podtree: Podtree) -> Pod:
    return podtree.run("sleep", "1000", name="cell")


def test_namespaces(pod: Pod) -> None:
    init = int(pod.info()["pid"])
    for kind in POD_NAMESPACES:
        assert namespace_id(init, kind) != namespace_id(os.getpid(), kind), kind


def test_privileges(pod: Pod) -> None:
    """The default capabilities of other container tools, and a filter."""
    of_init = status(int(pod.info()["pid"]))
    assert {of_init[key] for key in ("CapPrm", "CapEff", "CapBnd")} == {"00000000a80425fb"}
    assert {of_init[key] for key in ("CapInh", "CapAmb")} == {"0000000000000000"}
    assert of_init["Seccomp"] == "2"


def test_no_descriptors(pod: Pod) -> None:
    init = int(pod.info()["pid"])
    assert sorted(os.listdir(f"/proc/{init}/fd"), key=int) == ["0", "1", "2"]
    out = pod.python("import os; print(sorted(int(fd) for fd in os.listdir('/proc/self/fd')))")
    assert out in ("[0, 1, 2]", "[0, 1, 2, 3]")  # 3: the directory being listed


@pytest.mark.parametrize(
    "command",
    [
        "mount -t tmpfs x /mnt",
        "umount /proc/kcore",
        "umount -l /.podtree",
        "mount -o remount,rw /sys",
        "mount -o bind,remount,rw /proc/sys",
        "unshare -U true",
        "unshare -m true",
        "nsenter -t 1 -n true",
        "echo 1 > /proc/sys/kernel/hostname",
        "echo b > /proc/sysrq-trigger",
        "hostname other",
        "date -s 2020-01-01",
        "chroot /proc/1/root mount -t tmpfs x /mnt",
        "rmdir /.podtree",
        "mv /.podtree /elsewhere",
        "touch /.podtree/x",
        "chmod 700 /dev/null",
        "mkdir /sys/fs/cgroup/x",
        "dmesg",
    ],
)
def test_refused(pod: Pod, command: str) -> None:
    done = pod.podtree("exec", pod.name, "--", "sh", "-c", command, code=None)
    assert done.code not in (0, 127), done


def test_devices_cannot_be_opened(pod: Pod) -> None:
    """A node that the pod makes is of no use, wherever it is made; those it was given work."""
    root = os.stat("/").st_dev
    script = f"""
import os, stat
for place in ('/tmp', '/dev', '/dev/shm', '/etc'):
    for kind, number in ((stat.S_IFBLK, {root}), (stat.S_IFCHR, os.makedev(1, 1)), (stat.S_IFCHR, os.makedev(1, 3))):
        path = place + '/node'
        try:
            os.mknod(path, kind | 0o600, number)
        except PermissionError:
            continue
        try:
            os.open(path, os.O_RDWR)
            print('opened', place, kind, number)
        except OSError as error:
            pass
        os.unlink(path)
for name in ('null', 'zero', 'full', 'random', 'urandom'):
    os.read(os.open('/dev/' + name, os.O_RDONLY), 1)
os.write(os.open('/dev/null', os.O_WRONLY), b'x')
assert os.read(os.open('/dev/zero', os.O_RDONLY), 3) == bytes(3)
print(sorted(os.listdir('/dev')))
"""
    names = "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"
    assert pod.python(script) == str(names.split())


def test_masked_paths(pod: Pod) -> None:
    assert pod.sh("cat /proc/kcore /proc/keys /proc/timer_list /proc/interrupts | wc -c") == "0"
    assert pod.sh("ls -A /sys/firmware /proc/acpi /proc/scsi /.podtree | grep -v :$ | grep -c . || true") == "0"
    mounts = [line.split() for line in pod.read("/proc/self/mounts").splitlines()]
    options = {words[1]: words[3].split(",") for words in mounts}
    for path in ("/sys", "/proc/sys", "/proc/irq", "/proc/bus", "/proc/kcore", "/.podtree"):
        if path in options:
            assert "ro" in options[path], path
    for point, words in options.items():
        assert "nodev" in words or "ro" in words or point == "/dev/pts", (point, words)


def test_host_is_out_of_sight(podtree: Podtree, pod: Pod) -> None:
    """Neither mounts nor processes nor cgroups nor interfaces of the host; the pool least of all."""
    home = str(podtree.home)
    assert home not in pod.read("/proc/self/mountinfo")
    assert "cgroup" not in pod.read("/proc/self/mounts")
    assert pod.sh(f"ls {home} 2>&1 | grep -c 'No such file'") == "1"
    assert pod.sh("cat /proc/net/dev | grep -c :") == "1"
    assert set(pod.processes()) == {1}
    assert pod.sh("cat /proc/self/cgroup | cut -d: -f3 | sort -u") in ("/", "/\n/..")


def test_pool_stays_hidden_after_a_rename(podtree: Podtree) -> None:
    """Renaming a directory above the pool's place doesn't lay it bare, not in a branch either."""
    above = podtree.home.parent
    target = "/tmp/moved" if str(above) != "/tmp" else "/moved"
    pod = podtree.run("sh", "-c", f"mv {above} {target}; echo moved; sleep 1000", name="mover", options=["-w", "/"])
    pod.wait_log("moved")
    assert pod.sh(f"ls {target}/{podtree.home.name} 2>&1 | grep -c 'No such file'") == "1"
    pod.checkpoint()
    branch = podtree.branch(f"{pod.name}@1")
    assert branch.sh(f"ls {target}/{podtree.home.name} 2>&1 | grep -c 'No such file'") == "1"


def test_nothing_propagates(podtree: Podtree, pod: Pod, tmp_path: Path) -> None:
    """A mount made on the host later doesn't appear inside, and the pod's own don't outside."""
    before = Path("/proc/self/mountinfo").read_text()
    subprocess.run(["mount", "-t", "tmpfs", "test", str(tmp_path)], check=True)
    try:
        (tmp_path / "x").touch()
        assert pod.sh(f"ls {tmp_path} 2>/dev/null | grep -c x || true") == "0"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert Path("/proc/self/mountinfo").read_text() == before
    init = int(pod.info()["pid"])
    tags = [line.split(" - ")[0].split()[6:] for line in Path(f"/proc/{init}/mountinfo").read_text().splitlines()]
    assert all(not tag for tag in tags), tags


def test_exe_of_the_supervisor_is_out_of_reach(podtree: Podtree, pod: Pod) -> None:
    """A program that is "#!/proc/self/exe" gets a sealed memory file, not the host's interpreter."""
    pod.sh("printf '#!/proc/self/exe\\n' > /bin/trap; chmod +x /bin/trap")
    done = podtree("exec", pod.name, "--", "/bin/trap", code=None)
    assert done.code != 0
    reader = podtree("run", "--rm", "--", "/proc/self/exe", code=None)
    assert reader.code != 0
    init = int(pod.info()["pid"])
    assert os.readlink(f"/proc/{init}/exe").endswith("sleep")


def test_loopback(pod: Pod) -> None:
    script = """
import socket
for family, host in ((socket.AF_INET, '127.0.0.1'), (socket.AF_INET6, '::1')):
    server = socket.socket(family); server.bind((host, 80)); server.listen()
    client = socket.create_connection((host, 80)); server.accept()[0].sendall(b'x'); print(client.recv(1))
try:
    socket.create_connection(('192.0.2.1', 80), 1)
except OSError as error:
    print(error.strerror)
print(socket.gethostbyname(socket.gethostname()))
"""
    assert pod.python(script).split("\n") == ["b'x'", "b'x'", "Network is unreachable", "127.0.0.1"]


def test_low_ports_without_root(podtree: Podtree) -> None:
    script = "import socket; s = socket.socket(); s.bind(('', 80)); print('bound')"
    assert podtree("run", "--rm", "--user", "nobody", "-w", "/", "--", SYSTEM_PYTHON, "-c", script).out == "bound\n"


def test_user_has_no_capabilities(podtree: Podtree) -> None:
    out = podtree("run", "--rm", "--user", "nobody", "-w", "/", "--", "grep", "Cap", "/proc/self/status").out
    values = dict(line.split() for line in out.splitlines())
    assert values["CapEff:"] == values["CapPrm:"] == "0" * 16 and values["CapBnd:"] == "00000000a80425fb"


def test_supervisors_are_not_dumpable_inside(podtree: Podtree, pod: Pod) -> None:
    """A pod that watches for newcomers can never open what they are before they are the pod's own program."""
    script = """
import os, sys
seen = set()
print('ready', flush=True)
while not os.path.exists('/tmp/stop'):
    for name in os.listdir('/proc'):
        if name.isdigit() and int(name) > 1 and int(name) != os.getpid():
            try:
                target = os.readlink(f'/proc/{name}/exe')
                os.open(f'/proc/{name}/exe', os.O_RDONLY)
                seen.add(target)
            except OSError:
                pass
print(sorted(t for t in seen if 'python' in t and '/usr/bin' not in t))
"""
    watcher = podtree.run(SYSTEM_PYTHON, "-c", script, name="watcher")
    watcher.wait_log("ready")
    for _ in range(15):
        watcher.sh("true")
    watcher.sh("touch /tmp/stop")
    watcher.wait()
    assert watcher.logs().splitlines() == ["ready", "[]"]


def test_clock_is_its_own(pod: Pod) -> None:
    init = int(pod.info()["pid"])
    assert Path(f"/proc/{init}/timens_offsets").read_text().split() == ["monotonic", "0", "0", "boottime", "0", "0"]


def test_tasks_are_limited_by_default(podtree: Podtree) -> None:
    """A fork bomb doesn't take the whole machine: half of its tasks, and all pods together leave some."""
    most = min(int(Path(f"/proc/sys/kernel/{name}").read_text()) for name in ("pid_max", "threads-max"))
    for options, limit in (((), most // 2), (("--pids", "77"), 77)):
        pod = podtree.run("sleep", "1000", name="limited", options=options)
        lines = Path(f"/proc/{pod.info()['pid']}/cgroup").read_text().splitlines()
        paths = [line.split(":", 2)[2].lstrip("/") for line in lines]
        tops = (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup"))
        group = next(top / path for top in tops for path in paths if (top / path / "pids.max").is_file())
        assert int((group / "pids.max").read_text()) == limit
        if not options:
            assert int((group.parent / "pids.max").read_text()) == most - most // 8
