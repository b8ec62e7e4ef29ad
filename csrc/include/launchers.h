// What the bindings hand to a kernel: pointers, sizes and strides, without a word of torch.
//
// Every CUDA launcher returns nullptr, or a sentence about what went wrong. Every CPU kernel works on a range of rows
// (or elements), so that the bindings can spread it over torch's own threads. Sizes and strides are in elements.
#pragma once

#ifdef __CUDACC_RTC__
using int32_t = int;
using int64_t = long long;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#else
#include <cstdint>
#endif

namespace megatron_ru {

// Float64 exists on the CPU only, where gradients are checked against differences.
enum class Dtype : int { kFloat64 = 0, kFloat32 = 1, kFloat16 = 2, kBFloat16 = 3 };

// A CUDA stream, which only the .cu files look into.
using Stream = void*;

// Moments, statistics and losses are kept in fp32, or fp64 beside fp64 inputs: "wide" below.

// ---------------------------------------------------------------------------------------------------------- norms

// y = gain * (x - mean) / sqrt(var + eps) + bias, or gain * x / sqrt(mean(x^2) + eps); gain = weight (+ 1).
struct NormForward {
  const void* x;            // [rows, hidden], row stride x_stride
  const void* residual;     // null, or [rows, hidden], row stride residual_stride: added to x first
  const void* weight;       // [hidden] in weight_dtype
  const void* bias;         // null, or [hidden] in weight_dtype
  void* y;                  // [rows, hidden], contiguous
  void* sum;                // with a residual: x + residual, rounded to dtype, contiguous; it is what gets normed
  void* mean;               // [rows] wide; null for RMSNorm
  void* inverse_deviation;  // [rows] wide: 1 / sqrt(... + eps)
  int64_t rows, hidden, x_stride, residual_stride;
  double eps;
  bool layer_norm, zero_centered;
  Dtype dtype, weight_dtype;  // weight_dtype is dtype or fp32
};

struct NormBackward {
  const void* dy;    // [rows, hidden], row stride dy_stride
  const void* dsum;  // null, or the gradient of the sum, row stride dsum_stride: added to dx
  const void* x;     // what was normed, row stride x_stride
  const void* weight;
  const void* mean;               // null for RMSNorm
  const void* inverse_deviation;  // [rows] wide
  void* dx;                       // [rows, hidden], contiguous
  void* dweight;                  // [hidden] in weight_dtype
  void* dbias;                    // null, or [hidden] in weight_dtype
  void* partial;                  // workspace, wide: [partial_rows, 1 or 2, hidden]
  int64_t partial_rows;
  int64_t rows, hidden, dy_stride, dsum_stride, x_stride;
  bool layer_norm, zero_centered;
  Dtype dtype, weight_dtype;
};

const char* norm_forward_cuda(const NormForward& call, Stream stream);
// How many rows of partial sums the backward of this shape wants on the current device.
int64_t norm_backward_partial_rows_cuda(int64_t rows, int64_t hidden, Dtype dtype, bool layer_norm);
const char* norm_backward_cuda(const NormBackward& call, Stream stream);

void norm_forward_cpu(const NormForward& call, int64_t first_row, int64_t last_row);
// Adds the rows' share of dweight and dbias to row `partial_row` of `partial`, which the caller has zeroed; the bindings
// sum the partial rows in order.
void norm_backward_cpu(const NormBackward& call, int64_t partial_row, int64_t first_row, int64_t last_row);

// ----------------------------------------------------------------------------------------------------------- rope

// Turns pairs of channels by an angle: (a, b) -> (a cos - b sin, b cos + a sin), sin negated when `inverse`. A pair is
// (i, i + rotary/2), or (2i, 2i + 1) when interleaved. Channels from rotary on are copied. One launch for q and k.
struct Rope {
  const void* in[2];  // q and k (null when there is none): [sequence, batch, heads, head_dim], last stride 1
  void* out[2];       // the same shapes; may be `in`
  int64_t heads[2];
  int64_t in_stride[2][3], out_stride[2][3];  // of sequence, batch, head
  int64_t sequence, batch, head_dim, rotary;
  const void* cos;  // [table_rows, rotary / 2] wide, contiguous
  const void* sin;
  int64_t table_rows;
  const int64_t* positions;  // null: token s stands at offset + s; else at offset + positions[s * stride + b * stride]
  int64_t positions_stride[2];
  int64_t offset;  // a position outside the table gives NaN
  bool interleaved, inverse;
  Dtype dtype;
};

const char* rope_cuda(const Rope& call, Stream stream);
void rope_cpu(const Rope& call, int64_t first_token, int64_t last_token);  // tokens are sequence * batch, b fastest

// positions[t] = t - cu_seqlens[i] for the sequence i that holds t; tokens after the last sequence count on from it.
struct PackedPositions {
  const void* cu_seqlens;  // [sequences + 1], int32 or int64
  bool is_int32;
  int64_t sequences, total;
  int64_t* positions;  // [total]
};

const char* packed_positions_cuda(const PackedPositions& call, Stream stream);
void packed_positions_cpu(const PackedPositions& call);

// ------------------------------------------------------------------------------------------------------ embedding

// kept[ids[i], :] += gradient[order[i], :] for each i, ids ascending; an id outside the rows of kept is left out.
struct EmbeddingGradient {
  const void* gradient;  // [tokens, hidden], contiguous
  const int64_t* ids;    // [tokens], ascending
  const int64_t* order;  // [tokens]: which row of gradient belongs to the id
  float* kept;           // [rows, hidden], contiguous
  int64_t tokens, rows, hidden;
  bool vectors;  // whether every row of gradient may be read in 16 bytes
  Dtype dtype;
};

const char* embedding_gradient_cuda(const EmbeddingGradient& call, Stream stream);

// -------------------------------------------------------------------------------------------------------------- fp8

// out[r, c] = in[r, c] / inverse_scale, rounded to fp8, and turned[c, r] the same; the scale takes the largest magnitude
// to the largest number of the format. A NaN or an infinity in `in` makes everything NaN.
struct RoundFp8 {
  const void* in;  // [rows, columns], contiguous, both multiples of 16
  void* out;       // [rows, columns]
  void* turned;    // [columns, rows]
  uint32_t* largest;  // one word of scratch
  float* inverse_scale;
  int64_t rows, columns;
  bool e5m2;  // else e4m3
  Dtype dtype;
};

const char* round_fp8_cuda(const RoundFp8& call, Stream stream);

// ---------------------------------------------------------------------------------------------------- activations

enum class Pointwise : int { kRelu = 0, kGelu = 1, kGeluTanh = 2, kSwish = 3 };

// out = f(gate + gate_bias), times (up + up_bias) when there is an up.
struct ActivationForward {
  const void* gate;  // [rows, columns], row stride gate_stride
  const void* up;    // null, or [rows, columns], row stride up_stride
  const void* gate_bias;
  const void* up_bias;  // null, or [columns] in dtype
  void* out;            // [rows, columns], row stride out_stride
  int64_t rows, columns, gate_stride, up_stride, out_stride;
  Pointwise function;
  Dtype dtype;
};

struct ActivationBackward {
  const void* dy;  // [rows, columns], row stride dy_stride
  const void* gate;
  const void* up;
  const void* gate_bias;
  const void* up_bias;
  void* dgate;  // may be `gate`
  void* dup;    // may be `up`; null without an up
  int64_t rows, columns, dy_stride, gate_stride, up_stride, dgate_stride, dup_stride;
  Pointwise function;
  Dtype dtype;
};

const char* activation_forward_cuda(const ActivationForward& call, Stream stream);
const char* activation_backward_cuda(const ActivationBackward& call, Stream stream);
void activation_forward_cpu(const ActivationForward& call, int64_t first_row, int64_t last_row);
void activation_backward_cpu(const ActivationBackward& call, int64_t first_row, int64_t last_row);

// -------------------------------------------------------------------------------------------------- cross entropy

// With p = softmax(x) over all vocab_total columns, e = label_smoothing, z = z_loss, lse = log sum exp x:
//   loss     = (1 - e) (lse - x[target]) + e (lse - mean(x)) + z lse^2          0 where target == ignore_index
//   gradient = (1 + 2 z lse) p - (1 - e) [column == target] - e / vocab_total   0 where target == ignore_index
// A target outside [0, vocab_total) that is not ignore_index gives NaN in loss and gradient.
struct CrossEntropy {
  const void* logits;  // [rows, columns] in dtype, row stride logits_stride
  int64_t rows, columns, logits_stride;
  const int64_t* target;  // [rows], ids over the whole vocabulary
  int64_t first_column;   // the id of column 0 here
  int64_t vocab_total;
  int64_t ignore_index;
  double label_smoothing, z_loss;
  Dtype dtype;

  // Statistics of the columns held here, [rows, 4] wide: max, sum exp(x - max), x[target] or 0 where it is elsewhere,
  // sum of x (0 unless label_smoothing > 0). `parts` blocks of them, rank after rank, go into the merge.
  void* statistics;
  int64_t parts;

  void* loss;  // [rows] wide
  void* lse;   // [rows] wide

  // gradient = loss_gradient[row * loss_gradient_stride] * d loss / d logits, in dtype; may be `logits`. A null
  // loss_gradient stands for ones.
  void* gradient;
  int64_t gradient_stride;
  const void* loss_gradient;  // wide
  int64_t loss_gradient_stride;
  // Rescaling: what the gradient was multiplied with when it was written; null stands for ones.
  const void* expected;
  int64_t expected_stride;

  // The mean over the rows that count: share is a scalar, 1 / their number, and mean = share * sum of loss.
  void* share;  // wide
  void* mean;   // wide
};

const char* cross_entropy_statistics_cuda(const CrossEntropy& call, Stream stream);  // logits -> statistics
const char* cross_entropy_merge_cuda(const CrossEntropy& call, Stream stream);       // statistics -> loss, lse
const char* cross_entropy_backward_cuda(const CrossEntropy& call, Stream stream);    // logits, lse -> gradient
const char* cross_entropy_one_pass_cuda(const CrossEntropy& call, Stream stream);    // logits -> loss, gradient (lse: null)
// gradient *= loss_gradient / expected, row by row; a row whose two factors are equal is not touched.
const char* cross_entropy_rescale_cuda(const CrossEntropy& call, Stream stream);
const char* cross_entropy_share_cuda(const CrossEntropy& call, Stream stream);  // target -> share
const char* cross_entropy_mean_cuda(const CrossEntropy& call, Stream stream);   // loss, share -> mean

void cross_entropy_statistics_cpu(const CrossEntropy& call, int64_t first_row, int64_t last_row);
void cross_entropy_merge_cpu(const CrossEntropy& call, int64_t first_row, int64_t last_row);
void cross_entropy_backward_cpu(const CrossEntropy& call, int64_t first_row, int64_t last_row);
void cross_entropy_one_pass_cpu(const CrossEntropy& call, int64_t first_row, int64_t last_row);
void cross_entropy_rescale_cpu(const CrossEntropy& call, int64_t first_row, int64_t last_row);

// ------------------------------------------------------------------------------------------------- gradient guard

// flags[i] = 1 and tensor i becomes zeros where it holds a NaN or an infinity, else 0 and it is left alone.
struct GradientGuard {
  void* const* tensors;  // host array of `count` pointers, each contiguous
  const int64_t* sizes;  // host array
  int64_t count;
  int32_t* flags;  // [count], zeroed by the caller
  Dtype dtype;
};

const char* gradient_guard_cuda(const GradientGuard& call, Stream stream);
// Whether `size` elements hold a NaN or an infinity.
bool holds_nonfinite_cpu(const void* tensor, int64_t size, Dtype dtype);

// ---------------------------------------------------------------------------------------------------------- adamw

// Decoupled weight decay (Loshchilov and Hutter, 2019, algorithm 2) in fp32 (fp64 beside fp64 parameters):
//   g = gradient / gradient_scale (negated when maximize);  p -= lr weight_decay p
//   m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
struct AdamW {
  void* const* parameters;          // host arrays of `count` device pointers, each contiguous, wide
  const void* const* gradients;     // in gradient_dtype
  void* const* first_moments;       // wide
  void* const* second_moments;      // wide
  void* const* copies;              // null, or rounded copies of the new parameters in copy_dtype
  const int64_t* sizes;
  int64_t count;
  double lr, beta1, beta2, eps, weight_decay;
  const float* step;             // device scalar: the number t of this step, from 1
  const float* lr_on_device;     // null, or a device scalar that replaces lr
  const float* gradient_scale;   // null, or a device scalar
  const float* found_inf;        // null, or a device scalar: nothing is changed where it is not 0
  bool maximize;
  Dtype dtype, gradient_dtype, copy_dtype;
};

const char* adamw_cuda(const AdamW& call, Stream stream);
void adamw_cpu(const AdamW& call, int64_t tensor, int64_t first, int64_t last);

}  // namespace megatron_ru
