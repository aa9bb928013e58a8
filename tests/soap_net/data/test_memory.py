import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from soap_net.config import DataConfig
from soap_net.data.clips import Clip
from soap_net.data.memory import ClipMemory
from soap_net.data.transforms import clip_loader
from soap_net.errors import ClipError

LIMIT = 64 * 6 * 48
"""Room for 64 clips of six frames of 3 x 4 x 4."""


@pytest.fixture
def clip(tmp_path: Path) -> Clip:
    """Six frames of noise."""
    rng = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    return Clip(tmp_path)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The frame numbers of each reading of a clip."""
    found: list[list[int]] = []
    read = Clip.read

    def noted(self: Clip, indices: list[int]) -> torch.Tensor:
        found.append(list(indices))
        return read(self, indices)

    monkeypatch.setattr(Clip, "read", noted)
    return found


def test_kept_clip_gives_the_same_frames_without_reading_again(clip: Clip, reads: list[list[int]]) -> None:
    memory = ClipMemory(LIMIT)
    for indices in ([1, 4], [5, 0, 5], [3]):
        torch.testing.assert_close(memory.read(clip, indices), clip.read(indices), rtol=0, atol=0)
    # Besides the three comparisons: the frames wanted first, and once all of them.
    assert reads == [[1, 4], [0, 1, 2, 3, 4, 5], [1, 4], [5, 0, 5], [3]]


def test_writing_into_what_was_read_leaves_the_kept_frames_alone(clip: Clip) -> None:
    memory = ClipMemory(LIMIT)
    memory.read(clip, [0]).zero_()
    memory.read(clip, [0]).zero_()
    assert memory.read(clip, [0]).any()


def test_a_broken_frame_that_is_not_wanted_does_no_harm(clip: Clip) -> None:
    (clip.path / "5.png").write_bytes(b"no image")
    memory = ClipMemory(LIMIT)
    for _ in range(2):
        assert memory.read(clip, [0, 4]).shape == (2, 3, 4, 4)
    with pytest.raises(ClipError, match=r"5\.png"):
        memory.read(clip, [5])


def test_nothing_is_kept_beyond_the_limit_or_by_a_loader_that_is_given_no_memory(
    clip: Clip, reads: list[list[int]]
) -> None:
    small, off = ClipMemory(LIMIT - 64), ClipMemory()
    for memory in (small, off):
        memory.read(clip, [2])
        memory.read(clip, [2])
    assert reads == [[2]] * 4
    loader = clip_loader(DataConfig(frames=2, resize=4, crop=4), train=False)
    assert torch.equal(loader(clip), loader(clip))
    assert reads[4:] == [[1, 4]] * 2


def test_clips_are_read_through_the_memory_that_the_loader_is_given(clip: Clip, reads: list[list[int]]) -> None:
    memory = ClipMemory(LIMIT)
    loader = clip_loader(DataConfig(frames=2, resize=4, crop=4), train=False, memory=memory)
    assert torch.equal(loader(clip), loader(clip))
    assert reads == [[1, 4], [0, 1, 2, 3, 4, 5]]


def test_another_process_gets_the_limit_and_no_clips(clip: Clip, reads: list[list[int]]) -> None:
    memory = ClipMemory(LIMIT)
    memory.read(clip, [0])
    copy = pickle.loads(pickle.dumps(memory))
    copy.read(clip, [0])
    assert copy.limit == LIMIT
    assert reads == 2 * [[0], [0, 1, 2, 3, 4, 5]]
