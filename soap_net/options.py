"""What the commands' options have in common: errors that name the nearest right one, and settings behind them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn

from soap_net.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from soap_net.config import Config

SETTINGS = "Settings may follow, as in --eval.tasks 1000; `soap-net train --help` lists them all."


class Options(argparse.ArgumentParser):
    """Options of one command; a mistake raises `UserError` rather than printing the whole usage."""

    def __init__(self, command: str, description: str, epilog: str = "") -> None:
        super().__init__(prog=f"soap-net {command}", description=description, epilog=epilog, allow_abbrev=False)
        self._given: list[str] = []

    def error(self, message: str) -> NoReturn:
        for option in self._given:  # an option is missing: perhaps it is there and misspelt
            if hint := self._hint(option):
                raise UserError(f"unknown option {option}{hint}")
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_known(self, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parses what it knows of `args`, and returns the rest beside it: settings. An option misspelt is named."""
        self._given = list(args)
        own = {name for action in self._actions for name in action.option_strings}
        values, rest = self.parse_known_args(_joined(args, {f"--{key}" for key in _undotted_settings()} - own))
        for option in rest:  # a setting's key has a dot, or is whole one of a config
            undotted = option.partition("=")[0].removeprefix("--") if "." not in option else ""
            if undotted and undotted not in ("print_config", *_undotted_settings()) and (hint := self._hint(option)):
                raise UserError(f"unknown option {option}{hint}")
        return values, rest

    def parse_exactly(self, args: Sequence[str]) -> argparse.Namespace:
        """Parses all of `args`; an unknown one is named together with the nearest there is."""
        values, rest = self.parse_known(args)
        if rest:
            raise UserError(f"unknown option {rest[0]}{self._hint(rest[0])}")
        return values

    def _hint(self, option: str) -> str:
        """Names the option that an unknown one was meant to be; empty if it is known, like none, or no option."""
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        name = option.partition("=")[0]
        return did_you_mean(name, known) if name.startswith("--") and name not in known else ""


def _undotted_settings() -> set[str]:
    from soap_net.config import Config

    return {"config", *(field.name for field in fields(Config))}


def _joined(args: Sequence[str], undotted: set[str]) -> list[str]:
    """The arguments with each setting's value joined to its key, lest it be taken for a positional one.

    A list's items may be arguments of their own, one after another.
    """
    from soap_net.config import Config
    from soap_net.settings import as_list, is_list, kinds

    lists = {f"--{key}" for key, kind in kinds(Config).items() if is_list(kind)}
    found: list[str] = []
    values: list[str] = []  # of the last argument, where that is a setting
    for arg in args:
        key = found[-1].partition("=")[0] if values else found[-1] if found else ""
        setting = key in undotted or (key.startswith("--") and "." in key and "=" not in key)
        if arg.startswith("--") or not setting or (values and key not in lists):
            found, values = [*found, arg], []
        else:
            values.append(arg)
            found[-1] = f"{key}={as_list(values) if key in lists else arg}"
    return found


def own_clips(settings: list[str], command: str) -> Config:
    """The config of `settings`, over the preset own_clips where they name no other."""
    from soap_net.config import parse, presets, read_settings

    named = any(setting.partition("=")[0] == "--config" for setting in settings)
    base = None if named else read_settings(presets()["own_clips"])
    return parse(settings, base=base, prog=f"soap-net {command}")


def print_json(value: Any) -> None:
    """Prints plain values."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
