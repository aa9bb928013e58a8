"""What a video file's own bytes tell without decoding: where reading may start, where a file should end."""

from __future__ import annotations

import re
from collections.abc import Iterator


def starts_anew(packet: bytes, extradata: bytes | None) -> bool:
    """Whether decoding from this H.264 picture on gives it and all that is shown after it as a full decode does.

    That is so of IDR pictures and of recovery points with nothing to wait for (open GOPs). Containers also flag the
    recovery points of intra refresh, from which on the picture becomes whole bit by bit.
    """
    return any(
        unit[0] & 31 == 5 or (unit[0] & 31 == 6 and _recovers_at_once(unit))
        for unit in _h264_units(packet, extradata)
        if unit
    )


def _h264_units(packet: bytes, extradata: bytes | None) -> Iterator[bytes]:
    if extradata is None or len(extradata) < 5 or extradata[0] != 1:
        yield from packet.split(b"\x00\x00\x01")[1:]
        return
    width = (extradata[4] & 3) + 1  # of the length before each unit, as MP4 and Matroska have it
    at = 0
    while at + width < len(packet):
        start = at + width
        at = start + int.from_bytes(packet[at:start], "big")
        yield packet[start:at]


_SEI_HEAD = re.compile(rb"(\xff*)([^\xff])(\xff*)([^\xff])")  # type and size, each a sum of bytes that a non-255 ends


def _recovers_at_once(sei: bytes) -> bool:
    body = sei[1:].replace(b"\x00\x00\x03", b"\x00\x00")  # 3 is put there so that no unit holds a start code
    at = 0
    while head := _SEI_HEAD.match(body, at):
        kind, size = (255 * len(head[n]) + head[n + 1][0] for n in (1, 3))
        if kind == 6:
            # A 1 for no frames to wait for (Exp-Golomb), and a 1 for an exact match from there on.
            return body[head.end() : head.end() + 1] >= b"\xc0"
        at = head.end() + size
    return False


def declared_end(head: bytes) -> int | None:
    """Where a Matroska, WebM or AVI file says that it ends; None where it does not say, or is something else."""
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little")

    def size(at: int) -> tuple[int, int]:
        length = 9 - head[at].bit_length()
        unknown = (1 << 7 * length) - 1
        value = int.from_bytes(head[at : at + length], "big") & unknown
        return (-1 if value == unknown else value), at + length

    try:
        if head[:4] != b"\x1aE\xdf\xa3":
            return None
        header, at = size(4)
        at += header
        if head[at : at + 4] != b"\x18\x53\x80\x67":
            return None
        segment, at = size(at + 4)
    except IndexError:
        return None
    return None if segment < 0 else at + segment
