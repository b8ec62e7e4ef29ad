"""The layer spec with fp8 linears."""

import dataclasses

import pytest
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_ru.models import layer_spec as module
from megatron_ru.models.fp8_linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear


@dataclasses.dataclass
class Submodules:
    linear_fc1: type = ColumnParallelLinear
    linear_fc2: type = RowParallelLinear
    other: str = "left"


def test_linears_among_the_fields_are_exchanged():
    made = Submodules()
    module._exchange_linears(made, module.SpecProvider().fp8_linears())
    assert (made.linear_fc1, made.linear_fc2, made.other) == (Fp8ColumnParallelLinear, Fp8RowParallelLinear, "left")


@pytest.mark.parametrize("wanted", [None, "tensorwise"])
def test_a_layer_of_megatron(wanted):
    from types import SimpleNamespace

    options = SimpleNamespace(ru_fp8=wanted, swiglu=True)
    layer = module.layer_spec(options, None).submodules
    linears = {layer.self_attention.submodules.linear_qkv, layer.self_attention.submodules.linear_proj}
    mlp = module._submodules_of(layer.mlp)
    linears |= {mlp.linear_fc1, mlp.linear_fc2}
    assert linears == (
        {Fp8ColumnParallelLinear, Fp8RowParallelLinear} if wanted else {ColumnParallelLinear, RowParallelLinear}
    )
