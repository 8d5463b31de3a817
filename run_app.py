"""`ita app` from a clone of the repository."""

from ita_segmentation.cli.app import main

if __name__ == "__main__":
    main()
