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

// Where a frame's picture lies in the square that it is scaled to fit.
struct Placement {
  int height, width, top, left;

  // Truncated sizes, as in openpi-client. A side that would be less than one pixel, an error there, is one.
  static Placement of(int frame_height, int frame_width, int size);
};

// One output pixel along one axis: the sum over t of weights[t] * in[first + t].
struct Window {
  int first;
  int count;
  std::size_t weights;  // where its weights start in Axis::weights
};

// The resampling of one axis.
struct Axis {
  std::vector<Window> windows;        // one for each output pixel; `first` never decreases
  std::vector<std::int32_t> weights;  // fixed point, see pixel.h
  int longest = 0;                    // the largest `count`
};

// Pillow's bilinear filter: a triangle around the output pixel's centre, two input pixels wide, and widened by the
// scale when it shrinks (antialiasing).
Axis bilinear_axis(int input, int output);

}  // namespace pi0
