#pragma once

#include <cstdint>
#include <vector>

#include "bilinear.h"

namespace pi0 {

// How much of the two buffers frames take.
struct PackedSize {
  std::int64_t bytes;  // of pixels
  std::int64_t ints;   // of the table
};

// The most that one frame of this size, or smaller, takes. Several take at most the sum.
PackedSize packed_size(int height, int width, int size);

// Copies frames of any sizes and strides into `pixels`, one after the other without gaps inside a frame, and writes
// the table that frames_to_patches reads (frame_table.h) to scale them to size x size.
//
// Sides and size in 1..kMaxSide. Throws std::invalid_argument if a buffer is too small; both are then undefined.
PackedSize pack_frames(const std::vector<FrameView>& frames, int size, std::uint8_t* pixels, std::int64_t pixels_size,
                       std::int32_t* table, std::int64_t table_size);

}  // namespace pi0
