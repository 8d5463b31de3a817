"""`ita export` from a clone of the repository."""

from ita_segmentation.cli.export import main

if __name__ == "__main__":
    main()
