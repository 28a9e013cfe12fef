from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

def resize_with_pad(
    frames: Sequence[npt.NDArray[np.uint8]], size: int, patch: int, out: npt.NDArray[np.float32], threads: int
) -> None: ...
def packed_size(height: int, width: int, size: int) -> tuple[int, int]: ...
def pack_frames(
    frames: Sequence[npt.NDArray[np.uint8]],
    size: int,
    pixels_out: npt.NDArray[np.uint8],
    table_out: npt.NDArray[np.int32],
) -> tuple[int, int]: ...
def frames_to_patches_host(
    pixels: npt.NDArray[np.uint8],
    table: npt.NDArray[np.int32],
    out: npt.NDArray[np.float32],
    count: int,
    size: int,
    patch: int,
) -> None: ...
def frames_to_patches_cuda(
    pixels_ptr: int, table_ptr: int, out_ptr: int, count: int, size: int, patch: int, stream: int
) -> None: ...
def load_frames_to_patches_cuda() -> str: ...
def cuda_architectures() -> tuple[int, ...]: ...
