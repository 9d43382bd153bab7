"""How a command runs and ends: ranks, checkpoints, files, pictures, exit codes."""
