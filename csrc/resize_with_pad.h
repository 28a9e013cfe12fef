#pragma once

#include <vector>

#include "bilinear.h"

namespace pi0 {

// frames[n] uint8 [H, W, 3] -> out float32 [n, (size / patch)^2, patch, patch, 3] in [-1, 1], black = -1: patches
// row-major in the picture, as the vision tower reads them. With patch = size that is the picture itself.
//
// Each frame is scaled to fit size x size with its aspect kept (antialiased bilinear), centred on black, and mapped
// to pixel / 255 * 2 - 1. Sizes, weights and rounding are those of openpi-client's image_tools.py, which calls Pillow:
// first along the rows, then along the columns, each pass rounded to uint8. The pixels equal Pillow's; only for frames
// more than twice as tall as wide, where Pillow >= 13 takes the other order, do some differ by one level of 255.
// A side that would scale to less than one pixel (an error in openpi-client) becomes one pixel.
//
// Sides in 1..kMaxSide, size in 1..kMaxSide, patch divides size, threads >= 1 (an upper limit; small work stays on the calling thread).
void resize_with_pad(const std::vector<FrameView>& frames, int size, int patch, float* out,
                     int threads);

}  // namespace pi0
