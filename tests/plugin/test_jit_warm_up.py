import pytest

from megatron_ru.plugin.jit_warm_up import jit_warm_up_seams


def test_nothing_is_compiled_before_it_is_used(monkeypatch):
    training = pytest.importorskip("megatron.training.training")
    called = []
    monkeypatch.setattr(training, "set_jit_fusion_options", lambda **keywords: called.append(keywords))
    (seam,) = jit_warm_up_seams()
    seam.install()
    training.set_jit_fusion_options(tp_size=2)
    assert called == []
    seam.undo()
    training.set_jit_fusion_options(tp_size=2)
    assert called == [{"tp_size": 2}]
