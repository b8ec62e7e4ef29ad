"""What a user types: one module per subcommand, found by scanning this package.

A command module imports nothing heavy at the top and defines

    NAME      the word on the command line (default: the module's name)
    SUMMARY   one line for `megatron-ru --help`
    add_arguments(parser)   its argparse options
    run(arguments) -> int | None

or, when it hands its words to somebody else's parser,

    run_raw(words: list[str]) -> int | None
"""
