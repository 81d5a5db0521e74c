"""`python -m palmette` is the command `palmette`."""

from palmette.cli import main

if __name__ == "__main__":
    main()
