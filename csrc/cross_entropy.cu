// Softmax cross entropy: the loss, and the gradient of the logits.
//
// One pass (whole vocabulary here): a cluster of blocks holds a row in its shared memory, so that the logits are read
// once and the gradient is written once. Two passes (a shard of the vocabulary, or an unknown upstream gradient):
// statistics of each row in one read, and later the gradient in one read and one write.
#include "include/host.cuh"

namespace megatron_ru {
namespace {

// max, sum exp(x - max), sum x over some of a row's columns. Nothing, or -inf alone, has the max -inf and the sum 0, which
// is relative to 0: another reference scales it by exp(-inf), not by the infinity that exp(0 - reference) may be.
struct Statistics {
  float max, exponentials, total;
};

__device__ __forceinline__ float finite_or_zero(float max) { return max == -INFINITY ? 0.0f : max; }

__device__ __forceinline__ float exp_of_difference(float x, float reference) {
  // The difference first: a product x log2 e of large logits would lose what the difference keeps.
  return exp2_fast((x - reference) * kLog2e);
}

__device__ __forceinline__ Statistics merge(const Statistics& a, const Statistics& b) {
  const float max = fmaxf(a.max, b.max), reference = finite_or_zero(max);
  return {max,
          a.exponentials * exp_of_difference(a.max, reference) +
              b.exponentials * exp_of_difference(b.max, reference),
          a.total + b.total};
}

template <bool kTotal, int kCount>
__device__ __forceinline__ void add_to(Statistics& s, const float (&x)[kCount]) {
  float max = s.max;
#pragma unroll
  for (int i = 0; i < kCount; ++i) max = fmaxf(max, x[i]);
  const float reference = finite_or_zero(max);
  float sum = s.exponentials * exp_of_difference(s.max, reference);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sum += exp_of_difference(x[i], reference);
    if (kTotal) s.total += x[i];
  }
  s.max = max;
  s.exponentials = sum;
}

// The largest over a warp. As integers floats keep their order, with the bits of negative ones turned round.
__device__ __forceinline__ float warp_max(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const int bits = __float_as_int(x);
  const int largest = __reduce_max_sync(0xffffffffu, bits < 0 ? bits ^ 0x7fffffff : bits);
  return __int_as_float(largest < 0 ? largest ^ 0x7fffffff : largest);
#else
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
#endif
}

template <bool kTotal>
__device__ __forceinline__ Statistics warp_merge(const Statistics& s) {
  const float max = warp_max(s.max), reference = finite_or_zero(max);
  return {max, warp_sum(s.exponentials * exp_of_difference(s.max, reference)),
          kTotal ? warp_sum(s.total) : 0.0f};
}

// Of the whole block, in every thread; merged in the order of the warps.
template <bool kTotal>
__device__ __forceinline__ Statistics block_merge(const Statistics& s) {
  __shared__ Statistics warps[kWarp];
  const Statistics mine = warp_merge<kTotal>(s);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = mine;
  __syncthreads();
  return warp_merge<kTotal>(threadIdx.x % kWarp < blockDim.x / kWarp ? warps[threadIdx.x % kWarp]
                                                                     : Statistics{-INFINITY, 0, 0});
}

struct Loss {
  float loss, lse;
};

// `exponentials` is the sum of exp(x - reference).
__device__ __forceinline__ Loss loss_of(const CrossEntropy& call, double reference, float exponentials, float total,
                                        float target_logit, int64_t target) {
  // The difference of large numbers in fp64: once a row it costs nothing.
  const double log_sum = logf(exponentials);
  const float lse = static_cast<float>(reference + log_sum);
  if (target == call.ignore_index) return {0.0f, lse};
  if (target < 0 || target >= call.vocab_total) return {NAN, lse};
  const float e = static_cast<float>(call.label_smoothing), z = static_cast<float>(call.z_loss);
  float loss = static_cast<float>(reference - target_logit + log_sum);
  if (e != 0) {
    const double mean = static_cast<double>(total) / static_cast<double>(call.vocab_total);
    loss = (1 - e) * loss + e * static_cast<float>(reference - mean + log_sum);
  }
  if (z != 0) loss += z * lse * lse;
  return {loss, lse};
}

// gradient = scale * exp(x - reference) - shift, less `at_target` in the target's column.
struct RowGradient {
  float reference, scale, shift, at_target;
  int64_t target_column;  // -1 where it is elsewhere
};

// exp(lse) is exp(reference) / inverse_exponentials.
__device__ __forceinline__ RowGradient row_gradient(const CrossEntropy& call, int64_t row, float reference,
                                                    float inverse_exponentials, float lse) {
  const int64_t target = call.target[row];
  float factor = call.loss_gradient == nullptr
                     ? 1.0f
                     : static_cast<const float*>(call.loss_gradient)[row * call.loss_gradient_stride];
  if (target == call.ignore_index) return {reference, 0, 0, 0, -1};
  if (target < 0 || target >= call.vocab_total) factor = NAN;
  const float e = static_cast<float>(call.label_smoothing), z = static_cast<float>(call.z_loss);
  const int64_t column = target - call.first_column;
  return {reference, factor * inverse_exponentials * (z == 0 ? 1.0f : fmaf(2 * z, lse, 1.0f)),
          e == 0 ? 0.0f : factor * e / static_cast<float>(call.vocab_total), factor * (1 - e),
          column >= 0 && column < call.columns ? column : -1};
}

__device__ __forceinline__ bool is_ignored(const CrossEntropy& call, int64_t row) {
  return call.target[row] == call.ignore_index;
}

template <int kCount>
__device__ __forceinline__ void to_gradient(const RowGradient& g, int64_t column, float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = fmaf(g.scale, exp_of_difference(x[i], g.reference), -g.shift);
  if (g.target_column < column || g.target_column >= column + kCount) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (g.target_column == column + i) x[i] -= g.at_target;
}

// kCount columns at once where they are aligned, else one.
template <typename T, int kCount, bool kStreaming = false>
__device__ __forceinline__ void load_columns(const T* address, float (&x)[kCount]) {
  if constexpr (kCount == 1)
    x[0] = to_float(*address);
  else
    unpack<T>(kStreaming ? load_streaming(address) : load_vector(address), x);
}

template <typename T, int kCount>
__device__ __forceinline__ void store_columns(T* address, const float (&x)[kCount]) {
  if constexpr (kCount == 1)
    *address = from_float<T>(x[0]);
  else
    store_streaming(address, pack<T>(x));
}

// ------------------------------------------------------------------------------------------ rows in shared memory

// What the blocks of a cluster (compute capability 9.0) tell each other; elsewhere a block is alone.
//
// Each block sends the statistics of its slice into the shared memory of all of them and waits for as many to arrive: a
// barrier of the whole cluster, with the fence that it needs, took a tenth of the kernel's time.
struct Exchange {
  float4 from[8];
  uint64_t arrived;  // an mbarrier
};

__device__ __forceinline__ int cluster_rank() {
  int rank = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
__device__ __forceinline__ int cluster_size() {
  int size = 1;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// By all threads, before anybody sends; between the two lies the wait for the row.
__device__ __forceinline__ void open_exchange([[maybe_unused]] Exchange& exchange, [[maybe_unused]] int ranks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    const uint32_t barrier = shared_address(&exchange.arrived);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(ranks * 16) : "memory");
  }
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

// By all threads: `mine` goes to every block, into the place of this rank. Returns in lane r what rank r sent.
__device__ __forceinline__ float4 exchange_with_cluster([[maybe_unused]] Exchange& exchange, [[maybe_unused]] int rank,
                                                        [[maybe_unused]] int ranks, const float4& mine) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  const int lane = threadIdx.x % kWarp;
  const uint32_t barrier = shared_address(&exchange.arrived);
  if (static_cast<int>(threadIdx.x) < ranks) {
    uint32_t there = shared_address(&exchange.from[rank]), barrier_there = barrier;
    asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(there) : "r"(threadIdx.x));
    asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(barrier_there) : "r"(threadIdx.x));
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
                 "r"(__float_as_uint(mine.x)), "r"(__float_as_uint(mine.y)), "r"(__float_as_uint(mine.z)),
                 "r"(__float_as_uint(mine.w)), "r"(barrier_there)
                 : "memory");
  }
  // A block leaves only after everybody's numbers have come, so nobody sends to one that has left.
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again_%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again_%=;\n"
      "}\n" ::"r"(barrier)
      : "memory");
  return lane < ranks ? exchange.from[lane] : make_float4(-INFINITY, 0, 0, 0);
#else
  return mine;
#endif
}

// exp(x - reference) as 2^(x log2 e + offset), one instruction less than a difference and a product. The offset's rounding
// is the same factor in every term and in their sum, so the gradient never sees it; the loss takes the reference that
// the offset stands for.
struct Exponential {
  float offset;

  __device__ __forceinline__ explicit Exponential(float max) : offset(-kLog2e * finite_or_zero(max)) {}
  __device__ __forceinline__ float operator()(float x) const { return exp2_fast(fmaf(x, kLog2e, offset)); }
  __device__ __forceinline__ double reference() const {
    constexpr double kInverse = 1.0 / static_cast<double>(kLog2e);
    return -kInverse * static_cast<double>(offset);
  }
};

// The largest of a vector's numbers, in pairs where the hardware can.
template <typename T>
__device__ __forceinline__ float largest(const uint4& raw) {
  float x[kVector<T>];
  if constexpr (sizeof(T) == 2) {
    using Pair = decltype(Word<T>::pair(0u));
    const Pair pair = __hmax2(__hmax2(Word<T>::pair(raw.x), Word<T>::pair(raw.y)), __hmax2(Word<T>::pair(raw.z), Word<T>::pair(raw.w)));
    return fmaxf(to_float(pair.x), to_float(pair.y));
  } else {
    unpack<T>(raw, x);
    return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
  }
}

// Threads of a block, blocks of a multiprocessor, and vectors that a thread keeps in registers: six slices of rows on a
// multiprocessor at once need both its registers and its shared memory. With two whole rows, in shared memory alone, reads
// and writes waited for each other (H200, 40000 columns: 89% of a copy, now 91%; 128256: 84%, now 93%).
constexpr int kOnePassThreads = 192, kOnePassBlocks = 6, kInRegisters = 5;

// A cluster takes one row, a block `slice` vectors of it: the first kInRegisters of each thread in registers, the rest in
// shared memory, where a thread reads back only what it copied itself.
template <typename T, bool kTotal>
__global__ void __launch_bounds__(kOnePassThreads, kOnePassBlocks) one_pass_kernel(const CrossEntropy call, int slice) {
  constexpr int N = kVector<T>;
  extern __shared__ uint4 in_shared[];
  __shared__ Exchange exchange;
  __shared__ Statistics of_warps[kWarp];
  __shared__ float target_of_block;
  const int rank = cluster_rank(), ranks = cluster_size(), block = blockDim.x;
  const int64_t row = blockIdx.x / ranks;
  const int first = rank * slice;
  const int vectors = min(slice, static_cast<int>(call.columns / N) - first);
  const T* logits = static_cast<const T*>(call.logits) + row * call.logits_stride + static_cast<int64_t>(first) * N;
  T* gradient = static_cast<T*>(call.gradient) + row * call.gradient_stride + static_cast<int64_t>(first) * N;
  // Of this thread: vector v is threadIdx.x + i * block for i = 0, 1, ..., and place i - kInRegisters in shared memory.
  const int beyond = threadIdx.x + kInRegisters * block;
  uint4* const own_shared = in_shared + threadIdx.x - beyond;
  if (ranks > 1) open_exchange(exchange, ranks);
  follow_previous_kernel();

  uint4 held[kInRegisters];
#pragma unroll
  for (int i = 0; i < kInRegisters; ++i) {
    const int v = threadIdx.x + i * block;
    if (v < vectors) held[i] = load_vector(logits + v * N);
  }
  for (int v = beyond; v < vectors; v += block) copy_in_background(own_shared + v, logits + v * N);
  end_group_of_copies();
  const int64_t target = call.target[row], target_column = target - static_cast<int64_t>(first) * N;
  const int target_vector =
      target_column >= 0 && target_column < static_cast<int64_t>(vectors) * N ? static_cast<int>(target_column / N) : -1;

  // Calls use(vector, its index) for each vector of this thread.
  const auto for_each_vector = [&](const auto& use) {
#pragma unroll
    for (int i = 0; i < kInRegisters; ++i) {
      const int v = threadIdx.x + i * block;
      if (v < vectors) use(held[i], v);
    }
    for (int v = beyond; v < vectors; v += block) use(own_shared[v], v);
  };
  float max = -INFINITY;
#pragma unroll
  for (int i = 0; i < kInRegisters; ++i)
    if (static_cast<int>(threadIdx.x + i * block) < vectors) max = fmaxf(max, largest<T>(held[i]));
  wait_for_copies<0>();
  for (int v = beyond; v < vectors; v += block) max = fmaxf(max, largest<T>(own_shared[v]));

  // One reference for the warp: its sums need no scaling when they meet.
  Statistics own{warp_max(max), 0, 0};
  const Exponential of_warp(own.max);
  for_each_vector([&](const uint4& raw, int) {
    float x[N];
    unpack<T>(raw, x);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      own.exponentials += of_warp(x[i]);
      if (kTotal) own.total += x[i];
    }
  });
  own.exponentials = warp_sum(own.exponentials);
  if (kTotal) own.total = warp_sum(own.total);
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) of_warps[threadIdx.x / kWarp] = own;
  if (threadIdx.x == 0) target_of_block = target_vector < 0 ? 0.0f : to_float(logits[target_column]);
  __syncthreads();
  float target_logit = target_of_block;
  Statistics found = lane < block / kWarp ? of_warps[lane] : Statistics{-INFINITY, 0, 0};
  const auto merge_lanes = [&] {
    const float largest_of_all = warp_max(found.max);
    found.exponentials = warp_sum(found.exponentials * Exponential(largest_of_all)(found.max));
    if (kTotal) found.total = warp_sum(found.total);
    found.max = largest_of_all;
  };
  merge_lanes();
  if (ranks > 1) {
    const float4 part = exchange_with_cluster(exchange, rank, ranks,
                                              make_float4(found.max, found.exponentials, found.total, target_logit));
    found = {part.x, part.y, part.z};
    merge_lanes();
    target_logit = warp_sum(part.w);
  }
  const Exponential exponential(found.max);
  float lse = 0;
  if (threadIdx.x == 0 || call.z_loss != 0) {
    const Loss loss = loss_of(call, exponential.reference(), found.exponentials, found.total, target_logit, target);
    lse = loss.lse;
    if (rank == 0 && threadIdx.x == 0) static_cast<float*>(call.loss)[row] = loss.loss;
  }

  if (target == call.ignore_index) {
    for (int v = threadIdx.x; v < vectors; v += block) store_streaming(gradient + v * N, make_uint4(0, 0, 0, 0));
    return;
  }
  const RowGradient g = row_gradient(call, row, 0, __frcp_rn(found.exponentials), lse);
  for_each_vector([&](const uint4& raw, int v) {
    float x[N];
    unpack<T>(raw, x);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = fmaf(g.scale, exponential(x[i]), -g.shift);
    if (v == target_vector) {
      const int target_element = static_cast<int>(target_column % N);
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (i == target_element) x[i] -= g.at_target;
    }
    store_streaming(gradient + v * N, pack<T>(x));
  });
}

// Rows that no cluster can hold, and any alignment: the second read comes from the cache.
template <typename T, int kCount, bool kTotal>
__global__ void one_pass_any_kernel(const CrossEntropy call) {
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(call.logits) + row * call.logits_stride;
  T* gradient = static_cast<T*>(call.gradient) + row * call.gradient_stride;
  const int64_t target = call.target[row];
  const bool target_here = target >= 0 && target < call.columns;
  const float target_logit = target_here ? to_float(logits[target]) : 0.0f;
  Statistics found{-INFINITY, 0, 0};
  float x[kCount];
  for (int64_t c = static_cast<int64_t>(threadIdx.x) * kCount; c < call.columns; c += static_cast<int64_t>(blockDim.x) * kCount) {
    load_columns<T, kCount>(logits + c, x);
    add_to<kTotal>(found, x);
  }
  // Its barrier also keeps the target's logit from being overwritten before everybody has read it.
  found = block_merge<kTotal>(found);
  const Loss loss = loss_of(call, finite_or_zero(found.max), found.exponentials, found.total, target_logit, target);
  if (threadIdx.x == 0) static_cast<float*>(call.loss)[row] = loss.loss;
  const RowGradient g = row_gradient(call, row, finite_or_zero(found.max), 1.0f / found.exponentials, loss.lse);
  const bool ignored = target == call.ignore_index;
  for (int64_t c = static_cast<int64_t>(threadIdx.x) * kCount; c < call.columns; c += static_cast<int64_t>(blockDim.x) * kCount) {
    load_columns<T, kCount>(logits + c, x);
    to_gradient(g, c, x);
    if (ignored) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = 0;
    }
    store_columns<T, kCount>(gradient + c, x);
  }
}

// ------------------------------------------------------------------------------------------------------ two passes

// Accesses that a thread has under way: a read alone wants more of them than a read and a write, whose exponentials need
// the registers (H200: 97.7 and 89.3% of a copy for 2 and 4 in the backward).
constexpr int kStatisticsAhead = 4, kBackwardAhead = 2;

template <typename T, int kCount, bool kTotal>
__global__ void statistics_kernel(const CrossEntropy call) {
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(call.logits) + row * call.logits_stride;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kCount;
  follow_previous_kernel();
  Statistics found{-INFINITY, 0, 0};
  int64_t c = static_cast<int64_t>(threadIdx.x) * kCount;
  for (; c + (kStatisticsAhead - 1) * step < call.columns; c += kStatisticsAhead * step) {
    float x[kStatisticsAhead][kCount];
#pragma unroll
    for (int a = 0; a < kStatisticsAhead; ++a) load_columns<T, kCount, true>(logits + c + a * step, x[a]);
#pragma unroll
    for (int a = 0; a < kStatisticsAhead; ++a) add_to<kTotal>(found, x[a]);
  }
  for (; c < call.columns; c += step) {
    float x[kCount];
    load_columns<T, kCount, true>(logits + c, x);
    add_to<kTotal>(found, x);
  }
  found = block_merge<kTotal>(found);
  if (threadIdx.x != 0) return;
  const int64_t column = call.target[row] - call.first_column;
  float* out = static_cast<float*>(call.statistics) + 4 * row;
  out[0] = found.max;
  out[1] = found.exponentials;
  out[2] = column >= 0 && column < call.columns ? to_float(logits[column]) : 0.0f;
  out[3] = found.total;
}

__global__ void merge_kernel(const CrossEntropy call) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= call.rows) return;
  follow_previous_kernel();
  const float* statistics = static_cast<const float*>(call.statistics);
  Statistics found{-INFINITY, 0, 0};
  float target_logit = 0;
  for (int64_t part = 0; part < call.parts; ++part) {
    const float4 s = *reinterpret_cast<const float4*>(statistics + 4 * (part * call.rows + row));
    found = merge(found, {s.x, s.y, s.w});
    target_logit += s.z;
  }
  const Loss loss = loss_of(call, finite_or_zero(found.max), found.exponentials, found.total, target_logit, call.target[row]);
  static_cast<float*>(call.loss)[row] = loss.loss;
  static_cast<float*>(call.lse)[row] = loss.lse;
}

// A block takes a tile of kBackwardAhead accesses a thread of one row.
template <typename T, int kCount>
__global__ void backward_kernel(const CrossEntropy call, int tiles) {
  const int64_t row = blockIdx.x / static_cast<unsigned>(tiles);
  const int64_t tile = blockIdx.x - row * tiles;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kCount;
  const int64_t first = tile * kBackwardAhead * step + static_cast<int64_t>(threadIdx.x) * kCount;
  const T* logits = static_cast<const T*>(call.logits) + row * call.logits_stride;
  T* gradient = static_cast<T*>(call.gradient) + row * call.gradient_stride;
  follow_previous_kernel();
  float x[kBackwardAhead][kCount];
#pragma unroll
  for (int a = 0; a < kBackwardAhead; ++a)
    if (first + a * step < call.columns) load_columns<T, kCount>(logits + first + a * step, x[a]);
  const float lse = static_cast<const float*>(call.lse)[row];
  const RowGradient g = row_gradient(call, row, lse, 1.0f, lse);
  const bool ignored = is_ignored(call, row);
#pragma unroll
  for (int a = 0; a < kBackwardAhead; ++a) {
    const int64_t column = first + a * step;
    if (column >= call.columns) continue;
    to_gradient(g, column, x[a]);
    if (ignored) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[a][i] = 0;
    }
    store_columns<T, kCount>(gradient + column, x[a]);
  }
}

// A block looks at the factors of its rows at once: nearly always there is nothing to do, and with a row to a block that
// took 10 us for 8192 rows.
constexpr int kMostRowsOfBlock = 32;

template <typename T, int kCount>
__global__ void rescale_kernel(const CrossEntropy call, int rows_of_block) {
  __shared__ float ratios[kMostRowsOfBlock];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows_of_block;
  const int rows = static_cast<int>(min(static_cast<int64_t>(rows_of_block), call.rows - first));
  follow_previous_kernel();
  bool differs = false;
  if (static_cast<int>(threadIdx.x) < rows) {
    const auto factor = [row = first + threadIdx.x](const void* factors, int64_t stride) {
      return factors == nullptr ? 1.0f : static_cast<const float*>(factors)[row * stride];
    };
    const float wanted = factor(call.loss_gradient, call.loss_gradient_stride);
    const float written = factor(call.expected, call.expected_stride);
    differs = wanted != written;
    ratios[threadIdx.x] = differs ? wanted / written : 1.0f;
  }
  if (!__syncthreads_or(differs)) return;
  for (int r = 0; r < rows; ++r) {
    const float ratio = ratios[r];
    // Other rows stay as they are, an infinity times 1 included.
    if (ratio == 1) continue;
    T* gradient = static_cast<T*>(call.gradient) + (first + r) * call.gradient_stride;
    for (int64_t c = static_cast<int64_t>(threadIdx.x) * kCount; c < call.columns; c += static_cast<int64_t>(blockDim.x) * kCount) {
      float x[kCount];
      load_columns<T, kCount>(gradient + c, x);
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] *= ratio;
      store_columns<T, kCount>(gradient + c, x);
    }
  }
}

// --------------------------------------------------------------------------------------------------------- the mean

// The sum over one block, in the order of threads and warps.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float warps[kWarp];
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  return warp_sum(threadIdx.x % kWarp < blockDim.x / kWarp ? warps[threadIdx.x % kWarp] : 0.0f);
}

// One block each, a number or two a thread: their time is that of a start.
__global__ void share_kernel(const CrossEntropy call) {
  follow_previous_kernel();
  // As an integer: a sum in fp32 would stop at 2^24.
  unsigned long long count = 0;
#pragma unroll 8
  for (int64_t row = threadIdx.x; row < call.rows; row += blockDim.x) count += call.target[row] != call.ignore_index;
  __shared__ unsigned long long all;
  if (threadIdx.x == 0) all = 0;
  __syncthreads();
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) count += __shfl_xor_sync(0xffffffffu, count, offset);
  if (threadIdx.x % kWarp == 0) atomicAdd(&all, count);
  __syncthreads();
  if (threadIdx.x == 0) *static_cast<float*>(call.share) = 1.0f / static_cast<float>(all);
}

__global__ void mean_kernel(const CrossEntropy call) {
  follow_previous_kernel();
  const float* loss = static_cast<const float*>(call.loss);
  float sum = 0;
#pragma unroll 8
  for (int64_t row = threadIdx.x; row < call.rows; row += blockDim.x) sum += loss[row];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *static_cast<float*>(call.mean) = sum * *static_cast<const float*>(call.share);
}

}  // namespace
}  // namespace megatron_ru

#ifndef __CUDACC_RTC__

namespace megatron_ru {
namespace {

constexpr int kBlock = 256;
// Shared memory that the blocks of a multiprocessor divide, less what the system keeps of each, and what one block may have
// before compute capability 9.0.
constexpr int64_t kSharedOfMultiprocessor = 224 * 1024, kReserved = 2 * 1024, kSharedOfOldBlock = 94 * 1024;
constexpr int kMostBlocksPerCluster = 8;

bool is_vector(const CrossEntropy& call, const void* data, int64_t stride, int64_t element_size) {
  return call.columns * element_size % 16 == 0 && aligned(data, stride, element_size);
}

int threads_for(int64_t accesses, int most) {
  return static_cast<int>(std::min<int64_t>(most, ceil_div(accesses, kWarp) * kWarp));
}

template <typename T>
const char* run_one_pass(const CrossEntropy& call, Stream stream) {
  const bool total = call.label_smoothing != 0;
  const bool vector = is_vector(call, call.logits, call.logits_stride, sizeof(T)) &&
                      is_vector(call, call.gradient, call.gradient_stride, sizeof(T));
  const int64_t vectors = call.columns / kVector<T>;
  const bool clusters = device().capability >= 90;
  const int64_t in_registers = kOnePassThreads * kInRegisters;
  const int64_t most = clusters ? kSharedOfMultiprocessor / kOnePassBlocks - kReserved : kSharedOfOldBlock;
  const int64_t cluster = clusters ? std::max<int64_t>(1, ceil_div(vectors, in_registers + most / 16)) : 1;
  const int64_t slice = ceil_div(vectors, cluster), shared = std::max<int64_t>(0, slice - in_registers) * 16;
  if (vector && vectors > 0 && cluster <= kMostBlocksPerCluster && shared <= most && call.rows * cluster <= 2147483647) {
    const auto kernel = total ? one_pass_kernel<T, true> : one_pass_kernel<T, false>;
    if (const char* error = allow_shared(kernel, shared)) return error;
    const int threads = threads_for(slice, kOnePassThreads);
    LaunchShape at{dim3(blocks(call.rows * cluster)), dim3(threads), static_cast<size_t>(threads == kOnePassThreads ? shared : 0)};
    at.cluster = static_cast<int>(cluster);
    at.overlaps_previous = true;
    return launch(at, stream, kernel, call, static_cast<int>(slice));
  }
  const LaunchShape at{dim3(blocks(call.rows)), dim3(vector ? 512 : 256)};
  if (vector) {
    const auto kernel = total ? one_pass_any_kernel<T, kVector<T>, true> : one_pass_any_kernel<T, kVector<T>, false>;
    return launch(at, stream, kernel, call);
  }
  const auto kernel = total ? one_pass_any_kernel<T, 1, true> : one_pass_any_kernel<T, 1, false>;
  return launch(at, stream, kernel, call);
}

template <typename T, int kCount>
const char* run_statistics(const CrossEntropy& call, Stream stream) {
  LaunchShape at{dim3(blocks(call.rows)), dim3(threads_for(ceil_div(call.columns, kCount), kBlock))};
  at.overlaps_previous = true;
  const auto kernel = call.label_smoothing != 0 ? statistics_kernel<T, kCount, true> : statistics_kernel<T, kCount, false>;
  return launch(at, stream, kernel, call);
}

template <typename T, int kCount>
const char* run_backward(const CrossEntropy& call, Stream stream) {
  const int threads = threads_for(ceil_div(ceil_div(call.columns, kCount), kBackwardAhead), kBlock);
  const int64_t tiles = ceil_div(call.columns, static_cast<int64_t>(threads) * kCount * kBackwardAhead);
  if (call.rows * tiles > 2147483647) return "more than 2^31 tiles of logits";
  LaunchShape at{dim3(blocks(call.rows * tiles)), dim3(threads)};
  at.overlaps_previous = true;
  return launch(at, stream, backward_kernel<T, kCount>, call, static_cast<int>(tiles));
}

template <typename T, int kCount>
const char* run_rescale(const CrossEntropy& call, Stream stream) {
  // Enough blocks for the whole device, should all rows need it.
  const int64_t wanted = std::max<int64_t>(1, call.rows / (4 * device().multiprocessors));
  const int rows_of_block = static_cast<int>(std::min<int64_t>(kMostRowsOfBlock, wanted));
  LaunchShape at{dim3(blocks(ceil_div(call.rows, rows_of_block))),
                 dim3(std::max(kWarp, threads_for(ceil_div(call.columns, kCount), 2 * kBlock)))};
  at.overlaps_previous = true;
  return launch(at, stream, rescale_kernel<T, kCount>, call, rows_of_block);
}

const char* run_alone(void (*kernel)(CrossEntropy), const CrossEntropy& call, Stream stream) {
  LaunchShape at{dim3(1), dim3(threads_for(call.rows, 1024))};
  at.block.x = std::max(kWarp, static_cast<int>(at.block.x));
  at.overlaps_previous = true;
  return launch(at, stream, kernel, call);
}

}  // namespace

const char* cross_entropy_one_pass_cuda(const CrossEntropy& call, Stream stream) {
  return for_dtype(call.dtype, [&](auto zero) { return run_one_pass<decltype(zero)>(call, stream); });
}

const char* cross_entropy_statistics_cuda(const CrossEntropy& call, Stream stream) {
  return for_dtype(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    return is_vector(call, call.logits, call.logits_stride, sizeof(T)) ? run_statistics<T, kVector<T>>(call, stream)
                                                                       : run_statistics<T, 1>(call, stream);
  });
}

const char* cross_entropy_merge_cuda(const CrossEntropy& call, Stream stream) {
  LaunchShape at{dim3(blocks(ceil_div(call.rows, kBlock))), dim3(kBlock)};
  at.overlaps_previous = true;
  return launch(at, stream, merge_kernel, call);
}

const char* cross_entropy_backward_cuda(const CrossEntropy& call, Stream stream) {
  return for_dtype(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool vector = is_vector(call, call.logits, call.logits_stride, sizeof(T)) &&
                        is_vector(call, call.gradient, call.gradient_stride, sizeof(T));
    return vector ? run_backward<T, kVector<T>>(call, stream) : run_backward<T, 1>(call, stream);
  });
}

const char* cross_entropy_rescale_cuda(const CrossEntropy& call, Stream stream) {
  return for_dtype(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    return is_vector(call, call.gradient, call.gradient_stride, sizeof(T)) ? run_rescale<T, kVector<T>>(call, stream)
                                                                           : run_rescale<T, 1>(call, stream);
  });
}

const char* cross_entropy_share_cuda(const CrossEntropy& call, Stream stream) { return run_alone(share_kernel, call, stream); }

const char* cross_entropy_mean_cuda(const CrossEntropy& call, Stream stream) { return run_alone(mean_kernel, call, stream); }

}  // namespace megatron_ru

#else

// Instantiations for a compiler that knows no launches, which checks other architectures.
template __global__ void megatron_ru::one_pass_kernel<megatron_ru::BFloat16, true>(const megatron_ru::CrossEntropy, int);
template __global__ void megatron_ru::one_pass_any_kernel<megatron_ru::Half, 1, false>(const megatron_ru::CrossEntropy);
template __global__ void megatron_ru::statistics_kernel<float, 4, true>(const megatron_ru::CrossEntropy);
template __global__ void megatron_ru::backward_kernel<megatron_ru::BFloat16, 8>(const megatron_ru::CrossEntropy, int);
template __global__ void megatron_ru::rescale_kernel<megatron_ru::BFloat16, 8>(const megatron_ru::CrossEntropy, int);

#endif
