"""`ita convert` from a clone of the repository."""

from ita_segmentation.cli.convert import main

if __name__ == "__main__":
    main()
