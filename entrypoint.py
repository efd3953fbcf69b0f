#!/usr/bin/env python3
"""Entry point of the container: `shoehorn serve` without an argument, otherwise the named subcommand."""

import sys

from shoehorn.cli import main

sys.exit(main(sys.argv[1:] or ["serve"]))
