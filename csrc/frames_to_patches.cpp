#include "frames_to_patches.h"

#include <vector>

#include "bilinear.h"
#include "frames_to_patches_parts.h"

// setup.py defines it, as "80, 90", when it compiles the .cu files too.
#ifndef PI0_CUDA_ARCHITECTURES
#define PI0_CUDA_ARCHITECTURES
#define PI0_WITHOUT_CUDA
#endif

namespace pi0 {

void frames_to_patches_host(const std::uint8_t* pixels, const std::int32_t* table, float* out, int count, int size,
                            int patch) {
  const int grid = size / patch, values = 3 * patch;
  std::vector<std::uint8_t> memory(kStagedBytes);
  for (int frame = 0; frame < count; ++frame) {
    for (int index = 0; index < grid * grid; ++index, out += values * patch) {
      const PatchJob job(pixels, table, frame, index, size, patch);
      std::uint8_t* staged = job.staged_bytes() <= kStagedBytes ? memory.data() : nullptr;
      for (int value = 0; staged != nullptr && value < values; ++value) stage_rows(job, value, 0, 1, staged);
      for (int value = 0; value < values; ++value) write_rows(job, value, 0, 1, staged, out);
    }
  }
}

std::string check_frame_table(std::int64_t pixels_size, const std::int32_t* table, std::int64_t table_size, int count,
                              int size) {
  if (table_size < kEntryInts * static_cast<std::int64_t>(count)) return "the table is too short for its frames";
  const auto axis_is_sound = [&](std::int64_t begin, std::int64_t terms, int input, int output) {
    if (begin < 0 || terms < 1 || terms > input || begin + output * (1 + terms) > table_size) return false;
    for (int i = 0; i < output; ++i) {
      const std::int32_t first = table[begin + i];
      if (first < (i == 0 ? 0 : table[begin + i - 1]) || first > input - terms) return false;
    }
    return true;
  };
  for (int frame = 0; frame < count; ++frame) {
    const FrameEntry& entry = reinterpret_cast<const FrameEntry*>(table)[frame];
    const std::string name = "frame " + std::to_string(frame);
    if (entry.height < 1 || entry.width < 1 || entry.height > kMaxSide || entry.width > kMaxSide || entry.pixels < 0 ||
        std::int64_t{entry.pixels} * kFrameAlignment + 3 * std::int64_t{entry.height} * entry.width > pixels_size) {
      return name + " does not lie inside the pixels";
    }
    if (entry.scaled_height < 1 || entry.scaled_width < 1 || entry.top < 0 || entry.left < 0 ||
        entry.scaled_height > size - entry.top || entry.scaled_width > size - entry.left) {
      return name + "'s picture does not lie inside " + std::to_string(size) + " x " + std::to_string(size) + " pixels";
    }
    if (!axis_is_sound(entry.rows, entry.row_terms, entry.height, entry.scaled_height) ||
        !axis_is_sound(entry.columns, entry.column_terms, entry.width, entry.scaled_width)) {
      return name + "'s resampling leaves the frame or the table";
    }
  }
  return "";
}

std::vector<int> cuda_architectures() { return {PI0_CUDA_ARCHITECTURES}; }

#ifdef PI0_WITHOUT_CUDA
const char* frames_to_patches_cuda(const std::uint8_t*, const std::int32_t*, float*, int, int, int, void*) {
  return load_frames_to_patches_cuda();
}

const char* load_frames_to_patches_cuda() { return "the extension was built without nvcc"; }
#endif

}  // namespace pi0
