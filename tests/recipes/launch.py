"""What torchrun starts: the command, as an installed ``manyvoice`` would be."""

from manyvoice.cli import main

if __name__ == "__main__":
    main()
