"""`python -m adapters`: the command line."""

from adapters.cli import main

main()
