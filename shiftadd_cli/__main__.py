"""`python -m shiftadd_cli` runs `shiftadd`."""

from shiftadd_cli.cli import main

if __name__ == "__main__":
    main(prog_name="shiftadd")
