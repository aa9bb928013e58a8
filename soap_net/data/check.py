"""Reads a whole data set once, to find out before training what is missing or broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from soap_net.data.clips import Clip, ClipError, ClipInfo
from soap_net.data.splits import ClipSet, MissingClipsError, load_split
from soap_net.data.transforms import FrameSampling


@dataclass
class SplitReport:
    """One split: what its readable clips hold, and what is wrong with the others."""

    split: str
    clips_per_class: dict[str, int]
    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    infos: list[ClipInfo] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether every clip is there and can be read."""
        return not self.missing and not self.broken

    def summary(self) -> str:
        """Several lines of text."""
        counts = list(self.clips_per_class.values())
        lines = [
            f"{self.split}: {len(counts)} classes, {sum(counts)} clips "
            f"({min(counts, default=0)} to {max(counts, default=0)} per class)"
        ]
        if self.infos:
            frames = sorted(info.frames for info in self.infos)
            lines.append(f"  frames per clip: {frames[0]} to {frames[-1]}, median {frames[len(frames) // 2]}")
            sizes = Counter((info.width, info.height) for info in self.infos).most_common()
            shown = ", ".join(f"{width}x{height} ({count})" for (width, height), count in sizes[:4])
            lines.append(f"  sizes: {shown}{f' and {len(sizes) - 4} more' if len(sizes) > 4 else ''}")
            rates = sorted({round(info.fps, 2) for info in self.infos if info.fps})
            if rates:
                lines.append(f"  frames per second: {', '.join(map(str, rates[:6]))}{' ...' if len(rates) > 6 else ''}")
        lines += [f"  missing: {name}" for name in self.missing]
        lines += [f"  broken: {reason}" for reason in self.broken]
        lines.append(
            "  every clip is there and can be read"
            if self.sound
            else f"  {len(self.missing)} clips missing, {len(self.broken)} broken"
        )
        return "\n".join(lines)


class _Probes(Dataset[ClipInfo | ClipError]):
    def __init__(self, clips: Sequence[Clip], sampling: FrameSampling) -> None:
        self.clips = clips
        self.sampling = sampling

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, position: int) -> ClipInfo | ClipError:
        try:
            clip = self.clips[position]
            info = clip.probe()
            clip.read(self.sampling.indices(info.frames, None))  # a truncated video still has its first frame
        except ClipError as error:
            return error
        return info


def check_split(
    root: Path,
    split: str,
    split_file: Path | None = None,
    *,
    sampling: FrameSampling | None = None,
    workers: int = 0,
    progress: bool = True,
) -> SplitReport:
    """Reads the frames that evaluation would read of every clip of a split.

    Raises:
        UserError: no data set or split there, or a malformed split file. Missing and broken clips are reported.
    """
    missing: list[str] = []
    try:
        found: ClipSet = load_split(root, split, split_file)
    except MissingClipsError as error:
        found, missing = error.found, list(error.missing)
    report = SplitReport(split, {n: len(c) for n, c in zip(found.classes, found.clips, strict=True)}, missing)
    clips = [clip for members in found.clips for clip in members]
    probes = DataLoader(_Probes(clips, sampling or FrameSampling()), batch_size=None, num_workers=workers)
    for result in tqdm(probes, desc=f"reading {split}", unit="clip", leave=False, disable=None if progress else True):
        if isinstance(result, ClipError):
            report.broken.append(str(result))
        else:
            report.infos.append(result)
    return report
