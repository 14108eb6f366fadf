"""The command line: options, help and rendering; the work is done by `quantize.api`.

Only click is imported until a command runs, so that help answers at once. There is one module for each command.
No code stands here: importing `quantize.cli.list` makes `list` mean that module in this one.
"""

from quantize.cli.group import COMMANDS, main, root

__all__ = ["COMMANDS", "main", "root"]
