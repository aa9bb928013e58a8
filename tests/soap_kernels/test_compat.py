import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from published import check_in_single_precision, transcription
from soap_kernels import SOAP
from soap_kernels.compat import UNSAVED, TriplePrior

PARTS = ("3dem", "cwem", "hmem")
SUBSETS = [s for n in range(4) for s in itertools.combinations(PARTS, n)]


def gradients(y: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad((y * torch.randn(y.shape, dtype=y.dtype)).sum(), inputs)


@pytest.mark.parametrize("backend", ["auto", "reference", "equations"])
@pytest.mark.parametrize(("clips", "height", "width"), [(2, 7, 9), (1, 1, 1), (3, 2, 5)])
def test_triple_prior_equals_the_published_equations(backend: str, clips: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    module = TriplePrior(backend=backend).double()
    x = torch.randn(clips * 8, 3, height, width, dtype=torch.float64, requires_grad=True)
    y, expected = module(x, 8), transcription(module, x, 8, (1, 2, 3), PARTS)
    torch.testing.assert_close(y, expected)
    inputs = [x, *module.parameters()]
    torch.testing.assert_close(gradients(y, inputs), gradients(expected, inputs))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_triple_prior_equals_the_published_equations_on_a_gpu(backend: str) -> None:
    torch.manual_seed(0)
    check_in_single_precision(TriplePrior(backend=backend).cuda(), torch.randn(2 * 8, 3, 33, 47, device="cuda"))


@pytest.mark.parametrize("parts", SUBSETS)
@pytest.mark.parametrize("backend", ["auto", "equations"])
def test_release_variant_equals_the_published_equations_for_any_parts(parts: tuple[str, ...], backend: str) -> None:
    torch.manual_seed(0)
    frames, channels, sizes = 5, 2, (1, 3)
    soap = SOAP(frames, channels, sizes, 4, parts, variant="release", backend=backend).double()
    x = torch.randn(2, frames, channels, 6, 5, dtype=torch.float64, requires_grad=True)
    y = soap(x)
    expected = transcription(soap, x.flatten(0, 1), frames, sizes, parts).view(x.shape)
    torch.testing.assert_close(y, expected)
    inputs = [x, *soap.parameters()]
    torch.testing.assert_close(gradients(y, inputs), gradients(expected, inputs))
    priors = soap.priors(x)
    assert tuple(priors) == parts
    torch.testing.assert_close(x * (len(parts) + 1 + sum(priors.values())), expected)


def test_release_variant_normalises_uint8_frames_and_lays_out_channels_last() -> None:
    torch.manual_seed(0)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    soap = SOAP(variant="release", normalize=(mean, std), out_dtype=torch.bfloat16, out_channels_last=True)
    plain = SOAP(variant="release")
    plain.load_state_dict(soap.state_dict())
    x = torch.randint(0, 256, (2, 8, 3, 6, 5), dtype=torch.uint8)
    shape = (3, 1, 1)
    expected = plain((x / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape))
    y = soap(x)
    assert y.dtype == torch.bfloat16
    assert y.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_frames_keep_their_dtype_and_accumulate_wide(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = TriplePrior()
    x = torch.rand(8, 3, 40, 40)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), module(x.to(dtype).float()), rtol=2e-2, atol=2e-2)


def test_all_convolutions_are_trained_and_repeatable() -> None:
    torch.manual_seed(0)
    module = TriplePrior()
    assert sum(p.numel() for p in module.parameters()) == 27 + 432 + 432 + 1415
    x = torch.randn(16, 3, 8, 8)
    assert torch.equal(module(x), module(x, 8))
    module(x).square().sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def release_state() -> dict[str, Tensor]:
    shapes = {"conv_st": (1, 1, 3, 3, 3), "conv_ch1": (16, 3, 3, 3), "conv_ch2": (3, 16, 3, 3)}
    return {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}


def test_a_published_state_dict_loads_strictly_with_one_warning() -> None:
    state = release_state()
    module = TriplePrior()
    before = copy.deepcopy(module.state_dict())
    with pytest.warns(UserWarning, match="they keep their initial values") as caught:
        module.load_state_dict(state)
    assert len(caught) == 1
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name] if name in state else before[name])
    assert len(state) == 3


def test_a_published_state_dict_loads_inside_a_larger_model_and_into_the_variant() -> None:
    model = nn.ModuleDict({"tripel_prior": TriplePrior(), "fc": nn.Linear(2, 2)})
    state = {f"tripel_prior.{name}": value for name, value in release_state().items()}
    state |= {f"fc.{name}": value for name, value in model["fc"].state_dict().items()}
    with pytest.warns(UserWarning, match="they keep their initial values"):
        model.load_state_dict(state)
    assert torch.equal(model["tripel_prior"].conv_st.weight, state["tripel_prior.conv_st.weight"])
    with pytest.warns(UserWarning, match="they keep their initial values"):
        SOAP(variant="release").load_state_dict(release_state())


def test_our_own_state_dicts_load_without_a_warning_and_broken_ones_are_refused() -> None:
    state = TriplePrior().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TriplePrior().load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"Missing key.*recover\.2\.bias"):
            TriplePrior().load_state_dict({k: v for k, v in state.items() if k != "recover.2.bias"})
        with pytest.raises(RuntimeError, match="Missing key"):
            TriplePrior().load_state_dict({})


def test_fresh_convs_are_drawn_anew_in_each_forward_from_the_seed() -> None:
    torch.manual_seed(0)
    module = TriplePrior(fresh_convs=3)
    assert set(module.state_dict()) == set(release_state())
    x = torch.randn(16, 3, 8, 8)
    random_state = torch.get_rng_state()
    first, second = module(x, 8), module(x, 8)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not torch.equal(first, second)
    again = TriplePrior(fresh_convs=3)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x, 8), first)
    assert torch.equal(again(x, 8), second)
    other = TriplePrior(fresh_convs=4)
    other.load_state_dict(module.state_dict())
    assert not torch.equal(other(x, 8), first)
    second.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert module(x[:12], 6).shape == (12, 3, 8, 8)


def test_fresh_convs_have_pytorch_s_default_initialisation() -> None:
    module = TriplePrior(fresh_convs=0)
    drawn = module._fresh(8, torch.device("cpu"))
    assert drawn.hmem is not None
    for diff, bias, recover in zip(drawn.hmem.diff, drawn.hmem.diff_bias, drawn.hmem.recover, strict=True):
        for weight in (diff, recover):
            bound = weight[0].numel() ** -0.5
            assert bound * 0.5 < weight.abs().max() <= bound
        assert bias.abs().max() <= diff[0].numel() ** -0.5
    assert drawn.stencil is module.conv_st.weight
    assert not any(name.startswith(UNSAVED) for name, _ in module.named_parameters())


def test_wrong_frames_are_refused_in_one_line() -> None:
    module = TriplePrior()
    with pytest.raises(ValueError, match="seq_len is 6, but it was made for 8"):
        module(torch.randn(12, 3, 4, 4), 6)
    with pytest.raises(ValueError, match=r"x has shape \(9, 3, 4, 4\), expected \(clips \* 8, 3, H, W\)"):
        module(torch.randn(9, 3, 4, 4), 8)
    with pytest.raises(ValueError, match="TriplePrior: tuple_sizes"):
        TriplePrior(seq_len=3)
    with pytest.raises(ValueError, match="variant is 'authors', expected 'paper' or 'release'"):
        SOAP(variant="authors")


def test_variant_and_triple_prior_compile_to_one_graph() -> None:
    torch.manual_seed(0)
    module = TriplePrior()
    x = torch.randn(8, 3, 6, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, 8), module(x, 8))
    expected = F.mse_loss(module(x, 8), x)
    expected.backward()
    grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    F.mse_loss(compiled(x, 8), x).backward()
    torch.testing.assert_close([p.grad for p in module.parameters()], grads)
