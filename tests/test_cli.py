"""The command line itself: JSON and errors of every verb, standard streams in any state, words that are no text."""

from __future__ import annotations

import importlib
import json
import os
import subprocess

import click
import pytest

from driver import Podtree
from pod_fixtures import start
from podtree.cli.main import _MODULES, _VERBS

ONE_POD = ["attach", "logs", "check", "checkpoint", "show", "log"]
SEVERAL_PODS = ["stop", "kill", "wait", "rm", "untag"]


def run_with(podtree: Podtree, shell: str, *args: str) -> subprocess.CompletedProcess[str]:
    """`podtree ARGS` with the redirections of a shell."""
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", str(podtree.program), *args]
    return subprocess.run(command, env=podtree.env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("verb", [verb for verb in _VERBS if verb != "pool"])
def test_every_verb_has_json(verb: str) -> None:
    command: click.Command = importlib.import_module(f"podtree.cli.{_MODULES.get(verb, verb)}").command
    assert "as_json" in {parameter.name for parameter in command.params}


@pytest.mark.parametrize("verb", ONE_POD + SEVERAL_PODS)
def test_unknown_names(podtree: Podtree, verb: str) -> None:
    """For people: the name and a hint on stderr. With --json: an object on stdout. Exit code 4 either way."""
    done = podtree(verb, "nowhere", code=4)
    assert "nowhere" in done.err and "\n  podtree " in done.err and done.out == ""
    done = podtree(verb, "nowhere", "--json", code=4)
    answer = json.loads(done.out)
    assert "nowhere" in answer["error"] and answer["hint"] and answer["problems"] == [] and done.err == ""


@pytest.mark.parametrize("args", [("run", "--no-such-option"), ("stop",), ("no-such-verb",), ("run",)])
def test_bad_usage_as_json(podtree: Podtree, args: tuple[str, ...]) -> None:
    done = podtree(*args, "--json", code=2)
    assert set(json.loads(done.out)) == {"error", "hint", "problems"} and done.err == ""


def test_json_of_the_pods_own_command(podtree: Podtree) -> None:
    """Behind the pod's name a word isn't an option of ours, also without `--`."""
    done = podtree("exec", "nowhere", "true", "--json", code=4)
    assert done.out == "" and "nowhere" in done.err


def test_several_pods(podtree: Podtree) -> None:
    """One that fails doesn't keep the others from being done; the exit code is its."""
    one, two = podtree.run("sleep", "1000"), podtree.run("sleep", "1000")
    done = podtree("kill", one.name, "nowhere", two.name, "--json", code=4)
    first, failed, last = json.loads(done.out)
    assert (first["pod"], first["signal"], last["pod"]) == (one.name, 9, two.name)
    assert "nowhere" in failed["error"] and failed["pod"] == "nowhere"
    done = podtree("wait", one.name, "nowhere", two.name, code=4)
    assert done.out == "137\n137\n" and "nowhere" in done.err
    assert json.loads(podtree("wait", one.name, "--json").out) == [
        {"pod": one.name, "id": one.info()["id"], "exit_code": 137}
    ]
    podtree("rm", one.name, "nowhere", two.name, code=4)
    assert podtree.pods() == []


def test_logs_as_json(podtree: Podtree) -> None:
    pod = podtree.run("printf", "a\\n\\377b\\n")
    pod.wait()
    assert podtree.json("logs", pod.name)["log"] == "a\n\ufffdb\n"
    assert podtree.json("logs", "--tail", "1", pod.name)["log"] == "\ufffdb\n"
    followed = podtree("logs", "-f", "--json", pod.name).out
    assert "".join(json.loads(line)["log"] for line in followed.splitlines()) == "a\n\ufffdb\n"


def test_untag(podtree: Podtree) -> None:
    pod = podtree.run("sleep", "1000")
    pod.checkpoint("--tag", "golden")
    assert podtree.json("untag", "golden") == [{"name": "golden"}]
    assert podtree.json("tag") == []
    assert len(podtree.json("log", pod.name)) == 1


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(podtree: Podtree, closed: str) -> None:
    """Nothing of the command's own is opened as 0, 1 or 2, where a pod's output would go into it."""
    script = "echo out; echo err >&2; cat; exit 3"
    done = run_with(podtree, closed + ("" if "<" in closed else " </dev/null"), "run", "--rm", "--", "sh", "-c", script)
    assert done.returncode == 3, done
    assert (done.stdout, done.stderr) == ("" if " >" in f" {closed}" else "out\n", "" if "2>" in closed else "err\n")
    done = run_with(podtree, closed, "ps", "--json")
    assert done.returncode == 0 and done.stdout == ("" if " >" in f" {closed}" else "[]\n")
    name = podtree.new_name("closed")
    assert run_with(podtree, closed, "run", "-d", "--name", name, "--", "sleep", "1000").returncode == 0
    assert run_with(podtree, closed, "exec", name, "--", "sh", "-c", "echo x; exit 4").returncode == 4
    assert podtree("fsck").code == 0


def test_full_disk_behind_stdout(podtree: Podtree) -> None:
    done = run_with(podtree, ">/dev/full", "ps")
    assert done.returncode == 1 and "No space left" in done.stderr and "Traceback" not in done.stderr


def test_nobody_reads(podtree: Podtree) -> None:
    process = start(podtree, "ps")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(20) == 141 and process.stderr.read() == b""


def test_words_that_are_no_text(podtree: Podtree) -> None:
    """Bytes that aren't UTF-8 reach the program as they are; as names they are unknown."""
    word = os.fsdecode(b"caf\xe9")
    options = ["-e", f"A={word}", "-w", f"/srv/{word}"]
    name = podtree.new_name("bytes")
    command = [str(podtree.program), "run", "-d", "--name", name, *options, "--", "sh", "-c", "sleep 1000", word]
    subprocess.run(command, env=podtree.env, check=True, capture_output=True)

    def inside(pod: str) -> bytes:
        script = 'echo "$A:$1"; pwd; tr "\\0" : < /proc/1/cmdline'
        args = [str(podtree.program), "exec", pod, "--", "sh", "-c", script, "sh", word]
        return subprocess.run(args, env=podtree.env, check=True, capture_output=True).stdout

    wanted = b"caf\xe9:caf\xe9\n/srv/caf\xe9\nsh:-c:sleep 1000:caf\xe9:"
    assert inside(name) == wanted
    podtree("checkpoint", name)
    assert inside(podtree.branch(f"{name}@1").name) == wanted
    assert name in podtree("ps").out
    for args in (["logs", word], ["branch", word], ["branch", f"{word}@3"], ["untag", word], ["show", word]):
        done = podtree(*args, code=4)
        assert "caf\\udce9" in done.err and "Traceback" not in done.err
    assert "not valid UTF-8" in podtree("checkpoint", name, "-m", word, code=2).err
    assert "caf" in json.loads(podtree("logs", word, "--json", code=4).out)["error"]


def test_a_tag_that_is_taken(podtree: Podtree) -> None:
    """No checkpoint is made that can't have the name it was to have."""
    pod = podtree.run("sleep", "1000")
    pod.checkpoint("--tag", "taken")
    for name, code in (("taken", 5), (pod.name, 5), ("a/b", 2)):
        podtree("checkpoint", pod.name, "--tag", name, code=code)
    assert len(podtree.json("log", pod.name)) == 1
    podtree("untag", "taken")


def test_several_branches(podtree: Podtree) -> None:
    """One object each; when one of the names is taken, none is made."""
    pod = podtree.run("sleep", "1000")
    pod.checkpoint()
    done = podtree("branch", f"{pod.name}@1", "-n", "3", "--name", "many", "--json")
    answers = [json.loads(line) for line in done.out.splitlines()]
    assert [answer["pod"] for answer in answers] == ["many-1", "many-2", "many-3"]
    assert all(answer["ready_ms"] > 0 and answer["pid"] > 0 for answer in answers)
    podtree("rm", "--force", "many-1")
    assert "many-2" in podtree("branch", f"{pod.name}@1", "-n", "3", "--name", "many", code=5).err
    assert {one["name"] for one in podtree.pods()} == {pod.name, "many-2", "many-3"}
