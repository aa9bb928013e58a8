"""SOAP-Net in the form of Hugging Face's hub: a folder with `config.json`, `model.safetensors` and a model card.

The folder holds data alone: all settings of the training, checked on reading as any others are, and the weights. It
stands wherever a checkpoint is asked for (`soap_net.checkpoint`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import safetensors.torch
from huggingface_hub import EvalResult as CardResult
from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin

from soap_net.checkpoint import SETTINGS, WEIGHTS, CheckpointError, load_model, non_finite
from soap_net.config import Config, from_dict, to_dict
from soap_net.errors import UserError
from soap_net.files import read_json, replacing, write_text, writing
from soap_net.settings import AtLeast, build, dump, read

if TYPE_CHECKING:
    from soap_net.models.soap_net import SOAPNet

PAPER = "https://arxiv.org/abs/2407.16344"
TASK = "video-classification"
README = "README.md"

CARD = """---
{{ card_data }}
---

# {{ name }}

A network that tells actions apart which it has not seen in training, by a few clips of each: SOAP-Net
([paper]({{ paper_url }})) with the backbone `{{ model.backbone }}` and the head `{{ model.head }}`,
{% if model.soap.enabled %}with SOAP's priors {{ model.soap.parts | join(", ") }}{% else %}without SOAP{% endif %},
on clips of {{ frames }} frames, trained on `{{ data_set }}`.

## Accuracy
{% if results %}
| data set | classes | task | accuracy | 95 % interval over tasks | tasks |
|---|---|---|---|---|---|
{% for one in results -%}
| {{ one.data_set }} | {{ one.split }} | {{ one.task }} | {{ "%.2f" | format(one.accuracy) }} % | {{ one.interval }} \
| {{ one.tasks }} |
{% endfor %}{% else %}
It was not evaluated.
{% endif %}
## Use

    pip install soap-net
    hf download {{ repo_id | default("OWNER/NAME", true) }} --local-dir FOLDER
    soap-net classify --checkpoint FOLDER --support my_classes --query my_clip.mp4

or `SOAPNet.from_pretrained("{{ repo_id | default("OWNER/NAME", true) }}")` of `soap_net.models`.

## Settings

```yaml
{{ settings }}```
"""


@dataclass
class Accuracy:
    """What of an `eval.json` a model card shows; percent, ``ci95`` half the width of the interval in points."""

    accuracy: Annotated[float, AtLeast(0, most=100)]
    ci95: Annotated[float, AtLeast(0)] | None
    tasks: Annotated[int, AtLeast(1)]
    way: Annotated[int, AtLeast(1)]
    shot: Annotated[int, AtLeast(1)]
    split: str
    data_set: str = ""

    @property
    def task(self) -> str:
        """``5-way 1-shot``."""
        return f"{self.way}-way {self.shot}-shot"

    @property
    def interval(self) -> str:
        """``+- 0.42``, in points; of a single task there is none."""
        return "none, of a single task" if self.ci95 is None else f"+- {self.ci95:.2f}"


class Pretrained(
    PyTorchModelHubMixin,
    library_name="soap-net",
    tags=["few-shot", "action-recognition", "video"],
    pipeline_tag=TASK,
    paper_url=PAPER,
    model_card_template=CARD,
):
    """``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` of a `SOAPNet`.

    Attributes:
        config: all that the net was trained with; `checkpoint.load_model` and `from_pretrained` set it.
    """

    config: Config | None = None

    def save_pretrained(  # type: ignore[override]  # a mapping stands for a config
        self, save_directory: str | Path, *, config: Config | Mapping[str, Any] | None = None, **options: Any
    ) -> str | None:
        """Writes `config.json`, `model.safetensors` and, where there is none, `README.md`, the model card.

        Args:
            save_directory: the folder, made if need be.
            config: all that the net was trained with; by default its own `config`.
            options: the mixin's, as ``model_card_kwargs``: see `generate_model_card`.

        Returns:
            With ``push_to_hub=True`` the address of the commit.

        Raises:
            UserError: no config, a backbone from a folder, which others lack, a weight that is not finite, or a result
                that is none; nothing is written then.
            WriteError: the disk is full or the folder can't be written.
        """
        if config is not None:
            self.config = from_dict(config) if isinstance(config, Mapping) else config
        if (name := non_finite(self.state_dict())) is not None:  # type: ignore[attr-defined]  # of an nn.Module
            raise CheckpointError(f"{save_directory}: not written, as the weight {name} is not finite")
        card = self.generate_model_card(**(options.get("model_card_kwargs") or {}))  # refuses what it can't show
        folder = Path(save_directory)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if not (folder / README).exists():
            write_text(folder / README, str(card))
        return super().save_pretrained(save_directory, config=to_dict(self._portable()), **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        state = {key: value.contiguous() for key, value in self.state_dict().items()}  # type: ignore[attr-defined]
        data = safetensors.torch.save(state, {"format": "pt"})
        with replacing(save_directory / WEIGHTS) as file:
            file.write(data)
        settings = json.dumps(to_dict(self._portable()), indent=2, ensure_ascii=False)
        write_text(save_directory / SETTINGS, settings + "\n")

    def generate_model_card(
        self, *args: Any, results: Sequence[str | Path | Mapping[str, Any]] = (), **more: Any
    ) -> ModelCard:
        """The model card.

        Args:
            args: none.
            results: `eval.json` files of the net, or what they hold.
            more: for the template, as ``repo_id``.

        Raises:
            UserError: no config, a backbone from a folder, or a result that is none.
        """
        config = self._portable()
        name = f"SOAP-Net on {config.data.name}"
        found = [_accuracy(result, config.data.name) for result in results]
        data: Any = self._hub_mixin_info.model_card_data.to_dict()
        if found:
            data |= {"model_name": name, "eval_results": [_listed(one) for one in found]}
        return ModelCard.from_template(
            ModelCardData(**data),
            template_str=CARD,
            name=name,
            paper_url=PAPER,
            model=config.model,
            frames=config.data.frames,
            data_set=config.data.name,
            results=found,
            settings=dump(config),
            **more,
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]  # settings come from the file, and are checked there
        cls, name_or_path: str | Path, *, backend: str = "auto", map_location: str = "cpu", **download: Any
    ) -> SOAPNet:
        """What `save_pretrained` wrote, in evaluation mode, with its `config`; no code of the folder is run.

        Args:
            name_or_path: a folder, or ``owner/name`` on the hub.
            backend: what SOAP is to run with here.
            map_location: the device.
            download: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

        Raises:
            UserError: no such folder or repository, settings that are none, weights that don't fit them.
        """
        from soap_kernels.hub import folder_of

        try:
            folder = folder_of(name_or_path, **download)
        except ValueError as error:
            raise UserError(str(error)) from error
        return load_model(folder, map_location, backend=backend)[0]

    def _portable(self) -> Config:
        """What is written of the config; raises UserError where there is none, or the net can't be built from it."""
        if self.config is None:
            raise UserError("say with which config the net was trained: save_pretrained(folder, config=config)")
        if self.config.model.folder is not None:
            raise UserError(
                f"model.backbone is {self.config.model.backbone}, a folder of this machine, and the net can be built "
                "nowhere else: in config, name one of the hub that is built alike, as hf:owner/model"
            )
        return self.config.portable()


def _accuracy(result: str | Path | Mapping[str, Any], data_set: str) -> Accuracy:
    where = "the result" if isinstance(result, Mapping) else str(result)
    values = result if isinstance(result, Mapping) else read_json(Path(result))
    if values is None:
        raise UserError(f"{where}: no such file; soap-net eval writes one")
    kept = {field.name: values[field.name] for field in fields(Accuracy) if field.name in values}
    if missing := [name for name in ("accuracy", "ci95", "tasks", "way", "shot", "split") if name not in kept]:
        raise UserError(f"{where}: not an eval.json: there is no {missing[0]} in it")
    return build(Accuracy, read({"data_set": data_set, **kept}, Accuracy, where))


def _listed(one: Accuracy) -> CardResult:
    return CardResult(
        task_type=TASK,
        dataset_type=one.data_set,
        dataset_name=f"{one.data_set}, {one.split} classes",
        metric_type="accuracy",
        metric_name=f"{one.task} accuracy, {one.interval}",
        metric_value=round(one.accuracy, 2),
    )
