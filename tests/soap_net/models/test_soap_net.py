import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from soap_kernels import SOAP
from soap_net.config import ModelConfig, SoapConfig
from soap_net.errors import UserError
from soap_net.models import SOAPNet, build_backbone, build_head, build_model
from soap_net.models.backbones import IMAGENET_MEAN, IMAGENET_STD, Backbone

WAY, FRAMES, SIZE = 3, 4, 32


def clips(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, FRAMES, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def net(backbone: str = "tiny", soap: bool = True, centred: bool = False, **options: object) -> SOAPNet:
    config = ModelConfig(backbone=backbone, weights=None, head_options={"out_dim": 16}, **options)  # type: ignore[arg-type]
    config.soap = SoapConfig(enabled=soap, tuple_sizes=(1, 2), centred=centred)
    return build_model(config, FRAMES, seed=0)


LABELS = torch.tensor([0, 1, 2, 1])


def test_an_episode_goes_from_uint8_clips_to_logits_and_trains_every_part() -> None:
    model = net()
    logits = model(clips(4), LABELS, clips(2, seed=1), WAY)
    assert logits.shape == (2, WAY)
    logits.log_softmax(1)[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.soap.parameters())  # type: ignore[union-attr]


def test_features_and_head_make_the_forward() -> None:
    model = net().eval()
    support, query = clips(4), clips(2, seed=1)
    features = model.features(support), model.features(query)
    assert features[0].shape == (4, FRAMES, model.backbone.dim)
    torch.testing.assert_close(
        model.head(features[0], LABELS, features[1], WAY), model(support, LABELS, query, WAY), rtol=1e-4, atol=1e-4
    )


def test_without_soap_the_backbone_sees_normalised_frames() -> None:
    model = net(soap=False).eval()
    assert model.soap is None
    x = clips(2)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    expected = model.backbone(((x / 255 - mean) / std).flatten(0, 1)).unflatten(0, (2, FRAMES))
    torch.testing.assert_close(model.features(x), expected)


@pytest.mark.parametrize("centred", [False, True])
def test_with_soap_the_backbone_sees_soap_of_normalised_frames(centred: bool) -> None:
    model = net(centred=centred).eval()
    x = clips(2)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    plain = SOAP(FRAMES, tuple_sizes=(1, 2), centred=centred)
    plain.load_state_dict(model.soap.state_dict())  # type: ignore[union-attr]
    expected = model.backbone(plain((x / 255 - mean) / std).flatten(0, 1)).unflatten(0, (2, FRAMES))
    torch.testing.assert_close(model.features(x), expected, rtol=1e-4, atol=1e-4)
    # A SOAP without normalize gets frames that the model has normalised.
    other = SOAPNet(plain, model.backbone, model.head, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(other.features(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk_frames", [1, 5, 7, 100])
def test_chunks_change_no_result_in_evaluation(chunk_frames: int) -> None:
    model = net("resnet18").eval()
    with torch.no_grad():
        expected = model.features(clips(3))
        model.chunk_frames = chunk_frames
        torch.testing.assert_close(model.features(clips(3)), expected, rtol=1e-4, atol=1e-4)


def test_weights_are_those_of_the_seed_and_the_callers_generator_is_left_alone() -> None:
    config = ModelConfig(backbone="tiny", weights=None, soap=SoapConfig(tuple_sizes=(1, 2)))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, again, other = (build_model(config, FRAMES, seed).state_dict() for seed in (7, 7, 8))
    assert torch.equal(torch.rand(4), expected)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert not torch.equal(other["head.attention.keys.weight"], first["head.attention.keys.weight"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_building_a_net_leaves_a_gpus_generator_alone() -> None:
    before = torch.cuda.get_rng_state()
    build_model(ModelConfig(backbone="tiny", weights=None), FRAMES, 7)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def step(model: SOAPNet) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(1)  # dropout
    logits = model(clips(4), LABELS, clips(2, seed=1), WAY)
    logits.log_softmax(1)[:, 0].sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads, dict(model.named_buffers())


def assert_equal_steps(a: SOAPNet, b: SOAPNet) -> None:
    (logits, grads, buffers), (other_logits, other_grads, other_buffers) = step(a), step(b)
    torch.testing.assert_close(other_logits, logits, rtol=1e-4, atol=1e-4)
    assert grads.keys() == other_grads.keys()
    assert len(grads) == len(list(a.parameters()))
    for name in grads:
        scale = float(grads[name].abs().max())
        torch.testing.assert_close(other_grads[name], grads[name], rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=name)
    for name in buffers:
        torch.testing.assert_close(other_buffers[name], buffers[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("name", "block"), [("resnet18", "layer1.0"), ("efficientnet_lite0", "blocks.1.0")])
def test_checkpointing_changes_neither_gradients_nor_running_statistics(name: str, block: str) -> None:
    plain, anew = net(name), net(name, checkpoint_backbone=True)
    assert plain.state_dict().keys() == anew.state_dict().keys()
    assert_equal_steps(plain, anew)
    assert int(anew.backbone.net.bn1.num_batches_tracked) == 1  # type: ignore[arg-type, union-attr]
    assert int(anew.backbone.net.get_submodule(block).bn1.num_batches_tracked) == 1  # type: ignore[arg-type, union-attr]


def test_checkpointing_chunks_changes_neither_gradients_nor_running_statistics() -> None:
    plain, anew = net(chunk_frames=9), net(chunk_frames=9, checkpoint_backbone=True)
    assert_equal_steps(plain, anew)


def test_chunks_change_no_gradient_where_batchnorm_rests() -> None:
    plain, chunked = net("tiny"), net("tiny", chunk_frames=7, checkpoint_backbone=True)
    plain.backbone.eval()
    chunked.backbone.eval()
    assert_equal_steps(plain, chunked)


def test_dropout_in_a_checkpointed_block_is_drawn_once() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop = nn.Linear(3, 8), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.drop(self.linear(x.mean(dim=(2, 3))))
            return out

    torch.manual_seed(0)
    backbone = Backbone("noisy", nn.Sequential(nn.ModuleList([Noisy()])[0]), 8)
    head = build_head("soap", 8, FRAMES, out_dim=4)
    plain = SOAPNet(None, copy.deepcopy(backbone), copy.deepcopy(head), IMAGENET_MEAN, IMAGENET_STD)
    anew = SOAPNet(None, backbone, head, IMAGENET_MEAN, IMAGENET_STD, checkpoint_backbone=True)
    assert_equal_steps(plain, anew)


def test_chunks_in_training_move_running_statistics_as_far_as_one_batch() -> None:
    """The first BatchNorm sees the same values either way, so its running mean must come out (nearly) the same."""
    whole, chunked = net("tiny", soap=False), net("tiny", soap=False, chunk_frames=4)
    chunked.load_state_dict(whole.state_dict())
    bright = clips(6) // 2 + 100
    with torch.no_grad():
        whole.features(bright)
        chunked.features(bright)
    for name in ("running_mean", "running_var"):
        one, many = (getattr(m.backbone.net.stages[0][1], name) for m in (whole, chunked))  # type: ignore[index, union-attr]
        torch.testing.assert_close(many, one, rtol=0.02, atol=2e-3)
    assert chunked.backbone.net.stages[0][1].momentum == 0.1  # type: ignore[index, union-attr]


def test_chunks_in_training_see_all_clips() -> None:
    """A chunk of neighbouring frames would be one clip, with the statistics of that clip alone."""
    seen: list[Tensor] = []

    class Record(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.mean(dim=(1, 2, 3)))
            return x.mean(dim=(2, 3))

    model = SOAPNet(
        None, Backbone("record", Record(), 3), build_head("soap", 3, 2, out_dim=2), (0,) * 3, (1,) * 3, chunk_frames=5
    )
    levels = torch.arange(10, dtype=torch.uint8)
    frames = levels.view(5, 2, 1, 1, 1).expand(5, 2, 3, 8, 8)
    features = model.features(frames)
    assert [len(chunk) for chunk in seen] == [5, 5]
    assert {round(float(v) * 255) // 2 for v in seen[0]} == set(range(5))
    torch.testing.assert_close(features[..., 0].flatten() * 255, levels.float())


def test_channels_last_changes_no_result() -> None:
    plain, last = net("resnet18"), net("resnet18", channels_last=True)
    assert last.backbone.net.conv1.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, operator]
    assert_equal_steps(plain, last)
    last.chunk_frames = 5
    last.eval()
    plain.eval()
    plain.load_state_dict(last.state_dict())
    torch.testing.assert_close(last.features(clips(2)), plain.features(clips(2)), rtol=1e-4, atol=1e-4)


def test_state_dict_holds_the_weights_alone() -> None:
    state = net().state_dict()
    assert {name.split(".")[0] for name in state} == {"soap", "backbone", "head"}
    assert "soap.three_dem.conv.weight" in state


@pytest.mark.parametrize(
    ("support", "message"),
    [
        (clips(4).float(), r"support: expected uint8 frames \(clips, frames, 3, height, width\), got float32"),
        (clips(4)[:, :, :2], r"got uint8 \(4, 4, 2, 32, 32\)"),
        (clips(4)[..., :16], "they must agree"),
    ],
)
def test_clips_of_another_kind_are_refused(support: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        net()(support, LABELS, clips(2), WAY)


def test_settings_that_do_not_fit_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"model\.soap: .*"):
        build_model(ModelConfig(backbone="tiny", weights=None, soap=SoapConfig(tuple_sizes=(9,))), FRAMES)
    with pytest.raises(UserError, match=r"^model\.soap: centred is for variant 'paper'"):
        build_model(
            ModelConfig(backbone="tiny", weights=None, soap=SoapConfig(variant="release", centred=True)), FRAMES
        )
    with pytest.raises(UserError, match="chunk_frames is -1"):
        net(chunk_frames=-1)
    with pytest.raises(UserError, match="the head takes 5 features a frame, backbone tiny has 576"):
        SOAPNet(None, build_backbone("tiny"), build_head("soap", 5, FRAMES), IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("name", ["tiny3d", pytest.param("r3d_18", marks=pytest.mark.slow)])
def test_a_3d_backbone_sees_whole_clips_and_gives_a_vector_per_frame(name: str) -> None:
    model = net(name).eval()
    x = clips(2)
    with torch.no_grad():
        features = model.features(x)
        x[0, 0] = 0
        changed = model.features(x)
    assert features.shape == (2, FRAMES, model.backbone.dim)
    assert not torch.equal(changed[0, 1], features[0, 1])
    torch.testing.assert_close(changed[1], features[1])


def test_a_3d_backbone_goes_on_as_it_is_where_channels_last_is_set() -> None:
    plain, last = net("tiny3d").eval(), net("tiny3d", channels_last=True).eval()
    assert torch.equal(plain.features(clips(2)), last.features(clips(2)))


def test_a_3d_backbone_refuses_chunks_of_frames() -> None:
    with pytest.raises(UserError, match="tiny3d takes whole clips"):
        net("tiny3d", chunk_frames=4)


def tiny_videomae(folder: Path, classifies: bool) -> str:
    """A random VideoMAE that takes `clips`, in ``folder``: a vector of two frames, or with a classifier of a clip."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install '.[videomae]'"
    )
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIZE,
        num_frames=FRAMES,
        initializer_range=0.3,
    )
    kind = transformers.VideoMAEForVideoClassification if classifies else transformers.VideoMAEModel
    kind(config).save_pretrained(folder)
    return f"hf:{folder}"


@pytest.mark.parametrize(
    ("vectors", "after"), [("frames", FRAMES - 1), ("tubelets", FRAMES // 2), ("a clip", 1)], ids=lambda value: value
)
def test_views_of_clip_nets_are_features_of_clips_then_of_their_differences(
    tmp_path: Path, vectors: str, after: int
) -> None:
    name = "tiny3d" if vectors == "frames" else tiny_videomae(tmp_path, classifies=vectors == "a clip")
    weights = None if vectors == "frames" else "pretrained"
    config = ModelConfig(backbone=name, weights=weights, head="views", soap=SoapConfig(enabled=False))
    model = build_model(config, FRAMES, seed=0).eval()
    x = clips(3)
    features = model.features(x)
    shown = model.backbone.vectors(FRAMES)
    assert features.shape == (3, shown + after, model.backbone.dim) == (3, model.head.frames, model.head.dim)
    frames = (x / 255 - model.mean) / model.std
    changes = torch.stack([frames[:, t] - frames[:, t - 1] for t in (1, 2, 3, 3)], dim=1)
    expected = model.backbone(changes) - model.backbone(torch.zeros_like(changes))
    torch.testing.assert_close(features[:, :shown], model.backbone(frames))
    torch.testing.assert_close(features[:, shown:], expected[:, :after])
    assert model(x, torch.tensor([0, 1, 2]), clips(2, seed=1), WAY).isfinite().all()


def test_a_vision_transformer_of_clips_trains_behind_soap_and_checkpointed_alike(tmp_path: Path) -> None:
    name = tiny_videomae(tmp_path, classifies=False)
    plain, saving = (net(name, checkpoint_backbone=anew) for anew in (False, True))
    assert plain.head.frames == FRAMES // 2
    for model in (plain, saving):
        torch.manual_seed(0)
        model(clips(4), LABELS, clips(2, seed=1), WAY).log_softmax(1)[:, 0].sum().backward()
    for (key, expected), found in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert expected.grad is not None
        assert expected.grad.abs().sum() > 0 or key.endswith("key.bias"), key
        torch.testing.assert_close(found.grad, expected.grad, msg=key)


def test_a_number_of_frames_that_the_backbone_does_not_take_is_refused_at_once(tmp_path: Path) -> None:
    config = ModelConfig(backbone=tiny_videomae(tmp_path, classifies=True), weights=None)
    with pytest.raises(UserError, match=r"takes clips of 4 frames, got 8: set data.frames to 4$"):
        build_model(config, 8)
