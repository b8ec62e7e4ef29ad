"""Names as torch.profiler gave them on an H200."""

import pytest

from megatron_ru.plugin import kernel_causes as causes

AT = "void at::native::"
RU = "void megatron_ru::(anonymous namespace)::"


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", causes.GEMM),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize160x128x32", causes.GEMM),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128", causes.ATTENTION),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*)", causes.ATTENTION),
        (f"{AT}(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float, SoftMaxForwardEpilogue>",
         causes.ATTENTION),
        (f"{AT}(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float, LogSoftMaxForwardEpilogue>",
         causes.CROSS_ENTROPY),
        (f"{RU}adamw_kernel<float>(megatron_ru::(anonymous namespace)::Table)", causes.OPTIMIZER),
        (f"{AT}(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, "
         "FusedAdamMathFunctor<float, 4>>", causes.OPTIMIZER),
        (f"{RU}backward_kernel<__nv_bfloat16, 8>(megatron_ru::CrossEntropy, int)", causes.CROSS_ENTROPY),
        (f"{RU}rope_kernel<__nv_bfloat16, false>(megatron_ru::Rope, int, int, int)", causes.ROPE),
        (f"{RU}finish_kernel<__nv_bfloat16>(megatron_ru::NormBackward)", causes.NORM),
        ("triton_red_fused__fused_rms_norm_add_3", causes.NORM),
        (f"{RU}forward_kernel<__nv_bfloat16, (megatron_ru::Pointwise)3>(megatron_ru::ActivationForward, int)",
         causes.ACTIVATION),
        ("triton_poi_fused_mul_silu_4", causes.ACTIVATION),
        ("triton_poi_fused_add_0", causes.ELEMENTWISE),
        (f"{AT}vectorized_elementwise_kernel<8, {AT}CUDAFunctor_add<c10::BFloat16>>", causes.ELEMENTWISE),
        (f"{AT}unrolled_elementwise_kernel<at::native::CUDAFunctor_add<float>, std::array<char*, 3ul>>",
         causes.ACCUMULATION),
        (f"{AT}vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", causes.ACCUMULATION),
        (f"{AT}reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::NormTwoOps<float>>>", causes.CLIPPING),
        ("Memcpy DtoD (Device -> Device)", causes.COPIES),
        (f"{AT}vectorized_elementwise_kernel<8, at::native::bfloat16_copy_kernel_cuda>", causes.COPIES),
        (f"{AT}(anonymous namespace)::compute_grad_weight<c10::BFloat16, long>(long const*)", causes.EMBEDDING),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", causes.COMMUNICATION),
        # The guard against NaNs.
        (f"{RU}scan_kernel<float>(megatron_ru::(anonymous namespace)::Table)", causes.CLIPPING),
        (f"{RU}round_kernel<__nv_bfloat16>(megatron_ru::RoundFp8)", causes.COPIES),
        (f"{AT}(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<c10::BFloat16, float, 32u>", causes.NORM),
        ("something_unheard_of", causes.OTHER),
    ],
)  # fmt: skip
def test_causes(name, cause):
    assert causes.cause_of(name) == cause
    assert cause in causes.CAUSES


def test_the_update_uses_the_same_kernels_for_something_else():
    scaling = f"{AT}vectorized_elementwise_kernel<4, at::native::AUnaryFunctor<float, float, MulFunctor<float>>>"
    assert causes.cause_of(scaling) == causes.ELEMENTWISE
    assert causes.cause_of(scaling, in_update=True) == causes.CLIPPING
    assert causes.cause_of("Memcpy DtoD (Device -> Device)", in_update=True) == causes.COPIES
