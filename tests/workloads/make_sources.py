"""Writes a C program of 60 files and its Makefile into a directory: make_sources.py DIRECTORY."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

FILES, FUNCTIONS = 60, 90
MAKEFILE = """\
CFLAGS := -O2 -pipe
OBJECTS := $(patsubst src/%.c,obj/%.o,$(wildcard src/*.c))
program: $(sort $(OBJECTS))
\tgcc -o $@ $^
obj/%.o: src/%.c src/all.h
\t@mkdir -p obj
\tgcc $(CFLAGS) -c -o $@ $<
"""


def part(name: str, chance: random.Random) -> str:
    """One source file: a table and many functions over it."""
    table = ", ".join(str(chance.randrange(2**31)) for _ in range(300))
    lines = ['#include "all.h"', f"static const unsigned table[] = {{{table}}};"]
    for number in range(FUNCTIONS):
        turns, shift = chance.randrange(1, 999), chance.randrange(1, 31)
        lines.append(
            f"static unsigned f{number}(unsigned x)\n{{\n"
            f"    for (int i = 0; i < {turns}; i++)\n"
            f"        x = (x << {shift} | x >> {32 - shift}) ^ table[(x + i) % 300];\n"
            f"    return x;\n}}"
        )
    total = " + ".join(f"f{number}(x + {number})" for number in range(FUNCTIONS))
    lines.append(f"unsigned {name}(unsigned x)\n{{\n    return {total};\n}}\n")
    return "\n".join(lines)


def main() -> None:
    os.makedirs(Path(sys.argv[1], "src"))
    os.chdir(sys.argv[1])
    chance = random.Random(5)
    names = [f"part{number:02}" for number in range(FILES)]
    for name in names:
        Path(f"src/{name}.c").write_text(part(name, chance))
    declared = "".join(f"unsigned {name}(unsigned);\n" for name in names)
    Path("src/all.h").write_text(f"#include <stdio.h>\n{declared}")
    calls = "".join(f"    x ^= {name}(x);\n" for name in names)
    end = '    printf("%u\\n", x);\n    return 0;\n}\n'
    Path("src/main.c").write_text(f'#include "all.h"\nint main(void)\n{{\n    unsigned x = 1;\n{calls}{end}')
    Path("Makefile").write_text(MAKEFILE)


if __name__ == "__main__":
    main()
