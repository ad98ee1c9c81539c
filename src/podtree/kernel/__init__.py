"""The Linux ABI and nothing else: system calls, ioctl numbers, structures. No policy.

Each module covers one kernel subsystem and cites the man page or the kernel header
that a constant comes from. Nothing here imports the rest of podtree.
"""
