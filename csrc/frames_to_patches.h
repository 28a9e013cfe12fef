#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pi0 {

// pixels and table as pack_frames wrote them (for this size) -> out float32 [count, (size / patch)^2, patch^2 * 3].
//
// The frames as resize_with_pad makes them, bit for bit, cut into patches: patches row-major, inside a patch its pixels
// row by row, the channel fastest. `patch` divides `size`.
void frames_to_patches_host(const std::uint8_t* pixels, const std::int32_t* table, float* out, int count, int size,
                            int patch);

// The same on the current CUDA device: device pointers, one launch on `stream` (a cudaStream_t), nothing waits.
// The table is not checked: it must have come from pack_frames. Returns why it could not be launched, or nullptr.
const char* frames_to_patches_cuda(const std::uint8_t* pixels, const std::int32_t* table, float* out, int count,
                                   int size, int patch, void* stream);

// Loads the kernel on the current CUDA device, so that a capture into a graph need not. Returns why it cannot run there
// (an older driver than the runtime's, a GPU without code for it), or nullptr.
const char* load_frames_to_patches_cuda();

// Whether every access that the table leads to lies inside the buffers: what is wrong, or "".
std::string check_frame_table(std::int64_t pixels_size, const std::int32_t* table, std::int64_t table_size, int count,
                              int size);

// The compute capabilities that frames_to_patches_cuda holds machine code for (80 means 8.0), rising. The newest is
// there as PTX too, for later GPUs. Empty if the extension was built without nvcc.
std::vector<int> cuda_architectures();

}  // namespace pi0
