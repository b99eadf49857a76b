"""`python -m pgtemp` is the command `pgtemp`."""

from pgtemp.cli.main import main

if __name__ == "__main__":
    main()
