"""`ita train-clip` from a clone of the repository."""

from ita_segmentation.cli.train_clip import main

if __name__ == "__main__":
    main()
