// frames_to_patches.cu run by CPU threads, one for each thread of a block, with a real barrier: what it launches and
// which thread writes what, checked without a GPU. tests/csrc/test_cuda.py puts the source here with its launch rewritten.

#include <pthread.h>

#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#define __global__
#define __launch_bounds__(threads)
#define __restrict__
#define __shared__ static

struct dim3 {
  unsigned x, y;
  explicit dim3(unsigned width = 1, unsigned height = 1) : x(width), y(height) {}
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaSuccess = 0;
int cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(int) { return ""; }

struct cudaFuncAttributes {};
template <class Kernel>
int cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

thread_local dim3 threadIdx;
dim3 blockIdx, blockDim, gridDim;  // blocks run one after the other
pthread_barrier_t barrier;
void __syncthreads() { pthread_barrier_wait(&barrier); }

template <class Kernel>
void launch(dim3 blocks, dim3 threads, Kernel kernel) {
  gridDim = blocks;
  blockDim = threads;
  for (blockIdx.y = 0; blockIdx.y < blocks.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x) {
      pthread_barrier_init(&barrier, nullptr, threads.x * threads.y);
      std::vector<std::thread> running;
      for (unsigned i = 0; i < threads.x * threads.y; ++i) {
        running.emplace_back([=] {
          threadIdx = dim3(i % threads.x, i / threads.x);
          kernel();
        });
      }
      for (std::thread& thread : running) thread.join();
      pthread_barrier_destroy(&barrier);
    }
  }
}

#include "frames_to_patches.inc"
#include "pack_frames.h"

int main() {
  std::mt19937 random(0);
  const int cases[][4] = {{48, 64, 28, 14}, {100, 37, 56, 14}, {5, 9, 32, 16}, {1, 40, 28, 14}, {400, 600, 14, 14}};
  for (const auto& [height, width, size, patch] : cases) {
    std::vector<std::uint8_t> pixels(3 * height * width);
    for (std::uint8_t& pixel : pixels) pixel = static_cast<std::uint8_t>(random());
    const std::vector<pi0::FrameView> frames{{pixels.data(), height, width, 3 * width, 3, 1},
                                             {pixels.data(), width, height, 3, 3 * width, 1}};
    const auto one = pi0::packed_size(height, width, size), other = pi0::packed_size(width, height, size);
    std::vector<std::uint8_t> packed(one.bytes + other.bytes);
    std::vector<std::int32_t> table(one.ints + other.ints);
    pi0::pack_frames(frames, size, packed.data(), packed.size(), table.data(), table.size());

    std::vector<float> expected(2 * 3 * size * size), given(expected.size(), 9.0f);
    pi0::frames_to_patches_host(packed.data(), table.data(), expected.data(), 2, size, patch);
    const char* error =
        pi0::frames_to_patches_cuda(packed.data(), table.data(), given.data(), 2, size, patch, nullptr);
    const bool same = std::memcmp(given.data(), expected.data(), given.size() * sizeof(float)) == 0;
    std::printf("%d x %d to %d in patches of %d: %s\n", height, width, size, patch,
                error != nullptr ? error : same ? "equal" : "different");
  }
}
