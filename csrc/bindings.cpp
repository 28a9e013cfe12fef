// The Python face of csrc/: argument types and memory safety, no arithmetic. Friendly errors are the caller's
// (python/pi0_engine/images/resize.py, pack.py, kernels/frames.py).

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "frames_to_patches.h"
#include "pack_frames.h"
#include "resize_with_pad.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled parts of pi0-engine.";

  using Frames = std::vector<py::array>;
  using Bytes = py::array_t<std::uint8_t, py::array::c_style>;
  using Ints = py::array_t<std::int32_t, py::array::c_style>;
  using Floats = py::array_t<float, py::array::c_style>;

  static const auto require = [](bool good, const char* function, const std::string& expected) {
    if (!good) throw py::value_error(std::string(function) + ": " + expected);
  };
  static const auto is_side = [](py::ssize_t side) { return 1 <= side && side <= pi0::kMaxSide; };
  static const std::string sides = "1 to " + std::to_string(pi0::kMaxSide) + " pixels";

  static const auto views_of = [](const Frames& frames, const char* function) {
    std::vector<pi0::FrameView> views;
    views.reserve(frames.size());
    for (const py::array& frame : frames) {
      require(py::isinstance<py::array_t<std::uint8_t>>(frame) && frame.ndim() == 3 && frame.shape(2) == 3, function,
              "every frame must be uint8 [height, width, 3]");
      require(is_side(frame.shape(0)) && is_side(frame.shape(1)), function, "every side of a frame must be " + sides);
      views.push_back({static_cast<const std::uint8_t*>(frame.data()), static_cast<int>(frame.shape(0)),
                       static_cast<int>(frame.shape(1)), frame.strides(0), frame.strides(1), frame.strides(2)});
    }
    return views;
  };

  m.def(
      "resize_with_pad",
      [](const Frames& frames, int size, int patch, Floats out, int threads) {
        require(is_side(size) && patch >= 1 && size % patch == 0, "resize_with_pad",
                "size must be " + sides + " and patch divide it");
        const py::ssize_t values = 3 * static_cast<py::ssize_t>(size) * size;
        require(out.size() == values * static_cast<py::ssize_t>(frames.size()), "resize_with_pad",
                "out must have 3 * size^2 values for each frame");
        require(threads >= 1, "resize_with_pad", "threads must be at least 1");
        const std::vector<pi0::FrameView> views = views_of(frames, "resize_with_pad");
        float* target = out.mutable_data();
        py::gil_scoped_release unlocked;  // `frames` and `out` are held by the arguments until the lock is back
        pi0::resize_with_pad(views, size, patch, target, threads);
      },
      py::arg("frames"), py::arg("size"), py::arg("patch"), py::arg("out").noconvert(), py::arg("threads"),
      "uint8 RGB frames [H, W, 3] of any sizes and strides -> out, float32 [N, (size / patch)^2, patch, patch, 3] in "
      "[-1, 1], of any shape with so many values.");

  m.def(
      "packed_size",
      [](int height, int width, int size) {
        require(is_side(height) && is_side(width) && is_side(size), "packed_size", "every side must be " + sides);
        const pi0::PackedSize most = pi0::packed_size(height, width, size);
        return py::make_tuple(most.bytes, most.ints);
      },
      py::arg("height"), py::arg("width"), py::arg("size"),
      "The most bytes and table entries that pack_frames uses for one frame of this size or smaller.");

  m.def(
      "pack_frames",
      [](const Frames& frames, int size, Bytes pixels_out, Ints table_out) {
        require(is_side(size), "pack_frames", "size must be " + sides);
        const std::vector<pi0::FrameView> views = views_of(frames, "pack_frames");
        std::uint8_t* pixels = pixels_out.mutable_data();
        std::int32_t* table = table_out.mutable_data();
        const py::ssize_t bytes = pixels_out.size(), ints = table_out.size();
        pi0::PackedSize used;
        {
          py::gil_scoped_release unlocked;
          used = pi0::pack_frames(views, size, pixels, bytes, table, ints);
        }
        return py::make_tuple(used.bytes, used.ints);
      },
      py::arg("frames"), py::arg("size"), py::arg("pixels_out").noconvert(), py::arg("table_out").noconvert(),
      "uint8 RGB frames [H, W, 3] of any sizes and strides -> their bytes, and the table of frames_to_patches. Returns "
      "how many bytes and table entries it used.");

  m.def(
      "frames_to_patches_host",
      [](Bytes pixels, Ints table, Floats out, int count, int size, int patch) {
        require(count >= 0 && is_side(size) && patch >= 1 && size % patch == 0, "frames_to_patches_host",
                "count must be at least 0, size " + sides + " and a multiple of patch");
        require(out.size() == static_cast<py::ssize_t>(count) * size * size * 3, "frames_to_patches_host",
                "out must hold float32 [count, (size / patch)^2, patch^2 * 3]");
        const std::string wrong = pi0::check_frame_table(pixels.size(), table.data(), table.size(), count, size);
        require(wrong.empty(), "frames_to_patches_host", wrong);
        const std::uint8_t* source = pixels.data();
        const std::int32_t* entries = table.data();
        float* target = out.mutable_data();
        py::gil_scoped_release unlocked;
        pi0::frames_to_patches_host(source, entries, target, count, size, patch);
      },
      py::arg("pixels").noconvert(), py::arg("table").noconvert(), py::arg("out").noconvert(), py::arg("count"),
      py::arg("size"), py::arg("patch"),
      "What pack_frames packed -> out, float32 [count, (size / patch)^2, patch^2 * 3] in [-1, 1].");

  m.def(
      "frames_to_patches_cuda",
      [](std::uintptr_t pixels_ptr, std::uintptr_t table_ptr, std::uintptr_t out_ptr, int count, int size, int patch,
         std::uintptr_t stream) {
        require(count >= 0 && is_side(size) && patch >= 1 && size % patch == 0, "frames_to_patches_cuda",
                "count must be at least 0, size " + sides + " and a multiple of patch");
        if (count == 0) return;
        const char* error = pi0::frames_to_patches_cuda(
            reinterpret_cast<const std::uint8_t*>(pixels_ptr), reinterpret_cast<const std::int32_t*>(table_ptr),
            reinterpret_cast<float*>(out_ptr), count, size, patch, reinterpret_cast<void*>(stream));
        if (error != nullptr) throw std::runtime_error(std::string("frames_to_patches_cuda: ") + error);
      },
      py::arg("pixels_ptr"), py::arg("table_ptr"), py::arg("out_ptr"), py::arg("count"), py::arg("size"),
      py::arg("patch"), py::arg("stream"),
      "frames_to_patches_host on the current CUDA device: addresses there, and a stream. Checks no table.");

  m.def(
      "load_frames_to_patches_cuda",
      [] {
        const char* error = pi0::load_frames_to_patches_cuda();
        return error == nullptr ? std::string() : std::string(error);
      },
      "Loads the kernel on the current CUDA device. Returns why it cannot run there, or an empty string.");

  m.def("cuda_architectures", [] { return py::tuple(py::cast(pi0::cuda_architectures())); },
        "The compute capabilities whose machine code is compiled in (80 means 8.0); none without nvcc.");
}
