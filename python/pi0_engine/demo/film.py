"""An episode for people: what happens, what the policy sees, and what it was told, as GIF or MP4."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pi0_engine.demo.outputs import check_writable
from pi0_engine.demo.scene import CAMERAS, CONTROL_HZ, Scene

#: Control steps per frame and frames per second: half the robot's speed.
_STRIDE, _FPS = 2, 20
#: In pixels: the scene, each of the policy's views beside it, the caption below.
_WIDTH, _HEIGHT, _CAPTION = 320, 240, 20
_VIEW = _HEIGHT // len(CAMERAS)
#: The last frame stays, in seconds.
_STAYS_S = 1.0


class Film:
    """Collects frames; see :meth:`add`.

    Args:
        path: where it will go, ``.gif`` or ``.mp4``.

    Attributes:
        speed: of the film, relative to the robot's.

    Raises:
        ValueError: another kind of file, no encoder for it, or a path that cannot be written.
    """

    speed = _STRIDE * _FPS / CONTROL_HZ

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        kind = self.path.suffix.lower()
        if kind not in (".gif", ".mp4"):
            raise ValueError(f"the film is to be {str(path)!r}, expected a .gif or .mp4 file")
        if kind == ".mp4":
            missing = [name for name in ("imageio", "imageio_ffmpeg") if importlib.util.find_spec(name) is None]
            if missing:
                raise ValueError(
                    f"an .mp4 needs {' and '.join(missing)}: pip install 'imageio[ffmpeg]', or film a .gif"
                )
        check_writable(path)
        self._frames: list[Image.Image] = []
        self._views: list[NDArray[np.uint8]] = []

    def look(self, observation: Mapping[str, Any]) -> None:
        """What the policy sees from now on."""
        self._views = [observation[camera] for camera in CAMERAS]

    def add(self, scene: Scene) -> None:
        """The scene as it is now; call it at every control step. Most are left out."""
        if scene.steps % _STRIDE and not scene.success:
            return
        frame = Image.new("RGB", (_WIDTH + _VIEW, _HEIGHT + _CAPTION), "white")
        frame.paste(Image.fromarray(scene.film(_WIDTH, _HEIGHT)), (0, 0))
        for row, view in enumerate(self._views):
            frame.paste(Image.fromarray(view).resize((_VIEW, _VIEW), Image.Resampling.NEAREST), (_WIDTH, row * _VIEW))
        done = ": done" if scene.success else ""
        ImageDraw.Draw(frame).text((6, _HEIGHT + 4), f'step {scene.steps}  "{scene.prompt}"{done}', fill="black")
        self._frames.append(frame)

    def save(self) -> None:
        """Write the file.

        Raises:
            ValueError: there is no frame.
        """
        if not self._frames:
            raise ValueError(f"{self.path} has no frames, expected at least one")
        if self.path.suffix.lower() == ".gif":
            shown = [round(1000 / _FPS)] * (len(self._frames) - 1) + [round(1000 * _STAYS_S)]
            # One palette for all frames, without dithering: half the size, and nothing flickers.
            palette = self._frames[0].quantize(128, dither=Image.Dither.NONE)
            first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in self._frames]
            first.save(self.path, save_all=True, append_images=others, duration=shown, loop=0)
        else:
            import imageio.v3 as imageio

            frames = self._frames + [self._frames[-1]] * round(_FPS * _STAYS_S)
            imageio.imwrite(self.path, np.stack([np.asarray(frame) for frame in frames]), fps=_FPS, macro_block_size=4)
