#include "frames_to_patches.h"

#include <cuda_runtime.h>

#include "frames_to_patches_parts.h"

namespace pi0 {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxPatch = 85;
static_assert(3 * kMaxPatch <= kThreads);
constexpr int kMaxFrames = 65535;  // of the grid's second dimension

// One block for each patch of each frame; threads (3 * patch values of a row, some rows).
//
// The block resamples horizontally the source rows that its patch needs, to uint8 in shared memory, then vertically.
// The filter covers 2 s source pixels for a picture shrunk s times, so a 14-pixel patch needs (14 + 1) s rows of 42
// values. For three cameras (scale; patches with a picture in them; multiply-adds; memory read and written):
//
//   480 x 640     2.9   576    6.2 M horizontally,  2.0 M vertically    2.8 MB of pixels, 1.8 MB of patches
//   720 x 1280    5.7   480   18.7 M                3.0 M               8.3 MB            1.8 MB
//   1080 x 1920   8.6   480   42.1 M                4.6 M              18.7 MB            1.8 MB
//
// A thread per output pixel that keeps nothing would resample every source row twice (its window is 2 s rows high, the
// next begins s rows further): 12, 37 and 82 M. Each multiply-add loads a byte and a weight, and a warp finds them in
// three to five cache lines, one per cycle: by that count, which is not a measurement, 0.03, 0.1 and 0.3 ms on an Orin
// (16 multiprocessors at 1.3 GHz) and a tenth of it on an H200. A host needs longer to pack the frames (0.06, 0.2 and
// 0.7 ms on a 2.5 GHz Xeon), so wider loads would gain nothing.
__global__ void __launch_bounds__(kThreads)
    frames_to_patches(const std::uint8_t* __restrict__ pixels, const std::int32_t* __restrict__ table,
                      float* __restrict__ out, int size, int patch) {
  __shared__ std::uint8_t memory[kStagedBytes];
  const PatchJob job(pixels, table, blockIdx.y, blockIdx.x, size, patch);
  std::uint8_t* const staged = job.staged_bytes() <= kStagedBytes ? memory : nullptr;  // alike in the whole block
  if (staged != nullptr) {
    stage_rows(job, threadIdx.x, threadIdx.y, blockDim.y, staged);
    __syncthreads();
  }
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  write_rows(job, threadIdx.x, threadIdx.y, blockDim.y, staged, out + index * (3 * patch * patch));
}

// What happened since the last call, or nullptr.
const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* load_frames_to_patches_cuda() {
  cudaFuncAttributes attributes;
  cudaFuncGetAttributes(&attributes, frames_to_patches);
  return last_error();
}

const char* frames_to_patches_cuda(const std::uint8_t* pixels, const std::int32_t* table, float* out, int count,
                                   int size, int patch, void* stream) {
  if (patch > kMaxPatch) return "a patch has more than 85 x 85 pixels";
  if (count > kMaxFrames) return "there are more than 65535 frames";
  const int grid = size / patch, values = 3 * patch;
  const dim3 blocks(grid * grid, count), threads(values, kThreads / values);
  frames_to_patches<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(pixels, table, out, size, patch);
  return last_error();
}

}  // namespace pi0
