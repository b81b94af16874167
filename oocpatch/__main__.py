"""`python -m oocpatch` is the command `oocpatch`."""

from oocpatch.cli.main import main

if __name__ == "__main__":
    main()
