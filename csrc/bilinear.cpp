#include "bilinear.h"

#include <algorithm>
#include <cmath>

#include "pixel.h"

namespace pi0 {

Placement Placement::of(int frame_height, int frame_width, int size) {
  const double ratio = std::max(frame_width / static_cast<double>(size), frame_height / static_cast<double>(size));
  const int height = std::max(static_cast<int>(frame_height / ratio), 1);
  const int width = std::max(static_cast<int>(frame_width / ratio), 1);
  return {height, width, (size - height) / 2, (size - width) / 2};
}

Axis bilinear_axis(int input, int output) {
  const double scale = static_cast<double>(input) / output;
  const double reach = std::max(scale, 1.0);
  Axis axis;
  axis.windows.reserve(output);
  std::vector<double> triangle;
  for (int i = 0; i < output; ++i) {
    const double centre = (i + 0.5) * scale;
    int first = std::max(static_cast<int>(centre - reach + 0.5), 0);
    const int end = std::min(static_cast<int>(centre + reach + 0.5), input);
    triangle.clear();
    double total = 0.0;
    for (int x = first; x < end; ++x) {
      triangle.push_back(std::max(1.0 - std::abs((x - centre + 0.5) / reach), 0.0));
      total += triangle.back();
    }
    const std::size_t begin = axis.weights.size();
    for (const double value : triangle) {
      const auto weight = static_cast<std::int32_t>(0.5 + value / total * kOne);
      if (weight == 0 && axis.weights.size() == begin) {
        ++first;  // leading zeros only cost time
      } else {
        axis.weights.push_back(weight);
      }
    }
    while (axis.weights.back() == 0) axis.weights.pop_back();
    const int count = static_cast<int>(axis.weights.size() - begin);
    axis.windows.push_back({first, count, begin});
    axis.longest = std::max(axis.longest, count);
  }
  return axis;
}

}  // namespace pi0
