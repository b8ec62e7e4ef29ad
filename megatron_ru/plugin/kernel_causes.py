"""What a GPU kernel, or an operator of torch on a CPU, is there for, told by its name. No torch here."""

import re

GEMM = "GEMM"
ATTENTION = "attention"
NORM = "norm"
ACTIVATION = "activation"
ROPE = "rope"
CROSS_ENTROPY = "cross entropy"
EMBEDDING = "embedding"
COPIES = "copies and casts"
ACCUMULATION = "gradient accumulation and zeroing"
CLIPPING = "gradient norm and clipping"
OPTIMIZER = "optimizer"
COMMUNICATION = "communication"
ELEMENTWISE = "residual additions and other elementwise"
OTHER = "other"

CAUSES = (
    GEMM, ATTENTION, NORM, ACTIVATION, ROPE, CROSS_ENTROPY, EMBEDDING, ELEMENTWISE, COPIES, ACCUMULATION, CLIPPING,
    OPTIMIZER, COMMUNICATION, OTHER,
)  # fmt: skip

# The first pattern that is found in the name decides.
_ANYWHERE = tuple(
    (cause, re.compile(pattern, re.IGNORECASE))
    for cause, pattern in (
        (COMMUNICATION, r"nccl|c10d|all_?reduce|all_?gather|reduce_?scatter|gloo"),
        (OPTIMIZER, r"adam"),
        # Before attention, whose softmax is without a logarithm.
        (CROSS_ENTROPY, r"cross_?entropy|nll_loss|log_?softmax"),
        (ATTENTION, r"sdpa|flash|fmha|attention|attn|compute_dot_do_o|convert_dq|softmax"),
        (ROPE, r"rope|rotary|_(cos|sin)_|(?<![a-z])(cos|sin)(?![a-z])"),
        (NORM, r"rms_?norm|layer_?norm|Norm(Forward|Backward)|GammaBeta|mean_pow|pow_mean|rsqrt"),
        (ACTIVATION, r"Activation(Forward|Backward)|silu|swiglu|gelu|relu|sigmoid|glu"),
        (GEMM, r"gemm|nvjet|cutlass|cublas|splitK|wgrad|matmul|::(add)?mm\b|::bmm\b|::linear\b|scaled_mm|xmma"),
        (EMBEDDING, r"embedding|vectorized_gather|indexSelect|index_elementwise|compute_grad_weight|sum_and_scatter|"
                    r"krn_partial|radix_sort|unique_by_key|DeviceScan|segment_offset|index_put"),
        # With the guard against NaNs, which reads the gradients too.
        (CLIPPING, r"NormTwoOps|LpNorm|l2norm|norm_2|linalg_vector_norm|clip_grad|"
                   r"megatron_ru::.*scan_kernel<\w+>\(.*Table"),
    )
)  # fmt: skip

_COPY = re.compile(
    r"memcpy|copy_kernel|CatArray|direct_copy|aten::(copy_|clone|contiguous|cat|_to_copy)|_to_copy|transpose|permute|"
    r"clone|RoundFp8|largest_kernel|amax",
    re.IGNORECASE,
)
_ZERO = re.compile(r"FillFunctor|memset|zero_|fill_", re.IGNORECASE)
_FLOAT_ADD = re.compile(r"CUDAFunctor_add<float>|CUDAFunctorOnSelf_add<float>|BinaryFunctor<float.*add|aten::add_")
_ELEMENTWISE = re.compile(r"elementwise|triton_(poi|per|red)|aten::(add|mul|div|sub)|foreach|multi_tensor", re.I)


def cause_of(name: str, in_update: bool = False) -> str:
    """One of CAUSES for a kernel or operator; `in_update` when it ran behind forward and backward: clipping and
    optimizer, where the same elementwise kernels serve another purpose."""
    for cause, pattern in _ANYWHERE:
        if pattern.search(name):
            if in_update and cause in (NORM, CROSS_ENTROPY):
                return CLIPPING
            return cause
    if _COPY.search(name):
        return COPIES
    if in_update:
        return CLIPPING if _ELEMENTWISE.search(name) or "reduce" in name else OTHER
    if _ZERO.search(name) or _FLOAT_ADD.search(name):
        # Float in a model of half precision: the gradients that are summed up.
        return ACCUMULATION
    return ELEMENTWISE if _ELEMENTWISE.search(name) else OTHER
