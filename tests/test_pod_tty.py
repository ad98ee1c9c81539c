"""Pods with a terminal: controlling tty, window size, job control, detaching and attaching."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import termios
import time
from pathlib import Path

from driver import SYSTEM_PYTHON, Podtree, until
from terminal import Terminal, attached


def terminal(podtree: Podtree, *args: str) -> Terminal:
    return Terminal([str(podtree.program), *args], podtree.env, rows=30, columns=100)


def resize(screen: Terminal, rows: int, columns: int) -> None:
    fcntl.ioctl(screen.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def test_foreground(podtree: Podtree) -> None:
    script = "tty; stty size; ps -o tty= -p 1; exit 5"
    screen = terminal(podtree, "run", "--rm", "--", "sh", "-c", script)
    screen.expect("/dev/pts/0\r?\n30 100\r?\npts/0")
    assert screen.process.wait(20) == 5
    screen.close()


def test_shell(podtree: Podtree) -> None:
    """Typing, ^C, window size, end by exit; the user's own terminal is as it was."""
    screen = terminal(podtree, "run", "--rm", "--", "bash", "--norc", "-i")
    before = termios.tcgetattr(screen.master)
    screen.expect(r"bash.*[#$] ")
    screen.type("echo $((40+2)); jobs -l; test -t 0 && echo terminal\n")
    screen.expect("42\r\n")
    screen.expect("terminal\r\n")
    screen.type("sleep 1000\n")
    screen.expect("sleep 1000\r\n")
    time.sleep(0.3)
    screen.type("\x03")
    screen.expect(r"\^C\r?\n?.*[#$] ")
    screen.type("echo rc=$?\n")
    screen.expect("rc=130")
    screen.type("sleep 1000\n")
    screen.expect("sleep 1000\r\n")
    time.sleep(0.3)
    screen.type("\x1a")
    screen.expect("Stopped")
    screen.type("kill %1; wait; stty size\n")
    screen.expect("30 100")
    resize(screen, 51, 77)
    until(lambda: screen.type("stty size\n") or "51 77" in _shown(screen), "the new size", every=0.3)
    screen.type("exit 7\n")
    assert screen.process.wait(20) == 7
    until(lambda: termios.tcgetattr(screen.master)[3] == before[3], "the shell has its terminal as before")
    screen.close()


def _shown(screen: Terminal) -> str:
    screen.expect(r"\d+ \d+\r\n")
    return screen.text


def test_detach_and_attach(podtree: Podtree) -> None:
    screen = terminal(podtree, "run", "--name", "det", "--", "bash", "--norc")
    screen.expect("[#$] ")
    screen.type("x=kept\n")
    screen.type("\x10\x11")
    screen.expect("detached from det")
    assert screen.process.wait(10) == 0
    screen.close()
    pod = podtree.pods()[0]
    assert pod["state"] == "running"
    with_keys = terminal(podtree, "attach", "--detach-keys", "ctrl-a", "det")
    with_keys.type("echo $x ^P is only a key: \x10\x10\n")
    with_keys.expect("kept")
    with_keys.type("\x01")
    with_keys.expect("detached")
    with_keys.close()
    assert podtree.pods()[0]["state"] == "running"


def test_hanging_up_detaches(podtree: Podtree) -> None:
    screen = terminal(podtree, "run", "--name", "hang", "--", "bash", "--norc")
    screen.expect("[#$] ")
    screen.close()
    assert podtree.pods()[0]["state"] == "running"


def test_attaching_draws_anew(podtree: Podtree) -> None:
    """A program that draws its screen hears of a changed window, also when the new one has the old one's size."""
    program = "import signal, os\nsignal.signal(signal.SIGWINCH, lambda *_: print('drawn', os.get_terminal_size()))\n"
    program += "print('ready')\nwhile True: signal.pause()"
    screen = terminal(podtree, "run", "--name", "draws", "--", SYSTEM_PYTHON, "-uc", program)
    screen.expect("ready")
    screen.type("\x10\x11")
    screen.expect("detached")
    screen.close()
    again = terminal(podtree, "attach", "draws")
    again.expect(r"drawn os.terminal_size\(columns=100, lines=30\)")
    again.close()


def test_job_control_of_the_users_shell(podtree: Podtree) -> None:
    """Started in the background it stops, and goes on in the foreground; stopped and continued, it is raw again."""
    screen = Terminal(["bash", "--norc", "--noprofile", "-i"], {**podtree.env, "PS1": "OUT> "}, rows=30, columns=100)
    screen.expect("OUT> ")
    before = termios.tcgetattr(screen.master)
    script = "echo begun; read x; echo got $x; stty size; read y; echo got $y; exit 5"
    screen.type(f"{podtree.program} run --rm --name job -- sh -c '{script}' &\n")
    screen.expect(r"\[1\] \d+")
    until(lambda: screen.type("jobs\n") or bool(screen.expect(r"\[1\].*(Stopped|Running)")[1] == "Stopped"), "it stops")
    screen.type("fg\n")
    screen.expect("^begun")
    screen.type("one\n")
    screen.expect("got one\r\n30 100")
    client = next(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _is_client(p))
    os.kill(client, signal.SIGSTOP)
    screen.expect("Stopped")
    resize(screen, 31, 101)
    screen.type("fg\n")
    screen.expect("run --rm --name job")
    until(lambda: not termios.tcgetattr(screen.master)[3] & termios.ICANON, "raw mode")
    screen.type("two\n")
    screen.expect("got two")
    screen.expect("OUT> ")
    screen.type("echo $?\n")
    screen.expect("^5\r\n")
    until(lambda: termios.tcgetattr(screen.master)[3] == before[3], "the shell has its terminal as before")
    screen.close()


def _is_client(process: Path) -> bool:
    """Whether it is the `podtree run` that this test began, not its keeper or supervisor."""
    try:
        words = (process / "cmdline").read_bytes()
        return b"--name\0job\0" in words and (process / "comm").read_text() == "podtree\n"
    except OSError:
        return False


def test_two_watch(podtree: Podtree) -> None:
    """Both clients see what either types; both get the exit code."""
    podtree("run", "-d", "-t", "--name", "two", "--", "bash", "--norc")
    one, two = terminal(podtree, "attach", "two"), terminal(podtree, "attach", "two")
    one.type("echo $((1000+1))\n")
    one.expect("1001")
    two.type("echo $((2000+2))\n")
    one.expect("2002")
    two.expect("2002")
    one.type("exit 3\n")
    assert (one.process.wait(20), two.process.wait(20)) == (3, 3)
    one.close()
    two.close()


def test_detached_with_terminal(podtree: Podtree) -> None:
    pod = podtree.run("sh", "-c", "tty; stty -echo; read x; echo got $x; sleep 1000", options=["-t"])
    pod.wait_log("/dev/pts/0")
    with attached(pod) as screen:
        screen.type("a word\n")
        screen.expect("got a word")
    pod.wait_log("got a word")
    assert pod.running()


def test_console(podtree: Podtree) -> None:
    pod = podtree.run("sh", "-c", "echo to the console > /dev/console; sleep 1000", options=["-t"])
    pod.wait_log("to the console")


def test_terminal_without_reader(podtree: Podtree) -> None:
    """Output with nobody attached goes to the log; the program never waits."""
    pod = podtree.run("sh", "-c", "seq 1 200000; echo done; sleep 1000", options=["-t"])
    log = pod.wait_log("done")
    assert log == "".join(f"{n}\n" for n in range(1, 200001)) + "done\n"


def test_slow_reader_loses_nothing(podtree: Podtree) -> None:
    screen = terminal(podtree, "run", "--rm", "--", "sh", "-c", "sleep 0.3; seq 1 300000; echo the end")
    screen.expect("the end", 60)
    numbers = [int(line) for line in screen.text.split("\r\n") if line.isdigit()]
    assert numbers == list(range(1, 300001))
    screen.process.wait(20)
    os.close(screen.master)


def test_rewind_keeps_the_terminal(podtree: Podtree) -> None:
    """Who is attached sees the past go on in the same window."""
    pod = podtree.run("bash", "--norc", options=["-t"])
    with attached(pod) as screen:
        screen.type("x=first; echo ready\n")
        screen.expect(r"[\r\n]ready\r\n")
        pod.checkpoint()
        screen.type("x=second; echo changed\n")
        screen.expect(r"[\r\n]changed\r\n")
        podtree("rewind", pod.name, f"{pod.name}@1")
        screen.type("echo it is $x\n")
        screen.expect("it is first")
