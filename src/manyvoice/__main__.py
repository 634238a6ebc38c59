"""``python -m manyvoice``, which torchrun wants."""

from manyvoice.cli import main

if __name__ == "__main__":
    main()
