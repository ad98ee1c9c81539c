"""What the tests share: a PODTREE_HOME for the session, the command on it, compiled programs, missing tools."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from driver import BUILD, PROGRAMS, Podtree

SKIP_MISSING = "PODTREE_SKIP_MISSING"
REMEDY = {  # program -> Debian package, where the names differ
    "redis-cli": "redis-tools",
    "node": "nodejs",
    "go": "golang-go",
    "javac": "default-jdk-headless",
    "java": "default-jdk-headless",
    "initdb": "postgresql",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
    "pg_amcheck": "postgresql",
    "mkfs.btrfs": "btrfs-progs",
    "ps": "procps",
    "libjemalloc.so.2": "libjemalloc2",
}


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated"))  # pods and mounts are removed all the same
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):  # ignored under nohup(1), in a script's background:
        if signal.getsignal(number) is signal.SIG_IGN:  # so they would be by all commands that tests start
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    config.addinivalue_line("markers", "needs(*programs): programs without which the test fails, naming the package")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The search for leftovers comes last: it ends the session's pods first."""
    items.sort(key=lambda item: item.path.name == "test_leftovers.py")


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = [name for mark in item.iter_markers("needs") for name in mark.args]
    missing = [name for name in wanted if find_program(name) is None]
    if not missing:
        return
    packages = " ".join(sorted({REMEDY.get(name, name) for name in missing}))
    message = f"missing: {' '.join(missing)}. Remedy: apt-get install {packages} (or `make test-setup`)"
    if os.environ.get(SKIP_MISSING) == "1":
        pytest.skip(message)
    pytest.fail(f"{message}; {SKIP_MISSING}=1 skips such tests", pytrace=False)


def find_program(name: str) -> str | None:
    """Path of a program, also where it is not in PATH (daemons, PostgreSQL's own directory), or of a library."""
    if ".so" in name:
        found = sorted(Path("/usr/lib").glob(f"*/{name}"))
        return str(found[0]) if found else None
    places = [os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"]
    places += sorted((str(path) for path in Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
    return shutil.which(name, path=os.pathsep.join(places))


@pytest.fixture(scope="session")
def session_podtree() -> Iterator[Podtree]:
    """A pool of the test session's own. Its path is short: a Unix socket's has at most 107 bytes."""
    if os.geteuid() != 0:
        pytest.fail("pods need root", pytrace=False)
    home = Path(tempfile.mkdtemp(prefix="pt", dir=os.environ.get("PODTREE_TEST_DIR", "/tmp")))
    podtree = Podtree(home)
    try:
        yield podtree
    finally:
        podtree.close()
        shutil.rmtree(home)


@pytest.fixture
def podtree(session_podtree: Podtree) -> Iterator[Podtree]:
    """The `podtree` command on the session's pool; what pods a test leaves are removed after it."""
    yield session_podtree
    session_podtree.remove_all()


MEMORY_MODES = {  # how the memory of a branch comes in: before it runs, or (with time to spare) while it does
    "filled": {"PODTREE_LAZY_BYTES": str(1 << 60)},
    "filling": {"PODTREE_LAZY_BYTES": "1", "PODTREE_LAZY_PACE_MS": "3"},
}


@pytest.fixture(params=MEMORY_MODES)
def memory_mode(request: pytest.FixtureRequest, podtree: Podtree, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test once in each mode."""
    for name, value in MEMORY_MODES[request.param].items():
        monkeypatch.setitem(podtree.env, name, value)
    return str(request.param)


@pytest.fixture(scope="session")
def compiled() -> Callable[[str], Path]:
    """Compiles tests/programs/NAME.c with gcc when it has changed, and returns the program's path."""

    def build(name: str) -> Path:
        source, program = PROGRAMS / f"{name}.c", BUILD / name
        newest = max(path.stat().st_mtime for path in (source, *PROGRAMS.glob("*.h")))
        if not program.exists() or program.stat().st_mtime < newest:
            BUILD.mkdir(parents=True, exist_ok=True)
            command = ["gcc", "-O1", "-g", "-Wall", "-Wextra", "-pthread", "-o", str(program), str(source), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        return program

    return build
