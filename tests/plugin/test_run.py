"""Which seams a run has."""

from argparse import Namespace

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.heartbeat import create_beat_file
from megatron_ru.ops import backend
from megatron_ru.plugin.arguments import HOST_SPEC
from megatron_ru.plugin.exit_signals import stop_listening
from megatron_ru.plugin.heartbeats import close_heartbeat
from megatron_ru.plugin.rank_start import start_rank
from megatron_ru.plugin.run import install_run, run_seams, undo_run

ALWAYS = [
    "megatron.core.datasets.utils:compile_helpers",
    "megatron.training.initialize:_compile_dependencies",
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict",
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
    # Where the time of the start goes.
    "megatron.training.initialize:_initialize_distributed",
    "megatron.training.training:setup_model_and_optimizer",
    "megatron.training.training:load_checkpoint",
    "megatron.training.training:build_train_valid_test_data_iterators",
    "megatron.training.training:train_step",
    # How fast it trains.
    "megatron.training.training:train_step",
    "megatron.training.training:training_log",
    "megatron.training.training:print_rank_last",
    "megatron.training.training:evaluate_and_print_results",
    "megatron.training.training:save_checkpoint_and_time",
    # The host runs ahead of the device.
    "megatron.training.training:logical_and_across_model_parallel_group",
    "megatron.training.training:reduce_max_stat_across_model_parallel_group",
    "megatron.training.training:torch",
    "megatron.core.optimizer.optimizer:MixedPrecisionOptimizer.get_loss_scale",
    "megatron.core.optimizer.optimizer:FP32Optimizer.get_loss_scale",
    "megatron.core.optimizer.clip_grads:multi_tensor_scale_tensor_impl",
    # Gradients of weights go straight into the buffer.
    "megatron.core.tensor_parallel.layers:F",
    "megatron.core.tensor_parallel.layers:_grad_accum_fusion_available",
    "megatron.core.tensor_parallel.layers:fused_weight_gradient_mlp_cuda",
    "megatron.core.utils:fused_weight_gradient_mlp_cuda",
    # Nor are zeros written for them.
    "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer.reset",
    "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_grad_sync",
    "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel._make_backward_post_hook",
    # Nothing is compiled before it is used.
    "megatron.training.training:set_jit_fusion_options",
    # Without --async-save.
    "megatron.core.dist_checkpointing.strategies.filesystem_async:_get_write_results_queue",
    "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue",
]
ROPE = [
    "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_bshd",
    "megatron.core.models.common.embeddings.rope_utils:fused_apply_rotary_pos_emb",
]
ACTIVATION = [
    "megatron.core.transformer.mlp:bias_swiglu_impl",
    "megatron.core.transformer.mlp:bias_gelu_impl",
]
CROSS_ENTROPY = [
    "megatron.core.models.common.language_module.language_module:fused_vocab_parallel_cross_entropy",
    "megatron.core.tensor_parallel:vocab_parallel_cross_entropy",
]
ADAMW = [
    "megatron.core.optimizer:torch",
    "megatron.core.optimizer.optimizer:clip_grad_by_total_norm_fp32",
    "megatron.core.optimizer.clip_grads:l2_norm_impl",
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._copy_main_params_to_model_params",
    "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params._copy_main_params_to_model_params",
]
RESIDUAL = ["megatron.core.transformer.transformer_block:TransformerBlock._build_layers"]
OPS = ROPE + ACTIVATION + CROSS_ENTROPY + ADAMW
MODEL = [
    "megatron.core.transformer.transformer_block:LayerNormImpl",
    "megatron.core.models.gpt.gpt_model:GPTModel.__init__",
]
WHOLE = [
    "megatron.core.tensor_parallel.layers:_initialize_affine_weight_gpu",
    "megatron.core.tensor_parallel.layers:_initialize_affine_weight_cpu",
    # The model is built on meta then.
    "megatron.core.models.common.language_module.language_module:LanguageModule.setup_embeddings_and_output_layer",
]
METRICS = ["megatron.training.training:evaluate"]
HEARTBEATS = [
    "megatron.training.training:train",
    "megatron.training.training:training_log",
    "megatron.training.ft_integration:on_eval_step_end",
    "megatron.training.training:save_checkpoint",
]
EXIT_SIGNALS = ["megatron.training.global_vars:DistributedSignalHandler", "megatron.training.training:train"]


def arguments(**changes):
    settings = {
        "ru_variant": "llama2_tiny", "ru_metrics": None, "ru_validate_from_start": False, "ru_init": "whole",
        "ru_profile": None, "ru_profile_steps": None, "ru_attention": "fused",
        "ru_meta_init": "auto", "ru_ops": "all", "ru_nan_grads": None, "ru_nan_names": False, "ru_checkpoints": None,
        "ru_keep": None, "ru_keep_every": None, "save": None, "load": None, "async_save": False,
        "seed": 7, "spec": HOST_SPEC, "log_interval": 1, "num_experts": None,
        "gradient_accumulation_fusion": True, "ru_fp8": None, "ru_recompute": "off", "ru_memory_budget": None,
    }  # fmt: skip
    return Namespace(**settings | changes)


def targets(args):
    return [seam.target for seam in run_seams(args)]


def test_experts_are_drawn_by_megatron():
    # Their names in the whole model depend on the expert-parallel rank.
    assert sorted(targets(arguments(num_experts=4))) == sorted(ALWAYS + OPS + RESIDUAL + MODEL)


def test_a_run_with_our_spec():
    assert sorted(targets(arguments())) == sorted(ALWAYS + OPS + RESIDUAL + MODEL + WHOLE)


def test_drawing_left_to_megatron():
    assert sorted(targets(arguments(ru_init="megatron"))) == sorted(ALWAYS + OPS + RESIDUAL + MODEL)


def test_another_spec_is_left_alone():
    assert sorted(targets(arguments(spec=["somebody.else", "SPEC"]))) == sorted(ALWAYS + OPS)
    assert sorted(targets(arguments(spec=None, ru_variant=None))) == sorted(ALWAYS + OPS)


def test_metrics_and_validation_add_their_own(tmp_path):
    found = targets(arguments(ru_metrics=str(tmp_path / "metrics.jsonl")))
    assert set(METRICS) <= set(found) - set(ALWAYS + OPS + RESIDUAL + MODEL + WHOLE)
    plain, watched = targets(arguments()), targets(arguments(ru_validate_from_start=True))
    assert set(plain) < set(watched)


def test_nan_gradients_are_counted_before_the_metrics_are_written(tmp_path):
    args = arguments(
        ru_metrics=str(tmp_path / "metrics.jsonl"), ru_nan_grads="zero", check_for_nan_in_loss_and_grad=True
    )
    seams = run_seams(args)
    logs = [seam for seam in seams if seam.target == "megatron.training.training:training_log"]
    # The later one is around the earlier one.
    assert [type(seam.make.__self__).__name__ for seam in logs] == ["StepMetrics", "NanGradients", "Throughput"]
    assert args.check_for_nan_in_loss_and_grad is False
    assert "NanGradients" not in {type(getattr(s.make, "__self__", None)).__name__ for s in run_seams(arguments())}


def test_a_profile_is_around_every_other_part_of_a_step(tmp_path):
    seams = run_seams(arguments(ru_profile=str(tmp_path / "profile.json"), ru_profile_steps="3:4"))
    steps = [seam for seam in seams if seam.target == "megatron.training.training:train_step"]
    assert type(steps[-1].make.__self__).__name__ == "StepProfile"
    with pytest.raises(UserError, match="--ru-profile-steps has no meaning without --ru-profile"):
        run_seams(arguments(ru_profile_steps="3:4"))


def test_plain_attention_takes_the_place_of_the_fused_one():
    [seam] = [seam for seam in run_seams(arguments(ru_attention="plain")) if "core_attention" in seam.target]
    from megatron_ru.models import core_attention
    from megatron_ru.ops.plain_attention import plain_attention

    seam.install()
    try:
        assert core_attention.attention is plain_attention
    finally:
        seam.undo()
    assert core_attention.attention is not plain_attention


@pytest.mark.parametrize("flag", ["use_megatron_fsdp", "use_torch_fsdp2"])
def test_gradients_of_fsdp_are_not_guarded(flag):
    with pytest.raises(UserError, match="leave one of the two out"):
        run_seams(arguments(ru_nan_grads="zero", **{flag: True}))


def test_unknown_variant():
    with pytest.raises(UserError, match="unknown variant 'lama2_tiny'"):
        run_seams(arguments(ru_variant="lama2_tiny"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("none", []),
        ("rope", ROPE),
        ("cross_entropy, adamw", CROSS_ENTROPY + ADAMW),
        # The norms are called by our layer spec, no name of Megatron is replaced for them.
        ("layer_norm,activation", ACTIVATION),
        # The sum before a norm of ours is made with it.
        ("rms_norm", RESIDUAL),
        ("all", OPS + RESIDUAL),
    ],
)
def test_seams_of_the_chosen_ops(words, expected):
    with backend.only(words):
        assert sorted(targets(arguments())) == sorted(ALWAYS + MODEL + WHOLE + expected)


def test_a_run_chooses_its_ops_and_gives_the_choice_back():
    before = backend.selected()
    install_run(arguments(ru_ops="rms_norm,cross_entropy"))
    try:
        assert backend.selected() == ("cross_entropy", "rms_norm")
        install_run(arguments(ru_ops="none"))
        assert backend.selected() == ()
    finally:
        undo_run()
    assert backend.selected() == before


def test_unknown_op():
    before = backend.selected()
    with pytest.raises(UserError, match=r"--ru-ops names rmsnorm; expected all, none or some of .*rms_norm"):
        install_run(arguments(ru_ops="rope,rmsnorm"))
    undo_run()
    assert backend.selected() == before


def test_every_reason_is_told():
    for seam in run_seams(arguments(ru_metrics="x", ru_validate_from_start=True)):
        assert len(seam.reason) > 20, seam.target


def test_a_guarded_run_beats_and_listens(tmp_path, monkeypatch):
    plain = targets(arguments())
    create_beat_file(tmp_path / "rank0")
    monkeypatch.setenv("RU_HEARTBEAT", str(tmp_path / "rank0"))
    start_rank(listen=False)
    try:
        args = arguments(exit_signal_handler=False)
        assert sorted(targets(args)) == sorted(plain + HEARTBEATS + EXIT_SIGNALS)
        assert args.exit_signal_handler is True
    finally:
        stop_listening()
        close_heartbeat()


def test_a_run_that_listens_without_a_guard():
    plain = targets(arguments())
    start_rank(listen=True)
    try:
        assert sorted(targets(arguments(exit_signal_handler=False))) == sorted(plain + EXIT_SIGNALS)
    finally:
        stop_listening()


def test_a_fault_on_request(monkeypatch):
    plain = targets(arguments())
    monkeypatch.setenv("MEGATRON_RU_FAULT", "kill,rank=0,step=5")
    monkeypatch.setenv("RANK", "0")
    assert sorted(targets(arguments())) == sorted([*plain, "megatron.training.training:train_step"])
    monkeypatch.setenv("MEGATRON_RU_FAULT", "kill")
    with pytest.raises(UserError, match="is not a fault"):
        targets(arguments())


@pytest.mark.parametrize(("variant", "final"), [("llama2_tiny", "Norm"), ("gpt2_tiny", "IdentityOp")])
def test_installed_and_taken_back(variant, final):
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import transformer_block

    before = GPTModel.__init__, transformer_block.LayerNormImpl
    install_run(arguments(ru_variant=variant))
    try:
        assert transformer_block.LayerNormImpl.__name__ == final
        assert GPTModel.__init__ is not before[0]
        # A second run in this process stands in the place of the first, not upon it.
        install_run(arguments(ru_variant="llama2_tiny", ru_init="megatron"))
        assert transformer_block.LayerNormImpl.__name__ == "Norm"
    finally:
        undo_run()
    assert (GPTModel.__init__, transformer_block.LayerNormImpl) == before
    undo_run()
