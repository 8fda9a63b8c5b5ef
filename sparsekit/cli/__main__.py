"""`python -m sparsekit.cli`."""

from sparsekit.cli import main

main()
