"""The rungs from plain PyTorch to all ops, each with one op more. Nothing here needs torch."""

_ALONE = ("--no-gradient-accumulation-fusion",)

# The flags of each rung. Up to the last, weight gradients are added up by an addition of their own, as in PyTorch.
RUNGS: dict[str, tuple[str, ...]] = {
    "PyTorch": ("--ru-attention", "plain", "--ru-ops", "none", *_ALONE),
    "+ flash attention": ("--ru-ops", "none", *_ALONE),
    "+ RoPE": ("--ru-ops", "rope", *_ALONE),
    "+ RMSNorm": ("--ru-ops", "rope,rms_norm", *_ALONE),
    "+ cross entropy": ("--ru-ops", "rope,rms_norm,cross_entropy", *_ALONE),
    "all": ("--ru-ops", "all"),
}
