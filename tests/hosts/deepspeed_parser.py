"""A parser with the flags of Megatron-DeepSpeed that matter to us, spelled and stored as it spells and stores them."""

from argparse import ArgumentParser


def host_parser() -> ArgumentParser:
    """What the host has built when it asks the script for more flags."""
    parser = ArgumentParser(allow_abbrev=False)
    for flag in (
        "num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-key-value-heads", "kv-channels",
        "max-position-embeddings", "seq-length", "vocab-size", "micro-batch-size", "global-batch-size", "train-iters",
        "eval-interval", "eval-iters", "num-layers-per-virtual-pipeline-stage", "save-interval",
    ):  # fmt: skip
        parser.add_argument(f"--{flag}", type=int, default=None)
    for flag, value in {
        "tensor-model-parallel-size": 1, "pipeline-model-parallel-size": 1, "ds-sequence-parallel-size": 1,
        "make-vocab-size-divisible-by": 128, "num-workers": 2, "log-interval": 100, "seed": 1234, "zero-stage": 1,
    }.items():  # fmt: skip
        parser.add_argument(f"--{flag}", type=int, default=value)
    for flag, kind in {
        "lr": None, "min-lr": 0.0, "weight-decay": 0.01, "clip-grad": 1.0, "adam-beta1": 0.9, "adam-beta2": 0.999,
        "adam-eps": 1e-8, "attention-dropout": 0.1, "hidden-dropout": 0.1, "layernorm-epsilon": 1e-5,
        "rotary-percent": 1.0,
    }.items():  # fmt: skip
        parser.add_argument(f"--{flag}", type=float, default=kind)
    for flag in (
        "use-rotary-position-embeddings", "untie-embeddings-and-output-weights", "swiglu", "squared-relu",
        "openai-gelu", "apply-layernorm-1p", "apply-residual-connection-post-layernorm", "no-pipeline-parallel",
        "sequence-parallel", "force-ds-sequence-parallel", "fp16", "bf16", "use-flash-attn-v2", "kd", "mos",
        "exit-signal-handler", "checkpoint-activations",
    ):  # fmt: skip
        parser.add_argument(f"--{flag}", action="store_true")
    for flag, dest in {
        "no-position-embedding": "add_position_embedding", "disable-bias-linear": "add_bias_linear",
        "no-bias-gelu-fusion": "bias_gelu_fusion", "no-masked-softmax-fusion": "masked_softmax_fusion",
        "no-gradient-accumulation-fusion": "gradient_accumulation_fusion",
    }.items():  # fmt: skip
        parser.add_argument(f"--{flag}", action="store_false", dest=dest)
    parser.add_argument("--rotary-position-embeddings-theta", type=int, default=10000, dest="rope_theta")
    parser.add_argument("--normalization", default="layernorm", choices=["layernorm", "rmsnorm"])
    parser.add_argument("--num-experts", type=int, nargs="+", default=[1])
    parser.add_argument("--distributed-backend", default="nccl", choices=["nccl", "gloo", "ccl", "hccl"])
    parser.add_argument("--lr-decay-style", default="linear")
    parser.add_argument("--split", default="969, 30, 1")
    parser.add_argument("--onnx-safe", type=bool)
    for flag in ("tokenizer-type", "tokenizer-model", "save", "load"):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--data-path", nargs="*")
    # DeepSpeed's own, which the host adds behind ours.
    parser.add_argument("--deepspeed", action="store_true")
    parser.add_argument("--deepspeed_config")
    return parser
