from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

def resize_with_pad(frames: Sequence[npt.NDArray[np.uint8]], out: npt.NDArray[np.float32], threads: int) -> None: ...
