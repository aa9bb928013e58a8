"""Which frames a video has: their numbers, how they are shown, and what is refused."""

from __future__ import annotations

import resource
import struct
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from soap_net.data import layout, videos
from soap_net.data.check import check_data
from soap_net.data.clips import Clip
from soap_net.errors import ClipError

Make = Callable[..., Path]
REAL = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "ucf101_9"


@pytest.fixture(params=["short", "long"])
def length(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short videos are decoded whole at first sight; as long ones are, here, all of which only the first few are."""
    if request.param == "long":
        monkeypatch.setattr(layout, "_WHOLE", 0)
        monkeypatch.setattr(videos, "_SAMPLE", 0)


def decoded(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def assert_frames_are_those_of_a_full_decode(path: Path) -> int:
    frames = decoded(path)
    clip = Clip(path)
    assert clip.num_frames() == len(frames)
    for asked in ([len(frames) - 1], [0, len(frames) - 1], range(len(frames)), range(len(frames) - 1, 0, -7)):
        assert torch.equal(clip.read(list(asked)), frames[list(asked)])
    assert clip.check().frames == len(frames)
    return len(frames)


# Packets and frames


def bits(data: bytes) -> str:
    return "".join(f"{byte:08b}" for byte in data)


def not_coded(picture: bytes) -> bytes:
    """An MPEG-4 picture's header alone, saying that it holds none (as encoders drop frames, and DivX packs them)."""
    at = picture.index(b"\x00\x00\x01\xb6") + 4
    head = bits(picture[at : at + 6])
    until = head.index("0", 2) + 1 + 1 + 5 + 1  # type, seconds, marker, 25ths of a second, marker: then "coded"
    head = head[:until] + "0"
    head += "0" + "1" * (-len(head) % 8 - 1 if len(head) % 8 else 7)
    return b"\x00\x00\x01\xb6" + int(head, 2).to_bytes(len(head) // 8, "big")


def rewritten(source: Path, target: Path, change: Callable[[list[bytes]], list[bytes]]) -> Path:
    """An AVI with other packets."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        keys = {bytes(packet) for packet in packets if packet.is_keyframe}
        for number, data in enumerate(change([bytes(packet) for packet in packets])):
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            packet.pts = packet.dts = number
            packet.is_keyframe = data in keys
            new.mux(packet)
    return target


@pytest.mark.usefixtures("length")
def test_packets_without_a_picture_are_no_frames(tmp_path: Path, write_video: Make) -> None:
    def with_dropped(packets: list[bytes]) -> list[bytes]:
        dropped = not_coded(packets[1])
        return [*packets[:5], dropped, *packets[5:30], dropped, dropped, *packets[30:], dropped]

    source = write_video(tmp_path / "plain.avi", "mpeg4", 40, gop=8)
    path = rewritten(source, tmp_path / "dropped.avi", with_dropped)
    assert 40 <= assert_frames_are_those_of_a_full_decode(path) < 44


def test_divx_packed_pictures_are_frames_of_their_own(tmp_path: Path, write_video: Make) -> None:
    def packed(packets: list[bytes]) -> list[bytes]:
        result = [packets[0]]
        for ahead, between in zip(packets[1::2], packets[2::2], strict=False):
            result += [ahead + between, not_coded(ahead)]
        at = result[0].index(b"\x00\x00\x01\xb6")
        return [result[0][:at] + b"\x00\x00\x01\xb2DivX503b1393p" + result[0][at:], *result[1:]]

    source = write_video(tmp_path / "plain.avi", "mpeg4", 25, options={"bf": "1", "b_strategy": "0"}, gop=100)
    path = rewritten(source, tmp_path / "packed.avi", packed)
    assert assert_frames_are_those_of_a_full_decode(path) >= 23


@pytest.mark.usefixtures("length")
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        (
            "hidden.webm",
            "libvpx-vp9",
            {"auto-alt-ref": "1", "lag-in-frames": "12", "deadline": "good", "cpu-used": "5"},
        ),
        ("hidden8.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "12", "deadline": "good", "cpu-used": "5"}),
        ("again.mp4", "libsvtav1", {"preset": "12"}),
        ("fields.ts", "libx264", {"x264-params": "interlaced=1:bframes=2"}),
        ("fields.mpg", "mpeg2video", {"flags": "+ilme+ildct", "bf": "2"}),
        ("pyramid.mp4", "libx265", {"x265-params": "log-level=0:bframes=4"}),
    ],
)
def test_hidden_and_interlaced_pictures_count_as_a_full_decode_has_it(
    name: str, codec: str, options: dict[str, str], tmp_path: Path, write_video: Make
) -> None:
    if codec not in av.codecs_available or not encodes(codec):
        pytest.skip(f"needs the encoder {codec}, which this FFmpeg is built without")
    path = write_video(tmp_path / name, codec, 33, options=options, size=(64, 64), gop=16)
    assert assert_frames_are_those_of_a_full_decode(path) == 33


def encodes(codec: str) -> bool:
    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        return False
    return True


@pytest.mark.usefixtures("length")
@pytest.mark.parametrize("kind", ["ts", "mpg"])
def test_pieces_that_were_joined_are_read_whole(kind: str, tmp_path: Path, write_video: Make) -> None:
    codec = "libx264" if kind == "ts" else "mpeg2video"
    pieces = [write_video(tmp_path / f"{n}.{kind}", codec, 30, gop=10).read_bytes() for n in range(2)]
    joined = tmp_path / f"joined.{kind}"
    joined.write_bytes(b"".join(pieces))
    assert assert_frames_are_those_of_a_full_decode(joined) == 60


def test_a_long_video_is_not_decoded_to_be_counted(
    tmp_path: Path, write_video: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    decodings = []
    checksum = videos.checksum
    monkeypatch.setattr(videos, "checksum", lambda frame: decodings.append(frame.pts) or checksum(frame))
    path = write_video(tmp_path / "long.mp4", frames=600, options={"preset": "ultrafast"}, size=(16, 16))
    assert Clip(path).num_frames() == 600
    assert len(decodings) <= 32
    short = write_video(tmp_path / "short.mp4", frames=100, size=(16, 16))
    assert Clip(short).num_frames() == 100
    assert len(decodings) >= 100


def test_real_clips_with_dropped_frames_have_those_of_a_full_decode() -> None:
    if not REAL.is_dir():
        pytest.skip("needs the data set ucf101_9, which does not come with the project")
    right = {"BaseballPitch_g08": 111, "BaseballPitch_g09": 67, "BaseballPitch_g10": 101, "Basketball_g12": 274}
    for name, frames in {**right, "Basketball_g13": 299, "Basketball_g16": 482}.items():
        path = next(REAL.rglob(f"v_{name}_c01.avi"))
        clip = Clip(path)
        assert clip.check().frames == frames
        assert torch.equal(clip.read([frames - 1, frames // 2]), decoded(path)[[frames - 1, frames // 2]])


# What a check reads


def test_a_check_finds_what_only_training_would_ask_for(
    tmp_path: Path, write_video: Make, write_frames: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_WHOLE", 0)
    last = write_video(tmp_path / "a" / "last.avi", "mjpeg", 64, pix_fmt="yuvj420p")
    data = last.read_bytes()
    at, end = data.rindex(b"\xff\xd8"), data.rindex(b"\xff\xd9")
    last.write_bytes(data[:at] + bytes(end - at) + data[end:])
    images = write_frames(tmp_path / "a" / "images", 30)
    (images / "00000004.png").write_bytes(b"no image")
    write_frames(tmp_path / "a" / "good", 3)
    for clip in (Clip(last), Clip(images)):
        centres = [(2 * k + 1) * clip.num_frames() // 16 for k in range(8)]
        clip.read(centres)  # evaluation would be content
    (report,) = check_data(tmp_path, {"train": None}, progress=False).splits
    assert sorted(Path(reason.split(": ")[0]).name for reason in report.broken) == ["00000004.png", "last.avi"]
    assert len(report.infos) == 1


# How frames are shown

ORIENTATIONS = [(a, b, c, d) for a, d in ((1, 1), (1, -1), (-1, 1), (-1, -1)) for b, c in ((0, 0),)] + [
    (0, b, c, 0) for b in (1, -1) for c in (1, -1)
]


def with_matrix(path: Path, a: float, b: float, c: float, d: float) -> Path:
    """Writes an MP4 track header's display matrix, which shows the pixel (p, q) at (a p + c q, b p + d q)."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (round(value * 65536) for value in (a, b, c, d))
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    turned = path.with_name(f"turned{a}{b}{c}{d}.mp4")
    turned.write_bytes(data)
    return turned


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, write_video: Make) -> Path:
    return write_video(tmp_path_factory.mktemp("plain") / "plain.mp4", frames=2, size=(48, 32))


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_every_orientation_is_shown_as_players_show_it(matrix: tuple[int, int, int, int], plain: Path) -> None:
    a, b, c, d = matrix
    stored = decoded(plain)[1].numpy()
    columns, rows = np.meshgrid(np.arange(48), np.arange(32))
    x, y = a * columns + c * rows, b * columns + d * rows
    x, y = x - x.min(), y - y.min()
    expected = np.zeros((3, y.max() + 1, x.max() + 1), np.uint8)
    expected[:, y, x] = stored[:, rows, columns]
    for scale in (1, 0.5):
        clip = Clip(with_matrix(plain, *(scale * value for value in matrix)))
        assert np.array_equal(clip.read([1])[0].numpy(), expected)
        info = clip.probe()
        assert (info.height, info.width) == expected.shape[1:]


def test_a_picture_that_lies_at_an_angle_is_refused_by_it(plain: Path) -> None:
    with pytest.raises(ClipError, match=r"its display matrix turns frames by -?30 degrees, not a multiple of 90"):
        Clip(with_matrix(plain, 0.866, 0.5, -0.5, 0.866)).num_frames()
    assert Clip(with_matrix(plain, 0, 0, 0, 0)).read([0]).shape == (1, 3, 32, 48)


# Limits


def giants(folder: Path, write_video: Make) -> Iterator[tuple[Path, int]]:
    size = (16_000, 16_000)
    gif = bytearray(write_video(folder / "a.gif", "gif", 2, pix_fmt="rgb8").read_bytes())
    gif[6:10] = struct.pack("<2H", *size)
    raw = write_video(folder / "raw.avi", "rawvideo", 2).read_bytes()
    png = write_video(folder / "png.mov", "png", 2, pix_fmt="rgb24").read_bytes()
    ffv1 = write_video(folder / "ffv1.avi", "ffv1", 2).read_bytes()
    for name, data in {
        "a.gif": bytes(gif),
        "raw.avi": raw.replace(struct.pack("<2I", 64, 48), struct.pack("<2I", *size)),
        "png.mov": png.replace(struct.pack(">2I", 64, 48), struct.pack(">2I", *size)),
        "ffv1.avi": ffv1.replace(struct.pack("<2I", 64, 48), struct.pack("<2I", *size)),
    }.items():
        (folder / name).write_bytes(data)
        yield folder / name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_a_frame_declared_as_a_giant_is_refused_before_memory_is_taken(tmp_path: Path, write_video: Make) -> None:
    for path, kilobytes in giants(tmp_path, write_video):
        began = time.monotonic()
        with pytest.raises(ClipError, match=f"frames of more than {2**24} pixels"):
            Clip(path).num_frames()
        assert time.monotonic() - began < 5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - kilobytes < 64 * 1024, path


def test_a_frame_of_5k_is_read(tmp_path: Path, write_video: Make) -> None:
    path = write_video(tmp_path / "large.avi", "mjpeg", 1, pix_fmt="yuvj420p", size=(5312, 2988))
    assert Clip(path).read([0]).shape == (1, 3, 2988, 5312)


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "other.ts"
    other.parent.mkdir()
    with av.open(str(other), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode())
    assert Clip(other).num_frames() == 10
    for name in ("list.m3u8", "list.mp4", "list.ts"):
        text = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{other}\n#EXT-X-ENDLIST\n"
        (tmp_path / name).write_text(text)
        with pytest.raises(ClipError):
            Clip(tmp_path / name).num_frames()
