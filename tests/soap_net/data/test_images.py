"""What an image or a zip says of its size is held to bounds before memory or time is taken; damage is one line."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import random
import resource
import struct
import sys
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from soap_net.data.clips import Clip
from soap_net.data.images import LONGEST_SIDE, MOST_BYTES, MOST_PACKED, MOST_PIXELS, MOST_SCANS
from soap_net.errors import ClipError

Picture = Callable[..., np.ndarray]
FRESH = multiprocessing.get_context("forkserver")
"""Not copies of this process, whose own pages would count as they are touched."""
FRESH.set_forkserver_preload(["soap_net.data.clips"])
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, as memory is measured as it counts it")


def outcome(path: Path) -> str:
    """A digest of all frames, or the one line that says what is wrong; any other exception passes."""
    try:
        clip = Clip(path)
        frames = clip.read(range(clip.num_frames()))
        return f"{tuple(frames.shape)} {hashlib.sha256(frames.contiguous().numpy().tobytes()).hexdigest()}"
    except ClipError as error:
        refused = error
    assert str(refused) == f"{refused.path}: {refused.reason}"
    assert len(str(refused).splitlines()) == 1
    return f"error: {refused}"


def refuse_code(event: str, arguments: tuple[Any, ...]) -> None:
    if event.split(".")[0] in ("subprocess", "socket") or event in (
        "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.fork", "pickle.find_class", "ctypes.dlopen",
    ):  # fmt: skip
        raise AssertionError(f"{event} {arguments}")


def measured(paths: list[Path]) -> list[tuple[str, float, float]]:
    """Of each clip, read in a process of its own that may run no other code: outcome, seconds, MiB that it took more.

    Where the process dies, the last outcome says so.
    """
    receiving, sending = FRESH.Pipe(duplex=False)
    process = FRESH.Process(target=measure, args=(paths, sending))
    process.start()
    sending.close()
    found = []
    try:
        while True:
            found.append(receiving.recv())
    except EOFError:
        process.join()
    return found if len(found) == len(paths) else [*found, (f"the process ended with {process.exitcode}", 0.0, 0.0)]


def measure(paths: list[Path], sending: Connection) -> None:
    torch.set_num_threads(1)
    sys.addaudithook(refuse_code)
    for path in paths:
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        try:
            told = outcome(path)
        except BaseException:
            told = traceback.format_exc()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        sending.send((told, time.perf_counter() - began, grown))


def assert_refused(path: Path, *said: str) -> None:
    [(told, seconds, grown)] = measured([path])
    assert told.startswith(f"error: {path}"), told
    for words in said:
        assert words in told
    assert seconds < 2
    assert grown < 150


# Sizes


def declaring(kind: str, width: int, height: int) -> bytes:
    """An image whose header says that size and whose pixels are those of a small one."""
    stream = io.BytesIO()
    lossless = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(stream, kind, **lossless)
    data = bytearray(stream.getvalue())
    if kind == "PNG":
        data[16:24] = struct.pack(">2I", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "BMP":
        data[18:26] = struct.pack("<2i", width, height)
    elif kind == "JPEG":
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = struct.pack(">2H", height, width)
    else:
        start = data.index(b"VP8L") + 9
        alpha = struct.unpack_from("<I", data, start)[0] >> 28
        struct.pack_into("<I", data, start, width - 1 | height - 1 << 14 | alpha << 28)
    return bytes(data)


GIANTS = {"PNG": (40_000, 4_000), "BMP": (60_000, 60_000), "JPEG": (65_000, 65_000), "WEBP": (16_000, 16_000)}


@pytest.mark.parametrize("kind", GIANTS)
def test_an_image_that_declares_a_giant_is_refused_before_memory_is_taken(kind: str, tmp_path: Path) -> None:
    width, height = GIANTS[kind]
    (tmp_path / "1.png").write_bytes(declaring(kind, width, height))
    assert_refused(tmp_path, "1.png: the image has", f"{MOST_PIXELS} pixels", "scale the frames down")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "JPEG"])
def test_an_image_with_a_giant_side_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(declaring(kind, LONGEST_SIDE + 1, 1))
    assert_refused(tmp_path, f"the image has {LONGEST_SIDE + 1} x 1 pixels")


def test_a_frame_of_4k_is_read(tmp_path: Path) -> None:
    Image.fromarray(np.full((2160, 4096, 3), 7, np.uint8)).save(tmp_path / "1.jpg", quality=20)
    assert Clip(tmp_path).read([0]).shape == (1, 3, 2160, 4096)


def test_a_jpeg_of_endless_scans_is_refused(tmp_path: Path) -> None:
    # Each scan of a few bytes has the decoder go over the whole image.
    stream = io.BytesIO()
    Image.fromarray(np.zeros((2048, 2048, 3), np.uint8)).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    last = data.rindex(b"\xff\xda")
    (tmp_path / "1.jpg").write_bytes(data[:last] + data[last:-2] * 20_000 + data[-2:])
    assert_refused(tmp_path, "scans", str(MOST_SCANS))
    (tmp_path / "1.jpg").write_bytes(data)
    assert Clip(tmp_path).read([0]).shape == (1, 3, 2048, 2048)


def test_a_bitmap_of_endless_runs_is_refused(tmp_path: Path, make_picture: Picture) -> None:
    def packed(runs: bytes) -> bytes:
        start = 14 + 40 + 1024
        header = struct.pack("<IiiHHIIiiII", 40, 64, 48, 1, 8, 1, len(runs), 0, 0, 256, 0)
        palette = b"".join(bytes((grey, grey, grey, 0)) for grey in range(256))
        return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + header + palette + runs

    (tmp_path / "1.bmp").write_bytes(packed(b"\x01\x05" * (MOST_PACKED // 2)))
    assert_refused(tmp_path, "run lengths", str(MOST_PACKED))
    (tmp_path / "1.bmp").write_bytes(packed(b"\x40\x05\x00\x00" * 48 + b"\x00\x01"))
    assert (Clip(tmp_path).read([0]) == 5).all()


def test_files_that_are_no_image_files_are_refused_unread(tmp_path: Path) -> None:
    for name in ("sparse", "pipe", "device", "folder"):
        (tmp_path / name).mkdir()
    with (tmp_path / "sparse" / "1.jpg").open("wb") as file:
        file.truncate(2**40)
    os.mkfifo(tmp_path / "pipe" / "1.jpg")
    (tmp_path / "device" / "1.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder" / "1.jpg").mkdir()
    assert_refused(tmp_path / "sparse", f"1.jpg: {2**40} bytes", str(MOST_BYTES))
    for name in ("pipe", "device", "folder"):
        assert_refused(tmp_path / name, "1.jpg: not a file")


def test_formats_that_have_programs_run_are_not_read(tmp_path: Path) -> None:
    # Pillow has Ghostscript draw EPS, whatever the file's name is.
    (tmp_path / "1.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    assert_refused(tmp_path, "1.jpg: the image cannot be decoded (not an image)")


# Zips


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def with_entry(path: Path, offset: int, form: str, *values: int) -> Path:
    """Overwrites fields of the first member in the zip's directory."""
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, data.index(b"PK\x01\x02") + offset, *values)
    path.write_bytes(data)
    return path


def test_a_member_that_declares_a_giant_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"c/v/1.png": bytes(MOST_BYTES + 1)})  # a thousandth of it, packed
    assert path.stat().st_size < 2**18
    assert_refused(path, f"frame 0 has {MOST_BYTES + 1} bytes", str(MOST_BYTES))


@pytest.mark.parametrize("stored", [2**31, 2**32 - 2])
def test_a_member_that_declares_more_than_the_file_holds_is_refused(stored: int, tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"c/v/1.png": b"x" * 100})
    assert_refused(with_entry(path, 20, "<I", stored), f"frame 0 has {stored} bytes")


@cache
def packed_zeros() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("c/v/1.png", bytes(2**28))
    return stream.getvalue()


@pytest.mark.parametrize("declared", [0, 1000])
def test_a_member_that_holds_more_than_it_declares_is_unpacked_up_to_there(declared: int, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(packed_zeros())
    assert_refused(with_entry(path, 24, "<I", declared), "frame 0 is damaged (its checksum differs)")


def test_places_and_sizes_beyond_all_numbers_are_one_line(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"c/v/1.png": b"x" * 100})
    data = path.read_bytes()
    start = data.index(b"PK\x01\x02")
    extra = struct.pack("<2H3Q", 1, 24, 2**64 - 1, 2**64 - 1, 2**64 - 1)
    entry = bytearray(data[start : start + 46 + 9])
    struct.pack_into("<2I", entry, 20, 2**32 - 1, 2**32 - 1)
    struct.pack_into("<H", entry, 30, len(extra))
    struct.pack_into("<I", entry, 42, 2**32 - 1)
    end = bytearray(data[start + len(entry) :])
    struct.pack_into("<I", end, 12, len(entry) + len(extra))
    path.write_bytes(data[:start] + entry + extra + end)
    assert_refused(path, "a.zip")


@pytest.mark.parametrize(
    ("offset", "form", "value", "said"),
    [
        (8, "<H", 1, "frame 0 is encrypted"),
        (10, "<H", 12, "a method other than store and deflate"),
        (10, "<H", 99, "a method other than store and deflate"),
        (16, "<I", 1, "its checksum differs"),
        (42, "<I", 7, "not where the zip's directory says"),
        (6, "<H", 99, "not a readable zip"),
    ],
)
def test_what_is_wrong_with_a_member_is_said(offset: int, form: str, value: int, said: str, tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"c/v/1.png": b"x" * 100})
    assert_refused(with_entry(path, offset, form, value), said)


def test_names_with_broken_utf8_are_one_line(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"ö/v/1.png": b"x"})
    data = path.read_bytes()
    path.write_bytes(data.replace("ö".encode(), b"\xff\xfe"))
    assert_refused(path, "not a readable zip")


def test_absolute_and_parent_names_are_folders_of_the_zip_alone(
    tmp_path: Path, make_picture: Picture, encode_image: Callable[..., bytes]
) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "1.png").write_bytes(encode_image(make_picture(9)))
    names = ("/c/v/1.png", f"{tmp_path}/secret/1.png", "../secret/1.png")
    path = zipped(tmp_path / "a.zip", {name: encode_image(make_picture(n)) for n, name in enumerate(names)})
    for number, member in enumerate(("/c/v", str(tmp_path / "secret"), "../secret")):
        [frame] = Clip(path, member=member).read([0])
        assert np.array_equal(frame.permute(1, 2, 0), make_picture(number))
    with pytest.raises(ClipError, match="holds no images there"):
        Clip(path, member="secret").read([0])


def test_a_zip_in_a_zip_stays_closed(tmp_path: Path, encode_image: Callable[..., bytes]) -> None:
    inner = zipped(tmp_path / "inner.zip", {"c/v/1.png": encode_image(np.zeros((4, 4, 3), np.uint8))})
    assert_refused(zipped(tmp_path / "a.zip", {"c/v/inner.zip": inner.read_bytes()}), "holds no images there")
    assert_refused(zipped(tmp_path / "b.zip", {"c/v/1.png": inner.read_bytes()}), "frame 0", "not an image")


def test_of_members_of_one_name_the_last_counts(
    tmp_path: Path, make_picture: Picture, encode_image: Callable[..., bytes]
) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        warnings.simplefilter("ignore")
        for number in (1, 2):
            file.writestr("c/v/1.png", encode_image(make_picture(number)))
    clip = Clip(tmp_path / "a.zip")
    assert clip.num_frames() == 1
    assert np.array_equal(clip.read([0])[0].permute(1, 2, 0), make_picture(2))


# Damage of every kind

IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline.jpg": ("RGB", {"quality": 85}),
    "progressive.jpg": ("RGB", {"quality": 85, "progressive": True}),
    "cmyk.jpg": ("CMYK", {}),
    "rgb.png": ("RGB", {}),
    "palette.png": ("P", {}),
    "deep.png": ("I;16", {}),
    "lossy.webp": ("RGB", {"quality": 80}),
    "lossless.webp": ("RGB", {"lossless": True}),
    "rgb.bmp": ("RGB", {}),
    "palette.bmp": ("P", {}),
}


def image_of(name: str, draw: random.Random) -> bytes:
    mode, options = IMAGES[name]
    pixels = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((56, 40), Image.Resampling.BICUBIC)
    image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257) if mode == "I;16" else image
    stream = io.BytesIO()
    image = image if mode in ("I;16", "RGB") else image.convert(mode)
    image.save(stream, {"jpg": "JPEG"}.get(name[-3:], name.rpartition(".")[2].upper()), **options)
    return stream.getvalue()


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Flipped bits, a cut, a range of zeros, a range moved, doubled or lost, or numbers at the front overwritten."""
    content = bytearray(data)
    start, length = draw.randrange(len(content)), draw.randrange(1, max(2, len(content) // 8))
    kind = draw.randrange(8)
    if kind <= 1:
        for _ in range(draw.choice((1, 1, 1, 4, 20))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == 2:
        del content[start:]
    elif kind == 3:
        content[start : start + length] = bytes(len(content[start : start + length]))
    elif kind == 4:
        content[start:start] = content[start : start + length]
    elif kind == 5:
        del content[start : start + length]
    elif kind == 6:
        taken = content[start : start + length]
        del content[start : start + length]
        where = draw.randrange(len(content) + 1)
        content[where:where] = taken
    else:
        where = draw.randrange(min(60, len(content)))
        content[where : where + 4] = draw.randbytes(4)
    return bytes(content)


def damaged_zip(path: Path, draw: random.Random) -> None:
    """Two frames in a zip that is damaged as `damaged` has it, or in one field of its directory or a local header."""
    name = draw.choice([*IMAGES])
    names = draw.choice((("c/v/1", "c/v/2"), ("/c/v/1", "/c/v/2"), ("../c/1", "../c/2"), ("c/v/1", "c/v/1")))
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", draw.choice((0, 8))) as file:
        warnings.simplefilter("ignore")
        for member in names:
            file.writestr(f"{member}.{name[-4:].strip('.')}", image_of(name, draw))
    data = bytearray(path.read_bytes())
    if draw.random() < 0.5:
        path.write_bytes(damaged(data, draw))
        return
    signature, fields = draw.choice(
        ((b"PK\x01\x02", (6, 8, 10, 16, 20, 24, 28, 30, 42)), (b"PK\x03\x04", (6, 8, 14, 18, 22, 26, 28)))
    )
    value = draw.choice((0, 1, 8, 12, 99, 2**16 - 1, draw.randrange(2**16)))
    struct.pack_into("<H", data, data.index(signature) + draw.choice(fields), value)
    path.write_bytes(data)


def pillow_reads(path: Path) -> bool:
    """Whether Python's zipfile and Pillow, which looks at checksums in `verify` alone, find nothing wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.is_dir():
                contents = [file.read_bytes() for file in path.iterdir()]
            else:
                with zipfile.ZipFile(path) as file:
                    contents = [file.read(name) for name in {*file.namelist()}]
            sizes = set()
            for content in contents:
                Image.open(io.BytesIO(content)).verify()
                image = Image.open(io.BytesIO(content))
                image.load()
                sizes.add(image.size)
    except Exception:
        return False
    return len(sizes) == 1


def campaign(folder: Path, seeds: range) -> None:
    paths = []
    for seed in seeds:
        draw = random.Random(seed)
        if seed % 3:
            name = [*IMAGES][seed % len(IMAGES)]
            path = folder / str(seed)
            path.mkdir()
            (path / name).write_bytes(damaged(image_of(name, draw), draw))
        else:
            path = folder / f"{seed}.zip"
            damaged_zip(path, draw)
        paths.append(path)
    here = measured(paths + paths)  # twice in one process, once in another
    again = measured(paths)
    told = [one for one, _, _ in here]
    assert told[: len(paths)] == told[len(paths) :] == [one for one, _, _ in again]
    strange = [one for one in told if not one.startswith(("error: ", "("))]
    assert not strange, strange[0]
    assert max(seconds for _, seconds, _ in here) < 10
    assert max(grown for _, _, grown in here) < 1024
    sound = [pillow_reads(path) for path in paths]
    kept = [one.startswith("(") for one, good in zip(told, sound, strict=False) if good]
    assert sum(kept) >= 0.95 * len(kept)
    assert len(kept) > 0.1 * len(paths), "most damage is of a kind that no decoder passes"
    assert any(one.startswith("error") for one in told)


def test_damaged_images_and_zips_read_alike_or_are_one_line(tmp_path: Path) -> None:
    campaign(tmp_path, range(200))


@pytest.mark.slow
def test_hundreds_of_damaged_images_and_zips_read_alike_or_are_one_line(tmp_path: Path) -> None:
    campaign(tmp_path, range(10_000, 11_500))
