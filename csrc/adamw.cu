// AdamW over many tensors in one launch, with rounded copies of the new parameters on the way out.
#include "include/host.cuh"

namespace megatron_ru {
namespace {

// Tensors of one launch: they travel as a kernel parameter, which holds 4 KiB.
constexpr int kTensors = 64;
constexpr int kBlock = 256;
// Numbers that a block updates: four a thread. More of them a thread, or more threads, leave fewer blocks to overlap.
constexpr int kChunk = kBlock * 4;

struct Table {
  float* parameters[kTensors];
  const void* gradients[kTensors];
  float* first_moments[kTensors];
  float* second_moments[kTensors];
  void* copies[kTensors];
  int64_t sizes[kTensors];
  int32_t first_block[kTensors];
  int32_t count;
};
static_assert(sizeof(Table) <= 3500);

struct Settings {
  double lr, beta1, beta2, eps, weight_decay;
  const float* step;
  const float* lr_on_device;
  const float* gradient_scale;
  const float* found_inf;
  bool maximize;
  Dtype copy_dtype;
};

// What all numbers of a step share, in fp32 after being computed in fp64: 1 - b2^t loses every digit in fp32.
struct Factors {
  float decay, beta1, beta2, rest1, rest2, step_size, inverse_root, eps, gradient;
};

__device__ __forceinline__ Factors factors(const Settings& settings) {
  const double t = *settings.step;
  const double lr = settings.lr_on_device != nullptr ? static_cast<double>(*settings.lr_on_device) : settings.lr;
  const double correction1 = 1.0 - pow(settings.beta1, t), correction2 = 1.0 - pow(settings.beta2, t);
  const float scale = settings.gradient_scale != nullptr ? 1.0f / *settings.gradient_scale : 1.0f;
  Factors f;
  f.decay = static_cast<float>(1.0 - lr * settings.weight_decay);
  f.beta1 = static_cast<float>(settings.beta1);
  f.beta2 = static_cast<float>(settings.beta2);
  f.rest1 = static_cast<float>(1.0 - settings.beta1);
  f.rest2 = static_cast<float>(1.0 - settings.beta2);
  f.step_size = static_cast<float>(lr / correction1);
  f.inverse_root = static_cast<float>(1.0 / sqrt(correction2));
  f.eps = static_cast<float>(settings.eps);
  f.gradient = settings.maximize ? -scale : scale;
  return f;
}

__device__ __forceinline__ void update(const Factors& f, float& p, float g, float& m, float& v) {
  g *= f.gradient;
  p *= f.decay;
  m = fmaf(f.beta1, m, f.rest1 * g);
  v = fmaf(f.beta2, v, f.rest2 * g * g);
  p -= f.step_size * m / fmaf(sqrtf(v), f.inverse_root, f.eps);
}

// Four numbers of a gradient: 16 bytes of fp32, 8 of the others.
template <typename G>
__device__ __forceinline__ float4 load_four(const G* address) {
  if constexpr (sizeof(G) == sizeof(float)) {
    return *reinterpret_cast<const float4*>(address);
  } else {
    const uint2 raw = *reinterpret_cast<const uint2*>(address);
    float out[4];
    Word<G>::unpack(raw.x, out);
    Word<G>::unpack(raw.y, out + 2);
    return make_float4(out[0], out[1], out[2], out[3]);
  }
}

template <typename C>
__device__ __forceinline__ void store_copy(void* copy, int64_t at, const float4& p) {
  const float values[4] = {p.x, p.y, p.z, p.w};
  *reinterpret_cast<uint2*>(static_cast<C*>(copy) + at) = make_uint2(Word<C>::pack(values), Word<C>::pack(values + 2));
}

// One chunk of a tensor whose pointers are aligned, or the rest of one. One thread computes the factors, in fp64, while the
// numbers of the chunk are on their way.
template <typename G>
__device__ __forceinline__ void update_chunk(const Table& table, const Settings& settings, Factors& f, int chunk) {
  const int tensor = tensor_of(table, chunk);
  const int64_t begin = static_cast<int64_t>(chunk - table.first_block[tensor]) * kChunk;
  const int64_t size = min(static_cast<int64_t>(kChunk), table.sizes[tensor] - begin);
  float* parameters = table.parameters[tensor] + begin;
  const G* gradients = static_cast<const G*>(table.gradients[tensor]) + begin;
  float* first_moments = table.first_moments[tensor] + begin;
  float* second_moments = table.second_moments[tensor] + begin;
  void* copies = table.copies[tensor];

  const auto is_aligned = [](const void* address, int bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; };
  const bool vector = size == kChunk && is_aligned(parameters, 16) && is_aligned(gradients, 4 * sizeof(G)) &&
                      is_aligned(first_moments, 16) && is_aligned(second_moments, 16) && is_aligned(copies, 8);
  const auto compute_factors = [&] {
    if (threadIdx.x == 0) f = factors(settings);
    __syncthreads();
  };
  if (!vector) {
    compute_factors();
    for (int i = threadIdx.x; i < size; i += kBlock) {
      float p = parameters[i], m = first_moments[i], v = second_moments[i];
      update(f, p, to_float(gradients[i]), m, v);
      parameters[i] = p;
      first_moments[i] = m;
      second_moments[i] = v;
      if (copies == nullptr) continue;
      if (settings.copy_dtype == Dtype::kBFloat16)
        static_cast<BFloat16*>(copies)[begin + i] = from_float<BFloat16>(p);
      else
        static_cast<Half*>(copies)[begin + i] = from_float<Half>(p);
    }
    return;
  }
  const int at = threadIdx.x * 4;
  float4 p = *reinterpret_cast<const float4*>(parameters + at);
  const float4 g = load_four(gradients + at);
  float4 m = *reinterpret_cast<const float4*>(first_moments + at);
  float4 v = *reinterpret_cast<const float4*>(second_moments + at);
  compute_factors();
  update(f, p.x, g.x, m.x, v.x);
  update(f, p.y, g.y, m.y, v.y);
  update(f, p.z, g.z, m.z, v.z);
  update(f, p.w, g.w, m.w, v.w);
  *reinterpret_cast<float4*>(parameters + at) = p;
  *reinterpret_cast<float4*>(first_moments + at) = m;
  *reinterpret_cast<float4*>(second_moments + at) = v;
  if (copies == nullptr) return;
  if (settings.copy_dtype == Dtype::kBFloat16)
    store_copy<BFloat16>(copies, begin + at, p);
  else
    store_copy<Half>(copies, begin + at, p);
}

// G: the gradients' type. Copies are bf16 or fp16. A block a chunk: a fixed grid that computed the powers of the factors
// only once a block was up to a tenth slower (H200).
template <typename G>
__global__ void __launch_bounds__(kBlock) adamw_kernel(const __grid_constant__ Table table, const Settings settings) {
  __shared__ Factors shared;
  follow_previous_kernel();
  if (settings.found_inf != nullptr && *settings.found_inf != 0.0f) return;
  update_chunk<G>(table, settings, shared, blockIdx.x);
}

}  // namespace
}  // namespace megatron_ru

#ifndef __CUDACC_RTC__

namespace megatron_ru {

const char* adamw_cuda(const AdamW& call, Stream stream) {
  if (call.dtype != Dtype::kFloat32) return "parameters on a GPU must be float32";
  if (call.copies != nullptr && call.copy_dtype != Dtype::kBFloat16 && call.copy_dtype != Dtype::kFloat16)
    return "copies must be bfloat16 or float16";
  const Settings settings{call.lr,           call.beta1,        call.beta2,     call.eps,
                          call.weight_decay, call.step,         call.lr_on_device, call.gradient_scale,
                          call.found_inf,    call.maximize,     call.copy_dtype};
  return for_dtype(call.gradient_dtype, [&](auto zero) -> const char* {
    using G = decltype(zero);
    for (int64_t first = 0; first < call.count;) {
      Table table{};
      int64_t next_block = 0;
      for (; first < call.count && table.count < kTensors; ++first, ++table.count) {
        const int64_t chunks = ceil_div(call.sizes[first], kChunk);
        if (next_block + chunks > 2147483647) break;
        table.parameters[table.count] = static_cast<float*>(call.parameters[first]);
        table.gradients[table.count] = call.gradients[first];
        table.first_moments[table.count] = static_cast<float*>(call.first_moments[first]);
        table.second_moments[table.count] = static_cast<float*>(call.second_moments[first]);
        table.copies[table.count] = call.copies == nullptr ? nullptr : call.copies[first];
        table.sizes[table.count] = call.sizes[first];
        table.first_block[table.count] = static_cast<int32_t>(next_block);
        next_block += chunks;
      }
      if (table.count == 0) return "a tensor of more than 2^42 numbers";
      LaunchShape at{dim3(blocks(next_block)), dim3(kBlock)};
      at.overlaps_previous = true;
      const char* error = launch(at, stream, adamw_kernel<G>, table, settings);
      if (error != nullptr) return error;
    }
    return nullptr;
  });
}

}  // namespace megatron_ru

#else

// Instantiations for a compiler that knows no launches, which checks other architectures.
template __global__ void megatron_ru::adamw_kernel<float>(const __grid_constant__ megatron_ru::Table, const megatron_ru::Settings);
template __global__ void megatron_ru::adamw_kernel<megatron_ru::BFloat16>(const __grid_constant__ megatron_ru::Table, const megatron_ru::Settings);

#endif
