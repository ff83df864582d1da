"""`python -m morse COMMAND` is the `morse` command."""

from morse.cli import main

if __name__ == "__main__":
    main()
