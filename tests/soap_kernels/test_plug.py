import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from soap_kernels import SOAP, plug


class Frames(nn.Module):
    """An image model small enough to see through."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, pixels: Tensor, scale: float = 1.0) -> Tensor:
        out: Tensor = scale * self.norm(self.conv(pixels)).mean(dim=(2, 3))
        return out


class Clips(nn.Module):
    """A video model on ``(B, C, T, H, W)``, or on frames first."""

    def __init__(self, frames_first: bool) -> None:
        super().__init__()
        self.frames_first = frames_first
        self.conv = nn.Conv3d(3, 4, 3, padding=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = pixel_values.transpose(1, 2) if self.frames_first else pixel_values
        out: Tensor = self.conv(x).mean(dim=(2, 3, 4))
        return out


def test_an_image_model_sees_enhanced_frames() -> None:
    torch.manual_seed(0)
    model = plug(Frames(), frames=4, tuple_sizes=(1, 2)).eval()
    x = torch.randn(8, 3, 6, 7)
    expected = model.model(model.soap(x.view(2, 4, 3, 6, 7)).flatten(0, 1))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(pixels=x, scale=2.0), 2 * expected)
    torch.testing.assert_close(model(x, 2.0), 2 * expected)


def test_a_centred_soap_takes_over_the_weights_of_another_and_adds_less() -> None:
    torch.manual_seed(0)
    paper, centred = plug(Frames(), frames=4), plug(Frames(), frames=4, centred=True)
    centred.load_state_dict(paper.state_dict())
    x = torch.randn(4, 3, 6, 7)
    torch.testing.assert_close(centred.soap(x[None]), paper.soap(x[None]) - 1.5)


@pytest.mark.parametrize("frames_first", [False, True])
def test_a_video_model_sees_enhanced_clips_in_its_own_layout(frames_first: bool) -> None:
    torch.manual_seed(0)
    model = plug(Clips(frames_first), frames=5)
    clips = torch.randn(2, 5, 3, 6, 7)
    seen = model.soap(clips) if frames_first else model.soap(clips).transpose(1, 2)
    expected = model.model(seen)
    x = clips if frames_first else clips.transpose(1, 2).contiguous()
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(pixel_values=x), expected)
    model.layout = "BTCHW" if frames_first else "BCTHW"
    torch.testing.assert_close(model(x), expected)


def test_as_many_frames_as_channels_need_a_layout() -> None:
    x = torch.randn(2, 3, 3, 6, 7)
    with pytest.raises(ValueError, match="3 frames of 3 channels don't tell BCTHW from BTCHW: name one as layout="):
        plug(Clips(False), frames=3, tuple_sizes=(1, 2))(x)
    torch.manual_seed(0)
    model = plug(Clips(False), frames=3, tuple_sizes=(1, 2), layout="BCTHW")
    torch.testing.assert_close(model(x), model.model(model.soap(x.transpose(1, 2)).transpose(1, 2)))


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [
        ((9, 3, 6, 6), "auto", r"shape \(9, 3, 6, 6\), expected \(clips \* 4, channels, height, width\)"),
        (
            (2, 3, 5, 6, 6),
            "auto",
            r"shape \(2, 3, 5, 6, 6\), with frames=4 expected \(clips \* 4, 3, H, W\), \(clips, 3, ",
        ),
        ((2, 4, 3, 6, 6), "BCTHW", r"expected BCTHW with T = 4 frames \(frames=\) and C = 3 channels"),
        ((2, 3, 4, 6, 6), "NCHW", r"shape \(2, 3, 4, 6, 6\)"),
        ((4, 6), "auto", r"shape \(4, 6\)"),
    ],
)
def test_frames_of_another_count_or_layout_are_refused(shape: tuple[int, ...], layout: str, message: str) -> None:
    model = plug(Frames(), frames=4, layout=layout)
    with pytest.raises(ValueError, match=message) as refused:
        model(torch.randn(shape))
    assert "\n" not in str(refused.value)


def test_frames_among_other_keywords_are_found_by_the_model_s_signature() -> None:
    torch.manual_seed(0)
    model = plug(Frames(), frames=4, tuple_sizes=(1, 2)).eval()
    x = torch.randn(4, 3, 6, 7)
    torch.testing.assert_close(model(scale=2.0, pixels=x), model(x, 2.0))

    class Anonymous(Frames):
        def forward(self, *args: Tensor, **inputs: Tensor) -> Tensor:
            return super().forward(*args, **{k: v for k, v in inputs.items() if k == "pixels"})

    hidden = plug(Anonymous(), frames=4, tuple_sizes=(1, 2)).eval()
    labels = torch.zeros(4, dtype=torch.int64)
    torch.testing.assert_close(hidden(labels=labels, pixels=x), hidden(x))
    traced = plug(torch.jit.trace(Frames().eval(), x), frames=4, tuple_sizes=(1, 2))  # says nothing of its arguments
    torch.testing.assert_close(traced(x), traced.model(traced.soap(x[None])[0]))
    with pytest.raises(TypeError, match="x is a str, expected a dense tensor"):
        model("clip.mp4")


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="layout is 'TCHW', expected one of auto, NCHW, BCTHW, BTCHW"):
        plug(Frames(), layout="TCHW")
    with pytest.raises(ValueError, match="tuple_sizes"):
        plug(Frames(), frames=2)
    with pytest.raises(ValueError, match="called without frames"):
        plug(Frames())()


def test_checkpoints_of_the_wrapped_model_and_of_the_whole_load() -> None:
    source = Frames()
    source.norm.running_mean += 1
    model = plug(Frames(), frames=4)
    priors = {name: value.clone() for name, value in model.soap.state_dict().items()}
    with pytest.warns(UserWarning, match="of the wrapped model alone: SOAP keeps its values") as caught:
        model.load_state_dict(source.state_dict())
    assert len(caught) == 1
    torch.testing.assert_close(model.model.state_dict(), source.state_dict())
    torch.testing.assert_close(dict(model.soap.state_dict()), priors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plug(Frames(), frames=4).load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: v for name, v in model.state_dict().items() if name != "model.conv.bias"})
    with pytest.warns(UserWarning, match="SOAP keeps"), pytest.raises(RuntimeError, match=r"Missing key.*conv\.bias"):
        model.load_state_dict({name: v for name, v in source.state_dict().items() if name != "conv.bias"})


def test_a_wrapped_model_with_a_part_called_model_or_soap_loads_too() -> None:
    inner = nn.Sequential()
    inner.add_module("model", Frames())
    inner.add_module("soap", nn.Linear(4, 2))
    model = plug(inner, frames=4)
    with pytest.warns(UserWarning, match="SOAP keeps its values"):
        model.load_state_dict(inner.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(model.state_dict())


def test_a_checkpoint_of_the_wrapped_model_loads_inside_a_larger_model() -> None:
    source = nn.ModuleDict({"net": Frames()})
    model = nn.ModuleDict({"net": plug(Frames(), frames=4)})
    with pytest.warns(UserWarning, match="SOAP keeps its values"):
        model.load_state_dict(source.state_dict())
    torch.testing.assert_close(model["net"].model.conv.weight, source["net"].conv.weight)


def test_priors_and_model_train_together() -> None:
    torch.manual_seed(0)
    model = plug(Frames(), frames=4)
    model(torch.randn(8, 3, 6, 7)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert isinstance(model.soap, SOAP)


def test_compiles_to_one_graph() -> None:
    torch.manual_seed(0)
    model = plug(Frames(), frames=4).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 3, 6, 7)
    torch.testing.assert_close(compiled(x), model(x))
    clips = plug(Clips(False), frames=4)
    x = torch.randn(2, 3, 4, 6, 7)
    torch.testing.assert_close(torch.compile(clips, fullgraph=True, backend="aot_eager")(x), clips(x))


def test_runs_under_autocast() -> None:
    torch.manual_seed(0)
    model = plug(Frames(), frames=4).eval()
    x = torch.randn(8, 3, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    torch.testing.assert_close(y.float(), model(x), rtol=0.05, atol=0.05)
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_exports_and_the_exported_program_gives_the_same() -> None:
    torch.manual_seed(0)
    model = plug(Frames(), frames=4).eval()
    x = torch.randn(8, 3, 6, 7)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    assert any("soap_kernels" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("named", [False, True])
def test_exports_for_any_number_of_clips_and_says_so_as_of_any_model(named: bool) -> None:
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=1, max=16)
    for model, x, sizes in (
        (plug(Clips(True), frames=4), torch.randn(2, 4, 3, 6, 7), {0: batch}),
        (plug(Frames(), frames=4).eval(), torch.randn(8, 3, 6, 7), {0: 4 * batch}),
    ):
        program = torch.export.export(model, (x,), dynamic_shapes={"frames": sizes} if named else (sizes,))
        torch.testing.assert_close(program.module()(torch.cat([x, x])), model(torch.cat([x, x])))


@pytest.mark.parametrize("settings", [{}, {"variant": "release"}, {"normalize": ((0.5,) * 3, (0.2,) * 3)}])
def test_a_traced_model_holds_plain_operations_and_takes_any_number_of_clips(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = plug(Frames(), frames=4, tuple_sizes=(1, 2), **settings).eval()
    x = torch.randint(0, 256, (12, 3, 6, 7), dtype=torch.uint8 if "normalize" in settings else torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, that what is checked is checked now alone, and that it is old
        traced = torch.jit.trace(model, x[:8])
    assert {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()} <= {"aten", "prim"}
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_symbolic_tracing_is_refused_with_what_to_do_or_keeps_soap_whole(variant: str) -> None:
    model = plug(Frames(), frames=4, variant=variant)
    for module in (model, model.soap, *([model.soap.cwem] if variant == "paper" else [])):
        with pytest.raises(TypeError, match=r"use torch.export.export, or a torch.fx.Tracer whose is_leaf_module"):
            torch.fx.symbolic_trace(module)

    class Whole(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, SOAP) or super().is_leaf_module(module, name)

    net = nn.Sequential(model.soap, nn.ReLU())
    x = torch.randn(2, 4, 3, 5, 5)
    torch.testing.assert_close(torch.fx.GraphModule(net, Whole().trace(net))(x), net(x))


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_a_model_on_meta_takes_the_wrapped_models_state_and_fresh_soap_weights(variant: str) -> None:
    torch.manual_seed(0)
    net, x = Frames().eval(), torch.randn(8, 3, 6, 7)
    with torch.device("meta"):
        model = plug(Frames(), frames=4, variant=variant).eval()
    with pytest.warns(UserWarning, match="SOAP keeps its values"):
        model.load_state_dict(net.state_dict(), assign=True)
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}
    assert all(p.requires_grad for p in model.parameters())
    expected = plug(net, frames=4, variant=variant).eval()
    expected.soap.load_state_dict(model.soap.state_dict())
    torch.testing.assert_close(model(x), expected(x))
    for w in model.soap.state_dict().values():  # as drawn for the first time: within the bound, and spread over it
        bound = w[0].numel() ** -0.5 if w.dim() > 1 else 1.0
        assert w.abs().max() <= bound
        assert w.dim() == 1 or w.std() > bound / 4


def test_trains_under_ddp(tmp_path: Path) -> None:
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("needs torch.distributed, with no process group begun")
    torch.manual_seed(0)
    model = plug(Frames(), frames=4)
    x = torch.randn(8, 3, 6, 7)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)  # must live until backward is over
        parallel(x).square().sum().backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


ON_ONE_RANK = """
import sys, torch
from torch import distributed, nn
from soap_kernels import plug

rank, folder = int(sys.argv[1]), sys.argv[2]
model, x = plug(torch.load(folder + "/net.pt", weights_only=False), frames=4), torch.load(folder + "/x.pt")
model.load_state_dict(torch.load(folder + "/state.pt"))
distributed.init_process_group("gloo", init_method="file://" + folder + "/rendezvous", rank=rank, world_size=2)
parallel = nn.parallel.DistributedDataParallel(model)
parallel(x[8 * rank : 8 * (rank + 1)]).square().sum().backward()
if rank == 0:
    torch.save({name: p.grad for name, p in model.named_parameters()}, folder + "/gradients.pt")
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ddp_processes_average_the_gradients_of_their_halves(tmp_path: Path) -> None:
    if not dist.is_available():
        pytest.skip("needs a PyTorch with torch.distributed")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model, x = plug(net, frames=4), torch.randn(16, 3, 6, 7)
    for name, value in (("net", net), ("x", x), ("state", model.state_dict())):
        torch.save(value, tmp_path / f"{name}.pt")
    ranks = [subprocess.Popen([sys.executable, "-c", ON_ONE_RANK, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    (model(x).square().sum() / 2).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(torch.load(tmp_path / "gradients.pt"), expected)


@pytest.mark.slow
def test_compiles_with_the_default_compiler() -> None:
    torch.compiler.reset()  # shapes that other tests compiled would make these symbolic
    torch.manual_seed(0)
    model = plug(Frames(), frames=4).eval()
    x = torch.randn(8, 3, 6, 7)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def check_real_model(net: nn.Module, x: Tensor, name: str, layout: str, folder: Path, fullgraph: bool = True) -> None:
    """Everything that `plug` promises, on a model of one of the usual libraries; `name` is its input's."""

    def scores(model: nn.Module, x: Tensor) -> Tensor:
        output = model(**{name: x})
        found: Tensor = getattr(output, "logits", output)
        return found

    model = plug(net, frames=8)
    with pytest.warns(UserWarning, match="SOAP keeps its values"):
        model.load_state_dict({key: value.clone() for key, value in net.state_dict().items()})
    logits = scores(model, x)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.soap.parameters())

    model.eval()
    model.zero_grad()
    clips = {"NCHW": x.unflatten(0, (-1, 8)) if x.dim() == 4 else x, "BCTHW": x.transpose(1, 2), "BTCHW": x}[layout]
    seen = model.soap(clips)
    seen = {"NCHW": seen.flatten(0, 1), "BCTHW": seen.transpose(1, 2), "BTCHW": seen}[layout]
    expected = scores(model, x)
    torch.testing.assert_close(scores(model.model, seen), expected)
    expected.square().sum().backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    model.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        scores(parallel, x).square().sum().backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close({key: p.grad for key, p in model.named_parameters()}, gradients)

    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(scores(model, x).float(), expected, rtol=0.1, atol=0.1)
        compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
        torch.testing.assert_close(scores(compiled, x), expected, rtol=1e-4, atol=1e-5)
        exported = torch.export.export(model, (), {name: x}, strict=False).module()
        torch.testing.assert_close(scores(exported, x), expected, rtol=1e-3, atol=1e-4)


class Nested(nn.Module):
    """Has ``head.weight`` and ``model.head.weight``: the new name of one key is another's old one."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        if depth:
            self.model = Nested(depth - 1)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("depth", [1, 2])
def test_loads_the_state_of_a_model_that_holds_a_model(depth: int) -> None:
    net, plugged = Nested(depth), plug(Nested(depth))
    with pytest.warns(UserWarning, match="SOAP keeps its values"):
        plugged.load_state_dict(net.state_dict())
    torch.testing.assert_close(plugged.model.state_dict(), net.state_dict())
    plugged.load_state_dict(plug(net).state_dict())  # its own, without a word
    torch.testing.assert_close(plugged.model.state_dict(), net.state_dict())


@pytest.mark.slow
def test_enhances_a_timm_model(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    check_real_model(timm.create_model("resnet18", num_classes=5), torch.randn(8, 3, 64, 64), "x", "NCHW", tmp_path)


@pytest.mark.slow
def test_enhances_a_torchvision_video_model(tmp_path: Path) -> None:
    from torchvision.models import video

    torch.manual_seed(0)
    check_real_model(video.r3d_18(num_classes=5), torch.randn(1, 3, 8, 64, 64), "x", "BCTHW", tmp_path)


@pytest.mark.slow
def test_enhances_a_hugging_face_video_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install '.[videomae]'"
    )
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(
        image_size=32, num_frames=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    net = transformers.VideoMAEForVideoClassification(config)
    # Its own code breaks the graph, so torch.compile may not be asked for one.
    check_real_model(net, torch.randn(2, 8, 3, 32, 32), "pixel_values", "BTCHW", tmp_path, fullgraph=False)
