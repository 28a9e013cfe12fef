#pragma once

#include <cstdint>

namespace pi0 {

// The table says how packed frames become pictures. It holds all that depends on a frame's size, so that one captured
// CUDA graph serves every camera. Flat int32: first one FrameEntry for each frame, then the axes that they refer to.
//
// An axis of `length` output pixels is first[length], then weights[terms][length] (fixed point, see pixel.h):
//   out[i] = sum over t < terms of weights[t][i] * in[first[i] + t]
// `first` never decreases. Every output pixel has as many terms as the longest window, and all lie inside the frame:
// shorter windows are filled with zeros, so the terms of neighbouring pixels are neighbours in memory and no loop
// needs a bound of its own. Frames of equal sizes share their axes.
struct FrameEntry {
  std::int32_t pixels;  // where the frame, uint8 [height, width, 3] without gaps, starts, in units of kFrameAlignment
  std::int32_t height, width;
  std::int32_t scaled_height, scaled_width, top, left;  // where its picture lies in the square; the rest is black
  std::int32_t rows, row_terms;                         // the vertical axis: where in the table, and its terms
  std::int32_t columns, column_terms;                   // the horizontal axis
};

constexpr int kEntryInts = sizeof(FrameEntry) / sizeof(std::int32_t);
constexpr int kFrameAlignment = 16;  // bytes

}  // namespace pi0
