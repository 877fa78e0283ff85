"""What the commands of :mod:`mmrec.cli` do, one module each; every module has one function that the command calls."""
