"""Damaged videos, drawn by seeds from many codecs, give the same frames in every read and process, or one line."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest

from soap_net.data import clips, layout, videos
from soap_net.data.clips import Clip
from soap_net.data.loading import PerClip, load
from soap_net.errors import ClipError

Make = Callable[..., Path]
Outcome = list[int] | str  # how many frames and the read ones' checksums, or the error

SOURCES: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264.mp4": ("libx264", "yuv420p", {"bf": "2"}),
    "h264.mkv": ("libx264", "yuv420p", {"bf": "2"}),
    "h264.ts": ("libx264", "yuv420p", {"bf": "2"}),
    "h264.avi": ("libx264", "yuv420p", {"bf": "0"}),
    "h264.flv": ("libx264", "yuv420p", {"bf": "2"}),
    "fields.mp4": ("libx264", "yuv420p", {"x264-params": "interlaced=1"}),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=0"}),
    "mpeg4.mp4": ("mpeg4", "yuv420p", {"bf": "2"}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {}),
    "mpeg4_b.avi": ("mpeg4", "yuv420p", {"bf": "2"}),
    "mpeg2.mpg": ("mpeg2video", "yuv420p", {"bf": "2"}),
    "mpeg2.ts": ("mpeg2video", "yuv420p", {"bf": "2"}),
    "mpeg2.mkv": ("mpeg2video", "yuv420p", {"bf": "2"}),
    "mpeg1.mpg": ("mpeg1video", "yuv420p", {}),
    "mjpeg.avi": ("mjpeg", "yuvj420p", {}),
    "mjpeg.mov": ("mjpeg", "yuvj420p", {}),
    "vp8.webm": ("libvpx", "yuv420p", {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1"}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}),
    "av1.mkv": ("libsvtav1", "yuv420p", {"preset": "12"}),
    "wmv.wmv": ("wmv2", "yuv420p", {}),
    "msmpeg4.avi": ("msmpeg4", "yuv420p", {}),
    "flash.flv": ("flv", "yuv420p", {}),
    "gif.gif": ("gif", "rgb8", {}),
    "ffv1.mkv": ("ffv1", "yuv420p", {"level": "3", "slices": "4"}),
    "ffv1.avi": ("ffv1", "yuv420p", {}),
    "huffyuv.avi": ("huffyuv", "yuv422p", {}),
    "utvideo.avi": ("utvideo", "yuv420p", {}),
    "prores.mov": ("prores_ks", "yuv422p10le", {}),
    "png.mov": ("png", "rgb24", {}),
    "qtrle.mov": ("qtrle", "rgb24", {}),
    "raw.avi": ("rawvideo", "yuv420p", {}),
}
FRAMES = 20  # of each video before it is damaged
TELLING = {".avi", ".mkv", ".mov", ".mp4", ".webm"}  # containers that always tell where frames are missing at their end
QUICK = ["h264.mp4", "h264.ts", "h264.avi", "mpeg4.avi", "mpeg2.ts", "mjpeg.avi", "ffv1.mkv", "vp8.webm"]


def moving(number: int) -> np.ndarray:
    """A texture on the move, so that predicted frames have vectors and residuals to damage."""
    texture = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    image = np.roll(texture, (number, 2 * number), (0, 1))
    image[3 * number % 48 :, 5 * number % 64 :][:8, :8] = (255, 255, 0)
    return image


def damaged(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """One kind of damage, drawn, and what it makes of a file."""
    kind = draw.choice(["flip", "flips", "bytes", "zeros", "removed", "twice", "cut"])
    result = bytearray(data)
    at = draw.randrange(len(data))
    chunk = slice(at, at + draw.randrange(1, len(data) // 10))
    if kind in {"flip", "flips"}:
        for _ in range(1 if kind == "flip" else draw.randrange(2, 40)):
            result[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "bytes":
        for _ in range(draw.randrange(1, 20)):
            result[draw.randrange(len(data))] = draw.randrange(256)
    elif kind == "zeros":
        result[chunk] = bytes(len(result[chunk]))
    elif kind == "removed":
        del result[chunk]
    elif kind == "twice":
        result[at:at] = result[chunk]
    else:
        del result[max(at, len(data) // 8) :]
    return kind, bytes(result)


def read(clip: Clip, numbers_alone: bool = False) -> Outcome:
    """What a process that has not seen the file before reads of it."""
    clips._open_source.cache_clear()
    try:
        count = clip.num_frames()
        centres = [(2 * k + 1) * count // 16 for k in range(8)]
        if numbers_alone:
            alone = {number: clip.read([number])[0] for number in random.Random(0).sample(centres, 8)}
            frames = [alone[number] for number in centres]
        else:
            frames = list(clip.read(centres))
    except ClipError as error:
        return str(error)
    return [count, *(zlib.crc32(frame.contiguous().numpy().tobytes()) for frame in frames)]


IN_WORKERS = """
import importlib.util, json, resource, sys
from pathlib import Path
from soap_net.data.clips import Clip
from soap_net.data.loading import PerClip, load
spec = importlib.util.spec_from_file_location("campaign", sys.argv[1])
campaign = importlib.util.module_from_spec(spec)
sys.modules["campaign"] = campaign
spec.loader.exec_module(campaign)
paths = sorted(Path(sys.argv[2]).iterdir())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps(list(load(PerClip([Clip(path) for path in paths], campaign.read), workers=1))))
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss - before)
"""


def read_in_another_process(folder: Path) -> list[Outcome]:
    """Where fresh memory holds other bytes than here; in a worker of it."""
    command = [sys.executable, "-c", IN_WORKERS, __file__, str(folder)]
    environment = {**os.environ, "MALLOC_PERTURB_": "85"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280, env=environment)
    outcomes, grown = done.stdout.splitlines()[-2:]
    assert 1024 * int(grown) < 2**30
    return list(json.loads(outcomes))


def read_in_a_worker(folder: Path) -> list[Outcome]:
    return list(load(PerClip([Clip(path) for path in sorted(folder.iterdir())], read), workers=1))


def frames_of_a_full_decode(path: Path) -> int | None:
    """None where PyAV raises, or the decoder gives nothing."""
    try:
        with av.open(str(path)) as container:
            return sum(1 for _ in container.decode(video=0)) or None
    except (av.FFmpegError, UnicodeDecodeError, IndexError, AttributeError):
        return None


@dataclass
class Campaign:
    decoded: int = 0  # files that a full decode reads without an error
    read: int = 0  # of those
    worst: float = 0.0  # seconds for one read


def run(folder: Path, kinds: dict[str, str], elsewhere: list[Outcome], *, counted: bool = True) -> Campaign:
    """Reads all anew and compares; `counted`: whether the number of frames must be a full decode's."""
    found = Campaign()
    for path, other in zip(sorted(folder.iterdir()), elsewhere, strict=True):
        began = time.monotonic()
        outcome = read(Clip(path))
        found.worst = max(found.worst, time.monotonic() - began)
        assert other == outcome, path.name
        if isinstance(outcome, str):
            assert outcome.startswith(f"{path}: ")
            assert "\n" not in outcome
        else:
            assert read(Clip(path), numbers_alone=True) == outcome, path.name
        count = frames_of_a_full_decode(path)
        if count is None:
            continue
        found.decoded += 1
        if isinstance(outcome, str):
            continue
        found.read += 1
        cut = kinds[path.name] == "cut"
        if counted or cut:
            assert outcome[0] == count, path.name
        if cut and count < FRAMES and path.suffix in TELLING:
            assert Clip(path).cut(), path.name
    assert found.worst < 10
    assert found.read >= 0.95 * found.decoded, found
    return found


def write_campaign(folder: Path, sources: list[str], each: int, seed: int, write_video: Make) -> dict[str, str]:
    """Damaged files; the kind of damage by name."""
    kinds = {}
    (folder / "damaged").mkdir()
    for name in sources:
        codec, pix_fmt, options = SOURCES[name]
        try:
            av.codec.Codec(codec, "w")
        except ValueError:
            continue  # FFmpeg was built without that encoder
        source = folder / name
        size = (64, 64) if codec == "libsvtav1" else (64, 48)
        write_video(
            source, codec, FRAMES, options=options, pix_fmt=pix_fmt, gop=8, pixels=None if size[1] > 48 else moving
        )
        for number in range(each):
            kind, data = damaged(source.read_bytes(), random.Random(f"{seed} {name} {number}"))
            path = folder / "damaged" / f"{source.stem}-{number:03d}{source.suffix}"
            path.write_bytes(data)
            kinds[path.name] = kind
    return kinds


def test_damaged_videos_are_the_same_in_every_read_or_an_error(tmp_path: Path, write_video: Make) -> None:
    kinds = write_campaign(tmp_path, QUICK, 4, 7, write_video)
    found = run(tmp_path / "damaged", kinds, read_in_a_worker(tmp_path / "damaged"))
    assert found.decoded > 12


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.parametrize("seed", [11, 101])
def test_a_thousand_damaged_videos_are_the_same_in_every_read_or_an_error(
    seed: int, tmp_path: Path, write_video: Make
) -> None:
    kinds = write_campaign(tmp_path, list(SOURCES), 33, seed, write_video)
    found = run(tmp_path / "damaged", kinds, read_in_another_process(tmp_path / "damaged"))
    assert len(kinds) > 600
    assert found.decoded > 500


@pytest.mark.slow
@pytest.mark.campaign
def test_of_long_damaged_videos_too_the_frames_that_can_be_read_are_always_the_same(
    tmp_path: Path, write_video: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("workers that are not forked do not have the bound that this test sets")
    monkeypatch.setattr(layout, "_WHOLE", 0)
    monkeypatch.setattr(videos, "_SAMPLE", 0)
    kinds = write_campaign(tmp_path, list(SOURCES), 12, 23, write_video)
    run(tmp_path / "damaged", kinds, read_in_a_worker(tmp_path / "damaged"), counted=False)
