// The Python face of csrc/: argument types and memory safety, no arithmetic. Friendly errors are the caller's
// (python/pi0_engine/images.py).

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "resize_with_pad.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled parts of pi0-engine.";

  m.def(
      "resize_with_pad",
      [](const std::vector<py::array>& frames, py::array_t<float, py::array::c_style> out, int threads) {
        const auto fail = [](const std::string& message) { throw py::value_error("resize_with_pad: " + message); };
        if (out.ndim() != 4 || out.shape(0) != static_cast<py::ssize_t>(frames.size()) ||
            out.shape(1) != out.shape(2) || out.shape(3) != 3 || out.shape(1) < 1 || out.shape(1) > pi0::kMaxSide) {
          fail("out must be float32 [number of frames, size, size, 3]");
        }
        if (threads < 1) fail("threads must be at least 1");
        std::vector<pi0::FrameView> views;
        views.reserve(frames.size());
        for (const py::array& frame : frames) {
          if (!py::isinstance<py::array_t<std::uint8_t>>(frame) || frame.ndim() != 3 || frame.shape(2) != 3) {
            fail("every frame must be uint8 [height, width, 3]");
          }
          for (int axis = 0; axis < 2; ++axis) {
            if (frame.shape(axis) < 1 || frame.shape(axis) > pi0::kMaxSide) {
              fail("every side of a frame must be 1 to " + std::to_string(pi0::kMaxSide) + " pixels");
            }
          }
          views.push_back({static_cast<const std::uint8_t*>(frame.data()), static_cast<int>(frame.shape(0)),
                           static_cast<int>(frame.shape(1)), frame.strides(0), frame.strides(1), frame.strides(2)});
        }
        float* target = out.mutable_data();
        const int size = static_cast<int>(out.shape(1));
        py::gil_scoped_release unlocked;  // `frames` and `out` are held by the arguments until the lock is back
        pi0::resize_with_pad(views, size, target, threads);
      },
      py::arg("frames"), py::arg("out").noconvert(), py::arg("threads"),
      "uint8 RGB frames [H, W, 3] of any sizes and strides -> out, float32 [N, size, size, 3] in [-1, 1].");
}
