#include "resize_with_pad.h"

#include <algorithm>
#include <array>
#include <exception>
#include <thread>

#include "pixel.h"

namespace pi0 {
namespace {

// Each thread must have at least this many pixels (read and written) to work on. Measured on two cores of a 2.5 GHz
// Xeon: a thread costs 35 us to start and join, and two are no faster than one below 0.8 ms of work, 200,000 pixels.
constexpr std::int64_t kPixelsPerThread = 100'000;

// What to do for one frame, decided before any pixel is touched.
struct Job {
  FrameView frame;
  float* out;  // [(size / patch)^2, patch, patch, 3]
  int size, patch;
  Placement picture;
  Axis rows, columns;

  Job(const FrameView& source, int square, int side, float* target)
      : frame(source),
        out(target),
        size(square),
        patch(side),
        picture(Placement::of(source.height, source.width, square)),
        rows(bilinear_axis(source.height, picture.height)),
        columns(bilinear_axis(source.width, picture.width)) {}

  // Row y of the picture, [size, 3], to its places in the patches.
  void write_row(int y, const float* row) const {
    const std::ptrdiff_t length = 3 * static_cast<std::ptrdiff_t>(patch);
    float* target = out + (static_cast<std::ptrdiff_t>(y / patch) * (size / patch) * patch + y % patch) * length;
    for (int column = 0; column < size; column += patch, row += length, target += patch * length) {
      std::copy(row, row + length, target);
    }
  }
};

// Working memory of one thread, large enough for every job, so that threads allocate nothing.
struct Scratch {
  std::vector<std::uint8_t> ring;  // [longest, width, 3]: the horizontally resampled rows in use
  std::vector<std::int32_t> sums;  // [width, 3]
  std::vector<float> row;          // [size, 3]

  Scratch(const std::vector<Job>& jobs, int size) : row(3 * static_cast<std::size_t>(size)) {
    std::size_t rows = 0, length = 0;
    for (const Job& job : jobs) {
      rows = std::max(rows, 3 * static_cast<std::size_t>(job.picture.width) * job.rows.longest);
      length = std::max(length, 3 * static_cast<std::size_t>(job.picture.width));
    }
    ring.resize(rows);
    sums.resize(length);
  }
};

// Row y of the frame [W, 3] -> out [width, 3], rounded to uint8 as Pillow does between its two passes.
void resample_row(const FrameView& frame, int y, const Axis& columns, std::uint8_t* out) {
  const std::uint8_t* row = frame.pixels + y * frame.row_stride;
  const std::ptrdiff_t step = frame.column_stride, channel = frame.channel_stride;
  if (columns.windows.size() == static_cast<std::size_t>(frame.width) && step == 3 && channel == 1) {
    std::copy(row, row + 3 * frame.width, out);  // same width: nothing to resample
    return;
  }
  for (const Window& window : columns.windows) {
    const std::uint8_t* pixel = row + window.first * step;
    const std::int32_t* weight = &columns.weights[window.weights];
    std::int32_t red = kHalf, green = kHalf, blue = kHalf;
    for (int t = 0; t < window.count; ++t, pixel += step) {
      red += weight[t] * pixel[0];
      green += weight[t] * pixel[channel];
      blue += weight[t] * pixel[2 * channel];
    }
    *out++ = round_to_pixel(red);
    *out++ = round_to_pixel(green);
    *out++ = round_to_pixel(blue);
  }
}

// What every pixel value becomes.
std::array<float, 256> normalized_values() {
  std::array<float, 256> values;
  for (int i = 0; i < 256; ++i) values[i] = normalize(static_cast<std::uint8_t>(i));
  return values;
}

// Row y of a frame that has the output's size already: nothing to resample, and most cameras are set up so.
void convert_row(const FrameView& frame, int y, float* __restrict out) {
  const std::uint8_t* __restrict pixel = frame.pixels + y * frame.row_stride;
  const std::ptrdiff_t step = frame.column_stride, channel = frame.channel_stride;
  if (step == 3 && channel == 1) {
    for (int i = 0; i < 3 * frame.width; ++i) out[i] = normalize(pixel[i]);
    return;
  }
  // Planes, as ALOHA sends them: no vector instructions here, and then a table is twice as fast as a division.
  static const std::array<float, 256> value = normalized_values();
  for (int x = 0; x < frame.width; ++x, pixel += step, out += 3) {
    out[0] = value[pixel[0]];
    out[1] = value[pixel[channel]];
    out[2] = value[pixel[2 * channel]];
  }
}

// Output rows [size * band / bands, ...) of one frame: the picture's rows are divided evenly, the black rows above
// belong to the first band and those below to the last.
void run_band(const Job& job, int band, int bands, Scratch& scratch) {
  const Placement& picture = job.picture;
  const std::size_t left = 3 * static_cast<std::size_t>(picture.left);
  const std::size_t length = 3 * static_cast<std::size_t>(picture.width);
  const int begin = static_cast<int>(static_cast<std::int64_t>(picture.height) * band / bands);
  const int end = static_cast<int>(static_cast<std::int64_t>(picture.height) * (band + 1) / bands);
  std::vector<float>& row = scratch.row;  // complete before it is written: the patches are visited once
  if (job.frame.height == job.size && job.frame.width == job.size) {
    for (int y = begin; y < end; ++y) {
      convert_row(job.frame, y, row.data());
      job.write_row(y, row.data());
    }
    return;
  }

  std::fill(row.begin(), row.end(), -1.0f);
  for (int y = 0; band == 0 && y < picture.top; ++y) job.write_row(y, row.data());
  for (int y = picture.top + picture.height; band == bands - 1 && y < job.size; ++y) job.write_row(y, row.data());
  int next = begin < end ? job.rows.windows[begin].first : 0;  // the next source row to resample horizontally
  for (int y = begin; y < end; ++y) {
    const Window& window = job.rows.windows[y];
    for (; next < window.first + window.count; ++next) {
      resample_row(job.frame, next, job.columns, &scratch.ring[next % job.rows.longest * length]);
    }
    std::int32_t* sums = scratch.sums.data();
    std::fill(sums, sums + length, kHalf);
    for (int t = 0; t < window.count; ++t) {
      const std::int32_t weight = job.rows.weights[window.weights + t];
      const std::uint8_t* source = &scratch.ring[(window.first + t) % job.rows.longest * length];
      for (std::size_t i = 0; i < length; ++i) sums[i] += weight * source[i];
    }
    float* pixels = row.data() + left;
    for (std::size_t i = 0; i < length; ++i) pixels[i] = normalize(round_to_pixel(sums[i]));
    job.write_row(picture.top + y, row.data());
  }
}

}  // namespace

void resize_with_pad(const std::vector<FrameView>& frames, int size, int patch, float* out, int threads) {
  const std::int64_t area = static_cast<std::int64_t>(size) * size;
  std::vector<Job> jobs;
  jobs.reserve(frames.size());
  std::int64_t pixels = 0;
  for (const FrameView& frame : frames) {
    jobs.emplace_back(frame, size, patch, out + 3 * area * static_cast<std::int64_t>(jobs.size()));
    pixels += static_cast<std::int64_t>(frame.height) * frame.width + area;
  }

  // Thread i computes band i of every frame: bands are independent (each resamples the few source rows it shares
  // with its neighbour itself), so there is nothing to wait for but the end.
  const auto useful = std::max<std::int64_t>(pixels / kPixelsPerThread, 1);
  const int bands = static_cast<int>(std::min<std::int64_t>(threads, useful));
  std::vector<Scratch> scratch(bands, Scratch(jobs, size));
  const auto run = [&](int band) {
    for (const Job& job : jobs) run_band(job, band, bands, scratch[band]);
  };
  std::vector<std::thread> workers;
  workers.reserve(bands - 1);
  for (int band = 1; band < bands; ++band) {
    try {
      workers.emplace_back(run, band);
    } catch (const std::exception&) {  // the system gives no more threads: do its share here
      run(band);
    }
  }
  run(0);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace pi0
