"""The paper's claims as commands: ``soap-net experiment <name>``."""
