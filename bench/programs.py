"""Programs that are recorded or not: programs.py compile|numpy AMOUNT. Run in a pod."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

FUNCTION = """
static double f%(n)d(const double *a, int n) {
    double s = %(n)d, t[64];
    for (int i = 0; i < 64; i++) t[i] = a[(i * %(n)d + 7) %% n] * %(n)d;
    for (int i = 0; i < n; i++)
        switch (i %% 5) {
        case 0: s += a[i] * t[i & 63]; break;
        case 1: s -= a[i] / (1 + t[(i + %(n)d) & 63]); break;
        case 2: t[i & 63] += s; break;
        case 3: s = s > a[i] ? s - a[i] : s + a[i]; break;
        default: s *= 0.5;
        }
    return s;
}
"""
FUNCTIONS = 150
COUNT = 600


def compile_c(times: int) -> None:
    """A source of many functions, again and again."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(name, "a.c")
        calls = " + ".join(f"f{n}(a, n)" for n in range(FUNCTIONS))
        functions = "".join(FUNCTION % {"n": n} for n in range(FUNCTIONS))
        source.write_text(functions + f"double all(const double *a, int n) {{ return {calls}; }}\n")
        for number in range(times):
            subprocess.run(["gcc", "-O2", "-c", "-o", str(Path(name, f"{number}.o")), str(source)], check=True)


def loop_numpy(times: int) -> None:
    """Products of matrices, and a large array changed in place: some hundreds of MB are written over and over."""
    import numpy as np

    matrix = np.random.default_rng(1).random((COUNT, COUNT))
    large = np.zeros(4_000_000)
    for number in range(times):
        matrix = matrix @ matrix
        matrix /= matrix.max()
        large[number % 4 :: 4] += matrix[0, 0]


if __name__ == "__main__":
    {"compile": compile_c, "numpy": loop_numpy}[sys.argv[1]](int(sys.argv[2]))
