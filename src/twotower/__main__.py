"""`python -m twotower` is the command `twotower`."""

from twotower.cli import main

main()
