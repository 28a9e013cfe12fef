#pragma once

#include <cstdint>

#include "frame_table.h"
#include "pixel.h"

// The two halves of frames_to_patches, for one patch of one frame, as the kernel's threads and the CPU's loops run
// them. A patch has `patch` rows of 3 * patch values (channel fastest); a thread works on one value of some rows.

namespace pi0 {

// Resampled source rows that a patch keeps for its second half, in bytes. 292 rows of a 14-pixel patch: frames up to
// 4,300 pixels wide, and on every GPU it leaves room for as many blocks as the threads allow.
constexpr int kStagedBytes = 12 * 1024;

// What to do for one patch.
struct PatchJob {
  const std::uint8_t* pixels;   // of the frame
  const std::int32_t* rows;     // the vertical axis
  const std::int32_t* columns;  // the horizontal axis
  int width, scaled_height, scaled_width, row_terms, column_terms;
  int patch;       // its side
  int top, left;   // of the patch, from the picture's corner; outside the picture is black
  int begin, end;  // the source rows that it needs

  PI0_HOST_DEVICE PatchJob(const std::uint8_t* packed, const std::int32_t* table, int frame, int index, int size,
                           int side) {
    const FrameEntry& entry = reinterpret_cast<const FrameEntry*>(table)[frame];
    pixels = packed + static_cast<std::int64_t>(entry.pixels) * kFrameAlignment;
    rows = table + entry.rows;
    columns = table + entry.columns;
    width = entry.width;
    scaled_height = entry.scaled_height;
    scaled_width = entry.scaled_width;
    row_terms = entry.row_terms;
    column_terms = entry.column_terms;
    patch = side;
    const int grid = size / side;
    top = index / grid * side - entry.top;
    left = index % grid * side - entry.left;
    const int first = top > 0 ? top : 0;
    const int last = (top + side < scaled_height ? top + side : scaled_height) - 1;
    const bool empty = first > last || left + side <= 0 || left >= scaled_width;
    begin = empty ? 0 : rows[first];
    end = empty ? 0 : rows[last] + row_terms;
  }

  PI0_HOST_DEVICE std::int64_t staged_bytes() const { return static_cast<std::int64_t>(end - begin) * (3 * patch); }
};

// Source row `row` -> value `value` of the patch's row, resampled horizontally and rounded as Pillow does between its
// two passes. The value must lie in the picture.
PI0_HOST_DEVICE inline std::uint8_t resample_row(const PatchJob& job, int row, int value) {
  const int column = job.left + value / 3;
  const std::uint8_t* pixel =
      job.pixels + 3 * (static_cast<std::int64_t>(row) * job.width + job.columns[column]) + value % 3;
  const std::int32_t* weight = job.columns + job.scaled_width + column;
  std::int32_t sum = kHalf;
  for (int t = 0; t < job.column_terms; ++t, pixel += 3, weight += job.scaled_width) sum += *weight * *pixel;
  return round_to_pixel(sum);
}

PI0_HOST_DEVICE inline bool in_picture(const PatchJob& job, int value) {
  const int column = job.left + value / 3;
  return 0 <= column && column < job.scaled_width;
}

// First half: source rows begin + offset, + step, ... of one value -> staged [end - begin, 3 * patch].
PI0_HOST_DEVICE inline void stage_rows(const PatchJob& job, int value, int offset, int step, std::uint8_t* staged) {
  if (!in_picture(job, value)) return;
  for (int row = job.begin + offset; row < job.end; row += step) {
    staged[(row - job.begin) * 3 * job.patch + value] = resample_row(job, row, value);
  }
}

// Second half: rows offset, + step, ... of one value -> out [patch, 3 * patch]. Without staged rows, each is resampled
// again for every output row that needs it.
PI0_HOST_DEVICE inline void write_rows(const PatchJob& job, int value, int offset, int step, const std::uint8_t* staged,
                                       float* out) {
  const bool in_columns = in_picture(job, value);
  for (int y = offset; y < job.patch; y += step) {
    const int row = job.top + y;
    float result = -1.0f;
    if (in_columns && 0 <= row && row < job.scaled_height) {
      const int first = job.rows[row];
      const std::int32_t* weight = job.rows + job.scaled_height + row;
      std::int32_t sum = kHalf;
      for (int t = 0; t < job.row_terms; ++t, weight += job.scaled_height) {
        sum += *weight * (staged != nullptr ? staged[(first + t - job.begin) * 3 * job.patch + value]
                                            : resample_row(job, first + t, value));
      }
      result = normalize(round_to_pixel(sum));
    }
    out[y * 3 * job.patch + value] = result;
  }
}

}  // namespace pi0
