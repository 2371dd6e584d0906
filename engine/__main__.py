"""`python -m pagefork` is the `pagefork` command."""

from pagefork.cli import main

if __name__ == "__main__":
    main()
