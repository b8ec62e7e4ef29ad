// Rotary position embedding of q and k in one launch.
//
// A thread owns one slice of the angles and turns it in several heads of a token: the cosines and sines are read once
// for all of them, and both halves of a pair are in the same thread, so the output may be the input.
#include "include/host.cuh"

namespace megatron_ru {
namespace {

// Heads that a thread turns, all of whose loads are under way before the first is used. Two: four and more need registers
// that cost warps (H200: 91.4, 90.4 and 89.9% of a copy for 2, 4 and 8).
constexpr int kHeads = 2;

struct Head {
  int which;  // 0: q, 1: k
  int64_t in, out;
};

__device__ __forceinline__ Head find_head(const Rope& call, int64_t sequence, int64_t batch, int64_t head) {
  const int which = head >= call.heads[0] ? 1 : 0;
  const int64_t own = head - (which == 1 ? call.heads[0] : 0);
  const int64_t* in = call.in_stride[which];
  const int64_t* out = call.out_stride[which];
  return {which, sequence * in[0] + batch * in[1] + own * in[2], sequence * out[0] + batch * out[1] + own * out[2]};
}

// The row of the table, or -1 for a position that it does not hold.
__device__ __forceinline__ int64_t table_row(const Rope& call, int64_t sequence, int64_t batch) {
  int64_t position = call.offset;
  position += call.positions == nullptr
                  ? sequence
                  : call.positions[sequence * call.positions_stride[0] + batch * call.positions_stride[1]];
  return position >= 0 && position < call.table_rows ? position : -1;
}

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

// `slices` threads share the channels of a head: first those that turn, then those that copy what is not rotary.
template <typename T, bool kInterleaved>
__global__ void rope_kernel(const Rope call, int turning, int slices, int lanes) {
  constexpr int N = kVector<T>;
  constexpr int kAngles = kInterleaved ? N / 2 : N;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t heads = call.heads[0] + call.heads[1];
  const int slice = static_cast<int>(threadIdx.x) % slices, lane = static_cast<int>(threadIdx.x) / slices;
  const int64_t first_head = static_cast<int64_t>(blockIdx.y) * lanes * kHeads + lane;
  if (token >= call.sequence * call.batch || lane >= lanes) return;
  const int64_t sequence = token / call.batch, batch = token - sequence * call.batch;
  const bool turns = slice < turning;
  // Where this thread's channels begin, and how far away the other half of the pairs is.
  const int64_t channel = kInterleaved || !turns ? static_cast<int64_t>(slice) * N + (turns ? 0 : call.rotary - turning * N)
                                                 : static_cast<int64_t>(slice) * N;
  const int64_t partner = call.rotary / 2;
  follow_previous_kernel();

  uint4 raw[kHeads], other[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const int64_t head = first_head + static_cast<int64_t>(h) * lanes;
    if (head >= heads) continue;
    const Head at = find_head(call, sequence, batch, head);
    const T* in = static_cast<const T*>(at.which == 1 ? call.in[1] : call.in[0]) + at.in + channel;
    raw[h] = load_vector(in);
    if (!kInterleaved && turns) other[h] = load_vector(in + partner);
  }

  float cosine[kAngles], sine[kAngles];
  if (turns) {
    const int64_t row = table_row(call, sequence, batch);
    const int64_t at = row * (call.rotary / 2) + static_cast<int64_t>(slice) * kAngles;
    if (row < 0) {
#pragma unroll
      for (int i = 0; i < kAngles; ++i) cosine[i] = sine[i] = not_a_number();
    } else if (kAngles % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kAngles; i += 4) {
        const float4 c = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(call.cos) + at + i));
        const float4 s = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(call.sin) + at + i));
        cosine[i] = c.x, cosine[i + 1] = c.y, cosine[i + 2] = c.z, cosine[i + 3] = c.w;
        sine[i] = s.x, sine[i + 1] = s.y, sine[i + 2] = s.z, sine[i + 3] = s.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kAngles; ++i) {
        cosine[i] = static_cast<const float*>(call.cos)[at + i];
        sine[i] = static_cast<const float*>(call.sin)[at + i];
      }
    }
    if (call.inverse) {
#pragma unroll
      for (int i = 0; i < kAngles; ++i) sine[i] = -sine[i];
    }
  }

#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const int64_t head = first_head + static_cast<int64_t>(h) * lanes;
    if (head >= heads) continue;
    const Head at = find_head(call, sequence, batch, head);
    T* out = static_cast<T*>(at.which == 1 ? call.out[1] : call.out[0]) + at.out + channel;
    if (!turns) {
      store_vector(out, raw[h]);
      continue;
    }
    float a[N];
    unpack<T>(raw[h], a);
    if (kInterleaved) {
#pragma unroll
      for (int i = 0; i < kAngles; ++i) {
        const float first = a[2 * i], second = a[2 * i + 1];
        a[2 * i] = first * cosine[i] - second * sine[i];
        a[2 * i + 1] = second * cosine[i] + first * sine[i];
      }
    } else {
      float b[N];
      unpack<T>(other[h], b);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float first = a[i], second = b[i];
        a[i] = first * cosine[i] - second * sine[i];
        b[i] = second * cosine[i] + first * sine[i];
      }
      store_vector(out + partner, pack<T>(b));
    }
    store_vector(out, pack<T>(a));
  }
}

// Any width and alignment: a thread a pair of channels, or a pair of channels that are copied.
template <typename T>
__global__ void rope_any_kernel(const Rope call, int64_t pairs) {
  const int64_t heads = call.heads[0] + call.heads[1];
  const int64_t total = call.sequence * call.batch * heads * pairs;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; index < total;
       index += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t pair = index % pairs, head = index / pairs % heads, token = index / pairs / heads;
    const int64_t sequence = token / call.batch, batch = token % call.batch;
    const Head at = find_head(call, sequence, batch, head);
    const T* in = static_cast<const T*>(call.in[at.which]) + at.in;
    T* out = static_cast<T*>(call.out[at.which]) + at.out;
    const int64_t half = call.rotary / 2;
    if (pair < half) {
      const int64_t first = call.interleaved ? 2 * pair : pair, second = call.interleaved ? 2 * pair + 1 : pair + half;
      const int64_t row = table_row(call, sequence, batch);
      const float cosine = row < 0 ? not_a_number() : static_cast<const float*>(call.cos)[row * half + pair];
      float sine = row < 0 ? not_a_number() : static_cast<const float*>(call.sin)[row * half + pair];
      if (call.inverse) sine = -sine;
      const float a = to_float(in[first]), b = to_float(in[second]);
      out[first] = from_float<T>(a * cosine - b * sine);
      out[second] = from_float<T>(b * cosine + a * sine);
    } else {
      const int64_t copied = call.rotary + 2 * (pair - half);
      out[copied] = in[copied];
      if (copied + 1 < call.head_dim) out[copied + 1] = in[copied + 1];
    }
  }
}

__global__ void packed_positions_kernel(const PackedPositions call) {
  const auto start = [&](int64_t i) {
    return call.is_int32 ? static_cast<int64_t>(static_cast<const int32_t*>(call.cu_seqlens)[i])
                         : static_cast<const int64_t*>(call.cu_seqlens)[i];
  };
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; token < call.total;
       token += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    // The last sequence that starts at or before the token.
    int64_t low = 0, high = call.sequences > 0 ? call.sequences - 1 : 0;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (start(middle) <= token)
        low = middle;
      else
        high = middle - 1;
    }
    call.positions[token] = token - start(low);
  }
}

}  // namespace
}  // namespace megatron_ru

#ifndef __CUDACC_RTC__

namespace megatron_ru {
namespace {

constexpr int kBlock = 256;

bool is_aligned(const Rope& call, int64_t element_size) {
  for (int which = 0; which < 2; ++which) {
    if (call.heads[which] == 0) continue;
    for (int d = 0; d < 3; ++d) {
      if (!aligned(call.in[which], call.in_stride[which][d], element_size)) return false;
      if (!aligned(call.out[which], call.out_stride[which][d], element_size)) return false;
    }
  }
  return aligned(call.cos, call.rotary / 2, sizeof(float)) && aligned(call.sin, call.rotary / 2, sizeof(float));
}

template <typename T>
const char* run(const Rope& call, Stream stream) {
  constexpr int N = kVector<T>;
  const int64_t heads = call.heads[0] + call.heads[1];
  const int64_t tokens = call.sequence * call.batch;
  const int64_t per_slice = call.interleaved ? N : 2 * N;
  const int64_t turning = call.rotary / per_slice, slices = turning + (call.head_dim - call.rotary) / N;
  const bool divides = call.rotary % per_slice == 0 && (call.head_dim - call.rotary) % N == 0 && slices > 0 &&
                       slices <= kBlock && tokens <= 2147483647;
  if (!divides || !is_aligned(call, sizeof(T))) {
    const int64_t pairs = call.rotary / 2 + ceil_div(call.head_dim - call.rotary, 2);
    const LaunchShape any{dim3(blocks(std::min<int64_t>(ceil_div(tokens * heads * pairs, kBlock), 1 << 20))), dim3(kBlock)};
    return launch(any, stream, rope_any_kernel<T>, call, pairs);
  }
  const int64_t lanes = std::min<int64_t>(ceil_div(heads, kHeads), kBlock / slices);
  const int threads = static_cast<int>(lanes * slices);
  const int together = std::max(1, 192 / threads);
  LaunchShape at{dim3(blocks(ceil_div(tokens, together)), static_cast<unsigned>(ceil_div(heads, lanes * kHeads))),
                 dim3(threads, together)};
  at.overlaps_previous = true;
  const auto kernel = call.interleaved ? rope_kernel<T, true> : rope_kernel<T, false>;
  return launch(at, stream, kernel, call, static_cast<int>(turning), static_cast<int>(slices), static_cast<int>(lanes));
}

}  // namespace

const char* rope_cuda(const Rope& call, Stream stream) {
  return for_dtype(call.dtype, [&](auto zero) { return run<decltype(zero)>(call, stream); });
}

const char* packed_positions_cuda(const PackedPositions& call, Stream stream) {
  const LaunchShape at{dim3(blocks(ceil_div(call.total, kBlock))), dim3(kBlock)};
  return launch(at, stream, packed_positions_kernel, call);
}

}  // namespace megatron_ru

#else

// Instantiations for a compiler that knows no launches, which checks other architectures.
template __global__ void megatron_ru::rope_kernel<megatron_ru::BFloat16, false>(const megatron_ru::Rope, int, int, int);
template __global__ void megatron_ru::rope_kernel<megatron_ru::Half, true>(const megatron_ru::Rope, int, int, int);
template __global__ void megatron_ru::rope_any_kernel<float>(const megatron_ru::Rope, int64_t);

#endif
