"""nginx with two workers under wrk, and a keep-alive client in the middle of a request."""

from __future__ import annotations

import re

import pytest
from branching import branch_twice

from driver import SYSTEM_PYTHON, Pod, Podtree

PLACE = "/var/lib/podtest-nginx"
CONFIGURATION = f"""
worker_processes 2;
error_log {PLACE}/error.log;
pid {PLACE}/nginx.pid;
events {{ worker_connections 200; }}
http {{
    log_format short '$status';
    access_log {PLACE}/access.log short;
    client_body_temp_path {PLACE}/body; proxy_temp_path {PLACE}/proxy; fastcgi_temp_path {PLACE}/fastcgi;
    uwsgi_temp_path {PLACE}/uwsgi; scgi_temp_path {PLACE}/scgi;
    keepalive_requests 1000000000;
    client_header_timeout 1h;
    send_timeout 1h;
    server {{
        listen 127.0.0.1:8080 reuseport;
        listen unix:{PLACE}/nginx.sock;
        root {PLACE}/html;
        location / {{ sendfile on; }}
    }}
}}
"""
CLIENT = f"""
import os, socket, time
size = os.path.getsize("{PLACE}/html/large")
half = socket.create_connection(("127.0.0.1", 8080))
half.sendall(b"GET /large HTTP/1.1\\r\\nHost: half")            # the request's head is not complete yet
slow = socket.socket(socket.AF_UNIX)
slow.connect("{PLACE}/nginx.sock")
slow.sendall(b"GET /large HTTP/1.1\\r\\nHost: slow\\r\\nConnection: close\\r\\n\\r\\n")
head = slow.recv(1000)                                          # megabytes are still to come
print("READY", flush=True)
while not os.path.exists("{PLACE}/go"):
    time.sleep(0.05)
half.sendall(b"\\r\\nConnection: close\\r\\n\\r\\n")
for name, end, start in (("half", half, b""), ("slow", slow, head)):
    parts = [start]
    while data := end.recv(1 << 16):
        parts.append(data)
    answer = b"".join(parts)
    top, _, body = answer.partition(b"\\r\\n\\r\\n")
    if not top.startswith(b"HTTP/1.1 200") or body != open("{PLACE}/html/large", "rb").read():
        print("BAD", name, top, len(body), size, flush=True)
        break
else:
    print("OK", flush=True)
"""
START = f"""
mkdir -p {PLACE}/html && cd {PLACE} && chmod -R a+rX . && umask 022
echo none > html/index.html
seq 1 3000000 > html/large
printf %s "$CONFIGURATION" > nginx.conf
nginx -c {PLACE}/nginx.conf -e {PLACE}/error.log -g 'daemon off;' &
until {SYSTEM_PYTHON} -c 'import socket; socket.create_connection(("127.0.0.1", 8080))' 2> /dev/null
do sleep 0.1; done
wrk -t1 -c20 -d3600s http://127.0.0.1:8080/ > wrk.log &
echo $! > wrk.pid
sleep 1
{SYSTEM_PYTHON} -c "$CLIENT"
wait
"""


def fetch(pod: Pod) -> str:
    """The front page, asked for from inside."""
    return pod.python("import urllib.request as u; print(u.urlopen('http://127.0.0.1:8080/').read().decode(), end='')")


def mark(pod: Pod, word: str) -> None:
    pod.sh(f"echo {word} > {PLACE}/html/new && mv {PLACE}/html/new {PLACE}/html/index.html")


def seen(pod: Pod) -> object:
    return fetch(pod).strip()


def goes_on(pod: Pod) -> None:
    """wrk goes on; then it is ended, and has seen no error.

    What it calls timeouts doesn't count: they go by the wall clock, which jumps in a branch.
    """
    size = f"stat -c %s {PLACE}/access.log"
    at = int(pod.sh(size))
    pod.wait_output(size, lambda out: int(out) > at, "wrk goes on")
    pod.sh(f"kill -INT $(cat {PLACE}/wrk.pid)")
    report = pod.wait_output(f"cat {PLACE}/wrk.log", lambda out: "Transfer/sec" in out, "wrk reports")
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout", report)
    assert not errors or errors.groups() == ("0", "0", "0"), report
    assert "Non-2xx" not in report, report
    requests = re.search(r"(\d+) requests in", report)
    assert requests and int(requests[1]) > 0, report


@pytest.mark.needs("nginx", "wrk")
@pytest.mark.timeout(300)
def test_nginx(podtree: Podtree) -> None:
    options = ["-e", f"CONFIGURATION={CONFIGURATION}", "-e", f"CLIENT={CLIENT}"]
    pod = podtree.run("sh", "-c", START, name="nginx", options=options)
    pod.wait_log("READY", 60)
    workers = pod.sh("pgrep -x nginx")
    assert len(workers.split()) == 3, workers
    lives = branch_twice(podtree, pod, mark, seen, goes_on)
    for one in lives.all:
        assert one.sh("pgrep -x nginx") == workers
        one.sh(f"touch {PLACE}/go")
    for one in lives.all:
        log = one.wait_log("OK", 60)
        assert "BAD" not in log, log
        errors = one.read(f"{PLACE}/error.log")
        assert "[alert]" not in errors and "[crit]" not in errors and "exited" not in errors, errors
