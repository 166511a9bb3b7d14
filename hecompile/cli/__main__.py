"""Run the command line as `python -m hecompile.cli`."""

from hecompile.cli.main import main

main()
