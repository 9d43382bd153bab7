"""The command."""

from ..command.run import run_command
from . import main

run_command(main)
