"""SOAP and its parts as modules: what they accept, hold and return."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from soap_kernels import CWEM, HMEM, SOAP, ThreeDEM

STATE = {
    "three_dem.conv.weight": (1, 1, 3, 3, 3),
    "cwem.expand.weight": (16, 3, 1, 1),
    "cwem.temporal.weight": (16, 16, 3),
    "cwem.temporal.bias": (16,),
    "cwem.squeeze.weight": (3, 16, 1, 1),
    "hmem.motion.0.weight": (3, 3, 3, 3),
    "hmem.motion.0.bias": (3,),
    "hmem.motion.1.weight": (6, 6, 3, 3),
    "hmem.motion.1.bias": (6,),
    "hmem.motion.2.weight": (9, 9, 3, 3),
    "hmem.motion.2.bias": (9,),
    "hmem.project.0.weight": (3, 3, 1, 1),
    "hmem.project.0.bias": (3,),
    "hmem.project.1.weight": (3, 6, 1, 1),
    "hmem.project.1.bias": (3,),
    "hmem.project.2.weight": (3, 9, 1, 1),
    "hmem.project.2.bias": (3,),
    "hmem.restore.weight": (8, 18),
    "hmem.restore.bias": (8,),
}


def test_state_dict_has_the_fixed_names_shapes_and_order() -> None:
    assert {k: tuple(v.shape) for k, v in SOAP().state_dict().items()} == STATE
    assert [tuple(w.shape) for w in SOAP().weights().flatten()] == list(STATE.values())


def test_a_part_alone_adds_its_own_prior() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 5, 6)
    shapes = {ThreeDEM: (2, 8, 1, 5, 6), CWEM: (2, 8, 3, 1, 1), HMEM: (2, 8, 3, 5, 6)}
    for part, shape in shapes.items():
        module = part()
        assert module.prior(x).shape == shape
        torch.testing.assert_close(module(x), x + module.prior(x))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("backend", ["reference", "equations"])
def test_priors_come_by_name_and_sum_up_to_the_output(backend: str, centred: bool) -> None:
    torch.manual_seed(1)
    module, x = SOAP(backend=backend, centred=centred), torch.randn(2, 8, 3, 5, 6)
    priors = module.priors(x)
    assert list(priors) == ["3dem", "cwem", "hmem"]
    torch.testing.assert_close(module(x), x + sum(priors.values()))


def test_priors_of_uint8_frames_are_those_of_the_normalised_frames() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)
    module = SOAP(normalize=(mean, std))
    plain = SOAP()
    plain.load_state_dict(module.state_dict())
    x = torch.randint(0, 256, (1, 8, 3, 5, 6), dtype=torch.uint8)
    frames = (x / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for name, prior in module.priors(x).items():
        torch.testing.assert_close(prior, plain.priors(frames)[name])


def test_no_parts_is_the_identity() -> None:
    x = torch.randn(2, 8, 3, 5, 6)
    assert SOAP(parts=())(x) is x
    assert SOAP(parts=(), centred=True)(x) is x
    assert list(SOAP(parts=()).parameters()) == []
    frames = torch.randint(0, 256, (2, 8, 3, 5, 6), dtype=torch.uint8)
    normalised = SOAP(parts=(), normalize=((0.5,) * 3, (0.25,) * 3))(frames)
    torch.testing.assert_close(normalised, (frames / 255 - 0.5) / 0.25)


def test_tuple_sizes_come_in_any_order_and_are_sorted() -> None:
    assert SOAP(tuple_sizes=[3, 1, 2]).tuple_sizes == (1, 2, 3)


def test_a_copied_or_reloaded_module_computes_the_same() -> None:
    module, x = SOAP(), torch.randn(1, 8, 3, 5, 5)
    torch.testing.assert_close(copy.deepcopy(module)(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"tuple_sizes": (1, 8)}, r"tuple_sizes is \(1, 8\), expected sizes below the 8 frames"),
        ({"tuple_sizes": ()}, "tuple_sizes is"),
        ({"tuple_sizes": (0, 1)}, "at least 1"),
        ({"tuple_sizes": (1, 1)}, "distinct"),
        ({"parts": ("4dem",)}, "parts holds '4dem'"),
        ({"variant": "draft"}, "variant is 'draft'"),
        ({"variant": "release", "centred": True}, "centred is for variant 'paper'"),
        ({"backend": "cudnn"}, "backend is 'cudnn'"),
        ({"precision": "low"}, "precision is 'low'"),
        ({"frames": 0, "parts": ("3dem",)}, "frames is 0"),
        ({"hidden_channels": 0}, "hidden_channels is 0"),
        ({"hidden_channels": 0, "variant": "release"}, "hidden_channels is 0"),
        ({"parts": "hem"}, "parts holds 'hem'"),
        ({"out_dtype": torch.int32}, "out_dtype is torch.int32, expected a floating dtype"),
        ({"out_dtype": "float32"}, "out_dtype is 'float32'"),
        (
            {"normalize": ((0.5,), (0.2,))},
            r"normalize is \(\(0.5,\), \(0.2,\)\), expected \(mean, std\) of 3 channels each",
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SOAP(**settings)


def test_frames_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(1, 3, 8, 5, 5\), expected .* T = 8 frames"):
        SOAP()(torch.randn(1, 3, 8, 5, 5))


@pytest.mark.parametrize("settings", [{}, {"backend": "equations"}, {"variant": "release"}])
def test_frames_of_another_dtype_are_refused_on_every_path(settings: dict) -> None:
    frames = torch.zeros(1, 8, 3, 4, 4)
    plain, normalized = SOAP(**settings), SOAP(normalize=((0.5,) * 3, (0.2,) * 3), **settings)
    for call in (plain, plain.priors):
        with pytest.raises(TypeError, match=r"x has dtype uint8, expected float32 or .*, or uint8 with mean and std"):
            call(frames.to(torch.uint8))
    for call in (normalized, normalized.priors):
        with pytest.raises(TypeError, match="x has dtype float32, expected uint8, since it has mean and std"):
            call(frames)


@pytest.mark.parametrize("settings", [{}, {"backend": "equations"}, {"variant": "release"}])
def test_narrow_frames_are_widened_before_anything_is_rounded(settings: dict) -> None:
    torch.manual_seed(0)
    narrow, wide = SOAP(**settings), SOAP(out_dtype=torch.float32, **settings)
    wide.load_state_dict(narrow.state_dict())
    x = (20 * torch.randn(1, 8, 3, 9, 9)).half()
    y = wide(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, narrow(x.float()), rtol=1e-5, atol=1e-4)


def test_an_output_in_float64_is_that_of_the_frames_widened() -> None:
    torch.manual_seed(0)
    module, wide = SOAP(), SOAP(out_dtype=torch.float64)
    wide.load_state_dict(module.state_dict())
    x = torch.randn(1, 8, 3, 9, 9)
    module(x).sum().backward()
    y = wide(x)
    y.sum().backward()
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, module(x).double(), rtol=1e-5, atol=1e-5)
    for one, other in zip(wide.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"backend": "equations"}, {"variant": "release", "backend": "equations"}])
def test_an_empty_batch_and_clips_stored_with_time_last(settings: dict) -> None:
    torch.manual_seed(0)
    module = SOAP(**settings)
    assert module(torch.randn(0, 8, 3, 5, 6)).shape == (0, 8, 3, 5, 6)
    x = torch.randn(2, 5, 6, 8, 3).permute(0, 3, 4, 1, 2)
    torch.testing.assert_close(module(x), module(x.contiguous()))


def test_weights_start_as_those_of_pytorch_s_own_layers() -> None:
    torch.manual_seed(3)
    module = SOAP(parts=("cwem", "hmem"), tuple_sizes=(2,))
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 16, 1, bias=False), nn.Conv1d(16, 16, 3), nn.Conv2d(16, 3, 1, bias=False)]
    layers += [nn.Conv2d(6, 6, 3), nn.Conv2d(6, 3, 1), nn.Linear(6, 8)]
    expected = [p for layer in layers for p in layer.parameters()]
    assert all(torch.equal(p, e) for p, e in zip(module.parameters(), expected, strict=True))


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_tools_that_act_on_layers_by_their_type_leave_it_alone(variant: str) -> None:
    model = nn.Sequential(SOAP(variant=variant), nn.Flatten(), nn.Linear(8 * 3 * 4 * 4, 2))
    x = torch.randn(1, 8, 3, 4, 4)
    expected = model[0](x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this tool has moved to another package
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model).eval(), {nn.Linear})
    torch.testing.assert_close(quantised[0](x), expected)
    assert quantised(x).shape == (1, 2)
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            prune.l1_unstructured(layer, "weight", 0.5)
    for _ in range(2):
        model(x).sum().backward()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.channels_last_3d])
def test_a_model_around_it_can_go_to_channels_last(layout: torch.memory_format) -> None:
    conv = nn.Conv2d(3, 4, 3) if layout is torch.channels_last else nn.Conv3d(3, 4, 3)
    model = nn.ModuleList([SOAP(), conv])
    weights = list(model[0].parameters())
    model = model.to(memory_format=layout)
    assert conv.weight.is_contiguous(memory_format=layout)
    assert all(a is b and a.is_contiguous() for a, b in zip(model[0].parameters(), weights, strict=True))
    assert {p.dtype for p in model.half().parameters()} == {torch.float16}


def test_meta_tensors_pass_through_every_path() -> None:
    x = torch.empty(2, 8, 3, 5, 6, device="meta")
    for settings in ({}, {"centred": True}, {"backend": "equations"}, {"variant": "release"}):
        module = SOAP(**settings).to("meta")
        assert module(x).shape == x.shape
        assert module.priors(x)["hmem"].is_meta


@pytest.mark.parametrize(("frames", "sizes"), [(8, (1, 2, 3)), (8, (2, 3)), (2, (1,))])
def test_a_start_from_differences_is_the_change_over_half_a_clip_with_either_sign(
    frames: int, sizes: tuple[int, ...]
) -> None:
    torch.manual_seed(2)
    x = torch.randn(2, frames, 3, 5, 6)
    prior = SOAP(frames, tuple_sizes=sizes, backend="equations", start="differences").priors(x)["hmem"]
    grey, lag = x.mean(2), frames // 2
    for t in range(frames):
        first = min(max(t - lag // 2, 0), frames - sizes[0] - lag)
        change = 2 * (grey[:, first] - grey[:, first + lag])
        expected = torch.stack([change, -change, torch.zeros_like(change)], 1).sigmoid()
        torch.testing.assert_close(prior[:, t], expected)


def test_from_differences_every_weight_learns_and_the_names_stay() -> None:
    torch.manual_seed(3)
    module = SOAP(start="differences")
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == STATE
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (module(x := torch.randn(2, 8, 3, 5, 6)) - x).square().sum().backward()
        optimizer.step()
    idle = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_a_start_that_cannot_be_is_named() -> None:
    for settings in ({"start": "zero"}, {"start": "differences", "parts": ("cwem",)}):
        with pytest.raises(ValueError, match="start is"):
            SOAP(**settings)
    with pytest.raises(ValueError, match="needs variant 'paper'"):
        SOAP(start="differences", variant="release")
