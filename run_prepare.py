"""`ita prepare` from a clone of the repository."""

from ita_segmentation.cli.prepare import main

if __name__ == "__main__":
    main()
