"""SOAP and its parts as modules: what they accept, hold and return."""

from __future__ import annotations

import copy

import pytest
import torch

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


@pytest.mark.parametrize("backend", ["reference", "equations"])
def test_priors_come_by_name_and_sum_up_to_the_output(backend: str) -> None:
    torch.manual_seed(1)
    module, x = SOAP(backend=backend), torch.randn(2, 8, 3, 5, 6)
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
        ({"backend": "cudnn"}, "backend is 'cudnn'"),
        ({"precision": "low"}, "precision is 'low'"),
        ({"frames": 0, "parts": ("3dem",)}, "frames is 0"),
        ({"hidden_channels": 0}, "hidden_channels is 0"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SOAP(**settings)


def test_frames_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(1, 3, 8, 5, 5\), expected .* T = 8 frames"):
        SOAP()(torch.randn(1, 3, 8, 5, 5))
