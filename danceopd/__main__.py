"""`python -m danceopd`: the command line, for launchers that start modules (`torchrun -m danceopd distill ...`)."""

from danceopd.cli.main import main

if __name__ == "__main__":
    main()
