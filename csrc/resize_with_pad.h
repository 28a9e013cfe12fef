#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pi0 {

// A uint8 RGB image where it lies in memory. Strides are in bytes and of any sign, so a flipped or
// transposed view is read in place.
struct FrameView {
  const std::uint8_t* pixels;
  int height;
  int width;
  std::ptrdiff_t row_stride;
  std::ptrdiff_t column_stride;
  std::ptrdiff_t channel_stride;
};

// The longest side that is accepted: beyond it the 32-bit sums of the resampling could overflow.
constexpr int kMaxSide = 1 << 20;

// frames[n] uint8 [H, W, 3] -> out float32 [n, size, size, 3] in [-1, 1], black = -1.
//
// Each frame is scaled to fit size x size with its aspect kept (antialiased bilinear), centred on black, and mapped
// to pixel / 255 * 2 - 1. Sizes, weights and rounding are those of openpi-client's image_tools.py, which calls Pillow:
// first along the rows, then along the columns, each pass rounded to uint8. The pixels equal Pillow's; only for frames
// more than twice as tall as wide, where Pillow >= 13 takes the other order, do some differ by one level of 255.
// A side that would scale to less than one pixel (an error in openpi-client) becomes one pixel.
//
// Sides in 1..kMaxSide, size in 1..kMaxSide, threads >= 1 (an upper limit; small work stays on the calling thread).
void resize_with_pad(const std::vector<FrameView>& frames, int size, float* out, int threads);

}  // namespace pi0
