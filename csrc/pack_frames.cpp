#include "pack_frames.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "frame_table.h"

namespace pi0 {
namespace {

void require(const char* what, std::int64_t needed, std::int64_t available) {
  if (needed > available) {
    throw std::invalid_argument("pack_frames: the frames need " + std::to_string(needed) + " " + what +
                                ", there is room for " + std::to_string(available));
  }
}

std::int64_t aligned(std::int64_t bytes) { return (bytes + kFrameAlignment - 1) / kFrameAlignment * kFrameAlignment; }

// Appends axes to the table, each pair of lengths once.
class AxisWriter {
 public:
  struct Written {
    int input, output, begin, terms;
  };

  AxisWriter(std::int32_t* table, std::int64_t size, std::int64_t begin) : table_(table), size_(size), end_(begin) {}

  Written write(int input, int output) {
    for (const Written& axis : written_) {
      if (axis.input == input && axis.output == output) return axis;
    }
    const Axis axis = bilinear_axis(input, output);
    const std::int64_t begin = end_;
    end_ += output * (1 + static_cast<std::int64_t>(axis.longest));
    require("table entries", end_, size_);
    std::int32_t* const first = table_ + begin;
    std::int32_t* const weights = first + output;
    std::fill(weights, table_ + end_, 0);
    for (int i = 0; i < output; ++i) {
      const Window& window = axis.windows[i];
      first[i] = std::min(window.first, input - axis.longest);  // all terms of the last windows lie inside, too
      std::int32_t* weight = weights + i + static_cast<std::ptrdiff_t>(window.first - first[i]) * output;
      for (int t = 0; t < window.count; ++t, weight += output) *weight = axis.weights[window.weights + t];
    }
    written_.push_back({input, output, static_cast<int>(begin), axis.longest});
    return written_.back();
  }

  std::int64_t end() const { return end_; }

 private:
  std::int32_t* table_;
  std::int64_t size_, end_;
  std::vector<Written> written_;
};

void copy_frame(const FrameView& frame, std::uint8_t* out) {
  const std::ptrdiff_t row_bytes = 3 * static_cast<std::ptrdiff_t>(frame.width);
  const bool dense_rows = frame.channel_stride == 1 && frame.column_stride == 3;
  if (dense_rows && frame.row_stride == row_bytes) {
    std::memcpy(out, frame.pixels, row_bytes * frame.height);
    return;
  }
  for (int y = 0; y < frame.height; ++y) {
    const std::uint8_t* pixel = frame.pixels + y * frame.row_stride;
    if (dense_rows) {
      std::memcpy(out, pixel, row_bytes);
      out += row_bytes;
      continue;
    }
    for (int x = 0; x < frame.width; ++x, pixel += frame.column_stride) {
      for (int channel = 0; channel < 3; ++channel) *out++ = pixel[channel * frame.channel_stride];
    }
  }
}

}  // namespace

PackedSize packed_size(int height, int width, int size) {
  // A window reaches over at most 2 * max(input / output, 1) + 2 pixels, and an axis has 1 + that for each of at most
  // `size` output pixels.
  const auto axis = [size](int input) { return 3 * std::int64_t{size} + 2 * std::int64_t{std::max(input, size)}; };
  return {aligned(3 * std::int64_t{height} * width), kEntryInts + axis(height) + axis(width)};
}

PackedSize pack_frames(const std::vector<FrameView>& frames, int size, std::uint8_t* pixels, std::int64_t pixels_size,
                       std::int32_t* table, std::int64_t table_size) {
  constexpr std::int64_t kMaxInt = std::numeric_limits<std::int32_t>::max();  // all the table can refer to
  const std::int64_t entries = kEntryInts * static_cast<std::int64_t>(frames.size());
  table_size = std::min(table_size, kMaxInt);
  require("table entries", entries, table_size);
  AxisWriter axes(table, table_size, entries);
  std::int64_t begin = 0, end = 0;  // of the frame, in bytes
  for (std::size_t i = 0; i < frames.size(); ++i) {
    const FrameView& frame = frames[i];
    begin = aligned(end);
    end = begin + 3 * std::int64_t{frame.height} * frame.width;
    require("bytes", end, std::min(pixels_size, kMaxInt * kFrameAlignment));
    const Placement picture = Placement::of(frame.height, frame.width, size);
    const auto rows = axes.write(frame.height, picture.height), columns = axes.write(frame.width, picture.width);
    const FrameEntry entry{static_cast<std::int32_t>(begin / kFrameAlignment),
                           frame.height,
                           frame.width,
                           picture.height,
                           picture.width,
                           picture.top,
                           picture.left,
                           rows.begin,
                           rows.terms,
                           columns.begin,
                           columns.terms};
    std::memcpy(table + kEntryInts * i, &entry, sizeof entry);
    copy_frame(frame, pixels + begin);
  }
  return {end, axes.end()};
}

}  // namespace pi0
