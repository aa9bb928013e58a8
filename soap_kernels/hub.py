"""SOAP alone in the form of Hugging Face's hub: a folder with `config.json`, `model.safetensors` and a model card.

The one module here that needs ``huggingface_hub`` and ``safetensors``; nothing else of this package imports it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

try:
    from huggingface_hub import PyTorchModelHubMixin, snapshot_download
    from safetensors.torch import load_file
except ImportError as error:
    raise ImportError("soap_kernels.hub needs: pip install huggingface_hub safetensors") from error

from soap_kernels import op
from soap_kernels.modules import SOAP

PAPER = "https://arxiv.org/abs/2407.16344"
SETTINGS, WEIGHTS = "config.json", "model.safetensors"
LARGEST_SETTINGS = 2**16
"""Bytes of a config.json."""

CARD = """---
{{ card_data }}
---

# SOAP for clips of {{ frames }} frames

Three small modules that relate frames in space and time, in front of any video model ([paper]({{ paper_url }})): the
frames plus their priors, in the shape of the frames.

```python
from soap_kernels.hub import HubSOAP

soap = HubSOAP.from_pretrained("{{ repo_id | default("FOLDER", true) }}")
```
"""


def folder_of(name_or_path: str | Path, **download: Any) -> Path:
    """The folder at that path, or else what `config.json` and `model.safetensors` a repository of the hub has.

    Args:
        name_or_path: a folder, or ``owner/name``.
        download: as ``huggingface_hub.snapshot_download`` takes it: ``revision``, ``token``, ``cache_dir``,
            ``local_files_only``, ``force_download``.

    Raises:
        ValueError: no such folder, and the repository can't be had.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(name_or_path), allow_patterns=[SETTINGS, WEIGHTS], **download))
        except Exception as error:  # of the hub, the network, the disk
            why = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(f"no folder {name_or_path}, and Hugging Face's hub does not give it: {why}") from error
    if missing := [name for name in (SETTINGS, WEIGHTS) if not (folder / name).is_file()]:
        raise ValueError(f"{folder}: no model: there is no {' and no '.join(missing)} in it")
    return folder


class HubSOAP(
    SOAP,
    PyTorchModelHubMixin,
    library_name="soap-net",
    tags=["soap", "video"],
    paper_url=PAPER,
    model_card_template=CARD,
):
    """`SOAP` with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` of Hugging Face's mixin."""

    def settings(self) -> dict[str, Any]:
        """What makes the same of `HubSOAP`, as plain values; without ``backend``, which is the machine's matter."""
        return {
            "frames": self.frames,
            "channels": self.channels,
            "tuple_sizes": list(self.tuple_sizes),
            "hidden_channels": self.hidden_channels,
            "parts": list(self.parts),
            "variant": self.variant,
            "centred": self.centred,
            "start": self.start,
            "precision": self.precision,
            "normalize": self.normalize and [list(map(float, numbers)) for numbers in self.normalize],
            "out_dtype": self.out_dtype and str(self.out_dtype),
            "out_channels_last": self.out_channels_last,
        }

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Writes `config.json`, `model.safetensors` and, where there is none, `README.md`; ``options`` are the mixin's.

        Raises:
            ValueError: a weight is not finite.
        """
        if name := next((name for name, weight in self.state_dict().items() if not weight.isfinite().all()), None):
            raise ValueError(f"HubSOAP: the weight {name} is not finite: nothing is written")
        return super().save_pretrained(save_directory, **{**options, "config": self.settings()})

    def generate_model_card(self, *args: Any, **more: Any) -> Any:
        """The model card; ``more`` goes into its template."""
        return super().generate_model_card(*args, frames=self.frames, **more)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # settings come from the file, and are checked there
        cls, name_or_path: str | Path, *, backend: str = "auto", map_location: str = "cpu", **download: Any
    ) -> HubSOAP:
        """What `save_pretrained` wrote, in evaluation mode; no code of the folder is run and no pickle read.

        Args:
            name_or_path: a folder, or ``owner/name`` on the hub.
            backend: what SOAP is to run with here.
            map_location: the device.
            download: see `folder_of`.

        Raises:
            ValueError: no such folder or repository, settings that are none of SOAP's, weights that don't fit them.
        """
        folder = folder_of(name_or_path, **download)
        with torch.device("meta"):  # settings may describe any size: weights are compared with an outline
            soap = cls(**_settings(folder / SETTINGS), backend=backend)
        try:
            state = load_file(folder / WEIGHTS, device=map_location)
        except Exception as error:  # damaged files fail in safetensors in many ways
            raise ValueError(f"{folder / WEIGHTS}: damaged, or no safetensors: {error}") from error
        own = soap.state_dict()
        if misfit := sorted(own.keys() ^ state.keys() or (key for key in own if own[key].shape != state[key].shape)):
            raise ValueError(f"{folder / WEIGHTS}: does not fit its {SETTINGS}: {misfit[0]!r}")
        if odd := next((key for key, weight in state.items() if not weight.isfinite().all()), None):
            raise ValueError(f"{folder / WEIGHTS}: the weight {odd!r} is not finite")
        soap.load_state_dict(state, assign=True)
        return soap.eval()


def _settings(path: Path) -> dict[str, Any]:
    """Those in a config.json, each of its own type; raises ValueError where they are none of SOAP's.

    One that an older version did not have is left to its default.
    """

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**16

    def listed(kind: Any) -> Any:
        return lambda value: isinstance(value, list) and all(map(kind, value))

    def text(value: Any) -> bool:
        return isinstance(value, str)

    def number(value: Any) -> bool:
        return isinstance(value, float)

    dtypes: dict[Any, Any] = {None: None, **{str(dtype): dtype for dtype in op.FLOATS}}
    kinds: dict[str, Any] = {
        **dict.fromkeys(("frames", "channels", "hidden_channels"), whole),
        **dict.fromkeys(("variant", "precision", "start"), text),
        "tuple_sizes": listed(whole),
        "parts": listed(text),
        "normalize": lambda value: value is None or (listed(listed(number))(value) and len(value) == 2),
        "out_dtype": lambda value: value is None or (text(value) and value in dtypes),
        **dict.fromkeys(("centred", "out_channels_last"), lambda value: isinstance(value, bool)),
    }
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(LARGEST_SETTINGS))
        wrong = sorted(found.keys() - kinds.keys()) or [key for key in found if not kinds[key](found[key])]
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, or not the settings of SOAP") from error
    if wrong:
        raise ValueError(f"{path}: not the settings of this version's SOAP: {str(wrong[0])[:60]!r}")
    return {**found, "out_dtype": dtypes[found.get("out_dtype")]}
