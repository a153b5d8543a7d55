"""`python -m fastpeft`."""

from fastpeft.cli import main

main()
