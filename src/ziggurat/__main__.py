"""`python -m ziggurat`: the form of the command that `accelerate launch -m` and `torchrun -m` start."""

from ziggurat.cli import main

if __name__ == "__main__":
    main()
