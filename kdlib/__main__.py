"""`python -m kdlib`: the command line, for torchrun and wherever `kd` is not on the path."""

from kdlib.workbench.cli import main

if __name__ == "__main__":
    main()
