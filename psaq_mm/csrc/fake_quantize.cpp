// Fake-quantization on CPU in one pass over memory, forward and backward. The same numbers, bit for bit in the forward
// pass, as psaq_mm/quantization/kernels.py, which takes several passes and needs no compiler.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_CPU
#endif

namespace {

constexpr int64_t kBlock = 8192;   // values that share one partial sum, so that sums don't depend on the thread count
constexpr int64_t kAtOnce = 1024;  // terms that are added pairwise

// How a contiguous tensor lies: rows of `width` values each, where a row's scale is that of channel
// `row % channels` - or, where the channels are the last axis, each value's that of its place in the row.
struct Grid {
  int64_t channels, width, rows;
  bool last;
  std::vector<float> scale, inverse, low, high;

  Grid(const at::Tensor& x, const at::Tensor& scales, const at::Tensor& zero_points, int64_t axis, int64_t quant_min,
       int64_t quant_max) {
    const auto s = scales.detach().to(at::kFloat).contiguous(), z = zero_points.detach().to(at::kFloat).contiguous();
    channels = s.numel();
    TORCH_CHECK(z.numel() == channels, "as many zero points as scales");
    TORCH_CHECK(channels == 1 || (axis < x.dim() && x.size(axis) == channels), "as many scales as channels");
    for (int64_t c = 0; c < channels; ++c) {
      const float value = s.data_ptr<float>()[c], zero = z.data_ptr<float>()[c];
      scale.push_back(value);
      inverse.push_back(1.0f / value);
      low.push_back(static_cast<float>(quant_min) - zero);
      high.push_back(static_cast<float>(quant_max) - zero);
    }
    last = false;
    if (channels == 1) {
      width = kBlock;
      rows = (x.numel() + width - 1) / width;
      return;
    }
    width = 1;
    for (int64_t d = axis + 1; d < x.dim(); ++d) width *= x.size(d);
    last = width == 1;
    if (last) width = channels;
    rows = x.numel() / width;
  }
};

// One scale for all values.
FOR_EACH_CPU void round_row(const float* x, float* out, int64_t n, float scale, float inverse, float low, float high) {
  for (int64_t i = 0; i < n; ++i) {
    const float integer = std::nearbyint(x[i] * inverse);
    const float below = integer < low ? low : integer;
    out[i] = (below > high ? high : below) * scale;
  }
}

// A scale for each value.
FOR_EACH_CPU void round_channels(const float* x, float* out, int64_t n, const float* scale, const float* inverse,
                                 const float* low, const float* high) {
  for (int64_t i = 0; i < n; ++i) {
    const float integer = std::nearbyint(x[i] * inverse[i]);
    const float below = integer < low[i] ? low[i] : integer;
    out[i] = (below > high[i] ? high[i] : below) * scale[i];
  }
}

// Overwrites grad with the gradient of the values.
FOR_EACH_CPU void pass_row(float* grad, const float* x, int64_t n, float inverse, float low, float high) {
  for (int64_t i = 0; i < n; ++i) {
    const float integer = std::nearbyint(x[i] * inverse);
    grad[i] = integer >= low && integer <= high ? grad[i] : 0.0f;
  }
}

// The sum of kAtOnce terms, which are overwritten; halves are added as vectors.
FOR_EACH_CPU float sum(float* terms) {
  for (int64_t half = kAtOnce / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) terms[i] += terms[half + i];
  }
  return terms[0];
}

// And adds to error what the derivative by the scale is, times the scale; to beyond the gradient outside the grid.
FOR_EACH_CPU void learn_row(float* grad, const float* x, int64_t n, float scale, float inverse, float low, float high,
                            float* error, float* beyond) {
  float errors[kAtOnce], outside[kAtOnce];
  for (int64_t start = 0; start < n; start += kAtOnce) {
    const int64_t count = std::min(kAtOnce, n - start);
    const float* values = x + start;
    float* grads = grad + start;
    for (int64_t i = 0; i < count; ++i) {
      const float value = values[i], g = grads[i];
      const float integer = std::nearbyint(value * inverse);
      const float below = integer < low ? low : integer;
      const float clamped = below > high ? high : below;
      const float passed = clamped == integer ? g : 0.0f, stopped = g - passed;
      const float rounded = clamped * scale;
      errors[i] = passed * (rounded - value) + stopped * rounded;
      outside[i] = stopped;
      grads[i] = passed;
    }
    for (int64_t i = count; i < kAtOnce; ++i) errors[i] = outside[i] = 0;
    *error += sum(errors);
    *beyond += sum(outside);
  }
}

FOR_EACH_CPU void learn_channels(float* grad, const float* x, int64_t n, const float* scale, const float* inverse,
                                 const float* low, const float* high, float* error, float* beyond) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = x[i], g = grad[i];
    const float integer = std::nearbyint(value * inverse[i]);
    const float below = integer < low[i] ? low[i] : integer;
    const float rounded = (below > high[i] ? high[i] : below) * scale[i];
    const bool in = integer >= low[i] && integer <= high[i];
    error[i] += g * (in ? rounded - value : rounded);
    beyond[i] += in ? 0.0f : g;
    grad[i] = in ? g : 0.0f;
  }
}

int64_t rows_at_once(const Grid& grid) { return std::max<int64_t>(1, kBlock / std::max<int64_t>(1, grid.width)); }

at::Tensor fake_quantize(const at::Tensor& values, const at::Tensor& scale, const at::Tensor& zero_point, int64_t axis,
                         int64_t quant_min, int64_t quant_max) {
  const auto x = values.contiguous();
  TORCH_CHECK(x.scalar_type() == at::kFloat, "float32 values");
  const Grid grid(x, scale, zero_point, axis, quant_min, quant_max);
  auto out = at::empty_like(x);
  const float* from = x.data_ptr<float>();
  float* to = out.data_ptr<float>();
  at::parallel_for(0, grid.rows, 4 * rows_at_once(grid), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * grid.width, n = std::min(grid.width, x.numel() - at), c = row % grid.channels;
      if (grid.last) {
        round_channels(from + at, to + at, n, grid.scale.data(), grid.inverse.data(), grid.low.data(),
                       grid.high.data());
      } else {
        round_row(from + at, to + at, n, grid.scale[c], grid.inverse[c], grid.low[c], grid.high[c]);
      }
    }
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> fake_quantize_backward(at::Tensor grad, const at::Tensor& x, const at::Tensor& scale,
                                                          const at::Tensor& zero_point, int64_t axis, int64_t quant_min,
                                                          int64_t quant_max, bool learned) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && grad.scalar_type() == at::kFloat, "float32 values");
  TORCH_CHECK(x.is_contiguous() && grad.is_contiguous() && x.sizes() == grad.sizes(), "contiguous values of one shape");
  const Grid grid(x, scale, zero_point, axis, quant_min, quant_max);
  const float* values = x.data_ptr<float>();
  float* grads = grad.data_ptr<float>();
  const int64_t step = grid.last ? rows_at_once(grid) : 1, blocks = (grid.rows + step - 1) / step;
  const int64_t sums = learned ? (grid.last ? grid.channels : 1) : 0;
  std::vector<float> errors(blocks * sums), beyonds(blocks * sums);
  at::parallel_for(0, blocks, std::max<int64_t>(1, 4 * rows_at_once(grid) / step), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t row = block * step; row < std::min(grid.rows, (block + 1) * step); ++row) {
        const int64_t at = row * grid.width, n = std::min(grid.width, x.numel() - at), c = row % grid.channels;
        if (grid.last && learned) {
          learn_channels(grads + at, values + at, n, grid.scale.data(), grid.inverse.data(), grid.low.data(),
                         grid.high.data(), &errors[block * sums], &beyonds[block * sums]);
        } else if (grid.last) {
          for (int64_t i = 0; i < n; ++i) {
            pass_row(grads + at + i, values + at + i, 1, grid.inverse[i], grid.low[i], grid.high[i]);
          }
        } else if (learned) {
          learn_row(grads + at, values + at, n, grid.scale[c], grid.inverse[c], grid.low[c], grid.high[c],
                    &errors[block], &beyonds[block]);
        } else {
          pass_row(grads + at, values + at, n, grid.inverse[c], grid.low[c], grid.high[c]);
        }
      }
    }
  });
  std::vector<double> error(grid.channels), beyond(grid.channels);
  for (int64_t block = 0; block < blocks && learned; ++block) {
    for (int64_t i = 0; i < sums; ++i) {
      const int64_t c = grid.last ? i : block % grid.channels;
      error[c] += errors[block * sums + i];
      beyond[c] += beyonds[block * sums + i];
    }
  }
  auto of_scale = at::empty({grid.channels}, x.options()), of_zero_point = at::empty({grid.channels}, x.options());
  for (int64_t c = 0; c < grid.channels; ++c) {
    of_scale.data_ptr<float>()[c] = error[c] / grid.scale[c];
    of_zero_point.data_ptr<float>()[c] = -grid.scale[c] * beyond[c];
  }
  return {of_scale, of_zero_point};
}

}  // namespace

TORCH_LIBRARY_IMPL(psaq_mm, CPU, library) {
  library.impl("fake_quantize", fake_quantize);
  library.impl("fake_quantize_backward", fake_quantize_backward);
}
