"""The spec that Megatron's --spec imports."""

import importlib
import sys
from argparse import Namespace

import pytest

from megatron_ru.models.positions import SelfAttentionWithPositions
from megatron_ru.plugin.arguments import HOST_SPEC


@pytest.mark.parametrize("variant", ["gpt2_pos_every_layer", None])
def test_it_is_the_spec_of_the_parsed_arguments(monkeypatch, cpu_device, variant):
    import megatron.training
    from megatron.core.transformer.spec_utils import ModuleSpec, import_module

    monkeypatch.setattr(megatron.training, "get_args", lambda: Namespace(ru_variant=variant, swiglu=True))
    monkeypatch.delitem(sys.modules, HOST_SPEC[0], raising=False)
    # Megatron looks into vars() of the module: a real attribute is needed.
    spec = import_module(HOST_SPEC)
    assert isinstance(spec, ModuleSpec)
    attention = spec.submodules.self_attention.module
    assert (attention is SelfAttentionWithPositions) is (variant is not None)
    assert importlib.import_module(HOST_SPEC[0]).LAYER_SPEC is spec
    sys.modules.pop(HOST_SPEC[0])
