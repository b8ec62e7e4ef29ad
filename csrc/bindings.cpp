// The only file that knows torch: schemas, shapes for fake tensors, autograd, and the way to the kernels.
//
// Each op is declared once and runs on CPU and CUDA tensors through the same function, which turns tensors into the
// structs of launchers.h. Gradients are C++ autograd functions: they cost microseconds less per call than Python's, and
// torch.compile sees through them to the forward and backward ops below.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#ifdef MEGATRON_RU_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

#include "include/launchers.h"

namespace megatron_ru {
namespace {

using at::Tensor;
using c10::SymInt;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Tensors = std::vector<Tensor>;

// ------------------------------------------------------------------------------------------------------ conversions

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      TORCH_CHECK(!tensor.is_cuda(), "megatron_ru: ", name, " is float64 on a GPU, expected float32, float16 or bfloat16");
      return Dtype::kFloat64;
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    default:
      TORCH_CHECK(false, "megatron_ru: ", name, " is ", tensor.scalar_type(),
                  ", expected float32, float16 or bfloat16 (float64 on a CPU)");
  }
}

at::ScalarType wide_type(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

const void* data_or_null(const optional<Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? tensor->const_data_ptr() : nullptr;
}

bool present(const optional<Tensor>& tensor) { return tensor.has_value() && tensor->defined(); }

void check_device(const Tensor& tensor, const Tensor& first, const char* name) {
  TORCH_CHECK(tensor.device() == first.device(), "megatron_ru: ", name, " is on ", tensor.device(), ", expected ",
              first.device(), " like the other inputs");
}

// A tensor as rows of its last dimension: one stride leads from row to row. What has no such stride is copied.
struct Rows {
  Tensor tensor;
  int64_t rows, columns, stride;
};

bool has_row_stride(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t last = x.dim() - 1;
  if (sizes[last] != 1 && strides[last] != 1) return false;
  int64_t expected = -1;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (expected >= 0 && strides[d] != expected) return false;
    expected = strides[d] * sizes[d];
  }
  return true;
}

int64_t row_stride(const Tensor& x) {
  for (int64_t d = x.dim() - 2; d >= 0; --d)
    if (x.size(d) != 1) return x.stride(d);
  return x.size(-1);
}

Rows as_rows(const Tensor& x, const char* name) {
  TORCH_CHECK(x.dim() >= 1, "megatron_ru: ", name, " has no dimension, expected at least one");
  const int64_t columns = x.size(-1);
  if (x.numel() == 0) return {x, 0, columns, columns};
  const Tensor rows = has_row_stride(x) ? x : x.contiguous();
  return {rows, x.numel() / columns, columns, row_stride(rows)};
}

// The same where the tensor is written to, so that a copy will not do.
Rows as_rows_in_place(const Tensor& x, const char* name) {
  TORCH_CHECK(x.dim() >= 1 && (x.numel() == 0 || has_row_stride(x)), "megatron_ru: ", name, " of sizes ", x.sizes(),
              " and strides ", x.strides(), " is to be overwritten, expected rows at one stride with contiguous columns");
  return as_rows(x, name);
}

Tensor contiguous_like(const Tensor& x) { return at::empty_symint(x.sym_sizes(), x.options()); }

Tensor wide_rows(const Tensor& x, int64_t rows) { return at::empty({rows}, x.options().dtype(wide_type(x))); }

// What torch's own in-place ops do, so that a tensor saved for a backward is known to have changed.
void mark_changed(const Tensor& tensor) { tensor.unsafeGetTensorImpl()->bump_version(); }

// Rows that one task of a thread should take at least, so that starting it is worth it.
int64_t grain(int64_t columns) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns)); }

template <typename Kernel>
void over_rows_cpu(int64_t rows, int64_t columns, const Kernel& kernel) {
  at::parallel_for(0, rows, grain(columns), kernel);
}

#ifdef MEGATRON_RU_CUDA
Stream stream_of(const Tensor& tensor) { return c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream(); }
#define MEGATRON_RU_LAUNCH(like, launcher, ...)                                            \
  do {                                                                                     \
    const char* error = launcher(__VA_ARGS__, stream_of(like));                            \
    TORCH_CHECK(error == nullptr, "megatron_ru: " #launcher ": ", error);                  \
  } while (false)
#else
#define MEGATRON_RU_LAUNCH(like, launcher, ...)                                                     \
  TORCH_CHECK(false, "megatron_ru: this build has CPU kernels only, but a tensor is on ",           \
              (like).device(), "; run `megatron-ru build --kind cuda` on a machine with nvcc")
#endif

template <typename Signature>
auto operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

bool needs_gradient(const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }
bool needs_gradient(const optional<Tensor>& tensor) { return present(tensor) && tensor->requires_grad(); }

template <typename... T>
bool records(const T&... tensors) {
  return at::GradMode::is_enabled() && (needs_gradient(tensors) || ...);
}

const Tensor& or_undefined(const optional<Tensor>& tensor) {
  static const Tensor undefined;
  return tensor.has_value() ? *tensor : undefined;
}

optional<Tensor> if_defined(const Tensor& tensor) { return tensor.defined() ? optional<Tensor>(tensor) : std::nullopt; }

// Whether the dispatcher, once autograd is done, would come straight back to the kernels of this file: no tracing, no
// fake or functional tensors, no mode that wants to see the call. Then the way through it can be left out.
template <typename... T>
bool is_plain(const T&... tensors) {
  const auto& local = c10::impl::tls_local_dispatch_key_set();
  const auto keys = ((c10::DispatchKeySet() | ... | tensors.key_set()) | local.included_) - local.excluded_ -
                    c10::autograd_dispatch_keyset_with_ADInplaceOrView - c10::DispatchKeySet(c10::DispatchKey::BackendSelect);
  const auto key = keys.highestPriorityTypeId();
  return key == c10::DispatchKey::CUDA || key == c10::DispatchKey::CPU;
}

// ------------------------------------------------------------------------------------------------------------ norms

void check_norm(const Tensor& x, const optional<Tensor>& residual, const Tensor& weight, const optional<Tensor>& bias) {
  const auto check = [&](const Tensor& parameter, const char* name) {
    check_device(parameter, x, name);
    TORCH_CHECK(parameter.dim() == 1 && parameter.size(0) == x.size(-1) && parameter.is_contiguous(), "megatron_ru: ",
                name, " has sizes ", parameter.sizes(), ", expected [", x.size(-1), "], the last size of x, contiguous");
    TORCH_CHECK(parameter.scalar_type() == x.scalar_type() ||
                    (parameter.scalar_type() == at::kFloat && x.scalar_type() != at::kDouble),
                "megatron_ru: ", name, " is ", parameter.scalar_type(), ", expected ", x.scalar_type(),
                " like x, or float32");
  };
  TORCH_CHECK(x.dim() >= 1, "megatron_ru: x has no dimension, expected at least one");
  check(weight, "weight");
  if (present(bias)) {
    check(*bias, "bias");
    TORCH_CHECK(bias->scalar_type() == weight.scalar_type(), "megatron_ru: bias is ", bias->scalar_type(),
                ", expected ", weight.scalar_type(), " like weight");
  }
  if (present(residual)) {
    check_device(*residual, x, "residual");
    TORCH_CHECK(residual->sizes() == x.sizes() && residual->scalar_type() == x.scalar_type(), "megatron_ru: residual is ",
                residual->scalar_type(), " of sizes ", residual->sizes(), ", expected ", x.scalar_type(), " of ",
                x.sizes(), " like x");
  }
}

// [y, inverse_deviation] + [mean] for LayerNorm + [sum] with a residual.
Tensors norm_forward(const Tensor& x, const optional<Tensor>& residual, const Tensor& weight,
                     const optional<Tensor>& bias, double eps, bool layer_norm, bool zero_centered) {
  check_norm(x, residual, weight, bias);
  const c10::DeviceGuard guard(x.device());
  const Rows in = as_rows(x, "x");
  const Rows added = present(residual) ? as_rows(*residual, "residual") : Rows{};
  Tensors out{contiguous_like(x), wide_rows(x, in.rows)};
  if (layer_norm) out.push_back(wide_rows(x, in.rows));
  if (present(residual)) out.push_back(contiguous_like(x));
  NormForward call{};
  call.x = in.tensor.const_data_ptr();
  call.residual = present(residual) ? added.tensor.const_data_ptr() : nullptr;
  call.weight = weight.const_data_ptr();
  call.bias = data_or_null(bias);
  call.y = out[0].mutable_data_ptr();
  call.inverse_deviation = out[1].mutable_data_ptr();
  call.mean = layer_norm ? out[2].mutable_data_ptr() : nullptr;
  call.sum = present(residual) ? out.back().mutable_data_ptr() : nullptr;
  call.rows = in.rows;
  call.hidden = in.columns;
  call.x_stride = in.stride;
  call.residual_stride = added.stride;
  call.eps = eps;
  call.layer_norm = layer_norm;
  call.zero_centered = zero_centered;
  call.dtype = dtype_of(x, "x");
  call.weight_dtype = dtype_of(weight, "weight");
  if (in.rows == 0) return out;
  if (x.is_cuda()) {
    MEGATRON_RU_LAUNCH(x, norm_forward_cuda, call);
  } else {
    over_rows_cpu(in.rows, in.columns, [&](int64_t first, int64_t last) { norm_forward_cpu(call, first, last); });
  }
  return out;
}

Tensors norm_forward_meta(const Tensor& x, const optional<Tensor>& residual, const Tensor&, const optional<Tensor>&,
                          double, bool layer_norm, bool) {
  const auto per_row = [&] {
    SymInt rows = 1;
    for (int64_t d = 0; d < x.dim() - 1; ++d) rows = rows * x.sym_size(d);
    return at::empty_symint({rows}, x.options().dtype(wide_type(x)));
  };
  Tensors out{contiguous_like(x), per_row()};
  if (layer_norm) out.push_back(per_row());
  if (present(residual)) out.push_back(contiguous_like(x));
  return out;
}

// [dx, dweight] + [dbias] when has_bias. `x` is what was normed: the sum where there was a residual.
Tensors norm_backward(const Tensor& dy, const optional<Tensor>& dsum, const Tensor& x, const Tensor& weight,
                      const optional<Tensor>& mean, const Tensor& inverse_deviation, bool has_bias,
                      bool zero_centered) {
  const c10::DeviceGuard guard(x.device());
  const Rows in = as_rows(x, "x"), gradient = as_rows(dy, "dy");
  const Rows added = present(dsum) ? as_rows(*dsum, "dsum") : Rows{};
  const bool layer_norm = present(mean);
  const int64_t sums = has_bias ? 2 : 1;
  Tensors out{contiguous_like(x), at::empty_like(weight)};
  if (has_bias) out.push_back(at::empty_like(weight));
  if (in.rows == 0) {
    for (size_t i = 1; i < out.size(); ++i) out[i].zero_();
    return out;
  }
  NormBackward call{};
  call.dy = gradient.tensor.const_data_ptr();
  call.dsum = present(dsum) ? added.tensor.const_data_ptr() : nullptr;
  call.x = in.tensor.const_data_ptr();
  call.weight = weight.const_data_ptr();
  call.mean = data_or_null(mean);
  call.inverse_deviation = inverse_deviation.const_data_ptr();
  call.dx = out[0].mutable_data_ptr();
  call.dweight = out[1].mutable_data_ptr();
  call.dbias = has_bias ? out[2].mutable_data_ptr() : nullptr;
  call.rows = in.rows;
  call.hidden = in.columns;
  call.dy_stride = gradient.stride;
  call.dsum_stride = added.stride;
  call.x_stride = in.stride;
  call.layer_norm = layer_norm;
  call.zero_centered = zero_centered;
  call.dtype = dtype_of(x, "x");
  call.weight_dtype = dtype_of(weight, "weight");
  const auto workspace = [&](int64_t rows) {
    call.partial_rows = rows;
    return at::empty({rows, sums, in.columns}, x.options().dtype(wide_type(x)));
  };
  if (x.is_cuda()) {
#ifdef MEGATRON_RU_CUDA
    const Tensor partial = workspace(norm_backward_partial_rows_cuda(in.rows, in.columns, call.dtype, layer_norm));
    call.partial = partial.mutable_data_ptr();
    MEGATRON_RU_LAUNCH(x, norm_backward_cuda, call);
#else
    MEGATRON_RU_LAUNCH(x, , );
#endif
    return out;
  }
  const int64_t tasks = std::clamp<int64_t>(in.rows / grain(in.columns), 1, at::get_num_threads());
  const Tensor partial = workspace(tasks).zero_();
  call.partial = partial.mutable_data_ptr();
  const int64_t share = (in.rows + tasks - 1) / tasks;
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task)
      norm_backward_cpu(call, task, std::min(in.rows, task * share), std::min(in.rows, (task + 1) * share));
  });
  const Tensor total = partial.sum(0);
  for (int64_t i = 0; i < sums; ++i) out[1 + i].copy_(total[i]);
  return out;
}

Tensors norm_backward_meta(const Tensor&, const optional<Tensor>&, const Tensor& x, const Tensor& weight,
                           const optional<Tensor>&, const Tensor&, bool has_bias, bool) {
  Tensors out{contiguous_like(x), at::empty_like(weight)};
  if (has_bias) out.push_back(at::empty_like(weight));
  return out;
}

Tensors call_norm_forward(const Tensor& x, const optional<Tensor>& residual, const Tensor& weight,
                          const optional<Tensor>& bias, double eps, bool layer_norm, bool zero_centered) {
  const at::AutoDispatchBelowADInplaceOrView below;
  if (is_plain(x, weight)) return norm_forward(x, residual, weight, bias, eps, layer_norm, zero_centered);
  static const auto op = operator_named<decltype(norm_forward)>("megatron_ru::norm_forward");
  return op.call(x, residual, weight, bias, eps, layer_norm, zero_centered);
}

// RMSNorm and LayerNorm, with and without a residual: returns [y] or [y, sum].
struct NormFunction : torch::autograd::Function<NormFunction> {
  static variable_list forward(AutogradContext* context, const Tensor& x, const optional<Tensor>& residual,
                               const Tensor& weight, const optional<Tensor>& bias, double eps, bool layer_norm,
                               bool zero_centered) {
    Tensors out = call_norm_forward(x, residual, weight, bias, eps, layer_norm, zero_centered);
    const bool added = present(residual);
    context->save_for_backward({added ? out.back() : x, weight, out[1], layer_norm ? out[2] : Tensor()});
    context->saved_data[kFlags] = kHasBias * present(bias) + kZeroCentered * zero_centered;
    context->set_materialize_grads(false);
    if (added) return {out[0], out.back()};
    return {out[0]};
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const bool added = gradients.size() == 2;
    const Tensor dsum = added ? gradients[1] : Tensor();
    if (!gradients[0].defined()) return {dsum, dsum, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
    static const auto op = operator_named<decltype(norm_backward)>("megatron_ru::norm_backward");
    const variable_list saved = context->get_saved_variables();
    const int64_t flags = context->saved_data[kFlags].toInt();
    const bool has_bias = (flags & kHasBias) != 0;
    const Tensors out = op.call(gradients[0], if_defined(dsum), saved[0], saved[1], if_defined(saved[3]), saved[2], has_bias,
                                (flags & kZeroCentered) != 0);
    return {out[0],   added ? out[0] : Tensor(), out[1], has_bias ? out[2] : Tensor(),
            Tensor(), Tensor(),                  Tensor()};
  }

 private:
  // One entry of the context's map instead of several: each costs an allocation.
  static constexpr const char* kFlags = "flags";
  static constexpr int64_t kHasBias = 1, kZeroCentered = 2;
};

// y first, and last the sum, where there is a residual.
template <bool kLayerNorm>
Tensors norm_autograd(const Tensor& x, const optional<Tensor>& residual, const Tensor& weight,
                      const optional<Tensor>& bias, double eps, bool zero_centered) {
  if (!records(x, residual, weight, bias)) return call_norm_forward(x, residual, weight, bias, eps, kLayerNorm, zero_centered);
  return NormFunction::apply(x, residual, weight, bias, eps, kLayerNorm, zero_centered);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, bool zero_centered) {
  return norm_autograd<false>(x, std::nullopt, weight, std::nullopt, eps, zero_centered)[0];
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                                        bool zero_centered) {
  const Tensors out = norm_autograd<false>(x, residual, weight, std::nullopt, eps, zero_centered);
  return {out.front(), out.back()};
}

Tensor layer_norm(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, double eps, bool zero_centered) {
  return norm_autograd<true>(x, std::nullopt, weight, bias, eps, zero_centered)[0];
}

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                          const optional<Tensor>& bias, double eps, bool zero_centered) {
  const Tensors out = norm_autograd<true>(x, residual, weight, bias, eps, zero_centered);
  return {out.front(), out.back()};
}

// ------------------------------------------------------------------------------------------------------------- rope

struct Angles {
  Tensor cos, sin;
  optional<Tensor> positions;
};

void check_rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const optional<Tensor>& positions, int64_t offset,
                const char* name) {
  TORCH_CHECK(x.dim() == 4 || x.dim() == 3, "megatron_ru: ", name, " has sizes ", x.sizes(),
              ", expected [sequence, batch, heads, head_dim] or [tokens, heads, head_dim]");
  check_device(cos, x, "cos");
  check_device(sin, x, "sin");
  TORCH_CHECK(cos.dim() == 2 && cos.sizes() == sin.sizes() && cos.is_contiguous() && sin.is_contiguous(),
              "megatron_ru: cos and sin have sizes ", cos.sizes(), " and ", sin.sizes(),
              ", expected both [positions, rotary / 2] and contiguous");
  TORCH_CHECK(cos.scalar_type() == wide_type(x) && sin.scalar_type() == wide_type(x), "megatron_ru: cos and sin are ",
              cos.scalar_type(), " and ", sin.scalar_type(), ", expected ", wide_type(x), " beside ", x.scalar_type());
  TORCH_CHECK(2 * cos.size(1) <= x.size(-1), "megatron_ru: the angles turn ", 2 * cos.size(1), " channels, but ", name,
              " has ", x.size(-1));
  if (!present(positions)) {
    TORCH_CHECK(offset >= 0 && offset + x.size(0) <= cos.size(0), "megatron_ru: positions ", offset, " to ",
                offset + x.size(0), " were asked for, but the table has ", cos.size(0), " rows");
    return;
  }
  check_device(*positions, x, "positions");
  const bool per_batch = positions->dim() == 2;
  TORCH_CHECK(positions->scalar_type() == at::kLong && (positions->dim() == 1 || (per_batch && x.dim() == 4)) &&
                  positions->size(0) == x.size(0) && (!per_batch || positions->size(1) == x.size(1)),
              "megatron_ru: positions are ", positions->scalar_type(), " of sizes ", positions->sizes(),
              ", expected int64 of [sequence] or [sequence, batch] for ", name, " of sizes ", x.sizes());
}

void fill_rope(Rope& call, int which, const Tensor& in, const Tensor& out) {
  const bool batched = in.dim() == 4;
  call.in[which] = in.const_data_ptr();
  call.out[which] = out.mutable_data_ptr();
  call.heads[which] = in.size(-2);
  const auto strides = [&](const Tensor& tensor, int64_t* to) {
    to[0] = tensor.stride(0);
    to[1] = batched ? tensor.stride(1) : 0;
    to[2] = tensor.stride(-2);
  };
  strides(in, call.in_stride[which]);
  strides(out, call.out_stride[which]);
}

void run_rope(const Tensor& q, const Tensor* k, const Tensor& q_out, const Tensor* k_out, const Tensor& cos,
              const Tensor& sin, const optional<Tensor>& positions, int64_t offset, bool interleaved, bool inverse) {
  check_rope(q, cos, sin, positions, offset, "q");
  if (k != nullptr) {
    check_rope(*k, cos, sin, positions, offset, "k");
    check_device(*k, q, "k");
    TORCH_CHECK(k->scalar_type() == q.scalar_type() && k->dim() == q.dim() && k->size(0) == q.size(0) &&
                    k->size(-1) == q.size(-1) && (q.dim() == 3 || k->size(1) == q.size(1)),
                "megatron_ru: k is ", k->scalar_type(), " of sizes ", k->sizes(), ", expected ", q.scalar_type(),
                " with the sequence, batch and head size of q, ", q.sizes());
  }
  const c10::DeviceGuard guard(q.device());
  Rope call{};
  fill_rope(call, 0, q, q_out);
  if (k != nullptr) fill_rope(call, 1, *k, *k_out);
  call.sequence = q.size(0);
  call.batch = q.dim() == 4 ? q.size(1) : 1;
  call.head_dim = q.size(-1);
  call.rotary = 2 * cos.size(1);
  call.cos = cos.const_data_ptr();
  call.sin = sin.const_data_ptr();
  call.table_rows = cos.size(0);
  if (present(positions)) {
    call.positions = positions->const_data_ptr<int64_t>();
    call.positions_stride[0] = positions->stride(0);
    call.positions_stride[1] = positions->dim() == 2 ? positions->stride(1) : 0;
  }
  call.offset = offset;
  call.interleaved = interleaved;
  call.inverse = inverse;
  call.dtype = dtype_of(q, "q");
  if (q.numel() == 0 && (k == nullptr || k->numel() == 0)) return;
  if (q.is_cuda()) {
    MEGATRON_RU_LAUNCH(q, rope_cuda, call);
  } else {
    const int64_t width = (call.heads[0] + call.heads[1]) * call.head_dim;
    over_rows_cpu(call.sequence * call.batch, width, [&](int64_t first, int64_t last) { rope_cpu(call, first, last); });
  }
}

Tensor with_contiguous_channels(const Tensor& x) {
  return x.dim() > 0 && x.sym_size(-1) != 1 && x.sym_stride(-1) != 1 ? x.contiguous() : x;
}

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const optional<Tensor>& positions,
            SymInt offset, bool interleaved, bool inverse) {
  const Tensor in = with_contiguous_channels(x);
  Tensor out = at::empty_like(in);
  run_rope(in, nullptr, out, nullptr, cos, sin, positions, offset.expect_int(), interleaved, inverse);
  return out;
}

std::tuple<Tensor, Tensor> rope_qk(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                   const optional<Tensor>& positions, SymInt offset, bool interleaved,
                                   bool inverse) {
  const Tensor q_in = with_contiguous_channels(q), k_in = with_contiguous_channels(k);
  Tensor q_out = at::empty_like(q_in), k_out = at::empty_like(k_in);
  run_rope(q_in, &k_in, q_out, &k_out, cos, sin, positions, offset.expect_int(), interleaved, inverse);
  return {q_out, k_out};
}

void rope_qk_in_place(Tensor q, Tensor k, const Tensor& cos, const Tensor& sin, const optional<Tensor>& positions,
                      SymInt offset, bool interleaved, bool inverse) {
  for (const Tensor& x : {q, k})
    TORCH_CHECK(x.dim() > 0 && (x.size(-1) == 1 || x.stride(-1) == 1), "megatron_ru: q or k has strides ", x.strides(),
                " and is to be overwritten, expected the channels of a head to be contiguous");
  run_rope(q, &k, q, &k, cos, sin, positions, offset.expect_int(), interleaved, inverse);
  mark_changed(q);
  mark_changed(k);
}

// The gradients of queries, keys and values [sequence, batch, heads, head_dim] side by side, queries and keys turned.
Tensor rope_join(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin, bool interleaved,
                 bool inverse) {
  const Tensor q_in = with_contiguous_channels(q), k_in = with_contiguous_channels(k);
  TORCH_CHECK(q.dim() == 4 && v.sizes() == k.sizes() && v.scalar_type() == q.scalar_type(), "megatron_ru: v is ",
              v.scalar_type(), " of sizes ", v.sizes(), ", expected ", q.scalar_type(), " of sizes ", k.sizes());
  check_device(v, q, "v");
  const int64_t queries = q.size(2), keys = k.size(2);
  Tensor out = at::empty({q.size(0), q.size(1), queries + 2 * keys, q.size(3)}, q.options());
  const Tensor q_out = out.narrow(2, 0, queries), k_out = out.narrow(2, queries, keys);
  run_rope(q_in, &k_in, q_out, &k_out, cos, sin, std::nullopt, 0, interleaved, inverse);
  out.narrow(2, queries + keys, keys).copy_(v);
  return out;
}

Tensor rope_join_meta(const Tensor& q, const Tensor& k, const Tensor&, const Tensor&, const Tensor&, bool, bool) {
  return at::empty_symint({q.sym_size(0), q.sym_size(1), q.sym_size(2) + k.sym_size(2) * 2, q.sym_size(3)}, q.options());
}

Tensor rope_meta(const Tensor& x, const Tensor&, const Tensor&, const optional<Tensor>&, SymInt, bool, bool) {
  return at::empty_like(with_contiguous_channels(x));
}

std::tuple<Tensor, Tensor> rope_qk_meta(const Tensor& q, const Tensor& k, const Tensor&, const Tensor&,
                                        const optional<Tensor>&, SymInt, bool, bool) {
  return {at::empty_like(with_contiguous_channels(q)), at::empty_like(with_contiguous_channels(k))};
}

void rope_qk_in_place_meta(Tensor, Tensor, const Tensor&, const Tensor&, const optional<Tensor>&, SymInt, bool,
                           bool) {}

Tensor call_rope(const Tensor& x, const Angles& angles, const SymInt& offset, bool interleaved, bool inverse) {
  const at::AutoDispatchBelowADInplaceOrView below;
  if (is_plain(x, angles.cos)) return rope(x, angles.cos, angles.sin, angles.positions, offset, interleaved, inverse);
  static const auto op = operator_named<decltype(rope)>("megatron_ru::rope");
  return op.call(x, angles.cos, angles.sin, angles.positions, offset, interleaved, inverse);
}

std::tuple<Tensor, Tensor> call_rope_qk(const Tensor& q, const Tensor& k, const Angles& angles, const SymInt& offset,
                                        bool interleaved, bool inverse) {
  const at::AutoDispatchBelowADInplaceOrView below;
  if (is_plain(q, k, angles.cos)) return rope_qk(q, k, angles.cos, angles.sin, angles.positions, offset, interleaved, inverse);
  static const auto op = operator_named<decltype(rope_qk)>("megatron_ru::rope_qk");
  return op.call(q, k, angles.cos, angles.sin, angles.positions, offset, interleaved, inverse);
}

// One tensor, or q and k together. The gradient is the turn by the opposite angle.
struct RopeFunction : torch::autograd::Function<RopeFunction> {
  static variable_list forward(AutogradContext* context, const Tensor& q, const optional<Tensor>& k, const Tensor& cos,
                               const Tensor& sin, const optional<Tensor>& positions, SymInt offset, bool interleaved,
                               bool inverse) {
    context->save_for_backward({cos, sin, or_undefined(positions)});
    context->saved_data["offset"] = offset;
    context->saved_data["flags"] = kInterleaved * interleaved + kInverse * inverse;
    context->set_materialize_grads(false);
    const Angles angles{cos, sin, positions};
    if (!present(k)) return {call_rope(q, angles, offset, interleaved, inverse)};
    auto [q_out, k_out] = call_rope_qk(q, *k, angles, offset, interleaved, inverse);
    return {q_out, k_out};
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const optional<Tensor> positions = if_defined(saved[2]);
    const SymInt offset = context->saved_data["offset"].toSymInt();
    const int64_t flags = context->saved_data["flags"].toInt();
    const bool interleaved = (flags & kInterleaved) != 0, inverse = (flags & kInverse) == 0;
    variable_list out(8);
    if (gradients.size() == 2 && gradients[0].defined() && gradients[1].defined()) {
      static const auto op = operator_named<decltype(rope_qk)>("megatron_ru::rope_qk");
      std::tie(out[0], out[1]) =
          op.call(gradients[0], gradients[1], saved[0], saved[1], positions, offset, interleaved, inverse);
      return out;
    }
    static const auto op = operator_named<decltype(rope)>("megatron_ru::rope");
    for (size_t i = 0; i < gradients.size(); ++i)
      if (gradients[i].defined())
        out[i] = op.call(gradients[i], saved[0], saved[1], positions, offset, interleaved, inverse);
    return out;
  }

 private:
  static constexpr int64_t kInterleaved = 1, kInverse = 2;
};

Tensor rope_autograd(const Tensor& x, const Tensor& cos, const Tensor& sin, const optional<Tensor>& positions,
                     SymInt offset, bool interleaved, bool inverse) {
  if (!records(x)) return call_rope(x, {cos, sin, positions}, offset, interleaved, inverse);
  return RopeFunction::apply(x, optional<Tensor>(), cos, sin, positions, offset, interleaved, inverse)[0];
}

std::tuple<Tensor, Tensor> rope_qk_autograd(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                            const optional<Tensor>& positions, SymInt offset, bool interleaved,
                                            bool inverse) {
  if (!records(q, k)) return call_rope_qk(q, k, {cos, sin, positions}, offset, interleaved, inverse);
  const variable_list out = RopeFunction::apply(q, optional<Tensor>(k), cos, sin, positions, offset, interleaved, inverse);
  return {out[0], out[1]};
}

Tensor packed_positions(const Tensor& cu_seqlens, SymInt total) {
  const bool is_int32 = cu_seqlens.scalar_type() == at::kInt;
  TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 && (is_int32 || cu_seqlens.scalar_type() == at::kLong),
              "megatron_ru: cu_seqlens is ", cu_seqlens.scalar_type(), " of sizes ", cu_seqlens.sizes(),
              ", expected int32 or int64 of [sequences + 1]");
  const c10::DeviceGuard guard(cu_seqlens.device());
  const Tensor starts = cu_seqlens.contiguous();
  Tensor positions = at::empty({total.expect_int()}, cu_seqlens.options().dtype(at::kLong));
  PackedPositions call{};
  call.cu_seqlens = starts.const_data_ptr();
  call.is_int32 = is_int32;
  call.sequences = cu_seqlens.size(0) - 1;
  call.total = positions.numel();
  call.positions = positions.mutable_data_ptr<int64_t>();
  if (call.total == 0) return positions;
  if (cu_seqlens.is_cuda()) {
    MEGATRON_RU_LAUNCH(cu_seqlens, packed_positions_cuda, call);
  } else {
    packed_positions_cpu(call);
  }
  return positions;
}

Tensor packed_positions_meta(const Tensor& cu_seqlens, SymInt total) {
  return at::empty_symint({total}, cu_seqlens.options().dtype(at::kLong));
}

// ------------------------------------------------------------------------------------------------------ embedding

void embedding_gradient(Tensor kept, const Tensor& gradient, const Tensor& ids) {
  TORCH_CHECK(kept.dim() == 2 && kept.is_contiguous() && kept.scalar_type() == at::kFloat, "megatron_ru: kept is ",
              kept.scalar_type(), " of sizes ", kept.sizes(), ", expected float32 of [rows, hidden], contiguous");
  TORCH_CHECK(gradient.dim() == 2 && gradient.size(1) == kept.size(1), "megatron_ru: gradient has sizes ",
              gradient.sizes(), ", expected [tokens, ", kept.size(1), "]");
  TORCH_CHECK(ids.dim() == 1 && ids.scalar_type() == at::kLong && ids.size(0) == gradient.size(0), "megatron_ru: ids are ",
              ids.scalar_type(), " of sizes ", ids.sizes(), ", expected int64 of [", gradient.size(0), "]");
  check_device(gradient, kept, "gradient");
  check_device(ids, kept, "ids");
  mark_changed(kept);
  if (gradient.numel() == 0) return;
  const c10::DeviceGuard guard(kept.device());
  if (!kept.is_cuda()) {
    kept.index_add_(0, ids, gradient.to(at::kFloat));
    return;
  }
  const auto [sorted, order] = at::sort(ids, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const Tensor rows = gradient.contiguous();
  EmbeddingGradient call{};
  call.gradient = rows.const_data_ptr();
  call.ids = sorted.const_data_ptr<int64_t>();
  call.order = order.const_data_ptr<int64_t>();
  call.kept = kept.mutable_data_ptr<float>();
  call.tokens = rows.size(0);
  call.rows = kept.size(0);
  call.hidden = rows.size(1);
  call.vectors = reinterpret_cast<uintptr_t>(call.gradient) % 16 == 0 && rows.size(1) * rows.element_size() % 16 == 0;
  call.dtype = dtype_of(rows, "gradient");
  MEGATRON_RU_LAUNCH(kept, embedding_gradient_cuda, call);
}

void embedding_gradient_meta(Tensor, const Tensor&, const Tensor&) {}

// -------------------------------------------------------------------------------------------------------------- fp8

std::tuple<Tensor, Tensor, Tensor> round_fp8_meta(const Tensor& x, bool e5m2) {
  const auto kind = x.options().dtype(e5m2 ? at::kFloat8_e5m2 : at::kFloat8_e4m3fn);
  return {at::empty_symint({x.sym_size(0), x.sym_size(1)}, kind), at::empty_symint({x.sym_size(1), x.sym_size(0)}, kind),
          at::empty({}, x.options().dtype(at::kFloat))};
}

std::tuple<Tensor, Tensor, Tensor> round_fp8(const Tensor& x, bool e5m2) {
  TORCH_CHECK(x.dim() == 2 && x.size(0) % 16 == 0 && x.size(1) % 16 == 0 && x.numel() > 0, "megatron_ru: x has sizes ",
              x.sizes(), ", expected two of them, multiples of 16");
  const c10::DeviceGuard guard(x.device());
  const Tensor in = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 ? x.contiguous() : x.clone(at::MemoryFormat::Contiguous);
  auto out = round_fp8_meta(in, e5m2);
  const Tensor largest = at::empty({}, in.options().dtype(at::kInt));
  RoundFp8 call{};
  call.in = in.const_data_ptr();
  call.out = std::get<0>(out).mutable_data_ptr();
  call.turned = std::get<1>(out).mutable_data_ptr();
  call.largest = static_cast<uint32_t*>(largest.mutable_data_ptr());
  call.inverse_scale = std::get<2>(out).mutable_data_ptr<float>();
  call.rows = in.size(0);
  call.columns = in.size(1);
  call.e5m2 = e5m2;
  call.dtype = dtype_of(in, "x");
  MEGATRON_RU_LAUNCH(in, round_fp8_cuda, call);
  return out;
}

// ------------------------------------------------------------------------------------------------------ activations

// The order of megatron_ru.ops.activation.ACTIVATIONS: relu, gelu, gelu_tanh, swish, reglu, geglu, swiglu.
struct Kind {
  Pointwise function;
  bool gated;
};

Kind kind_of(int64_t kind) {
  static constexpr Kind kinds[] = {
      {Pointwise::kRelu, false}, {Pointwise::kGelu, false}, {Pointwise::kGeluTanh, false}, {Pointwise::kSwish, false},
      {Pointwise::kRelu, true},  {Pointwise::kGelu, true},  {Pointwise::kSwish, true}};
  TORCH_CHECK(kind >= 0 && kind < 7, "megatron_ru: activation ", kind, " is unknown, expected 0 to 6");
  return kinds[kind];
}

const void* shifted(const void* data, int64_t elements, const Tensor& like) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + elements * like.element_size();
}

void* shifted(void* data, int64_t elements, const Tensor& like) {
  return static_cast<char*>(data) + elements * like.element_size();
}

void check_activation(const Tensor& x, const optional<Tensor>& bias, Kind kind) {
  TORCH_CHECK(x.dim() >= 1 && (!kind.gated || x.size(-1) % 2 == 0), "megatron_ru: x has sizes ", x.sizes(),
              ", expected an even last size, the gate and then the up half");
  if (!present(bias)) return;
  check_device(*bias, x, "bias");
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == x.size(-1) && bias->is_contiguous() &&
                  bias->scalar_type() == x.scalar_type(),
              "megatron_ru: bias is ", bias->scalar_type(), " of sizes ", bias->sizes(), ", expected ", x.scalar_type(),
              " of [", x.size(-1), "]");
}

Tensor activation_output(const Tensor& x, Kind kind) {
  auto sizes = x.sym_sizes().vec();
  if (kind.gated) sizes.back() = sizes.back() / 2;
  return at::empty_symint(sizes, x.options());
}

void run_activation_forward(const ActivationForward& call, const Tensor& like) {
  if (call.rows == 0 || call.columns == 0) return;
  if (like.is_cuda()) {
    MEGATRON_RU_LAUNCH(like, activation_forward_cuda, call);
  } else {
    over_rows_cpu(call.rows, call.columns,
                  [&](int64_t first, int64_t last) { activation_forward_cpu(call, first, last); });
  }
}

void run_activation_backward(const ActivationBackward& call, const Tensor& like) {
  if (call.rows == 0 || call.columns == 0) return;
  if (like.is_cuda()) {
    MEGATRON_RU_LAUNCH(like, activation_backward_cuda, call);
  } else {
    over_rows_cpu(call.rows, call.columns,
                  [&](int64_t first, int64_t last) { activation_backward_cpu(call, first, last); });
  }
}

Tensor activation_forward(const Tensor& x, const optional<Tensor>& bias, int64_t kind_index) {
  const Kind kind = kind_of(kind_index);
  check_activation(x, bias, kind);
  const c10::DeviceGuard guard(x.device());
  const Rows in = as_rows(x, "x");
  Tensor out = activation_output(x, kind);
  ActivationForward call{};
  call.rows = in.rows;
  call.columns = kind.gated ? in.columns / 2 : in.columns;
  call.gate = in.tensor.const_data_ptr();
  call.gate_bias = data_or_null(bias);
  if (kind.gated) {
    call.up = shifted(call.gate, call.columns, x);
    call.up_bias = shifted(call.gate_bias, call.columns, x);
  }
  call.out = out.mutable_data_ptr();
  call.gate_stride = call.up_stride = in.stride;
  call.out_stride = call.columns;
  call.function = kind.function;
  call.dtype = dtype_of(x, "x");
  run_activation_forward(call, x);
  return out;
}

Tensor activation_meta(const Tensor& x, const optional<Tensor>&, int64_t kind) {
  return activation_output(x, kind_of(kind));
}

void run_activation_backward_into(const Tensor& dy, const Rows& in, const optional<Tensor>& bias, Kind kind,
                                  const Rows& dx) {
  const Rows gradient = as_rows(dy, "dy");
  ActivationBackward call{};
  call.rows = in.rows;
  call.columns = kind.gated ? in.columns / 2 : in.columns;
  call.dy = gradient.tensor.const_data_ptr();
  call.gate = in.tensor.const_data_ptr();
  call.gate_bias = data_or_null(bias);
  call.dgate = dx.tensor.mutable_data_ptr();
  if (kind.gated) {
    call.up = shifted(call.gate, call.columns, dy);
    call.up_bias = shifted(call.gate_bias, call.columns, dy);
    call.dup = shifted(call.dgate, call.columns, dy);
  }
  call.dy_stride = gradient.stride;
  call.gate_stride = call.up_stride = in.stride;
  call.dgate_stride = call.dup_stride = dx.stride;
  call.function = kind.function;
  call.dtype = dtype_of(in.tensor, "x");
  run_activation_backward(call, dy);
}

Tensor activation_backward(const Tensor& dy, const Tensor& x, const optional<Tensor>& bias, int64_t kind) {
  const c10::DeviceGuard guard(x.device());
  Tensor dx = contiguous_like(x);
  run_activation_backward_into(dy, as_rows(x, "x"), bias, kind_of(kind), as_rows(dx, "dx"));
  return dx;
}

Tensor activation_backward_meta(const Tensor&, const Tensor& x, const optional<Tensor>&, int64_t) {
  return contiguous_like(x);
}

void activation_backward_in_place(const Tensor& dy, Tensor x, const optional<Tensor>& bias, int64_t kind) {
  const c10::DeviceGuard guard(x.device());
  const Rows in = as_rows_in_place(x, "x");
  run_activation_backward_into(dy, in, bias, kind_of(kind), in);
  mark_changed(x);
}

void activation_backward_in_place_meta(const Tensor&, Tensor, const optional<Tensor>&, int64_t) {}

Tensor call_activation(const Tensor& x, const optional<Tensor>& bias, int64_t kind) {
  const at::AutoDispatchBelowADInplaceOrView below;
  if (is_plain(x)) return activation_forward(x, bias, kind);
  static const auto op = operator_named<decltype(activation_forward)>("megatron_ru::activation");
  return op.call(x, bias, kind);
}

// Keeps x alone and computes the activation anew in the backward. When `overwrite`, dx takes the place of x.
template <bool kOverwrite>
struct ActivationFunction : torch::autograd::Function<ActivationFunction<kOverwrite>> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const optional<Tensor>& bias, int64_t kind) {
    context->save_for_backward({x, or_undefined(bias)});
    context->saved_data["kind"] = kind;
    return call_activation(x, bias, kind);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const optional<Tensor> bias = if_defined(saved[1]);
    const int64_t kind = context->saved_data["kind"].toInt();
    Tensor dx, dbias;
    if (kOverwrite) {
      static const auto op =
          operator_named<decltype(activation_backward_in_place)>("megatron_ru::activation_backward_");
      dx = saved[0].detach();
      op.call(gradients[0], dx, bias, kind);
    } else {
      static const auto op = operator_named<decltype(activation_backward)>("megatron_ru::activation_backward");
      dx = op.call(gradients[0], saved[0], bias, kind);
    }
    if (needs_gradient(saved[1]))
      dbias = dx.reshape_symint({-1, dx.sym_size(-1)}).sum(0, false, wide_type(dx)).to(dx.scalar_type());
    return {dx, dbias, Tensor()};
  }
};

template <bool kOverwrite>
Tensor activation_autograd(const Tensor& x, const optional<Tensor>& bias, int64_t kind) {
  if (!records(x, bias)) return call_activation(x, bias, kind);
  return ActivationFunction<kOverwrite>::apply(x, bias, kind);
}

void check_glu(const Tensor& gate, const Tensor& up, Kind kind) {
  check_device(up, gate, "up");
  TORCH_CHECK(kind.gated, "megatron_ru: glu takes a gated activation, 4 to 6");
  TORCH_CHECK(gate.dim() >= 1 && gate.sizes() == up.sizes() && gate.scalar_type() == up.scalar_type(),
              "megatron_ru: up is ", up.scalar_type(), " of sizes ", up.sizes(), ", expected ", gate.scalar_type(),
              " of ", gate.sizes(), " like gate");
}

Tensor glu_forward(const Tensor& gate, const Tensor& up, int64_t kind_index) {
  const Kind kind = kind_of(kind_index);
  check_glu(gate, up, kind);
  const c10::DeviceGuard guard(gate.device());
  const Rows gates = as_rows(gate, "gate"), ups = as_rows(up, "up");
  Tensor out = contiguous_like(gate);
  ActivationForward call{};
  call.gate = gates.tensor.const_data_ptr();
  call.up = ups.tensor.const_data_ptr();
  call.out = out.mutable_data_ptr();
  call.rows = gates.rows;
  call.columns = call.out_stride = gates.columns;
  call.gate_stride = gates.stride;
  call.up_stride = ups.stride;
  call.function = kind.function;
  call.dtype = dtype_of(gate, "gate");
  run_activation_forward(call, gate);
  return out;
}

Tensor glu_meta(const Tensor& gate, const Tensor&, int64_t) { return contiguous_like(gate); }

std::tuple<Tensor, Tensor> glu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up, int64_t kind) {
  const c10::DeviceGuard guard(gate.device());
  const Rows gradient = as_rows(dy, "dy"), gates = as_rows(gate, "gate"), ups = as_rows(up, "up");
  Tensor dgate = contiguous_like(gate), dup = contiguous_like(up);
  ActivationBackward call{};
  call.dy = gradient.tensor.const_data_ptr();
  call.gate = gates.tensor.const_data_ptr();
  call.up = ups.tensor.const_data_ptr();
  call.dgate = dgate.mutable_data_ptr();
  call.dup = dup.mutable_data_ptr();
  call.rows = gates.rows;
  call.columns = call.dgate_stride = call.dup_stride = gates.columns;
  call.dy_stride = gradient.stride;
  call.gate_stride = gates.stride;
  call.up_stride = ups.stride;
  call.function = kind_of(kind).function;
  call.dtype = dtype_of(gate, "gate");
  run_activation_backward(call, gate);
  return {dgate, dup};
}

std::tuple<Tensor, Tensor> glu_backward_meta(const Tensor&, const Tensor& gate, const Tensor& up, int64_t) {
  return {contiguous_like(gate), contiguous_like(up)};
}

Tensor call_glu(const Tensor& gate, const Tensor& up, int64_t kind) {
  const at::AutoDispatchBelowADInplaceOrView below;
  if (is_plain(gate, up)) return glu_forward(gate, up, kind);
  static const auto op = operator_named<decltype(glu_forward)>("megatron_ru::glu");
  return op.call(gate, up, kind);
}

struct GluFunction : torch::autograd::Function<GluFunction> {
  static Tensor forward(AutogradContext* context, const Tensor& gate, const Tensor& up, int64_t kind) {
    context->save_for_backward({gate, up});
    context->saved_data["kind"] = kind;
    return call_glu(gate, up, kind);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    static const auto op = operator_named<decltype(glu_backward)>("megatron_ru::glu_backward");
    const variable_list saved = context->get_saved_variables();
    auto [dgate, dup] = op.call(gradients[0], saved[0], saved[1], context->saved_data["kind"].toInt());
    return {dgate, dup, Tensor()};
  }
};

Tensor glu_autograd(const Tensor& gate, const Tensor& up, int64_t kind) {
  if (!records(gate, up)) return call_glu(gate, up, kind);
  return GluFunction::apply(gate, up, kind);
}

// ---------------------------------------------------------------------------------------------------- cross entropy

// One wide number per row, or one for all of them at stride 0.
struct PerRow {
  Tensor tensor;
  int64_t stride = 0;

  const void* data() const { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }
};

PerRow per_row(const optional<Tensor>& given, const Tensor& logits, int64_t rows, const char* name) {
  if (!present(given)) return {};
  check_device(*given, logits, name);
  const Tensor wide = given->to(wide_type(logits));
  const auto strides = wide.strides();
  const bool same = wide.numel() == 1 || (wide.numel() == rows && std::all_of(strides.begin(), strides.end(),
                                                                              [](int64_t s) { return s == 0; }));
  TORCH_CHECK(same || wide.numel() == rows, "megatron_ru: ", name, " has sizes ", wide.sizes(), ", expected one number or ",
              rows, ", one for each row of logits");
  if (same) return {wide, 0};
  return {wide.reshape({rows}).contiguous(), 1};
}

// What every cross entropy op shares: the logits' rows and the targets.
struct CrossEntropyInputs {
  Rows logits;
  Tensor target;
  CrossEntropy call{};
};

CrossEntropyInputs cross_entropy_inputs(const Tensor& logits, const Tensor& target, bool in_place) {
  check_device(target, logits, "target");
  TORCH_CHECK(logits.dim() >= 1 && target.numel() * logits.size(-1) == logits.numel(), "megatron_ru: target has sizes ",
              target.sizes(), ", expected ", logits.sizes().slice(0, logits.dim() - 1), ", the logits' without the last");
  TORCH_CHECK(target.scalar_type() == at::kLong || target.scalar_type() == at::kInt, "megatron_ru: target is ",
              target.scalar_type(), ", expected int64 or int32");
  TORCH_CHECK(logits.size(-1) > 0, "megatron_ru: logits have no column");
  CrossEntropyInputs in;
  in.logits = in_place ? as_rows_in_place(logits, "logits") : as_rows(logits, "logits");
  in.target = target.to(at::kLong).contiguous();
  in.call.logits = in.logits.tensor.const_data_ptr();
  in.call.rows = in.logits.rows;
  in.call.columns = in.call.vocab_total = in.logits.columns;
  in.call.logits_stride = in.logits.stride;
  in.call.target = in.target.const_data_ptr<int64_t>();
  in.call.dtype = dtype_of(logits, "logits");
  return in;
}

#define MEGATRON_RU_CROSS_ENTROPY(name, call, like, work)                                                     \
  do {                                                                                                        \
    if ((call).rows == 0) break;                                                                              \
    if ((like).is_cuda()) {                                                                                   \
      MEGATRON_RU_LAUNCH(like, name##_cuda, call);                                                            \
    } else {                                                                                                  \
      over_rows_cpu((call).rows, work, [&](int64_t first, int64_t last) { name##_cpu(call, first, last); });  \
    }                                                                                                         \
  } while (false)

Tensor cross_entropy_statistics(const Tensor& logits, const Tensor& target, SymInt first_column, bool smoothing) {
  const c10::DeviceGuard guard(logits.device());
  CrossEntropyInputs in = cross_entropy_inputs(logits, target, false);
  Tensor statistics = at::empty({in.call.rows, 4}, logits.options().dtype(wide_type(logits)));
  in.call.first_column = first_column.expect_int();
  in.call.label_smoothing = smoothing ? 1.0 : 0.0;
  in.call.statistics = statistics.mutable_data_ptr();
  MEGATRON_RU_CROSS_ENTROPY(cross_entropy_statistics, in.call, logits, in.call.columns);
  return statistics;
}

Tensor cross_entropy_statistics_meta(const Tensor& logits, const Tensor& target, SymInt, bool) {
  return at::empty_symint({target.sym_numel(), 4}, logits.options().dtype(wide_type(logits)));
}

std::tuple<Tensor, Tensor> cross_entropy_merge(const Tensor& statistics, const Tensor& target, SymInt vocab_total,
                                               int64_t ignore_index, double label_smoothing, double z_loss) {
  const c10::DeviceGuard guard(statistics.device());
  check_device(target, statistics, "target");
  const int64_t rows = target.numel();
  TORCH_CHECK(statistics.dim() == 3 && statistics.size(1) == rows && statistics.size(2) == 4 &&
                  statistics.is_contiguous() && wide_type(statistics) == statistics.scalar_type(),
              "megatron_ru: statistics have sizes ", statistics.sizes(), ", expected [parts, ", rows,
              ", 4], contiguous, as the ranks gathered them");
  const Tensor ids = target.to(at::kLong).contiguous();
  Tensor loss = at::empty(target.sizes(), statistics.options()), lse = at::empty({rows}, statistics.options());
  CrossEntropy call{};
  call.rows = rows;
  call.target = ids.const_data_ptr<int64_t>();
  call.vocab_total = vocab_total.expect_int();
  call.ignore_index = ignore_index;
  call.label_smoothing = label_smoothing;
  call.z_loss = z_loss;
  call.dtype = dtype_of(statistics, "statistics");
  call.statistics = const_cast<void*>(statistics.const_data_ptr());
  call.parts = statistics.size(0);
  call.loss = loss.mutable_data_ptr();
  call.lse = lse.mutable_data_ptr();
  MEGATRON_RU_CROSS_ENTROPY(cross_entropy_merge, call, statistics, 16);
  return {loss, lse};
}

std::tuple<Tensor, Tensor> cross_entropy_merge_meta(const Tensor& statistics, const Tensor& target, SymInt,
                                                    int64_t, double, double) {
  return {at::empty_symint(target.sym_sizes(), statistics.options()),
          at::empty_symint({target.sym_numel()}, statistics.options())};
}

void run_cross_entropy_backward(const Tensor& loss_gradient, CrossEntropyInputs& in, const Tensor& lse,
                                SymInt first_column, SymInt vocab_total, int64_t ignore_index,
                                double label_smoothing, double z_loss, const Rows& gradient) {
  const Tensor& logits = in.logits.tensor;
  check_device(lse, logits, "lse");
  TORCH_CHECK(lse.numel() == in.call.rows && lse.is_contiguous() && lse.scalar_type() == wide_type(logits),
              "megatron_ru: lse is ", lse.scalar_type(), " of sizes ", lse.sizes(), ", expected ", wide_type(logits),
              " of [", in.call.rows, "]");
  const PerRow factor = per_row(loss_gradient, logits, in.call.rows, "loss_gradient");
  in.call.first_column = first_column.expect_int();
  in.call.vocab_total = vocab_total.expect_int();
  in.call.ignore_index = ignore_index;
  in.call.label_smoothing = label_smoothing;
  in.call.z_loss = z_loss;
  in.call.lse = const_cast<void*>(lse.const_data_ptr());
  in.call.gradient = gradient.tensor.mutable_data_ptr();
  in.call.gradient_stride = gradient.stride;
  in.call.loss_gradient = factor.data();
  in.call.loss_gradient_stride = factor.stride;
  MEGATRON_RU_CROSS_ENTROPY(cross_entropy_backward, in.call, logits, in.call.columns);
}

Tensor cross_entropy_backward(const Tensor& loss_gradient, const Tensor& logits, const Tensor& target, const Tensor& lse,
                              SymInt first_column, SymInt vocab_total, int64_t ignore_index,
                              double label_smoothing, double z_loss) {
  const c10::DeviceGuard guard(logits.device());
  CrossEntropyInputs in = cross_entropy_inputs(logits, target, false);
  Tensor gradient = contiguous_like(logits);
  run_cross_entropy_backward(loss_gradient, in, lse, first_column, vocab_total, ignore_index, label_smoothing, z_loss,
                             as_rows(gradient, "gradient"));
  return gradient;
}

Tensor cross_entropy_backward_meta(const Tensor&, const Tensor& logits, const Tensor&, const Tensor&, SymInt,
                                   SymInt, int64_t, double, double) {
  return contiguous_like(logits);
}

void cross_entropy_backward_in_place(const Tensor& loss_gradient, Tensor logits, const Tensor& target, const Tensor& lse,
                                     SymInt first_column, SymInt vocab_total, int64_t ignore_index,
                                     double label_smoothing, double z_loss) {
  const c10::DeviceGuard guard(logits.device());
  CrossEntropyInputs in = cross_entropy_inputs(logits, target, true);
  run_cross_entropy_backward(loss_gradient, in, lse, first_column, vocab_total, ignore_index, label_smoothing, z_loss,
                             in.logits);
  mark_changed(logits);
}

void cross_entropy_backward_in_place_meta(const Tensor&, Tensor, const Tensor&, const Tensor&, SymInt,
                                          SymInt, int64_t, double, double) {}

Tensor run_cross_entropy_one_pass(const Tensor& logits, const Tensor& target, const optional<Tensor>& expected,
                                  int64_t ignore_index, double label_smoothing, double z_loss, bool in_place,
                                  const Tensor& gradient) {
  CrossEntropyInputs in = cross_entropy_inputs(logits, target, in_place);
  const Rows to = in_place ? in.logits : as_rows(gradient, "gradient");
  Tensor loss = at::empty(target.sizes(), logits.options().dtype(wide_type(logits)));
  const PerRow factor = per_row(expected, logits, in.call.rows, "expected_gradient");
  in.call.ignore_index = ignore_index;
  in.call.label_smoothing = label_smoothing;
  in.call.z_loss = z_loss;
  in.call.loss = loss.mutable_data_ptr();
  in.call.gradient = to.tensor.mutable_data_ptr();
  in.call.gradient_stride = to.stride;
  in.call.loss_gradient = factor.data();
  in.call.loss_gradient_stride = factor.stride;
  MEGATRON_RU_CROSS_ENTROPY(cross_entropy_one_pass, in.call, logits, in.call.columns);
  return loss;
}

std::tuple<Tensor, Tensor> cross_entropy_one_pass(const Tensor& logits, const Tensor& target,
                                                  const optional<Tensor>& expected, int64_t ignore_index,
                                                  double label_smoothing, double z_loss) {
  const c10::DeviceGuard guard(logits.device());
  Tensor gradient = contiguous_like(logits);
  Tensor loss = run_cross_entropy_one_pass(logits, target, expected, ignore_index, label_smoothing, z_loss, false, gradient);
  return {loss, gradient};
}

// 1 / the number of rows that count, as a scalar, wide.
Tensor cross_entropy_share(const Tensor& logits, const Tensor& target, int64_t ignore_index) {
  if (!logits.is_cuda()) return target.ne(ignore_index).sum(wide_type(logits)).reciprocal_();
  CrossEntropyInputs in = cross_entropy_inputs(logits, target, false);
  Tensor share = at::empty({}, logits.options().dtype(wide_type(logits)));
  in.call.ignore_index = ignore_index;
  in.call.share = share.mutable_data_ptr();
  MEGATRON_RU_LAUNCH(logits, cross_entropy_share_cuda, in.call);
  return share;
}

Tensor cross_entropy_mean_of(const Tensor& loss, const Tensor& share) {
  if (!loss.is_cuda()) return loss.sum().mul_(share);
  Tensor mean = at::empty({}, loss.options());
  CrossEntropy call{};
  call.rows = loss.numel();
  call.loss = loss.mutable_data_ptr();
  call.share = share.mutable_data_ptr();
  call.mean = mean.mutable_data_ptr();
  MEGATRON_RU_LAUNCH(loss, cross_entropy_mean_cuda, call);
  return mean;
}

// The mean over the rows that count, and its gradient times `expected`.
std::tuple<Tensor, Tensor> cross_entropy_one_pass_mean(const Tensor& logits, const Tensor& target,
                                                       const optional<Tensor>& expected, int64_t ignore_index,
                                                       double label_smoothing, double z_loss) {
  const c10::DeviceGuard guard(logits.device());
  const Tensor share = cross_entropy_share(logits, target, ignore_index);
  Tensor gradient = contiguous_like(logits);
  const Tensor loss = run_cross_entropy_one_pass(logits, target, present(expected) ? expected->mul(share) : share, ignore_index,
                                                 label_smoothing, z_loss, false, gradient);
  return {cross_entropy_mean_of(loss, share), gradient};
}

std::tuple<Tensor, Tensor> cross_entropy_one_pass_mean_meta(const Tensor& logits, const Tensor&, const optional<Tensor>&,
                                                            int64_t, double, double) {
  return {at::empty_symint({}, logits.options().dtype(wide_type(logits))), contiguous_like(logits)};
}

Tensor loss_like(const Tensor& logits, const Tensor& target) {
  return at::empty_symint(target.sym_sizes(), logits.options().dtype(wide_type(logits)));
}

std::tuple<Tensor, Tensor> cross_entropy_one_pass_meta(const Tensor& logits, const Tensor& target,
                                                       const optional<Tensor>&, int64_t, double, double) {
  return {loss_like(logits, target), contiguous_like(logits)};
}

Tensor cross_entropy_gradient_in_place(Tensor logits, const Tensor& target, const optional<Tensor>& expected,
                                       int64_t ignore_index, double label_smoothing, double z_loss) {
  const c10::DeviceGuard guard(logits.device());
  Tensor loss = run_cross_entropy_one_pass(logits, target, expected, ignore_index, label_smoothing, z_loss, true, logits);
  mark_changed(logits);
  return loss;
}

Tensor cross_entropy_gradient_in_place_meta(Tensor logits, const Tensor& target, const optional<Tensor>&, int64_t, double,
                                            double) {
  return loss_like(logits, target);
}

void cross_entropy_rescale(Tensor gradient, const Tensor& loss_gradient, const optional<Tensor>& expected) {
  const c10::DeviceGuard guard(gradient.device());
  const Rows rows = as_rows_in_place(gradient, "gradient");
  const PerRow factor = per_row(loss_gradient, gradient, rows.rows, "loss_gradient");
  const PerRow written = per_row(expected, gradient, rows.rows, "expected_gradient");
  CrossEntropy call{};
  call.rows = rows.rows;
  call.columns = rows.columns;
  call.dtype = dtype_of(gradient, "gradient");
  call.gradient = rows.tensor.mutable_data_ptr();
  call.gradient_stride = rows.stride;
  call.loss_gradient = factor.data();
  call.loss_gradient_stride = factor.stride;
  call.expected = written.data();
  call.expected_stride = written.stride;
  MEGATRON_RU_CROSS_ENTROPY(cross_entropy_rescale, call, gradient, call.columns);
  // A second backward would scale twice: torch refuses a saved tensor whose version has moved.
  mark_changed(gradient);
}

void cross_entropy_rescale_meta(Tensor, const Tensor&, const optional<Tensor>&) {}

std::tuple<Tensor, Tensor> loss_and_lse(const Tensor& logits, const Tensor& target, int64_t ignore_index,
                                        double label_smoothing, double z_loss) {
  static const auto statistics = operator_named<decltype(cross_entropy_statistics)>("megatron_ru::cross_entropy_statistics");
  static const auto merge = operator_named<decltype(cross_entropy_merge)>("megatron_ru::cross_entropy_merge");
  const Tensor found = statistics.call(logits, target, 0, label_smoothing != 0.0);
  return merge.call(found.unsqueeze(0), target, logits.sym_size(-1), ignore_index, label_smoothing, z_loss);
}

Tensor cross_entropy_loss(const Tensor& logits, const Tensor& target, const optional<Tensor>&, int64_t ignore_index,
                          double label_smoothing, double z_loss, bool) {
  return std::get<0>(loss_and_lse(logits, target, ignore_index, label_smoothing, z_loss));
}

Tensor cross_entropy_mean_loss(const Tensor& logits, const Tensor& target, const optional<Tensor>&, int64_t ignore_index,
                               double label_smoothing, double z_loss) {
  const Tensor loss = std::get<0>(loss_and_lse(logits, target, ignore_index, label_smoothing, z_loss));
  return loss.sum().mul(target.ne(ignore_index).sum(loss.scalar_type()).reciprocal());
}

// The gradient is written in the forward, which knows what it will be multiplied with, or believes so. With kMean the
// mean is part of the op, and the factor is that of the mean.
template <bool kMean>
struct OnePassFunction : torch::autograd::Function<OnePassFunction<kMean>> {
  static Tensor forward(AutogradContext* context, const Tensor& logits, const Tensor& target,
                        const optional<Tensor>& expected, int64_t ignore_index, double label_smoothing, double z_loss) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = operator_named<decltype(cross_entropy_one_pass)>(
        kMean ? "megatron_ru::cross_entropy_one_pass_mean" : "megatron_ru::cross_entropy_one_pass");
    auto [loss, gradient] = op.call(logits, target, expected, ignore_index, label_smoothing, z_loss);
    context->save_for_backward({gradient, present(expected) ? *expected : Tensor()});
    return loss;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    static const auto op = operator_named<decltype(cross_entropy_rescale)>("megatron_ru::cross_entropy_rescale_");
    const variable_list saved = context->get_saved_variables();
    Tensor gradient = saved[0].detach();
    op.call(gradient, gradients[0], saved[1].defined() ? optional<Tensor>(saved[1]) : std::nullopt);
    return {gradient, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

// The backward reads the logits again: less traffic where the upstream gradient is known only then.
struct TwoPassFunction : torch::autograd::Function<TwoPassFunction> {
  static Tensor forward(AutogradContext* context, const Tensor& logits, const Tensor& target, int64_t ignore_index,
                        double label_smoothing, double z_loss) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, lse] = loss_and_lse(logits, target, ignore_index, label_smoothing, z_loss);
    context->save_for_backward({logits, target, lse});
    context->saved_data["ignore_index"] = ignore_index;
    context->saved_data["label_smoothing"] = label_smoothing;
    context->saved_data["z_loss"] = z_loss;
    return loss;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    static const auto op = operator_named<decltype(cross_entropy_backward)>("megatron_ru::cross_entropy_backward");
    const variable_list saved = context->get_saved_variables();
    const Tensor gradient = op.call(gradients[0], saved[0], saved[1], saved[2], 0, saved[0].sym_size(-1),
                                    context->saved_data["ignore_index"].toInt(),
                                    context->saved_data["label_smoothing"].toDouble(),
                                    context->saved_data["z_loss"].toDouble());
    return {gradient, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor cross_entropy_autograd(const Tensor& logits, const Tensor& target, const optional<Tensor>& expected,
                              int64_t ignore_index, double label_smoothing, double z_loss, bool one_pass) {
  if (records(logits)) {
    if (one_pass) return OnePassFunction<false>::apply(logits, target, expected, ignore_index, label_smoothing, z_loss);
    return TwoPassFunction::apply(logits, target, ignore_index, label_smoothing, z_loss);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return std::get<0>(loss_and_lse(logits, target, ignore_index, label_smoothing, z_loss));
}

Tensor cross_entropy_mean_autograd(const Tensor& logits, const Tensor& target, const optional<Tensor>& expected,
                                   int64_t ignore_index, double label_smoothing, double z_loss) {
  if (records(logits))
    return OnePassFunction<true>::apply(logits, target, expected, ignore_index, label_smoothing, z_loss);
  const at::AutoDispatchBelowADInplaceOrView below;
  return cross_entropy_mean_loss(logits, target, expected, ignore_index, label_smoothing, z_loss);
}

// --------------------------------------------------------------------------------------------------- gradient guard

void check_listed(const Tensor& tensor, const Tensor& first, const char* name) {
  check_device(tensor, first, name);
  TORCH_CHECK(tensor.is_contiguous(), "megatron_ru: a tensor of ", name, " has sizes ", tensor.sizes(), " and strides ",
              tensor.strides(), ", expected it to be contiguous");
}

void guard_cuda([[maybe_unused]] const at::TensorList& tensors, [[maybe_unused]] size_t first,
                [[maybe_unused]] size_t last, [[maybe_unused]] int32_t* flags) {
#ifdef MEGATRON_RU_CUDA
  std::vector<void*> pointers;
  std::vector<int64_t> sizes;
  for (size_t i = first; i < last; ++i) {
    pointers.push_back(tensors[i].mutable_data_ptr());
    sizes.push_back(tensors[i].numel());
  }
  GradientGuard call{};
  call.tensors = pointers.data();
  call.sizes = sizes.data();
  call.count = static_cast<int64_t>(pointers.size());
  call.flags = flags + first;
  call.dtype = dtype_of(tensors[first], "a gradient");
  MEGATRON_RU_LAUNCH(tensors[first], gradient_guard_cuda, call);
#else
  MEGATRON_RU_LAUNCH(tensors[first], , );
#endif
}

bool guard_cpu(const Tensor& tensor) {
  const Dtype dtype = dtype_of(tensor, "a gradient");
  const auto* data = static_cast<const char*>(tensor.const_data_ptr());
  std::atomic<bool> found{false};
  at::parallel_for(0, tensor.numel(), 1 << 16, [&](int64_t first, int64_t last) {
    if (holds_nonfinite_cpu(data + first * tensor.element_size(), last - first, dtype))
      found.store(true, std::memory_order_relaxed);
  });
  if (found) std::memset(tensor.mutable_data_ptr(), 0, tensor.nbytes());
  return found;
}

Tensor zero_nonfinite(at::TensorList tensors) {
  if (tensors.empty()) return at::zeros({0}, at::TensorOptions().dtype(at::kInt));
  const c10::DeviceGuard guard(tensors[0].device());
  for (const Tensor& tensor : tensors) check_listed(tensor, tensors[0], "tensors");
  const auto count = static_cast<int64_t>(tensors.size());
  Tensor flags = at::zeros({count}, tensors[0].options().dtype(at::kInt));
  auto* out = flags.mutable_data_ptr<int32_t>();
  for (size_t first = 0; first < tensors.size();) {
    size_t last = first + 1;
    while (last < tensors.size() && tensors[last].scalar_type() == tensors[first].scalar_type()) ++last;
    if (tensors[0].is_cuda()) {
      guard_cuda(tensors, first, last, out);
    } else {
      for (size_t i = first; i < last; ++i) out[i] = guard_cpu(tensors[i]) ? 1 : 0;
    }
    first = last;
  }
  for (const Tensor& tensor : tensors) mark_changed(tensor);
  return flags;
}

Tensor zero_nonfinite_meta(at::TensorList tensors) {
  const auto options = tensors.empty() ? at::TensorOptions() : tensors[0].options();
  return at::empty({static_cast<int64_t>(tensors.size())}, options.dtype(at::kInt));
}

// ------------------------------------------------------------------------------------------------------------ adamw

const float* scalar_data(const optional<Tensor>& scalar, const Tensor& first, const char* name) {
  if (!present(scalar)) return nullptr;
  check_device(*scalar, first, name);
  TORCH_CHECK(scalar->numel() == 1 && scalar->scalar_type() == at::kFloat, "megatron_ru: ", name, " is ",
              scalar->scalar_type(), " of sizes ", scalar->sizes(), ", expected one float32 number");
  return scalar->const_data_ptr<float>();
}

void adamw(at::TensorList parameters, at::TensorList gradients, at::TensorList first_moments,
           at::TensorList second_moments, at::TensorList copies, const Tensor& step, double lr,
           const optional<Tensor>& lr_on_device, double beta1, double beta2, double eps, double weight_decay,
           bool maximize, const optional<Tensor>& gradient_scale, const optional<Tensor>& found_inf) {
  if (parameters.empty()) return;
  const Tensor& first = parameters[0];
  const c10::DeviceGuard guard(first.device());
  const size_t count = parameters.size();
  TORCH_CHECK(gradients.size() == count && first_moments.size() == count && second_moments.size() == count &&
                  (copies.empty() || copies.size() == count),
              "megatron_ru: ", count, " parameters came with ", gradients.size(), " gradients, ", first_moments.size(),
              " and ", second_moments.size(), " moments and ", copies.size(), " copies, expected as many of each");
  TORCH_CHECK(wide_type(first) == first.scalar_type(), "megatron_ru: parameters are ", first.scalar_type(),
              ", expected float32 (float64 on a CPU)");
  std::vector<void*> p, m, v, copy;
  std::vector<const void*> g;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < count; ++i) {
    const auto check = [&](const Tensor& tensor, const Tensor& model, const char* name) {
      check_listed(tensor, first, name);
      TORCH_CHECK(tensor.scalar_type() == model.scalar_type() && tensor.numel() == parameters[i].numel(),
                  "megatron_ru: tensor ", i, " of ", name, " is ", tensor.scalar_type(), " of ", tensor.numel(),
                  " numbers, expected ", model.scalar_type(), " of ", parameters[i].numel());
    };
    check(parameters[i], first, "parameters");
    check(gradients[i], gradients[0], "gradients");
    check(first_moments[i], first, "first_moments");
    check(second_moments[i], first, "second_moments");
    if (parameters[i].numel() == 0) continue;
    p.push_back(parameters[i].mutable_data_ptr());
    g.push_back(gradients[i].const_data_ptr());
    m.push_back(first_moments[i].mutable_data_ptr());
    v.push_back(second_moments[i].mutable_data_ptr());
    sizes.push_back(parameters[i].numel());
    if (copies.empty()) continue;
    check(copies[i], copies[0], "copies");
    copy.push_back(copies[i].mutable_data_ptr());
  }
  AdamW call{};
  call.parameters = p.data();
  call.gradients = g.data();
  call.first_moments = m.data();
  call.second_moments = v.data();
  call.copies = copies.empty() ? nullptr : copy.data();
  call.sizes = sizes.data();
  call.count = static_cast<int64_t>(sizes.size());
  call.lr = lr;
  call.beta1 = beta1;
  call.beta2 = beta2;
  call.eps = eps;
  call.weight_decay = weight_decay;
  call.step = scalar_data(step, first, "step");
  call.lr_on_device = scalar_data(lr_on_device, first, "lr_on_device");
  call.gradient_scale = scalar_data(gradient_scale, first, "gradient_scale");
  call.found_inf = scalar_data(found_inf, first, "found_inf");
  call.maximize = maximize;
  call.dtype = dtype_of(first, "parameters");
  call.gradient_dtype = dtype_of(gradients[0], "gradients");
  call.copy_dtype = copies.empty() ? call.dtype : dtype_of(copies[0], "copies");
  if (first.is_cuda()) {
    MEGATRON_RU_LAUNCH(first, adamw_cuda, call);
  } else {
    for (int64_t i = 0; i < call.count; ++i)
      at::parallel_for(0, sizes[i], 1 << 14, [&](int64_t from, int64_t to) { adamw_cpu(call, i, from, to); });
  }
  for (const at::TensorList& changed : {parameters, first_moments, second_moments, copies})
    for (const Tensor& tensor : changed) mark_changed(tensor);
}

void adamw_meta(at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList, const Tensor&, double,
                const optional<Tensor>&, double, double, double, double, bool, const optional<Tensor>&,
                const optional<Tensor>&) {}

std::string build_info() {
#ifdef MEGATRON_RU_CUDA
  return "cuda " MEGATRON_RU_CUDA;
#else
  return "cpu";
#endif
}

}  // namespace

TORCH_LIBRARY(megatron_ru, m) {
  m.def("build_info() -> str", build_info);

  m.def("rms_norm(Tensor x, Tensor weight, float eps, bool zero_centered) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, bool zero_centered) -> (Tensor, Tensor)");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, bool zero_centered) -> Tensor");
  m.def("add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, bool zero_centered) "
        "-> (Tensor, Tensor)");
  m.def("norm_forward(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool layer_norm, "
        "bool zero_centered) -> Tensor[]");
  m.def("norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor? mean, Tensor inverse_deviation, "
        "bool has_bias, bool zero_centered) -> Tensor[]");

  m.def("rope(Tensor x, Tensor cos, Tensor sin, Tensor? positions, SymInt offset, bool interleaved, bool inverse) "
        "-> Tensor");
  m.def("rope_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, SymInt offset, bool interleaved, "
        "bool inverse) -> (Tensor, Tensor)");
  m.def("rope_qk_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor? positions, SymInt offset, "
        "bool interleaved, bool inverse) -> ()");
  m.def("rope_join(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor");
  m.def("packed_positions(Tensor cu_seqlens, SymInt total) -> Tensor");

  m.def("round_fp8(Tensor x, bool e5m2) -> (Tensor, Tensor, Tensor)");
  m.def("embedding_gradient_(Tensor(a!) kept, Tensor gradient, Tensor ids) -> ()");

  m.def("activation(Tensor x, Tensor? bias, int kind) -> Tensor");
  m.def("activation_saving(Tensor x, Tensor? bias, int kind) -> Tensor");
  m.def("activation_backward(Tensor dy, Tensor x, Tensor? bias, int kind) -> Tensor");
  m.def("activation_backward_(Tensor dy, Tensor(a!) x, Tensor? bias, int kind) -> ()");
  m.def("glu(Tensor gate, Tensor up, int kind) -> Tensor");
  m.def("glu_backward(Tensor dy, Tensor gate, Tensor up, int kind) -> (Tensor, Tensor)");

  m.def("cross_entropy(Tensor logits, Tensor target, Tensor? expected_gradient, int ignore_index, "
        "float label_smoothing, float z_loss, bool one_pass) -> Tensor");
  m.def("cross_entropy_one_pass(Tensor logits, Tensor target, Tensor? expected_gradient, int ignore_index, "
        "float label_smoothing, float z_loss) -> (Tensor, Tensor)");
  m.def("cross_entropy_mean(Tensor logits, Tensor target, Tensor? expected_gradient, int ignore_index, "
        "float label_smoothing, float z_loss) -> Tensor");
  m.def("cross_entropy_one_pass_mean(Tensor logits, Tensor target, Tensor? expected_gradient, int ignore_index, "
        "float label_smoothing, float z_loss) -> (Tensor, Tensor)");
  m.def("cross_entropy_gradient_(Tensor(a!) logits, Tensor target, Tensor? expected_gradient, int ignore_index, "
        "float label_smoothing, float z_loss) -> Tensor");
  m.def("cross_entropy_rescale_(Tensor(a!) gradient, Tensor loss_gradient, Tensor? expected_gradient) -> ()");
  m.def("cross_entropy_statistics(Tensor logits, Tensor target, SymInt first_column, bool smoothing) -> Tensor");
  m.def("cross_entropy_merge(Tensor statistics, Tensor target, SymInt vocab_total, int ignore_index, "
        "float label_smoothing, float z_loss) -> (Tensor, Tensor)");
  m.def("cross_entropy_backward(Tensor loss_gradient, Tensor logits, Tensor target, Tensor lse, SymInt first_column, "
        "SymInt vocab_total, int ignore_index, float label_smoothing, float z_loss) -> Tensor");
  m.def("cross_entropy_backward_(Tensor loss_gradient, Tensor(a!) logits, Tensor target, Tensor lse, "
        "SymInt first_column, SymInt vocab_total, int ignore_index, float label_smoothing, float z_loss) -> ()");

  m.def("zero_nonfinite_(Tensor(a!)[] tensors) -> Tensor");
  m.def("adamw_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] first_moments, "
        "Tensor(c!)[] second_moments, Tensor(d!)[] copies, Tensor step, float lr, Tensor? lr_on_device, float beta1, "
        "float beta2, float eps, float weight_decay, bool maximize, Tensor? gradient_scale, Tensor? found_inf) -> ()");
}

void implement_kernels(torch::Library& m) {
  m.impl("norm_forward", norm_forward);
  m.impl("norm_backward", norm_backward);
  m.impl("rope", rope);
  m.impl("rope_qk", rope_qk);
  m.impl("rope_qk_", rope_qk_in_place);
  m.impl("rope_join", rope_join);
  m.impl("packed_positions", packed_positions);
  m.impl("embedding_gradient_", embedding_gradient);
  m.impl("activation", activation_forward);
  m.impl("activation_saving", activation_forward);
  m.impl("activation_backward", activation_backward);
  m.impl("activation_backward_", activation_backward_in_place);
  m.impl("glu", glu_forward);
  m.impl("glu_backward", glu_backward);
  m.impl("cross_entropy_one_pass", cross_entropy_one_pass);
  m.impl("cross_entropy_one_pass_mean", cross_entropy_one_pass_mean);
  m.impl("cross_entropy_gradient_", cross_entropy_gradient_in_place);
  m.impl("cross_entropy_rescale_", cross_entropy_rescale);
  m.impl("cross_entropy_statistics", cross_entropy_statistics);
  m.impl("cross_entropy_merge", cross_entropy_merge);
  m.impl("cross_entropy_backward", cross_entropy_backward);
  m.impl("cross_entropy_backward_", cross_entropy_backward_in_place);
  m.impl("zero_nonfinite_", zero_nonfinite);
  m.impl("adamw_", adamw);
}

TORCH_LIBRARY_IMPL(megatron_ru, CPU, m) { implement_kernels(m); }
TORCH_LIBRARY_IMPL(megatron_ru, CUDA, m) {
  implement_kernels(m);
  // On a CPU there is no product of fp8 matrices to make ready for.
  m.impl("round_fp8", round_fp8);
}

TORCH_LIBRARY_IMPL(megatron_ru, Meta, m) {
  m.impl("norm_forward", norm_forward_meta);
  m.impl("norm_backward", norm_backward_meta);
  m.impl("rope", rope_meta);
  m.impl("rope_qk", rope_qk_meta);
  m.impl("rope_qk_", rope_qk_in_place_meta);
  m.impl("rope_join", rope_join_meta);
  m.impl("packed_positions", packed_positions_meta);
  m.impl("embedding_gradient_", embedding_gradient_meta);
  m.impl("round_fp8", round_fp8_meta);
  m.impl("activation", activation_meta);
  m.impl("activation_saving", activation_meta);
  m.impl("activation_backward", activation_backward_meta);
  m.impl("activation_backward_", activation_backward_in_place_meta);
  m.impl("glu", glu_meta);
  m.impl("glu_backward", glu_backward_meta);
  m.impl("cross_entropy_one_pass", cross_entropy_one_pass_meta);
  m.impl("cross_entropy_one_pass_mean", cross_entropy_one_pass_mean_meta);
  m.impl("cross_entropy_gradient_", cross_entropy_gradient_in_place_meta);
  m.impl("cross_entropy_rescale_", cross_entropy_rescale_meta);
  m.impl("cross_entropy_statistics", cross_entropy_statistics_meta);
  m.impl("cross_entropy_merge", cross_entropy_merge_meta);
  m.impl("cross_entropy_backward", cross_entropy_backward_meta);
  m.impl("cross_entropy_backward_", cross_entropy_backward_in_place_meta);
  m.impl("zero_nonfinite_", zero_nonfinite_meta);
  m.impl("adamw_", adamw_meta);
}

// The same functions where autograd has been left behind, and must not be entered again.
template <auto kFunction>
struct BelowAutograd;
template <typename Out, typename... In, Out (*kFunction)(In...)>
struct BelowAutograd<kFunction> {
  static Out call(In... in) {
    const at::NoGradGuard off;
    return kFunction(std::forward<In>(in)...);
  }
};

// These are made of the ops above wherever they run, so that one kernel serves every key below autograd.
TORCH_LIBRARY_IMPL(megatron_ru, CompositeExplicitAutograd, m) {
  m.impl("rms_norm", BelowAutograd<rms_norm>::call);
  m.impl("add_rms_norm", BelowAutograd<add_rms_norm>::call);
  m.impl("layer_norm", BelowAutograd<layer_norm>::call);
  m.impl("add_layer_norm", BelowAutograd<add_layer_norm>::call);
  m.impl("cross_entropy", cross_entropy_loss);
  m.impl("cross_entropy_mean", cross_entropy_mean_loss);
}

TORCH_LIBRARY_IMPL(megatron_ru, Autograd, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("add_rms_norm", add_rms_norm);
  m.impl("layer_norm", layer_norm);
  m.impl("add_layer_norm", add_layer_norm);
  m.impl("rope", rope_autograd);
  m.impl("rope_qk", rope_qk_autograd);
  m.impl("activation", activation_autograd<false>);
  m.impl("activation_saving", activation_autograd<true>);
  m.impl("glu", glu_autograd);
  m.impl("cross_entropy", cross_entropy_autograd);
  m.impl("cross_entropy_mean", cross_entropy_mean_autograd);
  // The rest has no gradient: asking for one is an error, not a silent zero.
  for (const char* name :
       {"norm_forward", "norm_backward", "rope_qk_", "rope_join", "embedding_gradient_", "round_fp8", "activation_backward", "activation_backward_", "glu_backward",
        "cross_entropy_one_pass", "cross_entropy_one_pass_mean", "cross_entropy_gradient_", "cross_entropy_rescale_", "cross_entropy_statistics",
        "cross_entropy_merge", "cross_entropy_backward", "cross_entropy_backward_", "zero_nonfinite_", "adamw_"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace megatron_ru
