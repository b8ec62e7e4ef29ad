// Adds the gradient of an embedding's output to the buffer that keeps the gradient of its rows.
//
// A block owns a slice of the channels of one id: it sums the rows of all tokens of that id, which the sorted order lays
// side by side, and adds the sum once. Nothing depends on which block comes first, and rows without a token are not
// touched.
#include "include/host.cuh"

namespace megatron_ru {
namespace {

constexpr int kThreads = 128;
// Rows whose loads are under way together: a frequent id has hundreds, and one after the other they would wait each.
constexpr int kAhead = 8;

template <typename T>
__global__ void __launch_bounds__(kThreads) embedding_gradient_kernel(const EmbeddingGradient call) {
  constexpr int N = kVector<T>;
  const int64_t first = blockIdx.x;
  follow_previous_kernel();
  const int64_t id = call.ids[first];
  if (id < 0 || id >= call.rows || (first > 0 && call.ids[first - 1] == id)) return;
  const int64_t channel = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * N;
  if (channel >= call.hidden) return;
  const T* gradient = static_cast<const T*>(call.gradient) + channel;
  const bool whole = call.vectors && channel + N <= call.hidden;
  const int width = static_cast<int>(min(static_cast<int64_t>(N), call.hidden - channel));
  float sum[N] = {};
  for (int64_t at = first; at < call.tokens && call.ids[at] == id;) {
    int count = 1;
    while (count < kAhead && at + count < call.tokens && call.ids[at + count] == id) ++count;
    if (whole) {
      uint4 raw[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (i < count) raw[i] = load_vector(gradient + call.order[at + i] * call.hidden);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (i >= count) break;
        float values[N];
        unpack<T>(raw[i], values);
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] += values[j];
      }
    } else {
      for (int i = 0; i < count; ++i)
        for (int j = 0; j < width; ++j) sum[j] += to_float(gradient[call.order[at + i] * call.hidden + j]);
    }
    at += count;
  }
  float* kept = call.kept + id * call.hidden + channel;
  for (int j = 0; j < width; ++j) kept[j] += sum[j];
}

}  // namespace
}  // namespace megatron_ru

#ifndef __CUDACC_RTC__

namespace megatron_ru {

const char* embedding_gradient_cuda(const EmbeddingGradient& call, Stream stream) {
  return for_dtype(call.dtype, [&](auto type) -> const char* {
    using T = decltype(type);
    LaunchShape shape;
    shape.grid = dim3(blocks(call.tokens), static_cast<unsigned>(ceil_div(call.hidden, kThreads * kVector<T>)));
    shape.block = dim3(kThreads);
    shape.overlaps_previous = true;
    return launch(shape, stream, embedding_gradient_kernel<T>, call);
  });
}

}  // namespace megatron_ru

#else

// Instantiations for a compiler that knows no launches, which checks other architectures.
template __global__ void megatron_ru::embedding_gradient_kernel<megatron_ru::BFloat16>(
    const megatron_ru::EmbeddingGradient);

#endif
