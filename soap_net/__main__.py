"""The program `soap-net`, which is `python -m soap_net` too."""

from __future__ import annotations

import sys
from typing import NoReturn

from soap_net.interrupts import end_at_signals, leave_at_signals


def run() -> NoReturn:
    """Does what the command line says, and ends the process with its exit code."""
    end_at_signals()  # before the rest is imported

    from soap_net.cli import main

    code = main()
    leave_at_signals(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
