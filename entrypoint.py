#!/usr/bin/env python3
"""The container's entry point: `serve` without an argument, else the `shoehorn` subcommand that is named."""

import sys

from shoehorn.cli import main

sys.exit(main(sys.argv[1:] or ["serve"]))
