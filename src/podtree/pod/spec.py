"""What a pod is to be: everything that `run` was asked for, as data that is kept with the pod.

A branch runs by the spec of the pod that its checkpoint was taken of. Arguments, variables and paths are
bytes: those that are no UTF-8 are surrogates here (PEP 383), and escaped where the spec is stored or sent.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from podtree.errors import UsageError, as_text
from podtree.objects.external import Policy

#: How a process tree's first process is connected: to a pty, to three pipes whose other ends the supervisor
#: holds, straight to the log file (stdin /dev/null), or to /dev/null.
StdioMode = Literal["tty", "pipes", "log", "null"]

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_DETACH_KEYS = "ctrl-p,ctrl-q"
HOST_ENVIRONMENT = ("PATH", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ")
_RESERVED_TARGETS = ("/proc", "/sys", "/dev", "/.podtree")
LEAST_MEMORY = 6 << 20  # bytes; the first process is a fork of the supervisor before it executes its program
_PID_MAX_LIMIT = 1 << 22  # proc_sys_kernel(5)
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
    hostname: str = "pod"  # "" until the pod has a name, which then is it
    user: str = ""  # "", "name", "uid", "name:group", "uid:gid": looked up in the pod's own files
    stdio: StdioMode = "log"
    interactive: bool = False  # keep stdin open while nobody is attached
    merged: bool = False  # with "pipes": stdout and stderr are the same one, so that their order is kept
    volumes: tuple[Volume, ...] = ()
    rootfs: str | None = None  # a directory of the host; None: the host's own root
    memory: int | None = None
    cpus: float | None = None
    pids: int | None = None
    auto_remove: bool = False  # `--rm`
    external: Policy = "refuse"  # what becomes of what is shared with the outside, in checkpoints
    nested: bool = False  # programs may make user namespaces, and in them others: podtree.pod.seccomp

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, as the pool stores it."""
        result: dict[str, Any] = _each_text(msgspec.to_builtins(self), _escape)
        return result

    @staticmethod
    def from_dict(data: dict[str, Any]) -> PodSpec:
        """The reverse of to_dict; raises msgspec.ValidationError."""
        return msgspec.convert(_each_text(data, _unescape), PodSpec)

    def to_json(self) -> bytes:
        """to_dict as JSON."""
        return msgspec.json.encode(self.to_dict())

    @staticmethod
    def from_json(data: bytes) -> PodSpec:
        """The reverse of to_json; raises msgspec.DecodeError."""
        return PodSpec.from_dict(msgspec.json.decode(data, type=dict[str, Any]))


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): _each_text(entry, change) for name, entry in value.items()}
    return [_each_text(entry, change) for entry in value] if isinstance(value, (list, tuple)) else value


def _escape(text: str) -> str:
    """Bytes that are no UTF-8 (as surrogates, PEP 383) as NUL and two digits: no argument holds a NUL."""
    return re.sub("[\udc80-\udcff]", lambda found: f"\0{ord(found[0]) - 0xDC00:02x}", text)


def _unescape(text: str) -> str:
    return re.sub("\0([89a-f][0-9a-f])", lambda found: chr(0xDC00 + int(found[1], 16)), text)


def check(spec: PodSpec) -> PodSpec:
    """Raise UsageError for what can be known to be wrong before anything is started."""
    if not spec.argv or not spec.argv[0]:
        raise UsageError("no command given", "it goes behind the options: -- COMMAND [ARGUMENT]...")
    volumes = [text for volume in spec.volumes for text in (volume.source, volume.target)]
    for text in (*spec.argv, *spec.env, *spec.env.values(), spec.cwd, spec.user, *volumes):
        if "\0" in text:
            raise UsageError("an argument or variable has a NUL byte")
        try:
            text.encode(errors="surrogateescape")
        except UnicodeEncodeError:
            raise UsageError(f"not text, nor bytes: {text!r}") from None
    if spec.user != as_text(spec.user):
        raise UsageError(f"--user {spec.user}: not valid UTF-8")
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?", spec.hostname):
        raise UsageError(
            f"--hostname {spec.hostname}: not a host name", "up to 63 letters, digits, '-', '.', '_' inside"
        )
    if not spec.cwd.startswith("/"):
        raise UsageError(f"--workdir {spec.cwd}: the working directory must be absolute", "as in --workdir /srv")
    if spec.memory is not None and spec.memory < LEAST_MEMORY:
        raise UsageError(f"--memory: at least {LEAST_MEMORY >> 20}m", "the process that starts the command needs it")
    if spec.cpus is not None and not 0.01 <= spec.cpus <= 4096:
        raise UsageError("--cpus: from 0.01 to 4096")
    if spec.pids is not None and not 1 <= spec.pids <= _PID_MAX_LIMIT:
        raise UsageError(f"--pids: from 1 to {_PID_MAX_LIMIT}")
    targets = [volume.target for volume in spec.volumes]
    for target in targets:
        if targets.count(target) > 1:
            raise UsageError(f"-v: {target} is given more than once")
    return spec


def as_hostname(text: str) -> str:
    """A pod's name as a host name."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", text).strip("-")[:63] or "pod"


def parse_volume(text: str) -> Volume:
    """SRC:DST[:ro|rw]; a relative SRC is one of the current directory."""
    parts = text.split(":")
    if len(parts) not in (2, 3) or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
        raise UsageError(f"-v {text}: not SRC:DST or SRC:DST:ro", "as in -v /srv/data:/data:ro")
    if not parts[0]:
        raise UsageError(f"-v {text}: no directory or file before the colon", "-v SRC:DST")
    source, target = absolute(parts[0], f"-v {text}"), _normal(parts[1])
    if not parts[1].startswith("/") or target == "/":
        raise UsageError(f"-v {text}: the target must be an absolute path below /")
    if any(target == p or target.startswith(p + "/") for p in _RESERVED_TARGETS):
        raise UsageError(f"-v {text}: {target} belongs to the pod itself")
    if not os.path.exists(source):
        raise UsageError(f"-v {text}: {parts[0]} does not exist", "make it first")
    return Volume(os.path.realpath(source), target, len(parts) == 3 and parts[2] == "ro")


def _normal(path: str) -> str:
    """Without `..` and the like; normpath leaves two slashes at the beginning."""
    return re.sub("^//+", "/", os.path.normpath(path))


def working_directory(wanted: str | None, *, host_root: bool) -> str:
    """Where the command starts: over the host's files a path is as it is for the caller, in another root from /."""
    if not host_root:
        return _normal(os.path.join("/", wanted or ""))
    if wanted:
        return absolute(wanted, f"--workdir {wanted}")
    try:
        return os.getcwd()
    except FileNotFoundError:  # deleted
        return "/"


def absolute(path: str, option: str) -> str:
    """A path of the caller's. Raises UsageError for a relative one in a directory that has been deleted."""
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        raise UsageError(f"{option}: the current directory doesn't exist any more", "cd to another") from None


def parse_size(text: str) -> int:
    """"512m" -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([bkmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise UsageError(f"--memory {text}: not a size", "for example 512m or 2g")
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
            raise UsageError(f"-e {item}: no name", "-e NAME=VALUE")
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
