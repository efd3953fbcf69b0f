"""Subcommands of `shoehorn`: each module has `add_arguments(parser)` and `run(arguments, environment) -> int`."""
