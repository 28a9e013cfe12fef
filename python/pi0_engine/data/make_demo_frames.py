"""Draws the demo's camera frames: a table with a cup, a cube and two arms, from above and from both wrists.

Run it to make them anew: ``python python/pi0_engine/data/make_demo_frames.py``. Needs Pillow.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = (320, 240)
OVERSAMPLING = 3
#: Kind, corner points in fractions of the height, colour.
Shapes = list[tuple[str, tuple[float, ...], str]]


def table(seed: int, light: tuple[float, float]) -> Image.Image:
    """A wooden table under a lamp at ``light`` (fractions of the picture)."""
    width, height = SIZE[0] * OVERSAMPLING, SIZE[1] * OVERSAMPLING
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / height
    grain = np.sin(2 * np.pi * (14 * y + 0.5 * np.sin(2.2 * x + rng.uniform(0, 6)))) * 0.05
    glow = 1.15 - 0.45 * np.hypot(x - light[0] * width / height, y - light[1])
    wood = np.stack([0.68 + grain, 0.52 + grain, 0.36 + grain * 0.6], axis=-1) * glow[..., None]
    return Image.fromarray((np.clip(wood, 0, 1) * 255).astype(np.uint8))


def put(image: Image.Image, shapes: Shapes, shadow: float) -> None:
    """Draw shapes given in fractions of the picture's height, each with a soft shadow first."""
    unit = image.height
    for kind, values, colour in shapes:
        points = [value * unit for value in values]
        shade = Image.new("L", image.size, 0)
        draw_shape(ImageDraw.Draw(shade), kind, [p + shadow * unit for p in points], 110, unit)
        image.paste((20, 15, 10), mask=shade.filter(ImageFilter.GaussianBlur(0.012 * unit)))
        draw_shape(ImageDraw.Draw(image), kind, points, colour, unit)


def draw_shape(draw: ImageDraw.ImageDraw, kind: str, points: list[float], fill: str | int, unit: int) -> None:
    if kind == "link":  # a rounded arm segment between two joints
        draw.line(points, fill=fill, width=int(0.06 * unit), joint="curve")
        for x, y in zip(points[::2], points[1::2], strict=True):
            radius = 0.04 * unit
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    else:
        getattr(draw, kind)(points, fill=fill)


CUP: Shapes = [("ellipse", (0.55, 0.42, 0.72, 0.59), "#d8d8e0"), ("ellipse", (0.57, 0.44, 0.70, 0.57), "#5b6470")]
CUBE: Shapes = [("polygon", (0.80, 0.62, 0.93, 0.60, 0.95, 0.73, 0.82, 0.75), "#b8322a")]
LEFT: Shapes = [
    ("link", (0.02, 0.95, 0.22, 0.72, 0.40, 0.60), "#30343b"),
    ("link", (0.40, 0.60, 0.50, 0.54), "#8d949e"),
]
RIGHT: Shapes = [
    ("link", (1.31, 0.95, 1.16, 0.74, 1.02, 0.68), "#30343b"),
    ("link", (1.02, 0.68, 0.96, 0.66), "#8d949e"),
]
CUP_CLOSE: Shapes = [("ellipse", (0.38, 0.10, 0.98, 0.62), "#d8d8e0"), ("ellipse", (0.44, 0.15, 0.92, 0.56), "#5b6470")]
CUBE_CLOSE: Shapes = [("polygon", (0.44, 0.20, 0.88, 0.16, 0.93, 0.58, 0.49, 0.63), "#b8322a")]
FINGERS: Shapes = [("polygon", (0.28, 1.0, 0.34, 0.60, 0.42, 0.60, 0.46, 1.0), "#22252a")]
FINGERS += [("polygon", (0.88, 1.0, 0.92, 0.60, 1.00, 0.60, 1.06, 1.0), "#22252a")]
SCENES: dict[str, tuple[int, tuple[float, float], Shapes]] = {
    "cam_high": (1, (0.5, 0.3), CUP + CUBE + LEFT + RIGHT),
    "cam_left_wrist": (2, (0.3, 0.2), CUP_CLOSE + FINGERS),
    "cam_right_wrist": (3, (0.7, 0.2), CUBE_CLOSE + FINGERS),
}

if __name__ == "__main__":
    for name, (seed, light, shapes) in SCENES.items():
        image = table(seed, light)
        put(image, shapes, shadow=0.015)
        image.resize(SIZE, Image.Resampling.LANCZOS).save(Path(__file__).parent / "demo" / f"{name}.jpg", quality=88)
