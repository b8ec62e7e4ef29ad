"""`python -m megatron_ru.pretrain_gpt` is `megatron-ru pretrain_gpt`."""

import sys

if __name__ == "__main__":
    from megatron_ru.engines.megatron_core import main

    sys.exit(main())
