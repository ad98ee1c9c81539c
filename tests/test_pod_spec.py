"""Pods as data: options, sizes, users, the seccomp filter, the last hop's machine code. No pod is started."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
from pathlib import Path

import pytest

from podtree.errors import Conflict, PodtreeError, Problem, Refused, UsageError
from podtree.kernel.mount import MountAttr
from podtree.pod import containment, hop, seccomp, spec, users, wire
from podtree.pod.dirs import PodDirs
from podtree.pod.paths import make_in, open_in
from podtree.pod.spec import PodSpec, Volume


@pytest.mark.parametrize(
    ("text", "size"), [("512m", 512 << 20), ("1.5g", 3 << 29), ("4096", 4096), ("64MiB", 64 << 20), ("1k", 1024)]
)
def test_sizes(text: str, size: int) -> None:
    assert spec.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "m", "-1", "5x", "1e3"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UsageError):
        spec.parse_size(text)


def test_volumes(tmp_path: Path) -> None:
    assert spec.parse_volume(f"{tmp_path}:/data:ro") == Volume(str(tmp_path), "/data", True)
    assert spec.parse_volume(f"{tmp_path}:/a/../b") == Volume(str(tmp_path), "/b", False)


@pytest.mark.parametrize(
    "text",
    [
        "/tmp",
        "/tmp:rel",
        "/tmp:/",
        "/tmp:/proc/x",
        "/tmp:/x/../dev",
        "/no/such:/x",
        "/tmp:/x:rx",
        ":/x",
        "/tmp:///proc/x",
    ],
)
def test_bad_volumes(text: str) -> None:
    with pytest.raises(UsageError):
        spec.parse_volume(text)


def test_environment_passes_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "secret")
    assert "API_TOKEN" not in spec.environment((), host_root=True, tty=True)
    assert spec.environment(("API_TOKEN", "A=b=c"), host_root=False, tty=False) == {
        "PATH": spec.DEFAULT_PATH,
        "API_TOKEN": "secret",
        "A": "b=c",
    }


@pytest.mark.parametrize(
    "bad",
    [
        {"argv": ()}, {"argv": ("",)}, {"argv": ("a\0b",)}, {"argv": ("\ud800",)}, {"argv": ("a",), "cwd": "x"},
        {"argv": ("a",), "hostname": "a b"}, {"argv": ("a",), "memory": 5}, {"argv": ("a",), "cpus": 0.0},
        {"argv": ("a",), "user": "\udcff"}, {"argv": ("a",), "pids": 1 << 40}, {"argv": ("a",), "pids": 0},
        {"argv": ("a",), "volumes": (Volume("/x", "/mnt"), Volume("/y", "/mnt"))},
    ],
)  # fmt: skip
def test_check_refuses(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        spec.check(PodSpec(**bad))  # type: ignore[arg-type]


def test_spec_survives_json() -> None:
    before = PodSpec(
        argv=("a", "\udce9"), env={"x\udcff": "y\udc80"}, volumes=(Volume("/a", "/b", True),), cpus=1.5, stdio="tty"
    )
    assert PodSpec.from_dict(before.to_dict()) == before
    assert PodSpec.from_json(before.to_json()) == before
    assert b"\\u0000e9" in before.to_json()


def test_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the host's files a relative one is the caller's; in another root it begins at /."""
    monkeypatch.chdir(tmp_path)
    assert spec.working_directory(None, host_root=True) == str(tmp_path)
    assert spec.working_directory("a/../b", host_root=True) == str(tmp_path / "b")
    assert [spec.working_directory(text, host_root=False) for text in (None, "a", "//b/.", "../c")] == [
        "/", "/a", "/b", "/c",
    ]  # fmt: skip
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert spec.working_directory(None, host_root=True) == "/"
    for call in (lambda: spec.working_directory("x", host_root=True), lambda: spec.parse_volume(".:/mnt")):
        with pytest.raises(UsageError):
            call()


def test_detach_keys() -> None:
    assert spec.parse_detach_keys("ctrl-p,ctrl-q") == b"\x10\x11"
    assert spec.parse_detach_keys("a,ctrl-[") == b"a\x1b"
    assert spec.parse_detach_keys("") == b""
    with pytest.raises(UsageError):
        spec.parse_detach_keys("ctrl-pp")


def test_hop_is_what_its_source_says(tmp_path: Path) -> None:
    """The bytes are those that the assembler makes of the source beside them."""
    (tmp_path / "hop.S").write_text(hop.SOURCE)
    subprocess.run(["as", "-o", tmp_path / "hop.o", tmp_path / "hop.S"], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", tmp_path / "hop.o", tmp_path / "hop.bin"], check=True)
    assert (tmp_path / "hop.bin").read_bytes() == hop.CODE


def test_hop_is_sealed() -> None:
    fd = hop.open_hop()
    with pytest.raises(PermissionError):
        os.write(fd, b"x")
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)


def test_seccomp_is_compiled_once(tmp_path: Path) -> None:
    first = seccomp.load(tmp_path)
    (cached,) = (tmp_path / "cache").iterdir()
    assert cached.read_bytes() == first
    cached.write_bytes(b"12345678")
    assert seccomp.load(tmp_path) == b"12345678"


def _filter_says(program: bytes, number: int, args: tuple[int, ...] = (), arch: int = 0xC000003E) -> int:
    """Run the classic BPF over a struct seccomp_data, as the kernel would."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *(args + (0,) * 6)[:6])
    code = list(struct.iter_unpack("<HBBI", program))
    at = accumulator = 0
    while True:
        op, true, false, k = code[at]
        at += 1
        if op == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif op == 0x06:
            return int(k)
        elif op == 0x05:
            at += k
        elif op == 0x54:
            accumulator &= k
        else:
            test = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}
            at += true if test[op] else false


ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS


@pytest.mark.parametrize(
    ("number", "args", "verdict"),
    [
        (0, (), ALLOW),  # read
        (59, (), ALLOW),  # execve
        (322, (), ALLOW),  # execveat: the last hop is entered by it
        (101, (), ALLOW),  # ptrace
        (310, (), ALLOW),  # process_vm_readv
        (165, (), EPERM),  # mount
        (250, (), EPERM),  # keyctl
        (272, (0x600,), ALLOW),  # unshare: a thread's own descriptors and directories
        *((272, (kind,), EPERM) for kind in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000)),
        *((272, (kind,), EPERM) for kind in (0x40000000, 0x80)),  # namespaces
        (308, (), EPERM),  # setns
        (321, (), EPERM),  # bpf
        (298, (), EPERM),  # perf_event_open
        (323, (), EPERM),  # userfaultfd
        (425, (), EPERM),  # io_uring_setup
        (304, (), EPERM),  # open_by_handle_at
        (435, (), ENOSYS),  # clone3
        (56, (0x11,), ALLOW),  # clone: fork
        (56, (0x10000000 | 0x11,), EPERM),  # clone with CLONE_NEWUSER
        (41, (1,), ALLOW),  # socket(AF_UNIX)
        (41, (40,), EPERM),  # socket(AF_VSOCK)
        (135, (0xFFFFFFFF,), ALLOW),  # personality, a question
        (135, (0x0400000,), EPERM),  # personality(READ_IMPLIES_EXEC)
        (900, (), ENOSYS),  # from the future
        (0x40000000, (), ENOSYS),  # an x32 call
    ],
)
def test_seccomp_verdicts(tmp_path: Path, number: int, args: tuple[int, ...], verdict: int) -> None:
    assert _filter_says(seccomp.load(tmp_path), number, args) == verdict


def test_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {
        "/etc/passwd": [["root", "x", "0", "0", "", "/root", "/bin/sh"], ["web", "x", "33", "44", "", "/srv", ""]],
        "/etc/group": [["web", "x", "44", ""], ["extra", "x", "55", "root,web"], ["bad", "x", "y", "web"]],
    }
    monkeypatch.setattr(users, "_table", lambda path, columns: tables[path])
    assert users.resolve("") == users.Identity(0, 0, (0, 55), "/root")
    assert users.resolve("web") == users.Identity(33, 44, (44, 55), "/srv")
    assert users.resolve("33") == users.resolve("web")
    assert users.resolve("web:extra") == users.Identity(33, 55, (55,), "/srv")
    assert users.resolve("1234:77") == users.Identity(1234, 77, (77,), "/")
    for bad in ("nobody-here", "web:nothing", "99999999999"):
        with pytest.raises(UsageError):
            users.resolve(bad)


def test_errors_cross_processes() -> None:
    problem = Problem(pid=5, comm="x", object="fd 3", reason="no", hint="h")
    refused = wire.decode_error(wire.encode_error(Refused([problem])))
    assert type(refused) is Refused and refused.problems == [problem] and refused.exit_code == 3
    conflict = wire.decode_error(wire.encode_error(Conflict("busy", "wait")))
    assert type(conflict) is Conflict and (conflict.message, conflict.hint) == ("busy", "wait")
    other = wire.decode_error(wire.encode_error(OSError(2, "gone", "/x")))
    assert type(other) is PodtreeError and "/x" in other.message
    assert type(wire.decode_error({"kind": "SystemExit", "error": "?"})) is PodtreeError
    executed = wire.decode_error(wire.encode_error(wire.ExecFailed("no", code=127)))
    assert type(executed) is wire.ExecFailed and executed.exit_code == 127


def test_reports_that_make_no_sense() -> None:
    """A program of the pod may have got hold of the report pipe."""
    for data in (b"x", b"E\xc1", b"E\x01", b"12345678", b"E" + b"\x90" * 5000):
        assert isinstance(wire.parse_report(data, "true"), PodtreeError)


def test_paths_stay_inside(tmp_path: Path) -> None:
    """Symbolic links and .. in a pod's root lead nowhere else."""
    (tmp_path / "out").mkdir()
    inside = tmp_path / "in"
    (inside / "etc").mkdir(parents=True)
    (inside / "up").symlink_to("../out")
    (inside / "abs").symlink_to("/etc")
    (inside / "dangling").symlink_to("/nowhere")
    root = os.open(inside, os.O_PATH)
    fd = make_in(root, "/abs/new/deep", directory=True)
    assert (inside / "etc/new/deep").is_dir()
    os.close(fd)
    for path in ("/up/x", "/dangling/x"):
        with pytest.raises((PodtreeError, OSError)):
            make_in(root, path, directory=True)
    with pytest.raises(PodtreeError):
        make_in(root, "/abs/x", directory=True, symlinks=False)
    assert os.path.samestat(os.fstat(open_in(root, "../../..")), os.stat(inside))
    assert not list((tmp_path / "out").iterdir())
    os.close(root)


def test_plan_can_be_printed(tmp_path: Path) -> None:
    """The mounts are data before they are action, and only the device nodes are without nodev."""
    dirs = PodDirs(tmp_path, tmp_path / "pod", tmp_path / "run")
    wanted = PodSpec(argv=("a",), volumes=(Volume("/usr", "/mnt", True),), rootfs="/srv")
    plan = containment.outer_plan(wanted, dirs) + containment.inner_plan()
    text = "\n".join(step.describe() for step in plan)
    assert "/usr on /mnt, read-only" in text and "mask /proc/kcore" in text and "mask /.podtree" in text
    news = [step for step in plan if isinstance(step, containment.NewFileSystem) and step.fstype != "devpts"]
    assert all(MountAttr.NODEV in step.attrs for step in news)
