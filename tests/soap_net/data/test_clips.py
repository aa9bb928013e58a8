from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from soap_net.data import layout, videos
from soap_net.data.clips import Clip
from soap_net.data.images import in_natural_order, natural
from soap_net.errors import ClipError

Make = Callable[..., Path]
Picture = Callable[..., np.ndarray]

VIDEOS = {
    "h264.mp4": ("libx264", {"bf": "3"}, "yuv420p"),
    "open_gop.mp4": ("libx264", {"x264-params": "open-gop=1:keyint=8:bframes=3:b-adapt=0"}, "yuv420p"),
    "intra_refresh.mp4": ("libx264", {"x264-params": "intra-refresh=1:keyint=8"}, "yuv420p"),
    "h264.mkv": ("libx264", {"bf": "3"}, "yuv420p"),
    "h264.ts": ("libx264", {"bf": "2"}, "yuv420p"),
    "h264.avi": ("libx264", {"bf": "3"}, "yuv420p"),
    "mpeg4.mp4": ("mpeg4", {"bf": "2"}, "yuv420p"),
    "mpeg4.avi": ("mpeg4", {"bf": "2"}, "yuv420p"),
    "mpeg4_without_b.avi": ("mpeg4", {}, "yuv420p"),
    "mpeg2.mpg": ("mpeg2video", {"bf": "2"}, "yuv420p"),
    "mjpeg.avi": ("mjpeg", {}, "yuvj420p"),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, "yuv420p"),
    "vp8.webm": ("libvpx", {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1"}, "yuv420p"),
    "wmv.wmv": ("wmv2", {}, "yuv420p"),
    "flash.flv": ("flv", {}, "yuv420p"),
    "gif.gif": ("gif", {}, "rgb8"),
}


def decode_all(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def assert_reads_as_a_full_decode(path: Path, singles: int = 1000) -> None:
    frames = decode_all(path)
    clip = Clip(path)
    count = clip.num_frames()
    assert count == len(frames)
    draw = random.Random(0)
    asked = [[i] for i in draw.sample(range(count), min(count, singles))]
    asked += [sorted(draw.sample(range(count), k)) for k in (2, 3, 4, 8, 8)]
    for indices in [*asked, [count - 1, 0, 0, count // 2], list(range(count))]:
        got = clip.read(indices)
        assert got.dtype == torch.uint8
        assert torch.equal(got, frames[indices]), (path.name, indices)


RARER = {"h264.ts", "h264.avi", "mpeg4.mp4", "mpeg2.mpg", "wmv.wmv", "flash.flv", "gif.gif", "intra_refresh.mp4"}


@pytest.mark.parametrize("name", [pytest.param(v, marks=pytest.mark.slow if v in RARER else ()) for v in VIDEOS])
def test_any_frame_of_a_video_is_that_of_a_full_decode(name: str, tmp_path: Path, write_video: Make) -> None:
    codec, options, pix_fmt = VIDEOS[name]
    assert_reads_as_a_full_decode(write_video(tmp_path / name, codec, 25, options=options, pix_fmt=pix_fmt, gop=8))


def test_frames_of_variable_rate_count_by_number_not_by_time(tmp_path: Path, write_video: Make) -> None:
    times = np.cumsum(np.random.default_rng(0).integers(1, 9, 20)).tolist()
    for name in ("vfr.mp4", "vfr.mkv"):
        assert_reads_as_a_full_decode(write_video(tmp_path / name, frames=20, options={"bf": "2"}, times=times, gop=8))


@pytest.mark.parametrize("name", ["intra_refresh.mp4", "intra_refresh.ts", "intra_refresh.mkv"])
def test_reading_never_starts_where_intra_refresh_has_yet_to_fill_the_picture(
    name: str, tmp_path: Path, write_video: Make
) -> None:
    options = {"x264-params": "intra-refresh=1:keyint=8:bframes=0"}
    path = write_video(tmp_path / name, frames=60, size=(128, 96), options=options, gop=8)
    with av.open(str(path)) as container:
        assert sum(packet.is_keyframe for packet in container.demux(video=0)) > 2
    assert_reads_as_a_full_decode(path)


@pytest.mark.parametrize(
    ("name", "format_name", "codec", "gop", "b_frames"),
    [
        ("a.mpg", "mpeg", "mpeg1video", 15, 2),
        ("a.mpg", "mpeg", "mpeg2video", 18, 0),
        ("a.vob", "mpeg", "mpeg2video", 12, 2),
        ("a.m1v", "mpegvideo", "mpeg1video", 15, 2),
    ],
)
def test_frames_of_an_mpeg_program_or_elementary_stream_are_not_taken_for_their_neighbours(
    name: str, format_name: str, codec: str, gop: int, b_frames: int, tmp_path: Path, write_video: Make
) -> None:
    path = write_video(tmp_path / name, codec, 90, options={"bf": str(b_frames)}, gop=gop, size=(128, 96))
    with av.open(str(path)) as container:
        assert container.format.name == format_name
    assert_reads_as_a_full_decode(path)


def in_a_process(program: str, *arguments: object) -> str:
    """What a program prints that must end, importing PyTorch included, within two minutes."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reading_does_not_hang_where_ffmpegs_log_goes_to_python(tmp_path: Path, write_video: Make) -> None:
    # As torchvision.io has it: each of the decoder's threads then waits for Python's lock to say its word, and before
    # PyAV 17.1 whoever closed the decoder waited for them with it. So the log stays in FFmpeg.
    program = """
import sys, av, pathlib
from soap_net.data.clips import Clip
for _ in range(40):
    av.logging.set_level(av.logging.DEBUG)
    print(len(Clip(pathlib.Path(sys.argv[1])).read([0, 9, 20])), av.logging.get_level())
"""
    path = write_video(tmp_path / "a.mp4", frames=30, options={"bf": "3"})
    assert in_a_process(program, path).splitlines() == ["3 None"] * 40


def test_a_video_that_hangs_its_decoder_is_a_broken_clip(tmp_path: Path, write_video: Make) -> None:
    # The wait is native and can't be interrupted; afterwards the same file is refused at once, and the program ends.
    program = """
import sys, ctypes, time, pathlib
from soap_net.data import videos
from soap_net.data.clips import Clip
from soap_net.errors import ClipError
clip = Clip(pathlib.Path(sys.argv[1]))
print(len(clip.read([1, 2])))
videos.upright = lambda frame, turn: ctypes.CDLL(None).sleep(1000)
for videos.PATIENCE in (1, 1000):
    began = time.monotonic()
    try:
        clip.read([1, 2])
    except ClipError as error:
        print(error.reason, time.monotonic() - began < 20)
"""
    said = in_a_process(program, write_video(tmp_path / "a.mp4"))
    assert said.splitlines() == [
        "2",
        "FFmpeg hangs in it: no frame came for a while True",
        "FFmpeg hangs in it: no frame came for a while True",
    ]


def test_a_video_may_take_its_time_as_long_as_frames_come(
    tmp_path: Path, write_video: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mp4", frames=12)
    clip = Clip(path)
    frames = decode_all(path)[:12]
    upright = videos.upright
    monkeypatch.setattr(videos, "upright", lambda frame, turn: time.sleep(0.4) or upright(frame, turn))
    monkeypatch.setattr(videos, "PATIENCE", 3)
    assert torch.equal(clip.read(range(12)), frames)


def test_metadata_that_is_no_utf8_does_no_harm(tmp_path: Path, write_video: Make) -> None:
    title, broken = "K\u00e4se".encode(), b"K\xff\xfese"
    path = write_video(tmp_path / "a.mp4", metadata={"title": title.decode()})
    content = path.read_bytes()
    assert title in content
    path.write_bytes(content.replace(title, broken))
    assert Clip(path).read([0, 29]).shape == (2, 3, 48, 64)


class CountingContainer:
    """Stands for an open container and counts the packets taken from it."""

    packets = 0

    def __init__(self, container: Any) -> None:
        self.container = container

    def demux(self, *streams: Any) -> Iterator[Any]:
        for packet in self.container.demux(*streams):
            CountingContainer.packets += 1
            yield packet

    def __getattr__(self, name: str) -> Any:
        return getattr(self.container, name)

    def __enter__(self) -> CountingContainer:
        return self

    def __exit__(self, *error: object) -> None:
        self.container.close()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("long.mp4", {"bf": "0", "sc_threshold": "0"}),
        ("open_gop.mp4", {"x264-params": "open-gop=1:bframes=2:scenecut=0:min-keyint=10"}),
        ("open_gop.ts", {"x264-params": "open-gop=1:bframes=2:scenecut=0:min-keyint=10"}),
    ],
)
def test_reading_far_frames_decodes_only_what_lies_after_their_keyframes(
    name: str, options: dict[str, str], tmp_path: Path, write_video: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = Clip(write_video(tmp_path / name, frames=240, options=options, gop=10))
    clip.num_frames()
    opened = av.open
    monkeypatch.setattr(CountingContainer, "packets", 0)
    monkeypatch.setattr("soap_net.data.videos.av.open", lambda *a, **k: CountingContainer(opened(*a, **k)))
    clip.read([115, 231])
    # A few frames from each keyframe on, and what the decoder's threads take in advance.
    assert 8 <= CountingContainer.packets <= 16 + 4 * ((os.cpu_count() or 1) + 1)


@pytest.mark.parametrize("decoder", ["torchvision", "Pillow"])
@pytest.mark.parametrize(("suffix", "lossless"), [(".png", True), (".bmp", True), (".jpg", False)])
def test_a_folder_of_images_is_read_in_natural_order(
    decoder: str,
    suffix: str,
    lossless: bool,
    tmp_path: Path,
    make_picture: Picture,
    encode_image: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if decoder == "Pillow":
        monkeypatch.setattr("soap_net.data.images.decode_image", None)
    for number in (1, 2, 10, 9, 100):
        (tmp_path / f"frame{number}{suffix}").write_bytes(encode_image(make_picture(number), suffix))
    (tmp_path / f"._frame3{suffix}").write_bytes(b"resource fork")
    (tmp_path / "notes.txt").write_text("not a frame")
    clip = Clip(tmp_path)
    assert clip.num_frames() == 5
    got = clip.read([4, 0, 3, 3])
    for frame, number in zip(got, (100, 1, 10, 10), strict=True):
        difference = frame.permute(1, 2, 0).int().numpy() - make_picture(number).astype(int)
        assert abs(difference).max() == 0 if lossless else abs(difference).mean() < 12
    info = clip.probe()
    assert (info.frames, info.height, info.width, info.fps) == (5, 48, 64, None)


@pytest.mark.parametrize("decoder", ["torchvision", "Pillow"])
def test_images_of_every_kind_become_rgb(
    decoder: str, tmp_path: Path, make_picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if decoder == "Pillow":
        monkeypatch.setattr("soap_net.data.images.decode_image", None)
    image = Image.fromarray(make_picture(0))
    grey = np.asarray(image.convert("L"))
    image.convert("RGBA").save(tmp_path / "0.png")
    image.convert("L").save(tmp_path / "1.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "2.png")
    image.convert("CMYK").save(tmp_path / "3.jpg")
    frames = Clip(tmp_path).read([0, 1, 2, 3])
    assert torch.equal(frames[0].permute(1, 2, 0), torch.from_numpy(make_picture(0)))
    for frame in frames[1:3]:
        assert torch.equal(frame, torch.from_numpy(grey.copy()).expand(3, -1, -1))
    assert frames.dtype == torch.uint8


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    ("colour", "depth"),
    [
        *((0, d) for d in (1, 2, 4, 8, 16)),
        (2, 8),
        (2, 16),
        *((3, d) for d in (1, 2, 4, 8)),
        (4, 8),
        (4, 16),
        (6, 8),
        (6, 16),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_png_of_any_colour_type_keeps_its_high_eight_bits(
    colour: int, depth: int, interlaced: bool, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    samples = rng.integers(0, 2**depth, (11, 13, channels))
    palette = rng.integers(0, 256, (2**depth if colour == 3 else 1, 3), dtype=np.uint8)
    (tmp_path / "1.png").write_bytes(png_of(samples, colour, depth, palette, interlaced))
    if colour == 3:
        expected = palette[samples[..., 0]]
    else:
        levels = samples >> 8 if depth == 16 else samples * 255 // (2**depth - 1)
        expected = levels[..., :3] if channels > 2 else levels[..., :1].repeat(3, -1)
    assert np.array_equal(Clip(tmp_path).read([0])[0].permute(1, 2, 0), expected)


def png_of(samples: np.ndarray, colour: int, depth: int, palette: np.ndarray, interlaced: bool) -> bytes:
    """Of every colour type, which Pillow does not write; a palette's first two colours are half clear."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def rows(part: np.ndarray) -> bytes:
        bits = (part.reshape(len(part), -1, 1) >> np.arange(depth)[::-1] & 1).reshape(len(part), -1)
        return b"".join(b"\0" + row.tobytes() for row in np.packbits(bits.astype(np.uint8), axis=-1))

    adam7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    passes = adam7 if interlaced else [(0, 0, 1, 1)]
    height, width = samples.shape[:2]
    data = b"\x89PNG\r\n\x1a\n"
    data += chunk(b"IHDR", struct.pack(">2I5B", width, height, depth, colour, 0, 0, interlaced))
    if colour == 3:
        data += chunk(b"PLTE", palette.tobytes()) + chunk(b"tRNS", b"\x80\x80")
    data += chunk(b"IDAT", zlib.compress(b"".join(rows(samples[y::dy, x::dx]) for y, x, dy, dx in passes)))
    return data + chunk(b"IEND", b"")


def zip_of(path: Path, members: dict[str, bytes], **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as file:  # type: ignore[arg-type]
        for name, data in members.items():
            file.writestr(name, data)
    return path


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_whole_or_below_one_folder(
    packing: int, tmp_path: Path, make_picture: Picture, encode_image: Callable[..., bytes]
) -> None:
    members = {f"set/b c/v{v}/{n}.png": encode_image(make_picture(10 * v + n)) for v in (1, 2) for n in (10, 2, 1)}
    members["__MACOSX/set/b c/v1/._1.png"] = b"resource fork"
    path = zip_of(tmp_path / "set.zip", members, compression=packing)
    one = Clip(path, member="set/b c/v2")
    assert (one.name, one.num_frames()) == ("b c/v2", 3)
    for frame, number in zip(one.read([0, 1, 2]), (21, 22, 30), strict=True):
        assert np.array_equal(frame.permute(1, 2, 0), make_picture(number))
    assert Clip(path).num_frames() == 6


def test_zip_names_in_utf8_without_the_flag_are_understood(tmp_path: Path, encode_image: Callable[..., bytes]) -> None:
    name = "tänzeln/v/1.png".encode()
    path = zip_of(tmp_path / "a.zip", {"x" * len(name.decode("cp437")): encode_image(np.zeros((4, 4, 3), np.uint8))})
    data = path.read_bytes()
    path.write_bytes(data.replace(b"x" * len(name.decode("cp437")), name))
    assert Clip(path, member="tänzeln/v").num_frames() == 1


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_zips_can_be_read_in_workers_after_the_parent_has_read_them(
    context: str, tmp_path: Path, make_picture: Picture, encode_image: Callable[..., bytes]
) -> None:
    if context not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system starts no processes by {context}")
    path = zip_of(
        tmp_path / "s.zip", {f"c/{v}/{n}.png": encode_image(make_picture(v)) for v in range(12) for n in "12"}
    )
    clips = [Clip(path, member=f"c/{v}") for v in range(12)]
    clips[0].read([0])
    loader = DataLoader(clips, batch_size=None, num_workers=1, collate_fn=first_frame, multiprocessing_context=context)
    for number, frame in enumerate(loader):
        assert np.array_equal(frame.permute(1, 2, 0), make_picture(number))


def first_frame(clip: Clip) -> torch.Tensor:
    return clip.read([0])[0]


def test_a_clip_is_the_same_by_text_or_path_and_never_changes() -> None:
    one, other = Clip("set/jump/v.1.mp4"), Clip(Path("set/jump/v.1.mp4"))
    assert (one, hash(one), one.path, one.name) == (other, hash(other), Path("set/jump/v.1.mp4"), "jump/v.1")
    assert one != Clip("set/jump/v.1.mp4", member="a")
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(FrozenInstanceError):
        one.name = "another"  # type: ignore[misc]


# What can be wrong with a file


def fails(clip: Clip, *said: str) -> None:
    with pytest.raises(ClipError) as caught:
        clip.read(range(clip.num_frames()))
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(clip.path))
    assert text == f"{caught.value.path}: {caught.value.reason}"
    for words in said:
        assert words in text
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.path, again.reason) == (text, caught.value.path, caught.value.reason)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    fails(Clip(tmp_path / "gone.mp4"), "no such file")


def test_a_zero_byte_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    fails(Clip(tmp_path / "a.mp4"), "empty (0 bytes)")


def test_text_named_mp4_is_not_a_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("<html>404 not found</html>\n" * 50)
    fails(Clip(tmp_path / "a.mp4"), "not a video that FFmpeg can read")


def test_sound_without_pictures_is_not_a_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    fails(Clip(tmp_path / "a.mp4"), "no video stream")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("whole", [2**24, 0])
@pytest.mark.parametrize(
    ("name", "codec"), [("start.mp4", "libx264"), ("a.webm", "libvpx"), ("a.mkv", "libx264"), ("a.avi", "mjpeg")]
)
def test_a_video_that_is_cut_short_is_what_a_full_decode_gives_and_says_so(
    name: str, codec: str, whole: int, share: float, tmp_path: Path, write_video: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_WHOLE", whole)
    path = write_video(
        tmp_path / name,
        codec,
        pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p",
        container_options={"movflags": "faststart"} if name == "start.mp4" else {},
    )
    data = path.read_bytes()
    assert Clip(path).cut() is None
    frames = Clip(path).num_frames()
    path.write_bytes(data[: int(len(data) * share)])
    try:
        left = decode_all(path)
    except (av.FFmpegError, ValueError):  # of no frame at all
        fails(Clip(path), *(["the file is cut short, and"] if share > 0.1 else []))
        return
    assert torch.equal(Clip(path).read(range(len(left))), left)
    assert torch.equal(torch.stack(list(Clip(path).each(range(len(left))))), left)
    assert torch.equal(torch.stack(list(Clip(path).video().stream(range(len(left))))), left)
    assert Clip(path).num_frames() == len(left) < frames
    told = f"{len(left)} of its {frames} frames are there" if path.suffix in {".mp4", ".avi"} else "it ends after"
    assert told in (Clip(path).cut() or "")
    assert Clip(path).remark() == f"{path}: the file is cut short: {Clip(path).cut()}"


def test_a_video_cut_before_its_index_is_refused(tmp_path: Path, write_video: Make) -> None:
    path = write_video(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes()[:-200])
    fails(Clip(path))


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("b.avi", "mjpeg")])
def test_wherever_a_video_is_cut_it_says_so_if_and_only_if_that_is_before_its_index(
    name: str, codec: str, tmp_path: Path, write_video: Make
) -> None:
    options = {"bf": "2"} if codec == "libx264" else {}  # of which the last is stored behind the last that is shown
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write_video(tmp_path / name, codec, 20, options=options, gop=8, pix_fmt=pix_fmt)
    data = path.read_bytes()
    index = data.rindex(b"idx1" if path.suffix == ".avi" else b"\x1c\x53\xbb\x6b")
    told = set()
    for end in range(9 * len(data) // 10, len(data), 7):
        part = Clip(tmp_path / f"{end}{path.suffix}")
        part.path.write_bytes(data[:end])
        try:
            told.add(part.cut())
        except ClipError as error:
            with pytest.raises((av.FFmpegError, ValueError)):
                decode_all(part.path)
            told.add(error.reason)
            continue
        assert (part.cut() is None) == (end >= index), (end, index)
        assert part.num_frames() == len(decode_all(part.path))
    assert len(told) > 2
    assert all(text is None or "cut short" in text or "it ends" in text or "frames are there" in text for text in told)


def test_a_video_damaged_inside_fails_or_reads_but_never_raises_anything_else(
    tmp_path: Path, write_video: Make
) -> None:
    data = write_video(tmp_path / "a.mp4", options={"bf": "2"}).read_bytes()
    for seed in range(12):
        damaged = bytearray(data)
        draw = random.Random(seed)
        for _ in range(40):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path = tmp_path / f"{seed}.mp4"
        path.write_bytes(damaged)
        with contextlib.suppress(ClipError):
            clip = Clip(path)
            clip.read(range(clip.num_frames()))


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"), [("a.mp4", "libx264", "yuv420p"), ("a.avi", "mjpeg", "yuvj420p")]
)
def test_a_video_of_one_frame_is_a_clip(name: str, codec: str, pix_fmt: str, tmp_path: Path, write_video: Make) -> None:
    path = write_video(tmp_path / name, codec, 1, pix_fmt=pix_fmt)
    assert Clip(path).num_frames() == 1
    assert torch.equal(Clip(path).read([0, 0]), decode_all(path)[[0, 0]])


@pytest.mark.parametrize("size", [(63, 47), (1, 1), (17, 200)])
def test_odd_sizes_are_kept(size: tuple[int, int], tmp_path: Path, write_video: Make) -> None:
    path = write_video(tmp_path / "a.mp4", "libx264", 3, size=size, pix_fmt="yuv444p")
    info = Clip(path).probe()
    assert (info.width, info.height, info.frames) == (*size, 3)
    assert Clip(path).read([1]).shape == (1, 3, size[1], size[0])


def test_alpha_is_dropped_and_grey_becomes_rgb(tmp_path: Path, write_video: Make, make_picture: Picture) -> None:
    def half_clear(number: int) -> np.ndarray:
        return np.concatenate([make_picture(number), np.full((48, 64, 1), 128, np.uint8)], axis=-1)

    alpha = Clip(write_video(tmp_path / "a.mov", "qtrle", 3, pix_fmt="argb", pixels=half_clear))
    assert np.array_equal(alpha.read([2])[0].permute(1, 2, 0), make_picture(2))
    grey = Clip(write_video(tmp_path / "g.mkv", "ffv1", 3, pix_fmt="gray")).read([1])[0]
    expected = np.asarray(Image.fromarray(make_picture(1)).convert("L")).astype(int)
    assert torch.equal(grey[0], grey[1])
    assert abs(grey[0].numpy().astype(int) - expected).max() <= 3


@pytest.mark.parametrize("clockwise", [0, 90, 180, 270])
def test_a_video_with_rotation_metadata_is_shown_upright(
    clockwise: int, tmp_path: Path, write_video: Make, make_picture: Picture
) -> None:
    upright = make_picture(5, 48, 80)  # portrait
    stored = np.ascontiguousarray(np.rot90(upright, clockwise // 90))  # a player turns it back by that angle
    height, width = stored.shape[:2]
    path = write_video(
        tmp_path / "a.mp4", "libx264", 2, size=(width, height), pixels=lambda _: stored, options={"crf": "1"}
    )
    # The track header's matrix (a b u, c d v, x y w): (p, q) is shown at (a p + c q + x, b p + d q + y).
    a, b, c, d, x, y = {
        0: (1, 0, 0, 1, 0, 0),
        90: (0, 1, -1, 0, height, 0),
        180: (-1, 0, 0, -1, width, height),
        270: (0, -1, 1, 0, 0, width),
    }[clockwise]
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    data[start : start + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, x * one, y * one, 1 << 30)
    path.write_bytes(data)
    frame = Clip(path).read([1])[0].permute(1, 2, 0).numpy()
    assert frame.shape == upright.shape
    assert abs(frame.astype(int) - upright).mean() < 12
    info = Clip(path).probe()
    assert (info.height, info.width) == (80, 48)


def test_an_empty_folder_holds_no_images(tmp_path: Path) -> None:
    fails(Clip(tmp_path), "holds no images")


def test_a_folder_with_a_truncated_an_empty_or_a_text_image_names_it(
    tmp_path: Path, write_frames: Make, encode_image: Callable[..., bytes], make_picture: Picture
) -> None:
    whole = encode_image(make_picture(0), ".jpg")
    for name, data in (("half", whole[: len(whole) // 2]), ("none", b""), ("text", b"hello"), ("end", whole[:-20])):
        folder = write_frames(tmp_path / name, 2, suffix=".jpg")
        (folder / "00000002.jpg").write_bytes(data)
        fails(Clip(folder), "00000002.jpg")
        assert Clip(folder).read([0]).shape == (1, 3, 16, 24)


READ = """
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from soap_net.data.clips import Clip
from soap_net.errors import ClipError
for path in sys.argv[1:]:
    try:
        Clip(Path(path)).read([0, 1])
    except ClipError as error:
        print(error)
"""


def test_a_damaged_png_is_named_and_does_not_end_the_process(tmp_path: Path, write_frames: Make) -> None:
    clips, named = [], []
    for step in range(6):
        folder = write_frames(tmp_path / str(step), 2, size=(320, 240))
        frame = folder / "00000002.png"
        damaged = bytearray(frame.read_bytes())
        start = damaged.index(b"IDAT") + 4
        length = int.from_bytes(damaged[start - 8 : start - 4], "big")
        damaged[start + length * step // 6] ^= 0x55
        frame.write_bytes(damaged)
        zipped = zip_of(tmp_path / f"{step}.zip", {file.name: file.read_bytes() for file in folder.iterdir()})
        clips += [folder, zipped]
        named += [f"{frame}: ", f"{zipped}: frame 1: "]
    read = subprocess.run([sys.executable, "-c", READ, *map(str, clips)], capture_output=True, text=True, check=True)
    for line, name in zip(read.stdout.splitlines(), named, strict=True):
        assert line.startswith(f"{name}the image cannot be decoded")


def test_a_bitmap_whose_header_claims_a_giant_is_refused(tmp_path: Path, encode_image: Callable[..., bytes]) -> None:
    data = bytearray(encode_image(np.zeros((4, 4, 3), np.uint8), ".bmp"))
    data[18:26] = struct.pack("<2i", 60000, 60000)
    (tmp_path / "1.bmp").write_bytes(data)
    fails(Clip(tmp_path), "1.bmp", "pixels")


def test_frames_of_different_sizes_are_refused(tmp_path: Path, write_frames: Make) -> None:
    write_frames(tmp_path, 2)
    write_frames(tmp_path, 1, size=(30, 20))
    fails(Clip(tmp_path), "24x16", "30x20")


def test_a_broken_zip_says_what_is_wrong(
    tmp_path: Path, encode_image: Callable[..., bytes], make_picture: Picture
) -> None:
    whole = zip_of(tmp_path / "a.zip", {"c/v/1.png": encode_image(make_picture(0))})
    fails(Clip(whole, member="c/w"), "holds no images there")
    data = bytearray(whole.read_bytes())
    (tmp_path / "cut.zip").write_bytes(data[:-30])
    fails(Clip(tmp_path / "cut.zip"), "not a readable zip")
    data[60] ^= 255
    (tmp_path / "flip.zip").write_bytes(data)
    fails(Clip(tmp_path / "flip.zip"), "damaged")


def test_a_frame_outside_the_clip_is_refused(tmp_path: Path, write_frames: Make) -> None:
    clip = Clip(write_frames(tmp_path, 3))
    for index in (-1, 3):
        with pytest.raises(ClipError, match=f"frame {index} was asked for, and it has frames 0 to 2"):
            clip.read([0, index])
    with pytest.raises(ClipError, match="no frame numbers"):
        clip.read([])


def test_a_clip_that_changes_on_disk_is_read_anew(tmp_path: Path, write_video: Make, write_frames: Make) -> None:
    path = write_video(tmp_path / "a.mp4", frames=5)
    assert Clip(path).num_frames() == 5
    write_video(path, frames=9)
    os.utime(path, ns=(1, 1))
    assert Clip(path).num_frames() == 9


@pytest.mark.parametrize(
    "name", ["Pouring (into) something", "don't", "Füße über Ölpfütze", "拍手", 'a\'b "c" [d] #e %20']
)
def test_class_names_may_hold_anything(name: str, tmp_path: Path, write_video: Make, write_frames: Make) -> None:
    video = Clip(write_video(tmp_path / name / "v 1.mp4", frames=2))
    assert (video.name, video.num_frames()) == (f"{name}/v 1", 2)
    assert video.read([1]).shape == (1, 3, 48, 64)
    assert Clip(write_frames(tmp_path / name / "f (2)", 2)).read([1]).shape == (1, 3, 16, 24)


@pytest.mark.parametrize(
    "name",
    ["10:30.mp4", "http:a.mp4", "file:a.mp4", "50% of #1?.mp4", "%03d.mp4", "a&b=c|d.mp4", "拍手: ß.mp4", "-i.mp4"],
)
def test_a_video_beside_the_reader_may_have_any_name(
    name: str, tmp_path: Path, write_video: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / name, frames=2)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(Clip(Path(name)).read([0, 1]), decode_all(path))


def test_natural_order_compares_numbers_by_value() -> None:
    names = ["v10", "v9", "v1", "train2", "train10", "a", "10", "9", ""]
    assert sorted(names, key=natural) == ["", "9", "10", "a", "train2", "train10", "v1", "v9", "v10"]
    assert natural("9" * 5000) < natural("1" + "0" * 5000) < natural("1" + "0" * 4999 + "1")


@settings(max_examples=300)
@given(st.sets(st.text("01a.", min_size=1, max_size=4)) | st.sets(st.from_regex(r"x[0-9]{3}\.p", fullmatch=True)))
def test_the_short_way_of_sorting_gives_the_natural_order(names: set[str]) -> None:
    assert in_natural_order(names) == sorted(sorted(names), key=natural)


@pytest.mark.slow
def test_real_videos_with_packed_frames_read_as_a_full_decode() -> None:
    root = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "ut_interaction" / "videos"
    if not root.is_dir():
        pytest.skip("needs the data set ut_interaction, which does not come with the project")
    for path in sorted(root.glob("*/*.avi"))[::30]:
        assert_reads_as_a_full_decode(path, singles=6)
