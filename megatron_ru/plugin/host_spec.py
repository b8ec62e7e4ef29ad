"""The layer spec of the run at hand, under a name that Megatron's `--spec` can import.

Megatron reads the attribute of a module (`vars(module)[name]`), so the spec is made when this module is imported;
by then the arguments are parsed.
"""

from megatron.training import get_args

from megatron_ru.models.layer_spec import layer_spec
from megatron_ru.models.variant import find_variant

_arguments = get_args()
_variant = getattr(_arguments, "ru_variant", None)

LAYER_SPEC = layer_spec(_arguments, find_variant(_variant) if _variant else None)
