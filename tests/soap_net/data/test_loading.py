"""What comes from data workers, and what ends them: real processes, really killed and really stuck."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from soap_net.data.clips import Clip
from soap_net.data.loading import PerClip, load
from soap_net.errors import ClipError, UserError


class Items(Dataset[Tensor]):
    """Tensors of 0, 1, 2 ...; `mishap` comes over the process that reads item 3."""

    def __init__(self, count: int = 8, mishap: Callable[[], object] | None = None) -> None:
        self.count = count
        self.mishap = mishap

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> Tensor:
        if position == 3 and self.mishap is not None:
            self.mishap()
        return torch.full((1000,), position)


def stuck_in_native_code() -> None:
    ctypes.PyDLL(None).sleep(1000)  # PyDLL keeps the interpreter's lock: no Python runs in this process any more


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exits() -> None:
    os._exit(7)


def killed_in_a_lock() -> None:
    """As where SIGKILL comes while PyTorch's loop asks whether to end: whatever it asks by a lock stays locked."""
    frame = sys._getframe()
    while frame.f_code.co_name != "_worker_loop":
        assert frame.f_back is not None
        frame = frame.f_back
    asked = getattr(frame.f_locals["done_event"], "_cond", None)
    if asked is not None:
        asked.acquire()
    killed()


def refuses() -> None:
    raise ClipError(Path("some.mp4"), "no good")


def fails() -> None:
    raise RuntimeError("a fault in the program")


def collect_and_count(clip: Clip) -> int:
    gc.collect()
    return clip.num_frames()


def read_number(clip: Clip) -> int:
    if clip.path.name == "2.mp4":
        refuses()
    if clip.path.name == "5.mp4":
        stuck_in_native_code()
    return int(clip.path.stem)


@pytest.fixture(autouse=True)
def _no_process_is_left() -> None:
    yield
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_items_come_in_their_order_one_by_one_or_in_lists(workers: int) -> None:
    assert [int(item[0]) for item in load(Items(), workers)] == list(range(8))
    lists = [[int(item[0]) for item in items] for items in load(Items(), workers, batch_size=3)]
    assert lists == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert list(load(Items(0), workers)) == []


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_users_arrives_as_it_was_raised(workers: int, batch_size: int | None) -> None:
    with pytest.raises(ClipError, match=r"^some\.mp4: no good$") as caught:
        list(load(Items(mishap=refuses), workers, batch_size=batch_size))
    assert caught.value.path == Path("some.mp4")


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_are_given_a_zips_index_and_do_not_read_it_again(method: str, tmp_path: Path) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system starts no processes by {method}")
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        for video, frames in enumerate((2, 1, 3)):
            for frame in range(frames):
                file.writestr(f"c/{video}/{frame}.jpg", b"no image")
    clips = [Clip(path, member=f"c/{video}") for video in range(3)]
    assert [clip.num_frames() for clip in clips] == [2, 1, 3]
    stat = path.stat()
    path.write_bytes(bytes(stat.st_size))  # whoever reads it again finds no index
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    try:
        assert list(load(PerClip(clips, Clip.num_frames), 2)) == [2, 1, 3]
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_the_callers_own_handler_of_ended_children_stays() -> None:
    heard: list[int] = []
    previous = signal.signal(signal.SIGCHLD, lambda *_: heard.append(1))
    try:
        list(load(Items(), 2))
    finally:
        signal.signal(signal.SIGCHLD, previous)
    assert heard


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_of_the_program_keeps_its_traceback(workers: int) -> None:
    with pytest.raises(RuntimeError, match="a fault in the program"):
        list(load(Items(mishap=fails), workers))


def test_per_clip_gives_an_unreadable_clips_error_in_its_place() -> None:
    clips = [Clip(Path(f"{number}.mp4")) for number in range(5)]
    for workers in (0, 2):
        found = list(load(PerClip(clips, read_number), workers))
        assert [item for item in found if not isinstance(item, ClipError)] == [0, 1, 3, 4]
        assert str(found[2]) == "some.mp4: no good"


@pytest.mark.parametrize(
    ("mishap", "how"),
    [(killed, "was killed by SIGKILL"), (killed_in_a_lock, "was killed by SIGKILL"), (exits, "ended with code 7")],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_that_dies_ends_the_reading(mishap: Callable[[], object], how: str, workers: int) -> None:
    began = time.monotonic()
    with pytest.raises(
        UserError, match=f"^a data worker {how} while reading item 3; where memory ran out, fewer workers may help$"
    ):
        list(load(Items(mishap=mishap), workers))
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_stuck_in_native_code_ends_the_reading(workers: int) -> None:
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"^nothing came from the data workers for 3 s, and they were ended, while reading item 3; "
    ):
        list(load(Items(mishap=stuck_in_native_code), workers, timeout=3))
    assert time.monotonic() - began < 30


def test_the_clip_that_a_worker_is_stuck_in_is_named() -> None:
    clips = [Clip(Path(f"a/{number}.mp4")) for number in (0, 1, 5)]
    reading = load(PerClip(clips, read_number), 1, timeout=3)
    # Where what came before has not left the process yet, it never will; still it is the last that is named.
    with pytest.raises(UserError, match="for 3 s, and they were ended, while reading a/5; "):
        list(reading)


def test_time_that_the_caller_takes_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = load(Items(), 1, timeout=5)
    for item in reading:
        if int(item[0]) < 3:
            time.sleep(2.0)
    assert int(item[0]) == 7


def test_closing_ends_workers_that_ignore_sigterm_and_are_stuck() -> None:
    reading = load(Items(mishap=stuck_in_native_code), 2)
    next(reading)
    began = time.monotonic()
    reading.close()
    assert time.monotonic() - began < 20


def test_a_worker_killed_meanwhile_raises_nothing_in_the_callers_code() -> None:
    assert len(list(DataLoader(Items(2), num_workers=1))) == 2  # leaves PyTorch's handler of SIGCHLD behind
    reading = load(Items(100), 1)
    next(reading)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    for _ in range(20):
        time.sleep(0.02)  # where that handler would raise
    with pytest.raises(UserError, match="killed by SIGKILL"):
        list(reading)


def test_ctrl_c_and_sigterm_leave_workers_alone() -> None:
    reading = load(Items(60), 1)
    next(reading)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(multiprocessing.active_children()[0].pid, number)
    assert [int(item[0]) for item in reading] == list(range(1, 60))


def test_the_program_ends_though_nobody_closed_the_reading() -> None:
    program = f"""
import faulthandler, importlib.util, sys
faulthandler.dump_traceback_later(180, exit=True)
spec = importlib.util.spec_from_file_location("cases", {__file__!r})
cases = importlib.util.module_from_spec(spec)
sys.modules["cases"] = cases
spec.loader.exec_module(cases)
reading = cases.load(cases.Items(mishap=cases.stuck_in_native_code), 2)
print(int(next(reading)[0]), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=200, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_a_worker_that_collects_garbage_does_not_wait_for_its_parents_decoders(tmp_path: Path) -> None:
    # A decoder's threads are not in a forked process; freed there, it would wait for them without end.
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode())
    gc.disable()
    try:
        with av.open(str(path)) as decoding:
            video = decoding.streams.video[0]
            video.codec_context.thread_count = 4
            next(decoding.decode(video=0))
        ring: list[object] = [video]
        ring.append(ring)
        del ring, video, decoding
        assert list(load(PerClip([Clip(path)], collect_and_count), 1, timeout=20.0)) == [10]
    finally:
        gc.enable()
