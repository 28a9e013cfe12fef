"""frames_to_patches: its meaning against resize_with_pad, its implementations against its meaning, bit for bit."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import Tensor

from pi0_engine.images.resize import FramePreprocessor
from pi0_engine.kernels import availability
from pi0_engine.kernels.availability import UNAVAILABLE
from pi0_engine.kernels.frames import frames_to_patches
from pi0_engine.kernels.registry import REGISTRY, Cost, OpFunction, select_ops
from tests.support.frames import into_patches, needs_extension, packed, textured_frame
from tests.support.op_checks import unset

pytestmark = needs_extension
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

CPU = torch.device("cpu")
frames_to_patches_cpp = REGISTRY["frames_to_patches"].load("cpp", None)
frames_to_patches_cuda = REGISTRY["frames_to_patches"].load("cuda", None)
#: Frames of one call: (height, width) of each, the square, the patch.
BATCHES = {
    "cameras": ([(480, 640), (480, 640), (720, 1280)], 224, 14),
    "same size": ([(224, 224)], 224, 14),
    "tall, wide": ([(300, 20), (20, 300), (1, 97), (97, 1)], 28, 14),
    "enlarged": ([(9, 5), (1, 1), (27, 28)], 56, 8),
    "one pixel": ([(30, 40)], 1, 1),
    "many rows": ([(700, 1000), (3, 1200)], 14, 14),
}


@pytest.fixture(params=BATCHES)
def batch(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    """pixels, table, and the patches as the image tests know them."""
    sides, size, patch = BATCHES[request.param]
    frames = [textured_frame(*side) for side in sides]
    pixels, table = packed(frames, size)
    images = FramePreprocessor("cpp", size, threads=1)(frames)
    return torch.from_numpy(pixels), torch.from_numpy(table), torch.from_numpy(into_patches(images, patch))


def test_meaning(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    pixels, table, expected = batch
    patches = unset(*expected.shape)
    frames_to_patches(pixels, table, patches=patches)
    assert torch.equal(patches, expected)


def test_cpp(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    pixels, table, expected = batch
    patches = unset(*expected.shape)
    frames_to_patches_cpp(pixels, table, patches=patches)
    assert torch.equal(patches, expected)


@needs_gpu
@pytest.mark.parametrize("run", [frames_to_patches, frames_to_patches_cuda], ids=["meaning", "cuda"])
def test_on_a_gpu(run: OpFunction, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    pixels, table, expected = batch
    device = torch.device("cuda", torch.cuda.current_device())
    if run is frames_to_patches_cuda and (why := UNAVAILABLE["cuda"](device)):
        pytest.skip(why)
    patches = unset(*expected.shape).to(device)
    run(pixels.to(device), table.to(device), patches=patches)
    assert torch.equal(patches.cpu(), expected)


@needs_gpu
def test_a_captured_graph_serves_every_camera() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if why := UNAVAILABLE["cuda"](device):
        pytest.skip(why)
    batches = [[(480, 640), (480, 640)], [(720, 1280), (31, 17)], [(1, 1), (5000, 3)]]
    pixels = torch.zeros(10_000_000, dtype=torch.uint8, device=device)
    table = torch.zeros(50_000, dtype=torch.int32, device=device)
    patches = unset(2, 256, 588).to(device)
    graph = torch.cuda.CUDAGraph()
    for index, sides in enumerate(batches):
        frames = [textured_frame(*side) for side in sides]
        packed_pixels, packed_table = packed(frames, 224)
        pixels[: packed_pixels.size].copy_(torch.from_numpy(packed_pixels))
        table[: packed_table.size].copy_(torch.from_numpy(packed_table))
        if index == 0:
            frames_to_patches_cuda(pixels, table, patches=patches)  # loads the kernel, which a capture may not
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                frames_to_patches_cuda(pixels, table, patches=patches)
        patches.fill_(torch.nan)
        graph.replay()
        expected = into_patches(FramePreprocessor("cpp", threads=1)(frames), 14)
        np.testing.assert_array_equal(patches.cpu().numpy(), expected)


def test_buffers_may_be_longer_than_their_contents(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    pixels, table, expected = batch
    pixels = torch.cat([pixels, torch.full((99,), 7, dtype=torch.uint8)])
    table = torch.cat([table, torch.full((99,), -7, dtype=torch.int32)])
    for run in (frames_to_patches, frames_to_patches_cpp):
        patches = unset(*expected.shape)
        run(pixels, table, patches=patches)
        assert torch.equal(patches, expected)


def test_misuse_is_refused() -> None:
    pixels, table = map(torch.from_numpy, packed([textured_frame(9, 12)], 8))
    patches = unset(1, 4, 48)
    for run in (frames_to_patches, frames_to_patches_cpp):
        with pytest.raises(ValueError, match=r"pixels is torch.int8 .*expected torch.uint8"):
            run(pixels.to(torch.int8), table, patches=patches)
        with pytest.raises(ValueError, match=r"table is torch.int64 .*expected torch.int32"):
            run(pixels, table.long(), patches=patches)
        with pytest.raises(ValueError, match=r"patches is torch.float32 \[4, 48\], expected .* with 3 dimensions"):
            run(pixels, table, patches=patches[0])
        with pytest.raises(ValueError, match=r"table is .* with strides \(2,\), expected contiguous"):
            run(pixels, table[::2], patches=patches)
        with pytest.raises(ValueError, match=r"pixels is on meta .*expected contiguous on cpu"):
            run(pixels.to("meta"), table, patches=patches)
        for shape in ((1, 3, 48), (1, 4, 47), (1, 0, 48), (1, 4, 0)):
            with pytest.raises(ValueError, match=r"expected \[N, grid\^2, patch\^2 \* 3\]"):
                run(pixels, table, patches=unset(*shape))
        with pytest.raises(ValueError, match="too few for 9 frames"):
            run(pixels, table[:98], patches=unset(9, 4, 48))


def test_cost() -> None:
    pixels, table = torch.zeros(300, dtype=torch.uint8), torch.zeros(50, dtype=torch.int32)
    cost = REGISTRY["frames_to_patches"].cost(pixels, table, patches=unset(1, 4, 48))
    assert cost == Cost(flops=4 * 300, bytes=300 + 4 * 50 + 4 * 192)


def test_why_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert UNAVAILABLE["cuda"](CPU) == "it needs a CUDA GPU, the device is 'cpu'"
    assert UNAVAILABLE["cpp"](gpu) == "it runs on CPUs, the device is 'cuda:0'"
    assert UNAVAILABLE["cpp"](CPU) is None

    class Extension:
        cuda_architectures = staticmethod(lambda: architectures)
        load_frames_to_patches_cuda = staticmethod(lambda: problem)

    monkeypatch.setattr(availability, "extension", lambda: Extension)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    architectures: tuple[int, ...] = ()
    problem = ""
    assert UNAVAILABLE["cuda"](gpu) == "the extension pi0_engine._C was built without nvcc"
    architectures = (80, 86, 90)
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        assert UNAVAILABLE["cuda"](gpu) is None
    problem = "the driver is too old"
    assert UNAVAILABLE["cuda"](gpu) == problem
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert UNAVAILABLE["cuda"](gpu) == (
        "pi0_engine._C holds code for compute capability 8.0, 8.6, 9.0, 'cuda:0' has 7.5"
    )


def test_without_the_extension_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("no such file")

    monkeypatch.setattr(availability, "extension", missing)
    for name, device in (("cuda", torch.device("cuda", 0)), ("cpp", CPU)):
        assert UNAVAILABLE[name](device) == "the extension pi0_engine._C cannot be imported (no such file)"


def test_a_cpu_takes_the_compiled_loops() -> None:
    ops = select_ops("auto", CPU)
    assert {choice.op: choice.implementation for choice in ops.choices}["frames_to_patches"] == "cpp"
    assert ops.launcher is None
    assert select_ops("torch", CPU).frames_to_patches is frames_to_patches


def test_a_backend_without_it_leaves_the_choice_open() -> None:
    """Recorded launches are Triton's; the tracer calls this op like any other."""
    pytest.importorskip("triton", reason="Triton is not installed")
    meta = torch.device("meta")
    ops = select_ops("triton", meta)
    chosen = {choice.op: choice.implementation for choice in ops.choices}
    assert chosen.pop("frames_to_patches") == "cuda"
    assert set(chosen.values()) == {"triton"}
    pixels, table = torch.empty(99, dtype=torch.uint8, device=meta), torch.empty(99, dtype=torch.int32, device=meta)
    ops.frames_to_patches(pixels, table, patches=torch.empty(2, 4, 48, device=meta))
    with pytest.raises(ValueError, match="too few"):
        ops.frames_to_patches(pixels, table[:9], patches=torch.empty(2, 4, 48, device=meta))
