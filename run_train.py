"""`ita train` from a clone of the repository."""

from ita_segmentation.cli.train import main

if __name__ == "__main__":
    main()
