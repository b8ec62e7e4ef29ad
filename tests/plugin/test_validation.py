from argparse import Namespace
from itertools import islice

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.plugin.validation import Repeated, check_validation, validation_seams


def test_the_same_items_come_again_and_again():
    repeated = Repeated(range(10), 3)
    assert len(repeated) == 3
    assert list(islice(iter(repeated), 8)) == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("name", ["overlap_param_gather", "full_validation", "multiple_validation_sets"])
def test_what_does_not_go_together(name):
    check_validation(Namespace(**{name: False}))
    with pytest.raises(UserError) as raised:
        check_validation(Namespace(**{name: True}))
    flag = "--" + name.replace("_", "-")
    assert str(raised.value) == f"--ru-validate-from-start does not work together with {flag}; drop one of them"


def test_seams_fit_the_installed_megatron(cpu_device):
    seams = validation_seams()
    try:
        assert [seam.install() for seam in seams] == [True, True]
    finally:
        for seam in seams:
            seam.undo()


def test_only_validation_data_is_repeated_and_from_its_beginning(cpu_device, one_process, monkeypatch):
    import megatron.training
    from megatron.core.datasets.utils import Split

    from megatron_ru.plugin import validation

    args = Namespace(eval_iters=2, micro_batch_size=4, global_batch_size=8, eval_micro_batch_size=None)
    monkeypatch.setattr(megatron.training, "get_args", lambda: args)
    build = validation._with_fixed_validation(lambda dataset, consumed_samples: (dataset, consumed_samples))
    train = Namespace(split=Split.train)
    assert build(train, 96) == (train, 96)
    assert build(None, 96) == (None, 96)
    found = build(Namespace(index_split=Split.valid), 96)
    # Two iterations of two micro-batches.
    assert len(found) == 4
    assert found._items[1] == 0
