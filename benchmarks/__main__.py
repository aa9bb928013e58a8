"""`python -m benchmarks [--device cpu|cuda]`: times SOAP on this machine and writes benchmarks/results/."""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    chosen, _ = parser.parse_known_args()
    if chosen.device == "cuda":
        from benchmarks import gpu

        return gpu.main()
    from benchmarks import cpu

    return cpu.main()


if __name__ == "__main__":
    sys.exit(main())
