#pragma once

#include <cstdint>

// Marks what a kernel and its CPU version share. Without nvcc it is nothing.
#ifdef __CUDACC__
#define PI0_HOST_DEVICE __host__ __device__
#else
#define PI0_HOST_DEVICE
#endif

namespace pi0 {

// Resampling weights are fixed point. 32 bits hold sign and carry (2), the pixel (8) and this fraction, as in Pillow.
constexpr int kFractionBits = 22;
constexpr std::int32_t kOne = 1 << kFractionBits;
constexpr std::int32_t kHalf = kOne / 2;

// A weighted sum of pixels that began with kHalf -> the nearest pixel.
PI0_HOST_DEVICE inline std::uint8_t round_to_pixel(std::int32_t sum) {
  const std::int32_t pixel = sum >> kFractionBits;
  return static_cast<std::uint8_t>(pixel < 255 ? pixel : 255);
}

// [0, 255] -> [-1, 1] as numpy computes it in float32. The doubling is exact, so a fused multiply-add gives the same.
PI0_HOST_DEVICE inline float normalize(std::uint8_t pixel) { return pixel / 255.0f * 2.0f - 1.0f; }

}  // namespace pi0
