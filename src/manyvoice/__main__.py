"""``python -m manyvoice`` is the command ``manyvoice``."""

from manyvoice.cli import main

if __name__ == "__main__":
    main()
