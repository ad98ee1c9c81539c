"""From a checkpoint to living processes.

plan.py     in which order the process tree is grown (data, no kernel)
arena.py    the place in a new task from which it acts on itself
tree.py     growing the tree: pids, sessions, groups, terminals, zombies
process.py  one process: memory, descriptors, signals, threads, credentials
pod.py      the whole: namespaces, builder, tree, processes, go
"""
