"""`python -m sparsekit` is the command `sparsekit`."""

from sparsekit.cli import main

if __name__ == "__main__":
    main()
