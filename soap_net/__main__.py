"""The program `soap-net`, which is `python -m soap_net` too."""

from __future__ import annotations

from typing import NoReturn

from soap_net.interrupts import end_at_signals, leave


def run() -> NoReturn:
    """Does what the command line says, and ends the process with its exit code."""
    end_at_signals()  # before the rest is imported

    from soap_net.cli import main

    leave(main())


if __name__ == "__main__":
    run()
