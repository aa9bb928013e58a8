"""The embedded videos: the patterns move as their names say, and no single frame tells which pattern it is from."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from soap_net.data import motion
from soap_net.data.episodes import EpisodeSampler
from soap_net.data.motion import PATTERNS, PATTERNS_OF, MotionConfig, render_clip, write_motion
from soap_net.data.splits import load_split
from soap_net.errors import UserError, WriteError

SMALL = MotionConfig(size=32, seconds=0.25, train_clips=2, val_clips=2, test_clips=2, dots=30)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_motion(tmp_path_factory.mktemp("data") / "motion", SMALL, progress=False)


# What moves


def test_splits_share_out_the_28_patterns_16_to_5_to_7() -> None:
    assert [len(PATTERNS_OF[split]) for split in ("train", "val", "test")] == [16, 5, 7]
    assert sorted(name for names in PATTERNS_OF.values() for name in names) == sorted(PATTERNS)
    assert len(PATTERNS) == 28


Field = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _named_fields() -> dict[str, list[Field]]:
    """What the names mean, written down anew: velocities at x to the right and y down of the centre, to some scale.

    The counterflows have two fields, one for each layer.
    """
    fields: dict[str, list[Field]] = {
        "rotation-clockwise": [lambda x, y: (-y, x)],  # right of the centre it goes down
        "rotation-anticlockwise": [lambda x, y: (y, -x)],
        "expansion": [lambda x, y: (x, y)],
        "contraction": [lambda x, y: (-x, -y)],
        "spiral-out-clockwise": [lambda x, y: (x - y, y + x)],
        "spiral-out-anticlockwise": [lambda x, y: (x + y, y - x)],
        "spiral-in-clockwise": [lambda x, y: (-x - y, -y + x)],
        "spiral-in-anticlockwise": [lambda x, y: (-x + y, -y - x)],
        "shear-top-left": [lambda x, y: (y, 0 * y)],  # above the centre, where y < 0, to the left
        "shear-top-right": [lambda x, y: (-y, 0 * y)],
        "shear-left-up": [lambda x, y: (0 * x, x)],
        "shear-left-down": [lambda x, y: (0 * x, -x)],
        "stretch-horizontal": [lambda x, y: (x, -y)],
        "stretch-vertical": [lambda x, y: (-x, y)],
    }

    def straight(degrees: float) -> Field:
        angle = math.radians(degrees)
        return lambda x, y: (torch.full_like(x, math.cos(angle)), torch.full_like(y, -math.sin(angle)))

    fields |= {f"direction-{degrees:03d}": [straight(degrees)] for degrees in range(0, 360, 30)}
    fields["counterflow-horizontal"] = [straight(0), straight(180)]
    fields["counterflow-vertical"] = [straight(90), straight(270)]
    return fields


def _predictability(clip: Tensor, fields: list[Field], step: float) -> float:
    """Correlation of each frame with the one before, moved by the fields at a root mean square of `step` pixels."""
    size = clip.shape[-1]
    images = clip[:, :1].float() - 128
    grid = torch.arange(size, dtype=torch.float32) + 0.5 - size / 2
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    moved = torch.zeros_like(images[1:])
    for field in fields:
        vx, vy = field(x, y)
        scale = step / (vx.square() + vy.square()).mean().sqrt()
        # For a linear field half a step back at half the speed, and so on, would be exact; two halves are near enough.
        mx, my = field(x - vx * scale / 2, y - vy * scale / 2)
        source = torch.stack([x - mx * scale, y - my * scale], dim=-1) / (size / 2)
        moved += F.grid_sample(images[:-1], source.expand(len(images) - 1, -1, -1, -1), align_corners=False)
    inside = (..., slice(4, -4), slice(4, -4))
    return float(torch.corrcoef(torch.stack([moved[inside].flatten(), images[1:][inside].flatten()]))[0, 1])


def test_each_clip_moves_as_its_name_says_and_as_no_other_pattern() -> None:
    config = MotionConfig(size=64, speed_spread=0, noise=0, dots=100, lifetime=1.0, seconds=0.375)
    fields = _named_fields()
    assert fields.keys() == PATTERNS.keys()
    for pattern in PATTERNS:
        clip = render_clip(pattern, 7, config)
        step = config.speed / config.frame_rate
        scores = {name: _predictability(clip, field, step) for name, field in fields.items()}
        assert max(scores, key=lambda name: scores[name]) == pattern
        assert scores[pattern] > 0.6
        assert scores[pattern] > _predictability(clip, fields[pattern], 0.5 * step)
        assert scores[pattern] > _predictability(clip, fields[pattern], 1.5 * step)


def test_twice_the_frame_rate_adds_frames_between_the_same_ones() -> None:
    config = replace(SMALL, noise=0)
    for pattern in ("spiral-in-clockwise", "counterflow-vertical"):
        slow = render_clip(pattern, 3, config)
        fast = render_clip(pattern, 3, replace(config, frame_rate=2 * config.frame_rate))
        assert torch.equal(fast[::2], slow)


def test_a_dot_lives_for_its_lifetime() -> None:
    # One dot at most, seen from its birth on: the runs of frames with a dot are as long as a life.
    config = MotionConfig(dots=0.4, lifetime=0.5, seconds=8, speed=0, noise=0, dot_radius=0.5)
    lives = []
    for seed in range(6):
        images = render_clip("direction-000", seed, config)[:, 0].flatten(1).int()
        marks = (images - 128).abs().amax(0) > 60
        for track in images[:, marks].T:
            on = np.flatnonzero(np.diff([0, *((track - 128).abs() > 60).int().tolist(), 0]))
            lives += [end - start for start, end in on.reshape(-1, 2) if start > 0 and end < len(images)]
    assert len(lives) > 20
    assert np.mean(np.isin(lives, (8, 16))) > 0.9  # 0.5 s at 16 frames a second; 16 where two follow each other


def test_a_clip_is_a_pure_function_of_its_seed() -> None:
    one = render_clip("expansion", (0, 1, 2), SMALL)
    assert one.dtype == torch.uint8
    assert one.shape == (SMALL.frames, 3, 32, 32)
    assert torch.equal(one, render_clip("expansion", (0, 1, 2), SMALL))
    assert not torch.equal(one, render_clip("expansion", (0, 1, 3), SMALL))


# What a single frame tells


def _still_features(frames: Tensor) -> Tensor:
    """What one frame (N, H, W) may give away: where the dots are, how many, how bright, their edges and neighbours."""
    images = frames.float() - 128
    size = images.shape[-1]
    grid = torch.arange(size) + 0.5 - size / 2
    radius = (grid[:, None].square() + grid[None].square()).sqrt()
    edge = torch.minimum(size / 2 - grid[:, None].abs(), size / 2 - grid[None].abs())
    power = images.square()
    dx, dy = images[:, 1:-1, 2:] - images[:, 1:-1, :-2], images[:, 2:, 1:-1] - images[:, :-2, 1:-1]
    angle, strength = torch.atan2(dy, dx), torch.hypot(dx, dy)
    inner = slice(4, -4)
    features = [
        F.adaptive_avg_pool2d(power[:, None], 6).flatten(1),
        F.adaptive_avg_pool2d(images[:, None], 4).flatten(1),
        *(power[:, (radius >= r) & (radius < r + 5)].mean(1, keepdim=True) for r in range(0, 30, 5)),
        *(power[:, (edge >= e) & (edge < e + 2)].mean(1, keepdim=True) for e in range(0, 6, 2)),
        *(((images > low) & (images <= low + 20)).float().mean((1, 2))[:, None] for low in range(-120, 120, 20)),
        *((strength * ((angle * 6 / math.pi).floor() == k)).mean((1, 2))[:, None] for k in range(-6, 6)),
        *(
            (images[:, inner, inner] * images.roll((i, j), (1, 2))[:, inner, inner]).mean((1, 2))[:, None]
            for i in range(3)
            for j in range(-2, 3)
        ),
    ]
    return torch.cat(features, 1)


def _right_answers(features: Tensor, labels: Tensor) -> tuple[int, int]:
    """Right answers of a ridge classifier, fitted on the even rows, on the odd ones; and how many those are."""
    mean, std = features[::2].mean(0), features[::2].std(0).clamp_min(1e-6)
    known = F.pad((features - mean) / std, (0, 1), value=1.0).double()
    fit, test = known[::2], known[1::2]
    targets = F.one_hot(labels[::2]).double()
    weights = torch.linalg.solve(fit.T @ fit + 30 * torch.eye(fit.shape[1], dtype=torch.float64), fit.T @ targets)
    return int(((test @ weights).argmax(1) == labels[1::2]).sum()), len(test)


def _most_by_luck(tries: int, chance: float, risk: float = 1e-4) -> int:
    """The number of right answers that guessing exceeds with a probability of at most `risk`: exact binomial tail."""
    tail, k = 1.0, 0
    while tail > risk:
        tail -= math.comb(tries, k) * chance**k * (1 - chance) ** (tries - k)
        k += 1
    return k - 1


def test_a_classifier_of_single_decoded_frames_stays_at_chance(tmp_path: Path) -> None:
    # Lives and speeds as in the demo, one frame of every clip, so that the answers are independent of each other.
    each = 24
    config = MotionConfig(seconds=0.0625, train_clips=each, val_clips=each, test_clips=each, seed=5)
    assert config.frames == 1
    write_motion(tmp_path / "motion", config, progress=False)
    frames, names = [], []
    for split in PATTERNS_OF:
        clips = load_split(tmp_path / "motion", split)
        for name, members in zip(clips.classes, clips.clips, strict=True):
            frames += [clip.read([0])[0, 0] for clip in members]
            names += [name] * len(members)
    features = _still_features(torch.stack(frames))

    patterns = torch.tensor([list(PATTERNS).index(name) for name in names])
    right, tries = _right_answers(features, patterns)
    assert right <= _most_by_luck(tries, 1 / 28)

    # Whether dots run apart or together would show first in their density: ask for that alone.
    apart = torch.tensor(["out" in name or name == "expansion" for name in names])
    together = torch.tensor(["in-" in name or name == "contraction" for name in names])
    chosen = apart | together
    right, tries = _right_answers(features[chosen], apart[chosen].long())
    assert right <= _most_by_luck(tries, 0.5)


def test_the_classifier_of_single_frames_would_find_a_trace() -> None:
    # The control of the test above: a difference in density of a fifth, as dots that die outside the frame leave.
    frames = [
        render_clip("direction-000", (number, cls), MotionConfig(seconds=0.0625, dots=60 if cls else 72))[0, 0]
        for number in range(72)
        for cls in (0, 0, 1, 1)
    ]
    right, tries = _right_answers(_still_features(torch.stack(frames)), torch.tensor([0, 0, 1, 1] * 72))
    assert right > _most_by_luck(tries, 0.5)


@pytest.mark.parametrize("lifetime", [0.375, 1.5])
def test_density_is_the_same_whether_dots_run_apart_or_together(lifetime: float) -> None:
    config = MotionConfig(seconds=0.5, frame_rate=4, lifetime=lifetime, noise=0, speed_spread=0)
    power: dict[str, list[float]] = {}
    for pattern in ("expansion", "contraction", "direction-090"):
        clips = torch.stack([render_clip(pattern, (9, seed), config)[:, 0] for seed in range(60)]).float() - 128
        power[pattern] = clips.square().mean((1, 2, 3)).tolist()
    for pattern in ("expansion", "contraction"):
        difference = np.mean(power[pattern]) - np.mean(power["direction-090"])
        error = math.sqrt((np.var(power[pattern]) + np.var(power["direction-090"])) / 60)
        assert abs(difference) < 4 * error


# Files


def test_written_clips_are_read_back_as_any_other_data_set(written: Path) -> None:
    for split, patterns in PATTERNS_OF.items():
        clips = load_split(written, split)
        assert sorted(clips.classes) == sorted(patterns)
        assert all(len(members) == 2 for members in clips.clips)
        EpisodeSampler(clips, way=5, shot=1, queries=1, seed=0)
    clip = clips.clips[0][1]
    frames = clip.read(range(SMALL.frames))
    pattern = clips.classes[0]
    drawn = render_clip(pattern, (SMALL.seed, list(PATTERNS).index(pattern), 1), SMALL)
    assert (frames.int() - drawn.int()).abs().float().mean() < 2
    assert clip.probe().fps == SMALL.frame_rate


def test_every_frame_is_a_keyframe(written: Path) -> None:
    # A predicted frame would carry traces of the motion in its compression artefacts.
    path = next((written / "videos" / "expansion").iterdir())
    with av.open(str(path)) as container:
        assert [packet.is_keyframe for packet in container.demux(video=0) if packet.size] == [True] * SMALL.frames


def test_files_are_the_same_for_any_number_of_workers(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(motion.os, "cpu_count", lambda: 7)
    again = write_motion(tmp_path / "again", SMALL, progress=False)
    files = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert len(files) == 28 * 2 + 4
    assert all((written / file).read_bytes() == (again / file).read_bytes() for file in files)


def _times(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


TINY = replace(SMALL, size=16, seconds=0.0625, train_clips=1, val_clips=1, test_clips=1)


def test_a_whole_data_set_of_the_same_config_is_left_alone_and_any_other_replaced(tmp_path: Path) -> None:
    root = write_motion(tmp_path / "motion", TINY, progress=False)
    before = _times(root)
    write_motion(root, TINY, progress=False)
    assert _times(root) == before
    clip = root / "videos" / "expansion" / "expansion-0000.mp4"
    drawn = clip.read_bytes()
    clip.unlink()
    write_motion(root, TINY, progress=False)
    assert clip.read_bytes() == drawn
    write_motion(root, replace(TINY, seed=1), progress=False)
    assert clip.read_bytes() != drawn
    assert [path.name for path in tmp_path.iterdir()] == ["motion"]


def test_a_crash_while_writing_leaves_nothing_behind_and_an_older_set_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pattern: str, seed: tuple[int, ...], config: MotionConfig) -> Tensor:
        if pattern == "expansion":
            raise OSError(28, "No space left on device")
        return render_clip(pattern, seed, config)

    old = write_motion(tmp_path / "old", TINY, progress=False)
    before = _times(old)
    monkeypatch.setattr(motion, "render_clip", fail)
    for root in (tmp_path / "new", old):
        with pytest.raises(OSError, match="No space left"):
            write_motion(root, replace(TINY, seed=1), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert _times(old) == before


def test_folders_that_killed_processes_left_go_and_one_in_use_stays(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="needs flock, which this system lacks")
    root = write_motion(tmp_path / "mo[ti]on", TINY, progress=False)
    for name in (".mo[ti]on.part-dead", ".mo[ti]on.part-live", ".other.part-x", "mo[ti]on.part-x"):
        (tmp_path / name / "fresh").mkdir(parents=True)
        (tmp_path / name / "fresh" / "clip.mp4").touch()
    handle = os.open(tmp_path / ".mo[ti]on.part-live", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    write_motion(root, TINY, progress=False)
    left = {".mo[ti]on.part-live", ".other.part-x", "mo[ti]on.part-x", "mo[ti]on"}
    assert {path.name for path in tmp_path.iterdir()} == left
    os.close(handle)
    write_motion(root, TINY, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == left - {".mo[ti]on.part-live"}


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, as it forks and locks folders")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_an_ended_process_was_writing_goes(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, begun = tmp_path / "motion", tmp_path / "begun"

    def wait(pattern: str, seed: tuple[int, ...], config: MotionConfig) -> Tensor:
        begun.touch()
        time.sleep(0.2)
        return render_clip(pattern, seed, config)

    def write() -> None:
        monkeypatch.setattr(motion, "render_clip", wait)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        write_motion(root, TINY, progress=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = multiprocessing.get_context("fork").Process(target=write)
        process.start()
    while not begun.exists():
        time.sleep(0.01)
    assert process.pid is not None
    assert len([*tmp_path.glob(".motion.part-*")]) == 1
    os.kill(process.pid, number)
    process.join()
    begun.unlink()
    assert [path.name[:13] for path in tmp_path.iterdir()] == [".motion.part-"] * (number == signal.SIGKILL)
    write_motion(root, TINY, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["motion"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="/file/motion: "):
        write_motion(tmp_path / "file" / "motion", SMALL, progress=False)


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "holiday.mp4").write_bytes(b"mine")
    with pytest.raises(UserError, match="holds other files than the motion data"):
        write_motion(tmp_path, TINY, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.mp4"]
    with pytest.raises(UserError, match="not a folder"):
        write_motion(tmp_path / "holiday.mp4", TINY, progress=False)


def test_mpeg4_stands_in_where_x264_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(motion, "CODECS", motion.CODECS[1:])
    config = replace(TINY, size=48)
    root = write_motion(tmp_path / "motion", config, progress=False)
    clip = load_split(root, "test").clips[0][0]
    drawn = render_clip("counterflow-horizontal", (0, list(PATTERNS).index("counterflow-horizontal"), 0), config)
    assert clip.name == "counterflow-horizontal/counterflow-horizontal-0000"
    assert (clip.read([0]).int() - drawn.int()).abs().float().mean() < 6
    monkeypatch.setattr(motion, "CODECS", (("no_such_codec", "", {}),))
    with pytest.raises(UserError, match="can encode neither no_such_codec"):
        write_motion(tmp_path / "other", TINY, progress=False)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("size", 31), ("size", 0), ("lifetime", 0.0), ("dots", float("nan")), ("speed_spread", 1.0), ("train_clips", -1)],
)
def test_settings_that_describe_no_clip_are_refused_by_name(setting: str, value: float) -> None:
    with pytest.raises(UserError, match=f"motion data: {setting} is {value}"):
        replace(SMALL, **{setting: value})


def test_an_unknown_pattern_is_refused() -> None:
    with pytest.raises(UserError, match="unknown pattern 'spiral'"):
        render_clip("spiral", 0, SMALL)
