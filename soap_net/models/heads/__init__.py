"""Few-shot heads by name, ours and those that other packages bring (`soap_net.models.installed`).

Each takes frame features only, so evaluation may compute features once per clip.
"""

from __future__ import annotations

import inspect
from typing import Any

from soap_net.errors import UserError, did_you_mean
from soap_net.models import installed
from soap_net.models.heads.base import Classes, Compared, Embedded, FewShotHead, Positions, group_by_class
from soap_net.models.heads.hyrsm import BiMHMHead, HyRSMHead
from soap_net.models.heads.otam import OTAMHead
from soap_net.models.heads.prototype import FrameAverageHead, PrototypeHead
from soap_net.models.heads.soap import SOAPHead
from soap_net.models.heads.trx import TRXHead
from soap_net.models.heads.views import ViewsHead

HEADS: dict[str, type[FewShotHead]] = {
    "soap": SOAPHead,
    "prototype": PrototypeHead,
    "tsn": FrameAverageHead,
    "otam": OTAMHead,
    "trx": TRXHead,
    "bimhm": BiMHMHead,
    "hyrsm": HyRSMHead,
    "views": ViewsHead,
}

__all__ = [
    "HEADS",
    "BiMHMHead",
    "Classes",
    "Compared",
    "Embedded",
    "FewShotHead",
    "FrameAverageHead",
    "HyRSMHead",
    "OTAMHead",
    "Positions",
    "PrototypeHead",
    "SOAPHead",
    "TRXHead",
    "ViewsHead",
    "build_head",
    "group_by_class",
    "head_class",
]


def head_class(name: str) -> type[FewShotHead]:
    """The class of the head ``name``.

    Raises:
        UserError: an unknown head (naming the nearest), or one of another package that is no head.
    """
    if name in HEADS:
        return HEADS[name]
    others = installed.found("head")
    if name not in others:
        known = (*HEADS, *others)
        raise UserError(f"unknown head {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})")
    theirs = installed.load("head", name)
    if not (isinstance(theirs, type) and issubclass(theirs, FewShotHead)):
        raise UserError(f"head {name!r} of the package {installed.package(others[name][0])} is no FewShotHead")
    return theirs


def build_head(name: str, dim: int, frames: int, /, **options: Any) -> FewShotHead:
    """Build the head ``name`` for ``frames`` frames of ``dim`` features, with its own ``options``.

    Raises:
        UserError: an unknown head or option (naming the nearest), or a value the head refuses.
    """
    kind = head_class(name)
    known = list(inspect.signature(kind).parameters)[2:]
    for option in options:
        if option not in known:
            near, all_of = did_you_mean(option, known), ", ".join(known) or "none"
            raise UserError(f"head {name} has no option {option!r}{near} (known: {all_of})")
    try:
        return kind(dim, frames, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"head {name}: {error}") from error
