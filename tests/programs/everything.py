"""Holds one of nearly everything that an image can have, and waits: for what is done to the image."""

from __future__ import annotations

import ctypes
import mmap
import os
import pty
import select
import signal
import socket
import threading
import time

libc = ctypes.CDLL(None, use_errno=True)
kept: list[object] = []


def files() -> None:
    kept.append(os.open("/etc/hostname", os.O_RDONLY))
    gone = os.open("/tmp/gone", os.O_RDWR | os.O_CREAT)
    os.write(gone, b"gone" * 5000)
    os.unlink("/tmp/gone")
    os.mkdir("/tmp/directory")
    kept.append(os.open("/tmp/directory", os.O_RDONLY))
    os.rmdir("/tmp/directory")
    memory = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
    os.write(memory, b"memory" * 5000)
    shared = os.open("/dev/shm/shared", os.O_RDWR | os.O_CREAT)
    os.write(shared, b"shared" * 5000)
    kept.append(mmap.mmap(shared, 8192))
    kept.append(mmap.mmap(-1, 8192))
    os.mkfifo("/tmp/fifo")
    kept.append(os.open("/tmp/fifo", os.O_RDWR))
    import fcntl

    fcntl.flock(gone, fcntl.LOCK_EX)
    fcntl.lockf(memory, fcntl.LOCK_EX, 10)
    fcntl.fcntl(gone, fcntl.F_SETOWN, os.getpid())


def events() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"in the pipe")
    epoll = select.epoll()
    epoll.register(reader, select.EPOLLIN)
    kept.extend((epoll, os.eventfd(7)))
    signals = ctypes.c_uint64(1 << (signal.SIGUSR2 - 1))
    kept.append(libc.signalfd(-1, ctypes.byref(signals), 0))
    timer = libc.timerfd_create(time.CLOCK_MONOTONIC, 0)
    libc.timerfd_settime(timer, 0, (ctypes.c_long * 4)(1000, 0, 1000, 0), None)
    kept.append(pty.openpty())
    kept.append(os.open("/dev/urandom", os.O_RDONLY))
    kept.append(os.open("/proc/self/status", os.O_RDONLY))
    kept.append(os.open("/proc/self/ns/net", os.O_RDONLY))
    kept.append(os.pidfd_open(os.getpid()))
    watcher = libc.inotify_init()
    libc.inotify_add_watch(watcher, b"/var/tmp", 0xFFF)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    os.kill(os.getpid(), signal.SIGUSR1)


def sockets() -> None:
    left, right = socket.socketpair()
    left.send(b"between")
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    socket.send_fds(here, [b"sent along"], [os.open("/etc/hostname", os.O_RDONLY)])
    listener = socket.socket()
    listener.bind(("127.0.0.1", 5000))
    listener.listen()
    client = socket.create_connection(("127.0.0.1", 5000))
    server, _ = listener.accept()
    client.send(b"under way")
    named = socket.socket(socket.AF_UNIX)
    named.bind("/tmp/socket")
    named.listen()
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 5001))
    udp.sendto(b"to itself", ("127.0.0.1", 5001))
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    netlink.bind((0, 0))
    kept.extend((left, right, here, there, listener, client, server, named, udp, netlink))


def processes() -> None:
    if os.fork() == 0:
        os._exit(3)  # a zombie
    if os.fork() == 0:
        os.setsid()
        time.sleep(10000)
    threading.Thread(target=time.sleep, args=(10000,), daemon=True).start()
    segment = libc.shmget(0x50, 8192, 0o1600)
    libc.shmat(segment, None, 0)
    queue = libc.msgget(0x52, 0o1600)
    libc.msgsnd(queue, ctypes.create_string_buffer(b"\1" + bytes(7) + b"queued"), 6, 0)


for work in (files, events, sockets, processes):
    work()
time.sleep(0.2)
print("READY", flush=True)
time.sleep(10000)
