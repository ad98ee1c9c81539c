"""What a pod is to be: everything that `run` was asked for, as data that is kept with the pod.

A branch runs by the spec of the pod that its checkpoint was taken of.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from podtree.errors import UsageError

#: How a process tree's first process is connected: to a pty, to three pipes whose other ends the supervisor
#: holds, straight to the log file (stdin /dev/null), or to /dev/null.
StdioMode = Literal["tty", "pipes", "log", "null"]

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_DETACH_KEYS = "ctrl-p,ctrl-q"
HOST_ENVIRONMENT = ("PATH", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ")
_RESERVED_TARGETS = ("/proc", "/sys", "/dev", "/.podtree")
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class Volume(msgspec.Struct, frozen=True):
    """A host directory or file that the pod sees at `target`. It is not part of any checkpoint."""

    source: str  # absolute, on the host
    target: str  # absolute, in the pod
    read_only: bool = False


class PodSpec(msgspec.Struct, frozen=True, kw_only=True):
    """See the module's text. Sizes in bytes."""

    argv: tuple[str, ...]
    env: dict[str, str] = msgspec.field(default_factory=dict)
    cwd: str = "/"
    hostname: str = "pod"
    user: str = ""  # "", "name", "uid", "name:group", "uid:gid": looked up in the pod's own files
    stdio: StdioMode = "log"
    interactive: bool = False  # keep stdin open while nobody is attached
    volumes: tuple[Volume, ...] = ()
    rootfs: str | None = None  # a directory of the host; None: the host's own root
    memory: int | None = None
    cpus: float | None = None
    pids: int | None = None
    auto_remove: bool = False  # `--rm`

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, as the pool stores it."""
        result: dict[str, Any] = msgspec.to_builtins(self)
        return result

    @staticmethod
    def from_dict(data: dict[str, Any]) -> PodSpec:
        """The reverse of to_dict; raises msgspec.ValidationError."""
        return msgspec.convert(data, PodSpec)


def check(spec: PodSpec) -> PodSpec:
    """Raise UsageError for what can be known to be wrong before anything is started."""
    if not spec.argv or not spec.argv[0]:
        raise UsageError("no command given", "podtree run [OPTIONS] -- COMMAND [ARGUMENT]...")
    for text in (*spec.argv, *spec.env, *spec.env.values(), spec.cwd):
        if "\0" in text:
            raise UsageError("an argument or variable has a NUL byte")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(f"not valid UTF-8: {text!r}") from None
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?", spec.hostname):
        raise UsageError(f"not a host name: {spec.hostname!r}")
    if not spec.cwd.startswith("/"):
        raise UsageError(f"the working directory must be absolute: {spec.cwd!r}")
    if spec.memory is not None and spec.memory < 1 << 20:
        raise UsageError("--memory: at least 1m")
    if spec.cpus is not None and not 0.01 <= spec.cpus <= 4096:
        raise UsageError("--cpus: at least 0.01")
    if spec.pids is not None and spec.pids < 1:
        raise UsageError("--pids: at least 1")
    return spec


def as_hostname(text: str) -> str:
    """A pod's name as a host name."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", text).strip("-")[:63] or "pod"


def parse_volume(text: str) -> Volume:
    """SRC:DST[:ro|rw]; a relative SRC is one of the current directory."""
    parts = text.split(":")
    if len(parts) not in (2, 3) or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
        raise UsageError(f"-v {text}: not SRC:DST or SRC:DST:ro")
    source, target = Path(parts[0]), os.path.normpath(parts[1])
    if not parts[1].startswith("/") or target == "/":
        raise UsageError(f"-v {text}: the target must be an absolute path below /")
    if any(target == p or target.startswith(p + "/") for p in _RESERVED_TARGETS):
        raise UsageError(f"-v {text}: {target} belongs to the pod itself")
    if not source.exists():
        raise UsageError(f"-v {text}: {source} does not exist")
    return Volume(str(source.resolve()), target, len(parts) == 3 and parts[2] == "ro")


def parse_size(text: str) -> int:
    """"512m" -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([bkmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise UsageError(f"not a size: {text!r}", "for example 512m or 2g")
    return int(float(match[1]) * _UNITS[match[2]])


def environment(extra: tuple[str, ...], *, host_root: bool, tty: bool) -> dict[str, str]:
    """The pod's variables. Of the caller's own environment only what names programs and languages passes.

    `extra` are -e's arguments: NAME=VALUE, or NAME to pass the caller's value on.
    """
    env = {"PATH": DEFAULT_PATH}
    if host_root:
        env.update({name: os.environ[name] for name in HOST_ENVIRONMENT if name in os.environ})
    if tty:
        env["TERM"] = os.environ.get("TERM", "xterm")
    return {**env, **extra_environment(extra)}


def extra_environment(extra: tuple[str, ...]) -> dict[str, str]:
    """-e's arguments, parsed."""
    env = {}
    for item in extra:
        name, equals, value = item.partition("=")
        if not name:
            raise UsageError(f"-e {item}: no name")
        if equals:
            env[name] = value
        elif name in os.environ:
            env[name] = os.environ[name]
    return env


def parse_detach_keys(text: str) -> bytes:
    """"ctrl-p,ctrl-q" -> the bytes to look for in what is typed; empty: no detaching."""
    keys = bytearray()
    for key in filter(None, text.split(",")):
        match = re.fullmatch(r"ctrl-([a-z@\[\\\]^_])", key)
        if match:
            keys.append(ord(match[1].upper()) & 0x1F)
        elif len(key) == 1 and key.isascii():
            keys += key.encode()
        else:
            raise UsageError(f"detach keys: {key!r} is neither a character nor ctrl-X")
    return bytes(keys)
