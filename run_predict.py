"""`ita predict` from a clone of the repository."""

from ita_segmentation.cli.predict import main

if __name__ == "__main__":
    main()
