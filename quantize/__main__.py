"""Lets `python -m quantize` stand for the command `quantize`."""

from quantize.cli import main

if __name__ == "__main__":
    main()
