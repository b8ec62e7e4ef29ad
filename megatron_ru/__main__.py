"""`python -m megatron_ru` is the console script `megatron-ru`."""

import sys

from megatron_ru.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
