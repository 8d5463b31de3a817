"""`ita eval` from a clone of the repository."""

from ita_segmentation.cli.eval import main

if __name__ == "__main__":
    main()
