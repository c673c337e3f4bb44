"""``python -m contextlm``: the same as the `contextlm` command."""

from contextlm.cli import main

if __name__ == "__main__":
    main()
