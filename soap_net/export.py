"""A classifier as one ONNX file, from frames to probabilities, for programs without PyTorch.

Its input is ``frames`` (B, T, 3, crop, crop) uint8 RGB, its outputs are ``probabilities`` (B, way) float32 and
``known`` (B,) bool. How a clip becomes such frames, and what the classes are, is in the file's metadata.
"""

from __future__ import annotations

import copy
import io
import json
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from soap_kernels import SOAP
from soap_net.calibration import Calibration
from soap_net.classify import Classifier
from soap_net.config import to_dict
from soap_net.errors import UserError
from soap_net.files import replacing
from soap_net.models.heads import group_by_class
from soap_net.models.soap_net import SOAPNet
from soap_net.tasks import autocast

TOLERANCE = 1e-4
"""What probabilities of the file may differ by from the classifier's in full precision, and what is a tie of known."""


def export(classifier: Classifier, path: Path) -> float:
    """Writes what `classifier` has learnt, whole or not at all, after a try of it in onnxruntime.

    The file computes in float32. Where the classifier does, too, on the CPU, its own predictions are what the file has
    to give; where it rounds more (`train.amp`, a GPU) they are what PyTorch gives in float32 on the CPU.

    Returns:
        The largest difference of a probability from the classifier's own in that try.

    Raises:
        UserError: nothing was learnt, a package is missing, the net has parts that ONNX does not know, or onnxruntime
            answers otherwise.
        WriteError: the disk is full or the folder can't be written.
    """
    calibration = classifier.calibration  # of a classifier that knows no classes this raises
    try:
        import onnxruntime  # noqa: F401 (asked for before the work)
        import onnxscript  # noqa: F401 (torch.onnx would ask for it late)
    except ImportError as error:
        needs = "pip install 'onnx>=1.18' 'onnxscript>=0.6' 'onnxruntime>=1.22'"
        raise UserError(f"{error.name} is missing, which export needs: {needs}") from error
    net = FramesToClasses(classifier, calibration).eval()
    data = classifier.data
    shape = (data.frames, 3, data.crop, data.crop)
    frames = torch.randint(0, 256, (5, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        written = _to_onnx(net, frames[:2], _metadata(classifier, calibration))
    except Exception as error:  # whatever a net of timm or a head does that can't be traced or has no ONNX operator
        model = classifier.config.model
        raise UserError(
            f"backbone {model.backbone} with head {model.head} can't be exported: {_root(error)}"
        ) from error
    apart = _try(written, net, classifier, frames)
    with replacing(path) as file:
        file.write(written)
    return apart


class FramesToClasses(nn.Module):
    """A classifier with all that it has learnt as one function of frames, on the CPU, in plain layers.

    ``(B, T, 3, crop, crop)`` uint8 to the probabilities ``(B, way)`` and whether each clip is known, ``(B,)``.
    """

    def __init__(self, classifier: Classifier, calibration: Calibration) -> None:
        super().__init__()
        model, supports = classifier.model, classifier.supports
        assert supports is not None
        backbone, head = copy.deepcopy(model.backbone).cpu(), copy.deepcopy(model.head).cpu()
        self.model = SOAPNet(_plain(model.soap), backbone, head, backbone.mean, backbone.std)
        self.calibration = calibration
        with torch.no_grad():
            # What was learnt was made in inference mode, and such tensors can't be traced; clones can.
            features, labels = supports.features.cpu().clone(), supports.labels.cpu().clone()
            self.compare = head.comparer(head.embed(features), group_by_class(labels, len(supports.classes)))

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        chances, familiar = self.scores(frames)
        return chances, familiar >= self.calibration.threshold

    def scores(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """The probabilities, and how familiar each clip is, ``(B,)``, which the threshold is for."""
        logits, familiar, _ = self.compare(self.model.head.embed(self.model.features(frames)))
        return (self.calibration.sharpness * logits.float()).softmax(dim=1), familiar


def _try(written: bytes, net: FramesToClasses, classifier: Classifier, frames: Tensor) -> float:
    """How far probabilities of the file are from the classifier's own; raises UserError where it answers otherwise."""
    import onnxruntime

    session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
    found, known = session.run(["probabilities", "known"], {"frames": frames.numpy()})
    own, takes = _predictions(classifier, frames)
    with torch.no_grad():
        expected, familiar = (scores.numpy() for scores in net.scores(frames))
    threshold = net.calibration.threshold
    knows = familiar >= threshold
    if classifier.device.type == "cpu" and classifier.config.train.amp == "none":
        expected, knows = own, takes
    if not (apart := float(np.abs(found - expected).max())) <= TOLERANCE:
        raise UserError(
            f"onnxruntime {onnxruntime.__version__} computes other probabilities, by {apart:.1g}: not written"
        )
    tied = np.isclose(familiar, threshold, rtol=TOLERANCE, atol=TOLERANCE)  # where rounding decides
    if bool(((known != knows) & ~tied).any()):
        raise UserError(f"onnxruntime {onnxruntime.__version__} takes other clips for known: not written")
    return float(np.abs(found - own).max())


def _predictions(classifier: Classifier, frames: Tensor) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """What a user of the classifier sees of such frames: probabilities ``(B, way)``, and which are known, ``(B,)``."""
    with torch.inference_mode(), autocast(classifier.device, classifier.config.train.amp):
        features = classifier.model.features(frames.to(classifier.device)).float()
    predictions = [classifier.predict(f"trial {number}", row) for number, row in enumerate(features)]
    if error := next((one.error for one in predictions if one.error), None):
        raise UserError(error)
    chances = [[one.probabilities[name] for name in classifier.classes] for one in predictions]
    return np.array(chances), np.array([one.known for one in predictions])


def _plain(soap: nn.Module | None) -> nn.Module | None:
    """SOAP without its kernels, which other runtimes lack."""
    if isinstance(soap, SOAP) and soap.variant == "paper":
        return soap.folded().cpu()
    plain = copy.deepcopy(soap)
    if isinstance(plain, SOAP):
        plain.backend = "equations"
    return None if plain is None else plain.cpu()


def _root(error: BaseException) -> str:
    """The first line of what was behind it all."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _to_onnx(net: nn.Module, frames: Tensor, metadata: dict[str, str]) -> bytes:
    talk = io.StringIO()  # of the exporter, on its own affairs
    with warnings.catch_warnings(), redirect_stdout(talk), redirect_stderr(talk):
        warnings.simplefilter("ignore")
        # Left to torch.onnx, a net that takes this number of clips only would be exported for that number, unsaid.
        traced = torch.export.export(net, (frames,), dynamic_shapes={"frames": {0: torch.export.Dim("batch")}})
        program = torch.onnx.export(
            traced,
            dynamo=True,
            input_names=["frames"],
            output_names=["probabilities", "known"],
            dynamic_shapes={"frames": {0: "batch"}},
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(metadata)
    written: bytes = program.model_proto.SerializeToString()
    return written


def _metadata(classifier: Classifier, calibration: Calibration) -> dict[str, str]:
    """Of strings alone, as ONNX has it; lists and settings are JSON."""
    data, config = classifier.data, to_dict(classifier.config)
    if data.interval is None:
        chosen = f"{data.frames} frames: of a clip of n frames the numbers (2 i + 1) n // {2 * data.frames}"
    else:
        chosen = f"{data.frames} frames, {data.interval} apart, in the middle of the clip"
    order = "" if data.order == "forward" else f", then {data.order}"
    return {
        "classes": json.dumps(classifier.classes, ensure_ascii=False),
        "frames": str(data.frames),
        "resize": str(data.resize),
        "crop": str(data.crop),
        "threshold": str(calibration.threshold),
        "settings": json.dumps({"data": config["data"], "model": config["model"]}, ensure_ascii=False),
        "reading": f"{chosen}{order}; RGB, short side to {data.resize} pixels (bilinear, antialiased), "
        f"the {data.crop} x {data.crop} in the middle",
    }
