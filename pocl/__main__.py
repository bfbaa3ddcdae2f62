"""`python -m pocl` is the `pocl` command: launchers that start modules, such as `torchrun -m`, need it."""

from pocl.cli import main

if __name__ == "__main__":
    main()
